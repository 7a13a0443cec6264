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

KILLS_EACH = 10
PACES = {0: 5, 1: 1_000}
"""Steps per second, by the number of the kill modulo 10; the others do not wait."""
STARTING = 2
"""The number of the kill, modulo 10, that happens while the process starts."""
SAVE_EVERY = 2_000
SEGMENT_BYTES = (1 << 18, 1 << 22, 1 << 26)
FIRST, LAST = 0, 1
"""Indices in the shared memory: the first sequence of a life, and its last receipt."""
PATIENCE_SECONDS = 60.0


# -- what is killed ---------------------------------------------------------------------------------------------------


class Line:
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
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({"name": name, "weights": self.weights}))
        beside.replace(path)
        return str(path)

    save_weights_for_sampler = save_state

    async def load_state(self, path):
        self.weights = json.loads(Path(path).read_text())["weights"]  # noqa: ASYNC240 - nothing else runs on the loop


class Points:
    """The points: ``pace`` per second, or without waiting if it is 0."""

    def __init__(self, pace: int) -> None:
        self.pace = pace

    async def build_batch(self, step_idx):
        if self.pace:
            await asyncio.sleep(1 / self.pace)
        x = (step_idx * 7919 % 1000) / 1000
        return TrainingBatch(data=(x, 3 * x - 1))


class Receipts:
    """A bus that writes the sequence of each published event to shared memory."""

    def __init__(self, bus: EventBus, writer: JournalWriter, shared: memoryview) -> None:
        self.bus, self.writer, self.shared = bus, writer, shared

    def publish(self, event):
        self.bus.publish(event)
        self.shared[LAST] = self.writer.next_sequence - 1  # one store of eight bytes: a kill cannot tear it


async def train(directory: Path, shared: memoryview, pace: int, segment_bytes: int) -> None:
    writer = JournalWriter(directory / "journal", segment_bytes=segment_bytes)
    async with EventBus([], journal=writer) as bus:
        shared[LAST] = writer.next_sequence - 1
        shared[FIRST] = writer.next_sequence
        receipts = Receipts(bus, writer, shared)
        run_dir = directory / "run"
        loop = TrainingLoop(
            Line(run_dir / "checkpoints"),
            Points(pace),
            num_steps=10**9,
            output_dir=run_dir,
            bus=receipts,
            save_every=SAVE_EVERY,
            resume=True,
        )
        await loop.run()


# -- what kills it ----------------------------------------------------------------------------------------------------


class Tally:
    """The totals so far."""

    def __init__(self) -> None:
        self.kills = self.receipts = self.records = self.lost = self.torn = self.unborn = 0

    def __str__(self) -> str:
        return f"kills {self.kills} receipts {self.receipts:,} lost {self.lost}"


class Fault(Exception):  # noqa: N818 - names what was found, not an error of this program
    """Raised when the journal does not keep its promises."""


