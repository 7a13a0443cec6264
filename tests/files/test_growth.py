"""What grows with a journal costs in proportion: counted in calls of the file system and names that it handed out."""

from pathlib import Path

import pytest

from evsys_bus.bus.callback_marks import recorded_marks
from evsys_bus.cli.events import EventFilter, EventReader
from evsys_bus.codec import encode
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.delivery.open_runs import RunAnnotations
from evsys_bus.delivery.progress import ProgressReader
from evsys_bus.delivery.source import Batch, EventSource
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import deregister, load_subscriptions, register
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, RunStart, StepEnd
from evsys_bus.journal import Cursor, CursorStore, JournalReader, JournalWriter, OsDisk, frame, verify
from evsys_bus.journal.stream_lock import acquire_stream
from evsys_bus.testing import ManualClock
from support.journals import read_records

FEW, MANY = 30, 240
MOST = 1.5 * MANY / FEW
"""Twelve times the calls for eight times as many; their square would be 64 times."""


class CountingDisk(OsDisk):
    """Counts calls, and the names that it hands out."""

    def __init__(self):
        self.cost = 0

    def __getattribute__(self, name):
        if name not in {"cost", "names"} and not name.startswith("_"):
            self.cost += 1
        return super().__getattribute__(name)

    def names(self, path):
        found = super().names(path)
        self.cost += 1 + len(list(found))
        return found


def write_segment(directory, stream, name, first, count=2):
    """A segment that begins a run, and has steps."""
    ctx = LogContext(directory).for_run("run")
    state = LoopState(first, 10_000, Path(directory) / "run", ctx=ctx)
    events = [RunStart(ctx), *(StepEnd(state, first + at, TrainingBatch(), {"v": 1.0}) for at in range(1, count))]
    records = [
        frame.pack(number, encode(Envelope(stream, number, float(number), event, "run", 0)))
        for number, event in enumerate(events, start=first)
    ]
    Path(directory, stream).mkdir(exist_ok=True)
    Path(directory, stream, name).write_bytes(frame.pack_segment_header() + b"".join(records))


def many_segments(directory, count):
    stream = "r0-000001-20260131T120000-5f3a91c2"
    for ordinal in range(1, count + 1):
        write_segment(directory, stream, f"{ordinal:06d}-{2 * ordinal - 1}.seg", 2 * ordinal - 1)
    Path(directory, stream, "lock").touch()


def many_streams(directory, count, family="r"):
    for number in range(1, count + 1):
        stream = f"{family}0-{number:06d}-20260131T120000-5f3a91c2"
        write_segment(directory, stream, "000001-1.seg", 1)
        Path(directory, stream, "lock").touch()


def streams_of_couriers(directory, count):
    many_streams(directory, count, "c")


def read(directory, disk):
    return len(read_records(directory, disk=disk))


def feed(directory, disk, *, thorough):
    found = EventSource(directory, Cursor(), ranks=None, disk=disk, clock=ManualClock(), faults=FaultLog())
    delivered = 0
    while True:
        batch = Batch()
        filled = found.read_batch(batch, 100, 1 << 20, include_idle=thorough)
        delivered += len(batch.items)
        if filled == "dry" and not batch.items:
            return delivered


def feed_on(directory, disk):
    return feed(directory, disk, thorough=False)


def feed_to_the_end(directory, disk):
    return feed(directory, disk, thorough=True)


def listen(directory, disk):
    clock = ManualClock()
    heard = RunAnnotations(JournalReader(directory, disk), clock, FaultLog())
    for _ in range(3):
        heard.poll()
        clock.advance(1.0)


def account(directory, disk):
    accounts = ProgressReader(directory, disk)
    return [[each.pending for each in accounts.read()] for _ in range(2)]


def print_all(directory, disk):
    return len(list(EventReader(Path(directory), EventFilter(), disk).poll()))


def print_last(directory, disk):
    return len(EventReader(Path(directory), EventFilter(), disk).latest(10))


def seek(directory, disk):
    reader = EventReader(Path(directory), EventFilter(since=3.0), disk)
    reader.seek(3.0)
    return sum(1 for _ in reader.poll())


def look_for_marks(directory, disk):
    return list(recorded_marks(directory, "run", disk=disk))


def begin(directory, disk):
    acquire_stream(disk, ManualClock(), directory, 0)


def check(directory, disk):
    return verify(directory, disk).is_intact


def write(directory, disk):
    writer = JournalWriter(directory, disk=disk, segment_bytes=1, reserve_bytes=0, flush_seconds=3600.0).open()
    for _ in range(20):
        writer.append(b"x")
    writer.flush()
    writer.close()


def follow_many(directory, count):
    register(
        directory, [Subscription(f"follower {number}", None, policy=DeliveryPolicy()) for number in range(count // 3)]
    )


def follow_again(directory, disk):
    register(directory, [each.to_subscription() for each in load_subscriptions(directory)], disk)


def leave(directory, disk):
    deregister(directory, set(), 0, disk)


READERS = [read, feed_on, feed_to_the_end, account, print_all, print_last, seek, look_for_marks, begin, check, write]
CASES = [(shape, what) for shape in (many_segments, many_streams) for what in READERS]
CASES.append((streams_of_couriers, listen))
CASES += [(follow_many, what) for what in (follow_again, leave, account, begin, write)]


@pytest.mark.parametrize(("shape", "what"), CASES, ids=lambda each: each.__name__)
def test_it_costs_in_proportion(tmp_path, shape, what):
    costs = []
    for count in (FEW, MANY):
        directory = str(tmp_path / str(count))
        Path(directory).mkdir()
        shape(directory, count)
        CursorStore(directory).save("it", Cursor())
        disk = CountingDisk()
        what(directory, disk)
        costs.append(disk.cost)
    assert costs[1] < MOST * costs[0], costs


def test_every_event_of_many_streams_is_delivered_once_and_in_their_order(tmp_path):
    many_streams(str(tmp_path), MANY)
    found = EventSource(str(tmp_path), Cursor(), ranks=None, disk=OsDisk(), clock=ManualClock(), faults=FaultLog())
    names = []
    while True:
        batch = Batch()
        if found.read_batch(batch, 7, 1 << 20, include_idle=True) == "dry" and not batch.items:
            break
        names += [each.stream for each in batch.items]
    assert names == [name for name in JournalReader(tmp_path).streams() for _ in range(2)]


def test_a_reader_whose_next_segments_are_removed_goes_on_with_those_that_are_there(tmp_path):
    many_segments(str(tmp_path), 9)
    reader = JournalReader(tmp_path)
    [stream] = reader.streams()
    tail = reader.tail(stream)
    records = tail.poll()
    first = next(records)
    for ordinal in (2, 3, 4, 6):
        Path(tmp_path, stream, f"{ordinal:06d}-{2 * ordinal - 1}.seg").unlink()
    sequences = [first.sequence, *(each.sequence for each in records)]
    assert sequences == [1, 2, 9, 10, *range(13, 19)]
    assert sum(last - first + 1 for first, last in tail.missing_ranges) == 8
    assert not tail.unreadable_segments
