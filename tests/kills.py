#!/usr/bin/env python3
"""Kill a training process over and over, and check that everything it had published is in the journal.

usage: uv run python tests/kills.py --kills 200 --receipts 5000000

A training process (`TrainingLoop` on a bus with a journal) writes the sequence of each event to shared memory once
`publish` has returned: its receipt. It is killed by SIGKILL at a random moment and restarted, with ``resume``, in the
same directory. After every kill each receipt must be in the journal, the sequences must have no gap, the steps must be
in order, and `verify` may report nothing but torn tails. Of ten lives, one trains at 5 steps a second, one at 1,000,
one is killed during its start, and seven train as fast as they can. After ten kills the last life of the directory is
ended by SIGTERM, and a new directory is used. The seed repeats the choices, not the moments.
"""

import argparse
import asyncio
import json
import mmap
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from evsys_bus import EventBus, TrainingBatch, TrainingLoop
from evsys_bus.journal import JournalReader, JournalWriter, verify
from support.violations import Violation, require

KILLS_EACH = 10
PACES = {0: 5, 1: 1_000}
"""Steps per second, by the number of the kill modulo 10; the others do not wait."""
STARTING_KILL = 2
"""The number of the kill, modulo 10, that happens while the process starts."""
SAVE_EVERY = 2_000
SEGMENT_BYTES = (1 << 18, 1 << 22, 1 << 26)
FIRST_INDEX, LAST_INDEX = 0, 1
"""Indices in the shared memory: the first sequence of a life, and its last receipt."""
TIMEOUT_SECONDS = 60.0


# -- what is killed ---------------------------------------------------------------------------------------------------


