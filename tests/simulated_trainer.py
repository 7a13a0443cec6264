"""The trainers of `simulation.py`: what they publish through the writer of a rank, and what happened to it."""

import math
import struct
from functools import partial
from pathlib import Path
from random import Random
from zlib import crc32

from simulated_machine import JOURNAL, ROOT, THIRD, Process

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


class Published:
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
        self.chance = Random(f"{simulation.seed} trainer {rank}")
        self.writer = self.process = None
        self.begun = 0
        self.steps = {}
        """The next step of each run that has not ended."""
        self.firsts = {}
        """The step at which each run was last started or resumed."""
        self.states = {}
        """The states of the runs that were started or resumed in this life."""
        self.in_doubt = 0
        """Events published before this index may be missing on the disk although they were synced."""
        self.waiting = []
        """Events that were published and may still wait for the disk."""

    def open(self):
        simulation, chance = self.simulation, self.chance
        lives = chance.choice((None, None, None, chance.randint(1, 600)))
        self.process = Process(simulation.machine, chance, lives=lives)
        if chance.random() < 0.1:
            self.process.interrupt_at = chance.randint(1, 300)
        self.flush_always = chance.random() < 0.4
        self.writer = JournalWriter(
            JOURNAL,
            rank=self.rank,
            flush="always" if self.flush_always else "interval",
            flush_seconds=math.inf,
            segment_bytes=simulation.segment_bytes,
            retain=simulation.retain,
            reserve_bytes=chance.choice((0, 4096)),
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
        chance = self.chance
        run = self._choose()
        for _ in range(count):
            state, step = self.states[run], self.steps[run]
            what = chance.random()
            if what < 0.08:
                name = chance.choice(("val", "math"))
                self._append("eval", run, step, name, partial(_eval, state, step, name))
                continue
            late = 0 if what < 0.85 else -chance.randint(1, 4)
            at = max(0, step + late)
            metrics = {"more": 1.0} if chance.random() < 0.03 else {}
            self._append("step", run, at, None, partial(_step, state, at, metrics))
            if late == 0 and chance.random() < 0.9:  # else another row of the same step
                self.steps[run] = step + 1
        if chance.random() < 0.08:
            self._append("end", run, None, None, lambda _: TrainEnd(state, LoopArtifacts()))
            ended = RunEnd(state.ctx, RunResult(), ArmResult("arm"))
            self._append("end", run, None, None, lambda _: ended, "append_end", run)
            del self.steps[run], self.states[run]

    def flush(self):
        self.simulation.look()  # before anything is pruned
        begun, failures = len(self.simulation.published), self.writer.failures
        self.writer.flush()
        self.simulation.pruned()
        self._note_safe(begun, failures)

    def close(self):
        self.simulation.look()
        begun, failures = len(self.simulation.published), self.writer.failures
        closed = self.writer.close()
        self.simulation.pruned()
        if closed:
            self._note_acknowledged()
            self._note_safe(begun, failures)
        self.kill()

    def kill(self):
        if self.writer is not None:
            self.process.kill()
            thread = self.writer._upkeep._thread
            self.writer._upkeep.abandon()
            if thread is not None:
                thread.join(10)
            self.writer = None
            self.waiting = []

    def _choose(self):
        """Choose a run to publish for, and start or resume it if needed."""
        chance = self.chance
        if not self.steps or (len(self.steps) < 3 and chance.random() < 0.05):
            self.begun += 1
            run = f"run{self.rank}-{self.begun}"
            self.steps[run] = 0
        else:
            run = chance.choice(sorted(self.steps))
        if run not in self.states:
            back = self.steps[run]
            first = max(0, back - chance.choice((0, 0, 1, 3, 10, back)))
            self.steps[run] = self.firsts[run] = first
            ctx = LogContext(output_dir=Path(ROOT)).for_run(run)
            state = LoopState(step=first, num_steps=99_999, output_dir=Path(ROOT, run), ctx=ctx)
            self._append("run", run, None, None, lambda _: RunStart(ctx), "append_start", run)
            self._append("start", run, first, None, lambda _: TrainStart(state), "append_start", run)
            self.states[run] = state
        return run

    def _append(self, kind, run, step, name, event, how="append", *scope):
        simulation, writer = self.simulation, self.writer
        one = Published(len(simulation.published), self.rank, run, kind, step, name)
        one.before_start = kind == "step" and step < self.firsts[run]
        simulation.published.append(one)
        envelope = Envelope(
            writer.stream,
            writer.next_sequence,
            simulation.machine.clock.wall(),
            event(one.number + THIRD),
            run,
            self.rank,
        )
        payload = encode(envelope)
        body = struct.pack("<2sHIQ", b"EJ", 0, len(payload), writer.next_sequence) + payload
        one.stream, one.frame = writer.stream, struct.pack("<I", crc32(body)) + body
        getattr(writer, how)(payload, *scope)
        self.waiting.append(one)
        self._note_acknowledged()

    def _note_acknowledged(self):
        if not self.writer.unrecorded and not self.writer.lost:
            for each in self.waiting:
                each.acknowledged = True
                each.safe = self.flush_always
            self.waiting = []

    def _note_safe(self, begun, failures):
        """Mark synced events as safe; events that the disk refused to sync stay in doubt."""
        if self.writer.failures != failures:
            self.in_doubt = begun
        else:
            self.simulation.look()
            for each in self.simulation.published[self.in_doubt :]:
                if (
                    each.acknowledged
                    and not each.lost
                    and each.stream == self.writer.stream
                    and each.number in self.simulation.there
                ):
                    each.safe = True


def _eval(state, step, name, number):
    return Eval(state, step, name, {"number": number})


def _step(state, step, metrics, number):
    return StepEnd(state, step, TrainingBatch(), metrics | {"number": number})
