"""A courier on a simulated disk: each call fails, or stops the machine, in its turn; and a disk that stays full."""

import asyncio
import errno
import json
import math
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from evsys_bus import (
    Envelope,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.delivery_store import MAX_PENDING
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import CourierBusyError, RetryLaterError
from evsys_bus.journal import CursorStore, JournalWriter
from evsys_bus.sink import BatchResult
from evsys_bus.testing import MachineStopped, ManualClock, SimulatedDisk

JOURNAL = "/journal"
CTX = LogContext(output_dir=Path("/out"), run_key="run-a")
STATE = LoopState(step=0, num_steps=9, output_dir=Path("/out/run-a"), ctx=CTX)
EVENTS = [
    RunStart(CTX),
    TrainStart(STATE),
    *(StepEnd(STATE, step, TrainingBatch(), {"loss": 0.5}) for step in range(6)),
    None,
    TrainEnd(STATE, LoopArtifacts()),
]
"""None: a record that is no envelope."""


def written(disk):
    """A journal of two segments or more; its stream."""
    writer = JournalWriter(JOURNAL, disk=disk, flush_seconds=math.inf, segment_bytes=900, reserve_bytes=0).open()
    for event in EVENTS:
        if event is None:
            writer.append(b"no envelope")
            continue
        payload = encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, "run-a"))
        writer.append(payload, essential=isinstance(event, RunStart | TrainStart))
    writer.close()
    return writer.stream


class Rows:
    """A receiver that writes a row for each event into a file, on the same disk, and is rewindable."""

    max_events = 2
    max_bytes = 1 << 20
    max_seconds = 0.0
    name = "rows"  # the kind, of subclasses too
    path = "/rows/rows"

    def __init__(self, disk, refuses=()) -> None:
        self.disk = disk
        self.refuses = refuses
        self.introduced = []
        self.file = None
        self.taken = 0

    async def open(self, report):
        self.disk.make_directory("/rows")
        self.file = self.disk.lock(self.path)
        self.fresh = True

    def rewind(self, mark):
        self.disk.truncate(self.file, mark)
        self.fresh = False

    def resume_runs(self, starts):
        self.introduced += [type(each.event).__name__ for each in starts]

    async def deliver(self, batch, sizes):
        if self.fresh:
            self.disk.truncate(self.file, 0)  # nothing of an earlier life counts where there is no mark
            self.fresh = False
        dead = {index: "refused" for index, each in enumerate(batch) if each.seq in self.refuses}
        for index, each in enumerate(batch):
            if index not in dead:
                self.disk.write(self.file, b"%d\n" % each.seq)
        self.taken += len(batch)
        return BatchResult(len(batch) - len(dead), dead)

    def interrupted_result(self):
        return None

    def mark(self):
        self.disk.sync(self.file)
        self.disk.sync_path("/rows")
        return self.disk.length(self.file)

    async def close(self, deadline=None, *, confirm=False):
        try:
            if self.file is not None:
                self.disk.close(self.file)
        except OSError:
            pass  # closing is all that was wanted


def rows(disk):
    return [int(line) for line in disk.contents(Rows.path).split()]


def letters(disk):
    found = [each for each in disk.paths() if each.endswith("dead.jsonl")]
    return [json.loads(line)["seq"] for path in found for line in bytes(disk.contents(path)).splitlines()]


def deliver(disk, receiver, clock=None, finish=True):
    courier = Courier(
        JOURNAL, "rows", receiver, DeliveryPolicy(), disk=disk, clock=clock or ManualClock(), retry_seconds=0.01
    )
    if finish:
        courier.finish()
    asyncio.run(asyncio.wait_for(courier.run(), 10))
    return courier


def account(disk):
    (one,) = read_progress(JOURNAL, disk)
    return one


def calls_of_a_delivery():
    disk = SimulatedDisk()
    written(disk)
    before = disk.calls
    deliver(disk, Rows(disk, refuses={4}))
    return before, disk.calls


ALL = [1, 2, 3, 5, 6, 7, 8, 10]
DEAD = [4, 9]