class Life:
    """One training process in a directory."""

    def __init__(self, directory: Path, pace: int, segment_bytes: int) -> None:
        self.file = directory / "receipts"
        self.file.write_bytes(bytes(16))
        with self.file.open("r+b") as file:
            self.shared = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")
        command = [sys.executable, __file__, "--train", str(directory), str(pace), str(segment_bytes)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def wait_for(self, receipts: int) -> None:
        deadline, before = time.monotonic() + PATIENCE_SECONDS, 0
        while (now := self.receipts) < receipts:
            if now > before:
                deadline, before = time.monotonic() + PATIENCE_SECONDS, now
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                said = self.process.communicate()[1].decode()
                raise Fault(f"the training ended by itself, or made no progress, at {now} receipts: {said}")
            time.sleep(0.0005)

    def end(self, by: signal.Signals) -> None:
        self.process.send_signal(by)
        said = self.process.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        if self.process.returncode != -by:
            raise Fault(f"it should have ended by {by.name} and ended with {self.process.returncode}: {said}")

    @property
    def first(self) -> int:
        return self.shared[FIRST]

    @property
    def receipts(self) -> int:
        return self.shared[LAST] - self.first + 1 if self.first else 0


class _SeenEvent(msgspec.Struct):
    type: str
    step_idx: int | None = None


class _Seen(msgspec.Struct):
    seq: int
    event: _SeenEvent


class Inspector:
    """Reads the one stream of a directory from kill to kill, each record once."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.tail = None
        self.torn_bytes = 0
        self._decode = msgspec.msgpack.Decoder(_Seen).decode

    def look(self, life: Life, *, by: signal.Signals) -> tuple[int, int]:
        """Return how many records are new, and how many receipts lack a record; raises `Fault` for other errors."""
        streams = JournalReader(self.journal).streams()
        _insist(len(streams) <= 1, f"a life did not continue the stream of the previous one: {streams}")
        if not streams:
            return 0, life.receipts
        self.tail = self.tail or JournalReader(self.journal).tail(streams[0])
        records, kept, step = 0, 0, None
        for record in self.tail.poll():
            records += 1
            kept += life.first > 0 and life.first <= record.sequence <= life.shared[LAST]
            seen = self._decode(record.payload)
            _insist(seen.seq == record.sequence, f"record {record.sequence} holds the event {seen.seq}")
            if seen.event.type == "step_end":
                step = _followed(step, seen.event.step_idx)
        _insist(
            records - kept <= 1, f"{records - kept} records have no receipt, where only one can have been in progress"
        )
        self._verify(by, wrote=records > 0)
        return records, life.receipts - kept

    def _verify(self, by: signal.Signals, *, wrote: bool) -> None:
        tail = self.tail
        [report] = verify(self.journal).streams
        sound = not (tail.missing or tail.damaged_bytes or tail.unreadable) and (report.last or 0) == tail.last
        _insist(sound and report.whole and not report.live, f"missing {tail.missing}; verify reports {report}")
        _insist(not wrote or report.closed == (by == signal.SIGTERM), f"ended by {by.name}; verify reports {report}")
        self.torn_bytes = report.torn_bytes


def _followed(before: int | None, step: int) -> int:
    """Return the step if it follows the previous one or, as the first of a life, a checkpoint."""
    _insist(before is None or step == before + 1, f"step {step} follows step {before}")
    _insist(before is not None or step % SAVE_EVERY == 0, f"it resumed at step {step}, not after a checkpoint")
    return step


def _insist(fine: bool, why: str) -> None:
    if not fine:
        raise Fault(why)


def one_directory(
    directory: Path, numbers: range, *, each: int, in_peace_at: int, chance: random.Random, tally: Tally, tell
) -> None:
    """Kill it once for each number, then end it by SIGTERM once there are ``in_peace_at`` receipts in total."""
    directory.mkdir()
    inspector = Inspector(directory / "journal")
    for number in (*numbers, None):
        pace = PACES.get(number % 10, 0) if number is not None else 0
        life = Life(directory, pace, chance.choice(SEGMENT_BYTES))
        if number is None:
            life.wait_for(max(in_peace_at - tally.receipts, 1))
        elif number % 10 == STARTING:
            time.sleep(chance.uniform(0.0, 0.6))
        else:
            life.wait_for(chance.randint(1, 2 * min(each, 5 if pace == 5 else 500 if pace else each)))
        by = signal.SIGTERM if number is None else signal.SIGKILL
        life.end(by)
        torn_before = inspector.torn_bytes
        records, lost = inspector.look(life, by=by)
        tally.torn += inspector.torn_bytes > torn_before
        tally.kills += number is not None
        tally.unborn += life.receipts == 0
        tally.receipts += life.receipts
        tally.records += records
        tally.lost += lost
        if number is not None:
            tell(f"{number + 1:>5}  {pace or '':>5} steps/s  {life.receipts:>9,} receipts  lost {lost}")


def kill(kills: int, receipts: int, *, seed: int, folder: Path, tell=lambda _: None) -> Tally:
    """Kill ``kills`` times, with at least ``receipts`` receipts in total; raises `Fault`."""
    chance = random.Random(seed)
    tally = Tally()
    while tally.kills < kills:
        left = kills - tally.kills
        # Seven of ten lives publish most of the events.
        each = max(round((receipts - tally.receipts) / left / 0.7), 10)
        directory = folder / f"from-{tally.kills:05d}"
        numbers = range(tally.kills, tally.kills + min(KILLS_EACH, left))
        in_peace_at = receipts if len(numbers) == left else 0
        one_directory(directory, numbers, each=each, in_peace_at=in_peace_at, chance=chance, tally=tally, tell=tell)
        shutil.rmtree(directory)
        tell(f"{tally}  ({tally.records:,} records, {tally.torn} torn tails, {tally.unborn} lives without a receipt)")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training process over and over; see the file.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--receipts", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--folder", help="where the journals go; default: the system's temporary directory")
    asked = parser.parse_args()
    began = time.monotonic()
    print(f"seed {asked.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=asked.folder))
    try:
        tally = kill(
            asked.kills, asked.receipts, seed=asked.seed, folder=folder, tell=lambda text: print(text, flush=True)
        )
    except Fault as fault:
        print(f"journals are in {folder}: {fault}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"{time.monotonic() - began:.0f} s")
    print(tally)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        where, pace, segment_bytes = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        with (where / "receipts").open("r+b") as memory:
            receipts = memoryview(mmap.mmap(memory.fileno(), 16)).cast("Q")
        asyncio.run(train(where, receipts, pace, segment_bytes))
    else:
        sys.exit(main())
