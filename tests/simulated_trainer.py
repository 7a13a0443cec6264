"""The trainers of `simulation.py`: what they publish through the writer of a rank, and what happened to it."""

import math
import struct
from functools import partial
from pathlib import Path
from random import Random
from zlib import crc32

from simulated_machine import JOURNAL, NUMBER_FRACTION, ROOT, Process

from evsys_bus import (
    ArmResult,
    Envelope,
    Eval,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.errors import JournalOpenError
from evsys_bus.journal import JournalWriter


class PublishedEvent:
    """One event, and what happened to it."""

    __slots__ = (
        "acknowledged",
        "before_start",
        "frame",
        "kind",
        "lost",
        "name",
        "number",
        "rank",
        "run",
        "safe",
        "seen",
        "step",
        "stream",
    )

    def __init__(self, number, rank, run, kind, step, name):
        self.number, self.rank, self.run, self.kind, self.step, self.name = number, rank, run, kind, step, name
        self.stream, self.frame = "", b"?"
        """Its stream and its frame, by docs/journal-format.md; a start that is repeated later is another frame."""
        self.before_start = False
        """Whether it is a step before the one at which its run was last started or resumed."""
        self.acknowledged = False
        """Whether publish has returned and nothing waits in memory."""
        self.safe = False
        """Whether it is acknowledged and survives a power cut."""
        self.seen = False
        """Whether it was ever found in the journal."""
        self.lost = False
        """Whether a power cut removed it from the journal."""

    def __repr__(self):
        return f"{self.number}: {self.kind} {self.run} rank {self.rank} step {self.step} {self.name or ''}".strip()


class Trainer:
    """The program of one rank, through all its lives."""

    def __init__(self, simulation, rank):
        self.simulation, self.rank = simulation, rank
        self.rng = Random(f"{simulation.seed} trainer {rank}")
        self.writer = self.process = None
        self.run_count = 0
        self.next_steps = {}
        """The next step of each run that has not ended."""
        self.first_steps = {}
        """The step at which each run was last started or resumed."""
        self.states = {}
        """The states of the runs that were started or resumed in this life."""
        self.uncertain_until = 0
        """Events published before this index may be missing on the disk although they were synced."""
        self.unacknowledged = []
        """Events that were published and may still wait for the disk."""

    def open(self):
        simulation, rng = self.simulation, self.rng
        max_calls = rng.choice((None, None, None, rng.randint(1, 600)))
        self.process = Process(simulation.machine, rng, max_calls=max_calls)
        if rng.random() < 0.1:
            self.process.interrupt_at = rng.randint(1, 300)
        self.flush_always = rng.random() < 0.4
        self.writer = JournalWriter(
            JOURNAL,
            rank=self.rank,
            flush="always" if self.flush_always else "interval",
            flush_seconds=math.inf,
            segment_bytes=simulation.segment_bytes,
            retain=simulation.retain,
            reserve_bytes=rng.choice((0, 4096)),
            disk=self.process,
            clock=simulation.machine.clock,
        )
        self.states = {}
        try:
            self.writer.open()
        except JournalOpenError:
            self.process.kill()
            self.writer = None
        except KeyboardInterrupt:
            self.kill()

    def publish(self, count):
        """Publish steps, late steps, several rows of one step, evals, and ends of runs."""
        rng = self.rng
        run = self._choose_run()
        for _ in range(count):
            state, step = self.states[run], self.next_steps[run]
            draw = rng.random()
            if draw < 0.08:
                name = rng.choice(("val", "math"))
                self._append("eval", run, step, name, partial(_make_eval, state, step, name))
                continue
            offset = 0 if draw < 0.85 else -rng.randint(1, 4)
            step_idx = max(0, step + offset)
            metrics = {"more": 1.0} if rng.random() < 0.03 else {}
            self._append("step", run, step_idx, None, partial(_make_step, state, step_idx, metrics))
            if offset == 0 and rng.random() < 0.9:  # else another row of the same step
                self.next_steps[run] = step + 1
        if rng.random() < 0.08:
            self._append("end", run, None, None, lambda _: TrainEnd(state, LoopArtifacts()))
            ended = RunEnd(state.ctx, RunResult(), ArmResult("arm"))
            self._append("end", run, None, None, lambda _: ended, essential=True)
            del self.next_steps[run], self.states[run]

    def flush(self):
        self.simulation.update_recorded()  # before anything is pruned
        published_before, failures = len(self.simulation.published), self.writer.failures
        self.writer.flush()
        self.simulation.note_pruned()
        self._mark_safe(published_before, failures)

    def close(self):
        self.simulation.update_recorded()
        published_before, failures = len(self.simulation.published), self.writer.failures
        closed = self.writer.close()
        self.simulation.note_pruned()
        if closed:
            self._mark_acknowledged()
            self._mark_safe(published_before, failures)
        self.kill()

    def kill(self):
        if self.writer is not None:
            self.process.kill()
            self.writer.abandon(10)
            self.writer = None
            self.unacknowledged = []

    def _choose_run(self):
        """Choose a run to publish for, and start or resume it if needed."""
        rng = self.rng
        if not self.next_steps or (len(self.next_steps) < 3 and rng.random() < 0.05):
            self.run_count += 1
            run = f"run{self.rank}-{self.run_count}"
            self.next_steps[run] = 0
        else:
            run = rng.choice(sorted(self.next_steps))
        if run not in self.states:
            next_step = self.next_steps[run]
            first = max(0, next_step - rng.choice((0, 0, 1, 3, 10, next_step)))
            self.next_steps[run] = self.first_steps[run] = first
            ctx = LogContext(output_dir=Path(ROOT)).for_run(run)
            state = LoopState(step=first, num_steps=99_999, output_dir=Path(ROOT, run), ctx=ctx)
            self._append("run", run, None, None, lambda _: RunStart(ctx), essential=True)
            self._append("start", run, first, None, lambda _: TrainStart(state), essential=True)
            self.states[run] = state
        return run

    def _append(self, kind, run, step, name, event, *, essential=False):
        simulation, writer = self.simulation, self.writer
        record = PublishedEvent(len(simulation.published), self.rank, run, kind, step, name)
        record.before_start = kind == "step" and step < self.first_steps[run]
        simulation.published.append(record)
        envelope = Envelope(
            writer.stream,
            writer.next_sequence,
            simulation.machine.clock.wall(),
            event(record.number + NUMBER_FRACTION),
            run,
            self.rank,
        )
        payload = encode(envelope)
        body = struct.pack("<2sHIQ", b"EJ", 0, len(payload), writer.next_sequence) + payload
        record.stream, record.frame = writer.stream, struct.pack("<I", crc32(body)) + body
        writer.append(payload, essential=essential)
        self.unacknowledged.append(record)
        self._mark_acknowledged()

    def _mark_acknowledged(self):
        if not self.writer.unrecorded and not self.writer.lost:
            for each in self.unacknowledged:
                each.acknowledged = True
                each.safe = self.flush_always
            self.unacknowledged = []

    def _mark_safe(self, published_before, failures):
        """Mark synced events as safe; events that the disk refused to sync stay in doubt."""
        if self.writer.failures != failures:
            self.uncertain_until = published_before
        else:
            self.simulation.update_recorded()
            for each in self.simulation.published[self.uncertain_until :]:
                if (
                    each.acknowledged
                    and not each.lost
                    and each.stream == self.writer.stream
                    and each.number in self.simulation.recorded
                ):
                    each.safe = True


def _make_eval(state, step, name, number):
    return Eval(state, step, name, {"number": number})


def _make_step(state, step, metrics, number):
    return StepEnd(state, step, TrainingBatch(), metrics | {"number": number})