@pytest.mark.parametrize("ending", ["kill", "power"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_whichever_call_the_machine_stops_in_every_event_is_there_once_after_it(ending, share):
    before, after = calls_of_a_delivery()
    assert after - before > 40
    for number in range(before + 1, after + 1):
        disk = SimulatedDisk()
        written(disk)
        disk.restart("kill")
        for path in disk.paths():  # the journal itself is on the medium
            disk.sync_path(path)
        for folder in {path.rpartition("/")[0] for path in disk.paths()}:
            disk.sync_path(folder)
        disk.stop(disk.calls + number - before, share)
        with suppress(MachineStopped):
            deliver(disk, Rows(disk, refuses={4}))
        assert disk.stopped
        disk.restart(ending, keep=share)
        deliver(disk, Rows(disk, refuses={4}))
        assert rows(disk) == ALL, number
        assert letters(disk) == DEAD, number
        one = account(disk)
        assert (one.recorded, one.delivered, one.dead, one.pending) == (10, 8, 2, 0), number
        assert not one.busy


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get)
def test_whichever_call_fails_nothing_is_lost_and_nothing_comes_twice_in_the_end(code):
    before, after = calls_of_a_delivery()
    for number in range(before + 1, after + 1):
        disk = SimulatedDisk()
        written(disk)
        disk.fail(disk.calls + number - before, code)
        receiver = Rows(disk, refuses={4})
        try:
            deliver(disk, receiver, clock=Ticking())
        except OSError:
            assert not receiver.taken, number  # before it began; whoever runs the courier tries again
        deliver(disk, Rows(disk, refuses={4}), clock=Ticking())
        found = rows(disk)
        assert sorted(set(found)) == ALL, (number, found)
        assert set(letters(disk)) == set(DEAD), number
        one = account(disk)
        assert one.recorded == one.delivered + one.dead + one.pending == 10, number
        assert one.pending == 0, number


class Ticking(ManualClock):
    """Each look at it takes a tenth of a second."""

    def monotonic(self):
        self.advance(0.1)
        return super().monotonic()


class Refusing(SimulatedDisk):
    """Refuses to replace or to append to some files."""

    refused = ()

    def replace(self, path, data):
        self._refuse(path)
        super().replace(path, data)

    def lock(self, path, mode=0o600):
        self._refuse(path)
        return super().lock(path, mode)

    def _refuse(self, path):
        if any(path.endswith(each) for each in self.refused):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cursor_that_cannot_be_read_now_is_no_reason_to_begin_anew():
    class Unreadable(SimulatedDisk):
        refuses = False

        def open_read(self, path):
            if self.refuses and path.endswith("cursors/rows.json"):
                raise OSError(errno.EMFILE, "Too many open files")
            return super().open_read(path)

    disk = Unreadable()
    written(disk)
    deliver(disk, Rows(disk))
    disk.refuses = True
    with pytest.raises(OSError, match="Too many"):
        deliver(disk, Rows(disk))
    assert not disk.is_locked(f"{JOURNAL}/couriers/rows.lock")
    disk.refuses = False
    second = Rows(disk)
    deliver(disk, second)
    assert second.taken == 0
    assert rows(disk) == [*range(1, 9), 10]


@pytest.mark.parametrize("segment", ["first", "last"])
@pytest.mark.parametrize("call", ["read", "names"])
def test_a_stream_that_cannot_be_read_for_a_moment_is_not_overtaken_by_the_next_of_its_rank(segment, call):
    class Unreadable(SimulatedDisk):
        refuses = 0
        refused = ""

        def _refuse(self, path):
            if self.refuses and path.startswith(self.refused):
                self.refuses -= 1
                raise OSError(errno.EIO, "I/O error")

        def read(self, path, offset, size):
            self._refuse(path if call == "read" else "")
            return super().read(path, offset, size)

        def open_read(self, path):
            self._refuse(path if call == "read" else "")
            return super().open_read(path)

        def names(self, path):
            self._refuse(path if call == "names" else "")
            return super().names(path)

    class Order(Rows):
        async def deliver(self, batch, sizes):
            order.extend((each.stream, each.seq) for each in batch)
            return await super().deliver(batch, sizes)

    order = []
    disk = Unreadable()
    before = written(disk)
    disk.restart("power")
    after = written(disk)
    folder = f"{JOURNAL}/{before}"
    paths = [each for each in disk.paths() if each.startswith(folder) and each.endswith(".seg")]
    disk.refused = folder if call == "names" else paths[0 if segment == "first" else -1]
    disk.refuses = 3

    async def run():
        courier = Courier(JOURNAL, "rows", Order(disk), DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)
        delivering = asyncio.create_task(courier.run())
        while len(order) < 2 * (len(EVENTS) - 1):
            clock.advance(0.3)
            await asyncio.sleep(0)
        courier.stop()
        await asyncio.wait([delivering])

    clock = ManualClock()
    asyncio.run(asyncio.wait_for(run(), 10))
    assert disk.refuses == 0
    assert [each[0] for each in order] == [before] * (len(EVENTS) - 1) + [after] * (len(EVENTS) - 1)


def test_a_disk_that_refuses_the_cursor_holds_nothing_up_and_is_said_once(caplog):
    disk = Refusing()
    stream = written(disk)
    disk.refused = ("rows.json",)
    deliver(disk, Rows(disk), clock=ManualClock())
    assert rows(disk) == [*range(1, 9), 10]
    assert CursorStore(JOURNAL, disk).load("rows").position(stream).sequence == 0
    assert sum("courier.not_committed" in each for each in caplog.messages) <= 2
    disk.refused = ()
    deliver(disk, Rows(disk))
    assert rows(disk) == [*range(1, 9), 10]
    assert CursorStore(JOURNAL, disk).load("rows").position(stream).sequence == 10


def test_a_refused_cursor_is_tried_again_while_nothing_comes():
    disk = Refusing()
    stream = written(disk)
    disk.refused = ("rows.json",)
    clock = ManualClock()
    courier = Courier(JOURNAL, "rows", Rows(disk), DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)

    async def scene():
        while courier.counts.pending:
            await asyncio.sleep(0.001)
        disk.refused = ()
        clock.advance(2)
        while CursorStore(JOURNAL, disk).load("rows").position(stream).sequence < 10:
            await asyncio.sleep(0.001)
        courier.stop()

    async def both():
        await asyncio.gather(courier.run(), asyncio.wait_for(scene(), 5))

    asyncio.run(both())


def test_the_cursor_does_not_pass_a_dead_letter_that_is_not_on_disk():
    disk = Refusing()
    stream = written(disk)
    disk.refused = ("dead.jsonl",)
    deliver(disk, Rows(disk, refuses={4}))
    assert rows(disk) == ALL  # the delivery went on
    assert CursorStore(JOURNAL, disk).load("rows").position(stream).sequence == 2
    assert letters(disk) == []
    disk.refused = ()
    deliver(disk, Rows(disk, refuses={4}))
    assert rows(disk) == ALL
    assert letters(disk) == DEAD
    assert account(disk).dead == 2


def test_when_too_many_dead_letters_wait_for_the_disk_the_delivery_waits_with_them():
    disk = Refusing()
    writer = JournalWriter(JOURNAL, disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    count = MAX_PENDING + 50
    for step in range(count):
        event = StepEnd(STATE, step, TrainingBatch(), {"loss": 0.5})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, "run-a")))
    writer.close()
    disk.refused = ("dead.jsonl",)
    clock = ManualClock()
    receiver = Rows(disk, refuses=range(1, count + 1))
    courier = Courier(JOURNAL, "rows", receiver, DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)

    async def scene():
        while courier.counts.dead < MAX_PENDING:
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0.001)
            assert courier.counts.dead == MAX_PENDING
        disk.refused = ()
        clock.advance(2)
        courier.finish()

    async def both():
        await asyncio.gather(courier.run(), asyncio.wait_for(scene(), 15))

    asyncio.run(both())
    assert letters(disk) == list(range(1, count + 1))


