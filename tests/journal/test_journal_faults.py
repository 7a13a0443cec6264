"""Rows 3, 4, 8 and 10 of the fault matrix on a simulated disk: each call fails, or stops the machine, in its turn."""

import errno
import math

import msgspec
import pytest

from evsys_bus.errors import JournalOpenError, UnrecordedError
from evsys_bus.journal import JournalReader, JournalWriter, verify
from evsys_bus.testing import MachineStopped, SimulatedDisk

EVENTS = 14


START = msgspec.msgpack.encode({"event": {"type": "run_start"}, "run": "run"})
END = msgspec.msgpack.encode({"event": {"type": "run_end"}, "run": "run"})


def payload(number: int) -> bytes:
    return b"event %d" % number


class Life:
    """A writer's life on this disk: what it was told is recorded, and what is on the medium."""

    def __init__(self, disk: SimulatedDisk, flush: str = "interval") -> None:
        self.disk = disk
        self.flush = flush
        self.stream = ""
        self.receipts: list[int] = []
        self.on_medium: list[int] = []

    def live(self) -> JournalWriter:
        writer = JournalWriter(
            "/journal", disk=self.disk, flush=self.flush, segment_bytes=150, flush_seconds=math.inf, reserve_bytes=64
        ).open()
        self.stream = writer.stream
        for index in range(EVENTS):
            number = writer.next_sequence
            if index == 0:
                writer.append(START, essential=True)
            elif index == EVENTS - 1:
                writer.append(END, essential=True)
            else:
                writer.append(payload(number))
            if not writer.unrecorded:
                self.receipts = list(range(number - index, number + 1))
                if self.flush == "always":
                    self.on_medium = self.receipts
            if index == EVENTS // 2:
                writer.flush()
                self.on_medium = self.receipts if not writer.failures else self.on_medium
        if writer.close() and not writer.failures:
            self.on_medium = self.receipts
        return writer


def read(disk: SimulatedDisk, stream: str) -> list[int]:
    records = list(JournalReader("/journal", disk).read(stream))
    assert all(record.payload in {payload(record.sequence), START, END} for record in records)
    return [record.sequence for record in records]


def calls_of_a_life(flush: str) -> int:
    disk = SimulatedDisk()
    Life(disk, flush).live()
    return disk.calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("flush", ["interval", "always"])
def test_whichever_call_fails_nothing_is_raised_and_nothing_is_lost(flush, code):
    for number in range(1, calls_of_a_life(flush) + 1):
        disk = SimulatedDisk()
        disk.fail(number, code)
        life = Life(disk, flush)
        try:
            writer = life.live()
        except JournalOpenError:
            writer = life.live()  # said clearly, and the next try finds nothing in its way
        assert (writer.recorded, writer.unrecorded, writer.lost) == (EVENTS, 0, 0), number
        assert read(disk, life.stream) == list(range(1, EVENTS + 1)), number
        assert verify("/journal", disk).is_intact, number


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_whichever_call_fails_what_is_acknowledged_as_synced_is_there_after_a_power_cut(code):
    for number in range(1, calls_of_a_life("always") + 1):
        disk = SimulatedDisk()
        disk.fail(number, code)
        try:
            writer = JournalWriter(
                "/journal", disk=disk, flush="always", segment_bytes=150, flush_seconds=math.inf, reserve_bytes=64
            ).open()
        except JournalOpenError:
            continue
        acknowledged = 0
        while acknowledged < EVENTS and not writer.failures:  # the power is cut at the first sign of trouble
            sequence = writer.append(payload(acknowledged + 1))
            acknowledged = acknowledged if writer.unrecorded else sequence
        disk.restart("power", keep=0.0)
        assert read(disk, writer.stream)[:acknowledged] == [*range(1, acknowledged + 1)], number


class InterruptedDisk(SimulatedDisk):
    """Ctrl-C comes at one of the syncs."""

    interrupt_at = 0

    def _count(self) -> None:
        self.interrupt_at -= 1
        if not self.interrupt_at:
            raise KeyboardInterrupt

    def sync(self, file: int) -> None:
        self._count()
        super().sync(file)

    def sync_path(self, path: str) -> None:
        self._count()
        super().sync_path(path)


class CountingDisk(SimulatedDisk):
    """Counts the syncs of closed segments."""

    count = 0

    def sync_path(self, path: str) -> None:
        self.count += path.endswith(".seg")
        super().sync_path(path)


@pytest.mark.parametrize("ending", ["closed", "killed"])
def test_a_writer_syncs_what_the_previous_one_left_and_not_every_segment_of_the_stream_again(ending):
    disk, counts = CountingDisk(), []
    for life in range(20):
        disk.count = 0
        writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
        writer.append(payload(life + 1))
        writer.flush()
        counts.append(disk.count)
        if ending == "closed":
            writer.close()
        else:
            disk.restart("kill")
    assert counts == [0] + 19 * [1]
    disk.restart("power", keep=0.0)
    assert read(disk, writer.stream) == [*range(1, 21)]