class LineModel:
    """A backend that fits a line to points by gradient descent, with very short steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights = [0.0, 0.0]
        self.gradient = [0.0, 0.0]

    async def forward_backward(self, batch):
        x, y = batch.data
        error = self.weights[0] * x + self.weights[1] - y
        self.gradient = [2 * error * x, 2 * error]
        return {"loss": error * error, "weight": self.weights[0], "bias": self.weights[1]}

    async def optim_step(self):
        self.weights = [w - 0.01 * slope for w, slope in zip(self.weights, self.gradient, strict=True)]
        return {"grad_norm": abs(self.gradient[0]) + abs(self.gradient[1])}

    async def save_state(self, name):
        self.directory.mkdir(exist_ok=True)
        path = self.directory / "state.json"  # one file, because a long run would leave thousands
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"name": name, "weights": self.weights}))
        temporary.replace(path)
        return str(path)

    save_weights_for_sampler = save_state

    async def load_state(self, path):
        self.weights = json.loads(Path(path).read_text())["weights"]  # noqa: ASYNC240 - nothing else runs on the loop


class PointBatches:
    """The points: ``pace`` per second, or without waiting if it is 0."""

    def __init__(self, pace: int) -> None:
        self.pace = pace

    async def build_batch(self, step_idx):
        if self.pace:
            await asyncio.sleep(1 / self.pace)
        x = (step_idx * 7919 % 1000) / 1000
        return TrainingBatch(data=(x, 3 * x - 1))


class AcknowledgingBus(EventBus):
    """A bus that writes the sequence of each published event to shared memory."""

    def __init__(self, writer: JournalWriter, shared: memoryview) -> None:
        super().__init__([], journal=writer)
        self.writer, self.shared = writer, shared

    def publish(self, event):
        super().publish(event)
        self.shared[LAST_INDEX] = self.writer.next_sequence - 1  # one store of eight bytes: a kill cannot tear it


async def train(directory: Path, shared: memoryview, pace: int, segment_bytes: int) -> None:
    writer = JournalWriter(directory / "journal", segment_bytes=segment_bytes)
    async with AcknowledgingBus(writer, shared) as bus:
        shared[LAST_INDEX] = writer.next_sequence - 1
        shared[FIRST_INDEX] = writer.next_sequence
        run_dir = directory / "run"
        loop = TrainingLoop(
            LineModel(run_dir / "checkpoints"),
            PointBatches(pace),
            num_steps=10**9,
            output_dir=run_dir,
            bus=bus,
            save_every=SAVE_EVERY,
            resume=True,
        )
        await loop.run()


# -- what kills it ----------------------------------------------------------------------------------------------------


class Totals:
    """The totals so far."""

    def __init__(self) -> None:
        self.kills = self.receipts = self.records = self.lost = self.torn = self.without_receipts = 0

    def __str__(self) -> str:
        return f"kills {self.kills} receipts {self.receipts:,} lost {self.lost}"


class Life:
    """One training process in a directory."""

    def __init__(self, directory: Path, pace: int, segment_bytes: int) -> None:
        self.file = directory / "receipts"
        self.file.write_bytes(bytes(16))
        with self.file.open("r+b") as file:
            self.shared = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")
        command = [sys.executable, __file__, "--train", str(directory), str(pace), str(segment_bytes)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def wait_for_receipts(self, receipts: int) -> None:
        deadline, before = time.monotonic() + TIMEOUT_SECONDS, 0
        while (now := self.receipts) < receipts:
            if now > before:
                deadline, before = time.monotonic() + TIMEOUT_SECONDS, now
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                stderr = self.process.communicate()[1].decode()
                raise Violation(f"the training ended by itself, or made no progress, at {now} receipts: {stderr}")
            time.sleep(0.0005)

    def end_process(self, by: signal.Signals) -> None:
        self.process.send_signal(by)
        stderr = self.process.communicate(timeout=TIMEOUT_SECONDS)[1].decode()
        if self.process.returncode != -by:
            raise Violation(f"it should have ended by {by.name} and ended with {self.process.returncode}: {stderr}")

    @property
    def first_sequence(self) -> int:
        return self.shared[FIRST_INDEX]

    @property
    def receipts(self) -> int:
        return self.shared[LAST_INDEX] - self.first_sequence + 1 if self.first_sequence else 0


class _EventView(msgspec.Struct):
    type: str
    step_idx: int | None = None


class _RecordView(msgspec.Struct):
    seq: int
    event: _EventView


class JournalChecker:
    """Reads the one stream of a directory from kill to kill, each record once."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.tail = None
        self.torn_bytes = 0
        self._decode = msgspec.msgpack.Decoder(_RecordView).decode

    def check_new_records(self, life: Life, *, by: signal.Signals) -> tuple[int, int]:
        """Return how many records are new, and how many receipts lack a record; raises `Violation` for other errors."""
        streams = JournalReader(self.journal).streams()
        require(len(streams) <= 1, f"a life did not continue the stream of the previous one: {streams}")
        if not streams:
            return 0, life.receipts
        self.tail = self.tail or JournalReader(self.journal).tail(streams[0])
        records, acknowledged, step = 0, 0, None
        for record in self.tail.poll():
            records += 1
            acknowledged += (
                life.first_sequence > 0 and life.first_sequence <= record.sequence <= life.shared[LAST_INDEX]
            )
            view = self._decode(record.payload)
            require(view.seq == record.sequence, f"record {record.sequence} holds the event {view.seq}")
            if view.event.type == "step_end":
                step = _check_next_step(step, view.event.step_idx)
        require(
            records - acknowledged <= 1,
            f"{records - acknowledged} records have no receipt, where only one can have been in progress",
        )
        self._verify(by, has_records=records > 0)
        return records, life.receipts - acknowledged

    def _verify(self, by: signal.Signals, *, has_records: bool) -> None:
        tail = self.tail
        [report] = verify(self.journal).streams
        is_intact = (
            not (tail.missing_ranges or tail.corrupt_bytes or tail.unreadable_segments)
            and (report.last_sequence or 0) == tail.last_sequence
        )
        require(
            is_intact and report.is_intact and not report.is_live,
            f"missing {tail.missing_ranges}; verify reports {report}",
        )
        require(
            not has_records or report.is_closed == (by == signal.SIGTERM),
            f"ended by {by.name}; verify reports {report}",
        )
        self.torn_bytes = report.torn_bytes