def test_a_letter_that_a_crash_cut_does_not_spoil_the_next_one():
    disk = SimulatedDisk()
    written(disk)
    disk.make_directory(f"{JOURNAL}/couriers")
    file = disk.lock(f"{JOURNAL}/couriers/rows.dead.jsonl")
    disk.write(file, b'{"stream":"r0')
    disk.close(file)
    deliver(disk, Rows(disk))
    lines = bytes(disk.contents(f"{JOURNAL}/couriers/rows.dead.jsonl")).splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [9]


def test_a_mark_that_cannot_be_made_keeps_the_cursor_and_has_the_adapter_built_anew():
    class Unmarked(Rows):
        def mark(self):
            raise ValueError("no idea")

    disk = SimulatedDisk()
    stream = written(disk)
    with pytest.raises(ValueError, match="no idea"):
        deliver(disk, Unmarked(disk), clock=Ticking())
    assert CursorStore(JOURNAL, disk).load("rows").position(stream).sequence == 0


def test_an_adapter_that_cannot_be_rewound_is_not_delivered_to():
    class Stuck(Rows):
        def rewind(self, mark):
            raise ValueError("the file is gone")

    disk = SimulatedDisk()
    written(disk)
    deliver(disk, Rows(disk))
    before = rows(disk)
    with pytest.raises(ValueError, match="gone"):
        deliver(disk, Stuck(disk))
    assert rows(disk) == before
    assert account(disk).state == "failed"