def test_a_flush_behind_one_that_was_interrupted_syncs_what_that_one_had_not():
    number, interrupted = 0, True
    while interrupted:
        number += 1
        interrupted = False
        disk = InterruptedDisk()
        first = JournalWriter("/journal", disk=disk, segment_bytes=150, flush_seconds=math.inf).open()
        for index in range(EVENTS):
            first.append(payload(index + 1))
        disk.restart("kill")  # the next one inherits segments that nobody has synced
        writer = JournalWriter("/journal", disk=disk, segment_bytes=150, flush_seconds=math.inf).open()
        for index in range(EVENTS):
            writer.append(payload(EVENTS + index + 1))
        disk.interrupt_at = number
        try:
            writer.flush()
        except KeyboardInterrupt:
            interrupted = True
        disk.interrupt_at = 0
        writer.flush()
        assert not writer.failures
        disk.restart("power", keep=0.0)
        assert read(disk, writer.stream) == [*range(1, 2 * EVENTS + 1)], number
    assert number > 5


# The machine also stops under the upkeep's thread, which says so as threads do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("ending", ["kill", "power"])
@pytest.mark.parametrize("flush", ["interval", "always"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_whichever_call_the_machine_stops_in_what_was_promised_is_there_after_it(flush, share, ending):
    for number in range(1, calls_of_a_life(flush) + 1):
        disk = SimulatedDisk()
        disk.stop(number, share)
        life = Life(disk, flush)
        try:
            life.live()
        except MachineStopped:
            pass
        disk.restart(ending, keep=share)
        promised = life.receipts if ending == "kill" else life.on_medium
        found = read(disk, life.stream) if life.stream else []
        assert found[: len(promised)] == promised, number
        assert found == list(range(1, len(found) + 1)), number
        second = Life(disk, flush)
        second.live()
        assert read(disk, second.stream)[-EVENTS:] == second.receipts, number
        assert len(second.receipts) == EVENTS, number
        assert all(not stream.corrupt_ranges for stream in verify("/journal", disk).streams), number


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_whichever_call_of_its_beginning_a_writer_is_killed_in_the_next_one_goes_on_in_the_stream(share):
    def begun(disk: SimulatedDisk) -> JournalWriter:
        return JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()

    number = 1
    killed = True
    while killed:
        disk = SimulatedDisk()
        first = begun(disk)
        first.append(payload(1))
        disk.restart("kill")
        disk.stop(disk.calls + number, share)
        try:
            begun(disk)
        except MachineStopped:
            pass
        else:
            killed = False
        disk.restart("kill")
        third = begun(disk)
        assert (third.stream, third.next_sequence) == (first.stream, 2), number
        number += 1
    assert number > 10


def test_on_a_full_disk_events_wait_in_order_and_are_written_when_there_is_room(caplog):
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    writer.append(payload(1))
    disk.room = 10  # the next one goes in part
    for number in range(2, 102):
        assert writer.append(payload(number)) == number
    assert (writer.recorded, writer.unrecorded, writer.lost) == (1, 100, 0)
    assert writer.current_error.errno == errno.ENOSPC
    assert read(disk, writer.stream) == [1]
    assert sum("journal.unrecorded" in line for line in caplog.messages) <= 2
    disk.room = None
    writer.flush()
    assert (writer.recorded, writer.unrecorded, writer.current_error) == (101, 0, None)
    assert read(disk, writer.stream) == list(range(1, 102))
    assert writer.close()
    assert verify("/journal", disk).is_intact


def test_what_does_not_fit_in_memory_is_lost_oldest_first_and_counted_and_named():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, max_unrecorded=10, reserve_bytes=0).open()
    writer.append(payload(1))
    disk.room = 0
    writer.append(START, essential=True)
    for number in range(3, 33):
        writer.append(payload(number))
    assert (writer.recorded, writer.unrecorded, writer.lost) == (1, 10, 21)
    disk.room = None
    writer.append(payload(33))
    assert (writer.recorded, writer.unrecorded, writer.lost) == (12, 0, 21)
    assert not writer.close()  # the truth: not all that was given is there
    assert read(disk, writer.stream) == [1, 2, *range(24, 34)]
    assert verify("/journal", disk).streams[0].missing_ranges == [(3, 23)]


def test_the_reserve_holds_the_end_events_on_a_full_disk():
    disk = SimulatedDisk()
    disk.room = 5000
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=1000).open()
    writer.append(payload(1))
    disk.room = 0
    writer.append(payload(2))
    writer.append(END, essential=True)
    assert (writer.recorded, writer.unrecorded) == (3, 0)
    assert read(disk, writer.stream) == [1, 2, 3]
    disk.room = 5000
    writer.flush()
    assert [path for path in disk.paths() if path.endswith("reserve")]  # taken again


