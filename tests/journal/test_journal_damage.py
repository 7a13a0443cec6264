"""Rows 2, 5 and 6 of the fault matrix: cut at every byte, every bit flipped, garbage behind; and a list as model."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evsys_bus.journal import JournalReader, JournalWriter, frame, verify
from evsys_bus.testing import SimulatedDisk

EVENTS = 6


def payload(number: int) -> bytes:
    return b"EJ event %d" % number


def recorded(events: int = EVENTS) -> tuple[SimulatedDisk, str, str]:
    """A closed journal on a simulated disk, its stream, and the path of its only segment."""
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
    for number in range(1, events + 1):
        writer.append(payload(number))
    path = writer.segment
    assert path is not None
    assert writer.close()
    return disk, writer.stream, path


def read(disk: SimulatedDisk, stream: str) -> list[int]:
    records = list(JournalReader("/journal", disk).read(stream))
    assert all(record.payload == payload(record.sequence) for record in records)
    return [record.sequence for record in records]


def size_of(number: int) -> int:
    return frame.FRAME_HEADER_BYTES + len(payload(number))


def test_a_segment_cut_at_every_byte_gives_what_was_whole_and_is_not_called_damaged():
    disk, stream, path = recorded()
    content = disk.contents(path)
    whole = bytes(content)
    for cut in range(len(whole)):
        content[:] = whole[:cut]
        fit = max(0, cut - frame.SEGMENT_HEADER_BYTES) // size_of(1)
        assert read(disk, stream) == list(range(1, min(fit, EVENTS) + 1))
        [report] = verify("/journal", disk).streams
        assert report.corrupt_ranges == []
        assert report.bytes + report.torn_bytes == cut


def test_after_a_cut_at_any_byte_the_next_writer_numbers_on_and_all_is_read():
    disk, _, path = recorded()
    for cut in range(len(disk.contents(path))):
        disk, stream, path = recorded()
        del disk.contents(path)[cut:]
        kept = read(disk, stream)
        writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
        assert (writer.stream, writer.next_sequence) == (stream, len(kept) + 1)
        writer.append(payload(writer.next_sequence))
        assert read(disk, stream) == [*kept, len(kept) + 1]
        assert writer.close()
        assert verify("/journal", disk).is_intact


def test_every_bit_flipped_costs_at_most_the_record_it_is_in_and_is_counted():
    disk, stream, path = recorded()
    content = disk.contents(path)
    for bit in range(len(content) * 8):
        content[bit // 8] ^= 1 << bit % 8
        place = bit // 8 - frame.SEGMENT_HEADER_BYTES
        hit = place // size_of(1) + 1 if place >= 0 else None
        assert read(disk, stream) == [number for number in range(1, EVENTS + 1) if number != hit]
        [report] = verify("/journal", disk).streams
        assert report.records == EVENTS - (hit is not None and hit <= EVENTS)
        if hit is None or hit <= EVENTS:
            assert sum(each.length for each in report.corrupt_ranges) == (
                frame.SEGMENT_HEADER_BYTES if hit is None else size_of(1)
            )
        else:
            assert report.torn_bytes == frame.FRAME_HEADER_BYTES  # the frame that says "closed"
        assert report.missing_ranges == ([(hit, hit)] if hit is not None and hit <= EVENTS else [])
        assert report.is_intact == (hit is not None and hit > EVENTS)
        tail = JournalReader("/journal", disk).tail(stream, after=1)
        list(tail.poll())
        assert tail.missing_ranges == (report.missing_ranges if hit != 1 else [])
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "junk", [bytes(300), bytes(range(256)) * 8, b"EJ" * 500, frame.pack(9, b"x" * 90)[:-1]], ids=len
)
def test_zeros_and_garbage_behind_the_last_record_cost_nothing(junk):
    disk, stream, path = recorded()
    disk.contents(path).extend(junk)
    assert read(disk, stream) == list(range(1, EVENTS + 1))
    [report] = verify("/journal", disk).streams
    assert report.torn_bytes == len(junk)
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open()
    assert writer.next_sequence == EVENTS + 1
    writer.append(payload(EVENTS + 1))
    tail = JournalReader("/journal", disk).tail(stream)
    assert [record.sequence for record in tail.poll()] == list(range(1, EVENTS + 2))
    assert (tail.torn_bytes, tail.corrupt_bytes, tail.missing_ranges) == (len(junk), 0, [])


def test_a_record_on_its_way_is_neither_read_nor_damage_and_is_read_when_it_is_whole():
    disk, stream, path = recorded(1)
    content = disk.contents(path)
    coming = frame.pack(2, payload(2))
    tail = JournalReader("/journal", disk).tail(stream)
    assert [record.sequence for record in tail.poll()] == [1]
    for byte in coming[:-1]:
        content.append(byte)
        assert list(tail.poll()) == []
    content.append(coming[-1])
    assert [record.sequence for record in tail.poll()] == [2]
    assert (tail.corrupt_bytes, tail.torn_bytes) == (0, 0)


def test_a_segment_that_is_gone_is_passed_over_and_its_sequences_are_named():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, segment_bytes=100, flush_seconds=math.inf).open()
    for number in range(1, 31):
        writer.append(payload(number))
    writer.close()
    paths = [path for path in disk.paths() if path.endswith(".seg")]
    disk.remove(paths[2])
    first, following = (int(path.rpartition("-")[2].removesuffix(".seg")) for path in paths[2:4])
    tail = JournalReader("/journal", disk).tail(writer.stream)
    assert [record.sequence for record in tail.poll()] == [n for n in range(1, 31) if not first <= n < following]
    assert tail.missing_ranges == verify("/journal", disk).streams[0].missing_ranges == [(first, following - 1)]


# -- a journal against a list -----------------------------------------------------------------------------------------

ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 300)),
        st.tuples(st.sampled_from(["restart", "kill", "flush", "tail", "full", "room", "lost directory"]), st.just(0)),
        st.tuples(st.just("power"), st.integers(0, 4)),
        st.tuples(st.just("garbage"), st.integers(1, 60)),
    ),
    max_size=60,
)


class Model:
    """What has to be read: per stream, the payload of every sequence that must be there, and of those that may be."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.must: dict[str, dict[int, bytes]] = {}
        self.may: dict[str, dict[int, bytes]] = {}
        self.flushed: dict[str, int] = {}
        self.has_lost_directory = False
        self.open()

    def open(self) -> None:
        self.writer = JournalWriter(
            "/journal", disk=self.disk, segment_bytes=400, flush_seconds=math.inf, reserve_bytes=0
        ).open()
        self.has_lost_directory = False
        if self.stream in self.flushed:  # continued; from 1 on, if its directory was lost with all that was flushed
            self.flushed[self.stream] = min(self.flushed[self.stream], self.writer.next_sequence - 1)

    @property
    def stream(self) -> str:
        return self.writer.stream

    def act(self, act: str, size: int) -> None:
        getattr(self, act.replace(" ", "_"))(size)

    def append(self, size: int) -> None:
        sequence = self.writer.next_sequence
        data = b"%d:" % sequence + bytes(size)
        self.writer.append(data)
        self.may.setdefault(self.stream, {})[sequence] = data
        if not self.writer.unrecorded:
            self.must.setdefault(self.stream, {}).update(self.may[self.stream])

    def restart(self, _: int) -> None:
        self.room(0)
        is_recorded = self.writer.close()
        assert is_recorded or self.has_lost_directory
        if is_recorded:  # otherwise the events wait in memory for a directory that does not come back
            self.must.setdefault(self.stream, {}).update(self.may.get(self.stream, {}))
        self.disk.restart()
        self.open()

    def kill(self, _: int) -> None:
        self.disk.room = None
        self.disk.restart()
        self.may[self.stream] = dict(self.must.get(self.stream, {}))
        self.open()

    def power(self, keep: int) -> None:
        self.disk.room = None
        self.disk.restart("power", keep / 4)
        for stream in self.must:
            self.must[stream] = {n: data for n, data in self.must[stream].items() if n <= self.flushed.get(stream, 0)}
        self.open()

    def flush(self, _: int) -> None:
        self.writer.flush()
        if not self.writer.unrecorded:
            self.must.setdefault(self.stream, {}).update(self.may.get(self.stream, {}))
            self.flushed[self.stream] = self.writer.next_sequence - 1

    def tail(self, _: int) -> None:
        self.check()

    def full(self, _: int) -> None:
        self.disk.room = 50

    def room(self, _: int) -> None:
        self.disk.room = None
        self.flush(0)

    def lost_directory(self, _: int) -> None:
        self.room(0)
        self.disk.take_away("/journal")
        self.must, self.flushed = {}, {}
        self.may = {self.stream: {}}
        self.has_lost_directory = True
        self.writer.flush()  # notices

    def garbage(self, size: int) -> None:
        """At the end of a dead writer's last segment."""
        self.restart(0)
        paths = [path for path in self.disk.paths() if path.endswith(".seg") and self.stream in path]
        if paths:
            self.disk.contents(paths[-1]).extend(b"\x07EJ\x00"[: size % 5] * size)

    def check(self) -> None:
        reader = JournalReader("/journal", self.disk)
        for stream, must in self.must.items():
            tail = reader.tail(stream)
            got = [(record.sequence, record.payload) for record in tail.poll()]
            assert got == sorted(got)
            assert len(dict(got)) == len(got)
            assert must.items() <= dict(got).items()
            assert tail.corrupt_bytes == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example([("append", 3), ("kill", 0), ("flush", 0), ("power", 0)])
@example([("append", 3), ("full", 0), *[("append", 30)] * 9, ("kill", 0), ("append", 3), ("garbage", 9), ("power", 2)])
@example([("lost directory", 0), ("append", 0), ("garbage", 1)])
@given(ACTS)
def test_a_journal_is_a_list_whatever_happens_to_it(acts):
    model = Model()
    for act, size in acts:
        model.act(act, size)
    model.room(0)
    model.check()


def test_damage_in_real_files_is_found_by_the_same_means(tmp_path: Path):
    writer = JournalWriter(tmp_path).open()
    for number in range(1, 1001):
        writer.append(payload(number))
    writer.close()
    [path] = tmp_path.rglob("*.seg")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    [report] = verify(tmp_path).streams
    assert report.records == 999
    assert len(report.corrupt_ranges) == len(report.missing_ranges) == 1
    assert not report.is_intact