def test_at_most_five_commits_a_second_while_events_come():
    disk = SimulatedDisk()
    writer = JournalWriter(JOURNAL, disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    for step in range(200):
        event = StepEnd(STATE, step, TrainingBatch(), {"loss": 0.5})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, "run-a")))
    clock = ManualClock()
    marks = []

    class Slow(Rows):
        async def deliver(self, batch, sizes):
            clock.advance(0.05)
            return await super().deliver(batch, sizes)

        def mark(self):
            marks.append(clock.monotonic())
            return super().mark()

    deliver(disk, Slow(disk), clock=clock)
    assert len(marks) >= 20  # 100 batches in 5 seconds
    marks = marks[:-2]  # without the end's: its commit, and word that it is on record
    assert all(later - earlier >= 0.19 for earlier, later in pairwise(marks))
    writer.close()


def test_a_second_courier_on_the_same_disk_is_refused():
    disk = SimulatedDisk()
    written(disk)
    disk.make_directory(f"{JOURNAL}/couriers")
    lock = disk.lock(f"{JOURNAL}/couriers/rows.lock")
    with pytest.raises(CourierBusyError, match="another process"):
        deliver(disk, Rows(disk))
    disk.close(lock)
    deliver(disk, Rows(disk))


def test_a_mark_is_on_disk_before_the_first_event():
    class Asks(Rows):
        async def deliver(self, batch, sizes):
            assert CursorStore(JOURNAL, self.disk).load("rows").mark is not None
            return await super().deliver(batch, sizes)

    disk = SimulatedDisk()
    written(disk)
    deliver(disk, Asks(disk))
    assert rows(disk) == [*range(1, 9), 10]


def test_a_refused_cursor_is_saved_before_another_mark_is_asked_for():
    class Numbers(Rows):
        """Keeps what it needs for its last two marks only."""

        number = 0

        def mark(self):
            saved = CursorStore(JOURNAL, self.disk).load("rows").mark
            behind.append(self.number - (saved or 0))
            self.number += 1
            return self.number

    behind = []
    disk = Refusing()
    stream = written(disk)
    disk.refused = ("rows.json",)
    receiver, clock = Numbers(disk), ManualClock()
    courier = Courier(JOURNAL, "rows", receiver, DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)

    async def scene():
        while courier.counts.pending:
            clock.advance(2)
            await asyncio.sleep(0.001)
        disk.refused = ()
        while CursorStore(JOURNAL, disk).load("rows").position(stream).sequence < 10:
            clock.advance(2)
            await asyncio.sleep(0.001)
        courier.stop()

    async def both():
        await asyncio.gather(courier.run(), asyncio.wait_for(scene(), 5))

    asyncio.run(both())
    assert max(behind) == 0


def test_no_other_mark_is_asked_for_at_an_end_in_a_batch_while_the_last_one_is_not_saved():
    class Numbers(Rows):
        """Has to begin anew at its third batch; from the first one on the disk refuses the cursor."""

        number = 0

        def mark(self):
            self.number += 1
            return self.number

        def rewind(self, mark):
            pass

        async def deliver(self, batch, sizes):
            if self.taken >= 4:
                raise RetryLaterError("not now")
            disk.refused = ("rows.json",)
            clock.advance(1)  # so that a commit is due
            return await super().deliver(batch, sizes)

    disk = Refusing()
    written(disk)
    receiver, clock = Numbers(disk), ManualClock()
    courier = Courier(JOURNAL, "rows", receiver, DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)
    with pytest.raises(RetryLaterError):
        asyncio.run(courier.run())
    saved = CursorStore(JOURNAL, disk).load("rows").mark
    assert receiver.number - saved <= 1  # the adapter keeps what it needs for two marks


def test_what_comes_while_the_last_batches_are_taken_is_delivered_before_the_end():
    class Appends(Rows):
        max_events = 4

        async def deliver(self, batch, sizes):
            if not self.taken and len(batch) == self.max_events:
                event = StepEnd(STATE, 8, TrainingBatch(), {"loss": 0.5})
                writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, "run-a")))
                courier.finish()
            return await super().deliver(batch, sizes)

    disk = SimulatedDisk()
    writer = JournalWriter(JOURNAL, disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    receiver, clock = Appends(disk), ManualClock()
    courier = Courier(JOURNAL, "rows", receiver, DeliveryPolicy(), disk=disk, clock=clock, poll_seconds=0.001)

    def append(step):
        event = StepEnd(STATE, step, TrainingBatch(), {"loss": 0.5})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, "run-a")))

    async def scene():
        append(0)
        while courier.counts.delivered < 1:
            await asyncio.sleep(0.001)
        receiver.taken = 0
        for step in range(8):
            append(step)

    async def both():
        await asyncio.gather(asyncio.wait_for(courier.run(), 10), scene())

    asyncio.run(both())
    assert rows(disk) == [*range(1, 11)]
    writer.close()