def test_at_the_close_of_a_full_disk_the_ends_and_the_newest_fit_in_the_reserve():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=400).open()
    writer.append(payload(1))
    disk.room = 0
    writer.append(START, essential=True)
    for number in range(3, 101):
        writer.append(payload(number))
    writer.append(END, essential=True)
    assert writer.unrecorded == 100
    assert not writer.close()
    found = read(disk, writer.stream)
    assert found[:2] == [1, 2]
    assert found[2:] == list(range(102 - len(found[2:]), 102))
    assert (writer.recorded, writer.unrecorded, writer.lost) == (len(found), 0, 101 - len(found))
    assert len(found) > 10


def test_told_to_raise_it_raises_and_gives_the_sequence_again():
    disk = SimulatedDisk()
    writer = JournalWriter(
        "/journal", disk=disk, flush_seconds=math.inf, on_unrecorded="raise", reserve_bytes=200
    ).open()
    writer.append(payload(1))
    disk.room = 7
    for _ in range(3):
        with pytest.raises(UnrecordedError, match="did not take an event"):
            writer.append(payload(2))
    assert (writer.next_sequence, writer.recorded, writer.unrecorded) == (2, 1, 0)
    assert writer.append(END, essential=True) == 2  # in the room of the reserve
    disk.room = None
    assert writer.append(payload(3)) == 3
    assert writer.close()
    assert read(disk, writer.stream) == [1, 2, 3]
    assert verify("/journal", disk).is_intact


def append_pairs(writer: JournalWriter, pairs: int) -> None:
    append_pair = writer.make_pair_appender(*[lambda event, sequence, _: payload(sequence)] * 2)
    for _ in range(pairs):
        append_pair(None, None, 0.0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("flush", ["interval", "always"])
def test_whichever_call_fails_two_events_of_one_write_are_on_record_once_and_in_order(flush, code):
    number = calls = 0
    while number <= calls:
        disk = SimulatedDisk()
        writer = JournalWriter(
            "/journal", disk=disk, flush=flush, segment_bytes=150, flush_seconds=math.inf, reserve_bytes=64
        ).open()
        disk.fail(disk.calls + number, code)  # 0: none
        before = disk.calls
        append_pairs(writer, 7)
        calls, number = calls or disk.calls - before, number + 1
        assert (writer.recorded + writer.unrecorded, writer.lost) == (14, 0), number
        assert writer.close()
        assert read(disk, writer.stream) == list(range(1, 15)), number
        assert verify("/journal", disk).is_intact
    assert number > 7


@pytest.mark.parametrize("on_unrecorded", ["queue", "raise"])
def test_two_events_of_one_write_of_which_the_disk_takes_any_share_are_recorded_once_there_is_room(on_unrecorded):
    for room in range(80):
        disk = SimulatedDisk()
        writer = JournalWriter(
            "/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=0, on_unrecorded=on_unrecorded
        ).open()
        append_pairs(writer, 1)
        disk.room = room
        refused = False
        try:
            append_pairs(writer, 1)
        except UnrecordedError:
            refused = True
        recorded = writer.recorded
        assert writer.unrecorded == (4 - recorded if on_unrecorded == "queue" else 0), room
        assert refused == (recorded < 4 and on_unrecorded == "raise"), room
        assert read(disk, writer.stream) == list(range(1, recorded + 1)), room
        disk.room = None
        append_pairs(writer, 1)
        total = 6 if on_unrecorded == "queue" else recorded + 2
        assert read(disk, writer.stream) == list(range(1, total + 1)), room
        assert writer.close()
        assert verify("/journal", disk).is_intact


def test_two_events_of_one_write_are_one_call_of_the_disk():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
    append_pairs(writer, 1)  # begins the segment
    before = disk.calls
    append_pairs(writer, 3)
    assert disk.calls - before == 3
    assert writer.close()


def test_after_a_failed_sync_the_segment_takes_no_more(caplog):
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
    writer.append(payload(1))
    writer.flush()
    first = writer.segment
    writer.append(payload(2))
    disk.fail(disk.calls + 1)
    writer.flush()
    assert "journal.not_synced" in caplog.text
    writer.append(payload(3))
    assert writer.segment not in {None, first}
    assert writer.failures == 1
    assert not writer.close()  # the second event may not be on the medium, and nobody can tell
    assert read(disk, writer.stream) == [1, 2, 3]


def test_an_abandoned_writer_writes_and_syncs_nothing_more_and_another_continues_its_stream():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    writer.append(payload(1))
    calls = disk.calls
    writer.abandon(10.0)
    assert disk.calls - calls <= 4, "only its files are closed"
    disk.restart("kill")
    with_next = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, reserve_bytes=0).open()
    assert (with_next.stream, with_next.next_sequence) == (writer.stream, 2)
    with_next.close()