def _check_next_step(previous: int | None, step: int) -> int:
    """Return the step if it follows the previous one or, as the first of a life, a checkpoint."""
    require(previous is None or step == previous + 1, f"step {step} follows step {previous}")
    require(previous is not None or step % SAVE_EVERY == 0, f"it resumed at step {step}, not after a checkpoint")
    return step


def kill_in_directory(
    directory: Path,
    numbers: range,
    *,
    receipts_per_kill: int,
    receipts_at_end: int,
    rng: random.Random,
    totals: Totals,
    on_progress,
) -> None:
    """Kill it once for each number, then end it by SIGTERM once there are ``receipts_at_end`` receipts in total."""
    directory.mkdir()
    checker = JournalChecker(directory / "journal")
    for number in (*numbers, None):
        pace = PACES.get(number % 10, 0) if number is not None else 0
        life = Life(directory, pace, rng.choice(SEGMENT_BYTES))
        if number is None:
            life.wait_for_receipts(max(receipts_at_end - totals.receipts, 1))
        elif number % 10 == STARTING_KILL:
            time.sleep(rng.uniform(0.0, 0.6))
        else:
            life.wait_for_receipts(
                rng.randint(1, 2 * min(receipts_per_kill, 5 if pace == 5 else 500 if pace else receipts_per_kill))
            )
        by = signal.SIGTERM if number is None else signal.SIGKILL
        life.end_process(by)
        torn_before = checker.torn_bytes
        records, lost = checker.check_new_records(life, by=by)
        totals.torn += checker.torn_bytes > torn_before
        totals.kills += number is not None
        totals.without_receipts += life.receipts == 0
        totals.receipts += life.receipts
        totals.records += records
        totals.lost += lost
        if number is not None:
            on_progress(f"{number + 1:>5}  {pace or '':>5} steps/s  {life.receipts:>9,} receipts  lost {lost}")


def kill_repeatedly(kills: int, receipts: int, *, seed: int, folder: Path, on_progress=lambda _: None) -> Totals:
    """Kill ``kills`` times, with at least ``receipts`` receipts in total; raises `Violation`."""
    rng = random.Random(seed)
    totals = Totals()
    while totals.kills < kills:
        remaining = kills - totals.kills
        # Seven of ten lives publish most of the events.
        receipts_per_kill = max(round((receipts - totals.receipts) / remaining / 0.7), 10)
        directory = folder / f"from-{totals.kills:05d}"
        numbers = range(totals.kills, totals.kills + min(KILLS_EACH, remaining))
        receipts_at_end = receipts if len(numbers) == remaining else 0
        kill_in_directory(
            directory,
            numbers,
            receipts_per_kill=receipts_per_kill,
            receipts_at_end=receipts_at_end,
            rng=rng,
            totals=totals,
            on_progress=on_progress,
        )
        shutil.rmtree(directory)
        on_progress(
            f"{totals}  ({totals.records:,} records, {totals.torn} torn tails, "
            f"{totals.without_receipts} lives without a receipt)"
        )
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training process over and over; see the file.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--receipts", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--folder", help="where the journals go; default: the system's temporary directory")
    args = parser.parse_args()
    started = time.monotonic()
    print(f"seed {args.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=args.folder))
    try:
        totals = kill_repeatedly(
            args.kills, args.receipts, seed=args.seed, folder=folder, on_progress=lambda text: print(text, flush=True)
        )
    except Violation as fault:
        print(f"journals are in {folder}: {fault}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"{time.monotonic() - started:.0f} s")
    print(totals)
    return 1 if totals.lost else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        directory, pace, segment_bytes = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        with (directory / "receipts").open("r+b") as shared_file:
            receipts = memoryview(mmap.mmap(shared_file.fileno(), 16)).cast("Q")
        asyncio.run(train(directory, receipts, pace, segment_bytes))
    else:
        sys.exit(main())
