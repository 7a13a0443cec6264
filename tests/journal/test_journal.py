"""The journal as it is meant to be used: streams, segments, cursors, retention, and what is refused."""

import gc
import math
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from evsys_bus.disk import OsDisk
from evsys_bus.errors import ForkedBusError, JournalClosedError, JournalOpenError, JournalVersionError
from evsys_bus.journal import (
    Cursor,
    CursorStore,
    JournalReader,
    JournalWriter,
    Position,
    RetentionPolicy,
    frame,
    verify,
)
from evsys_bus.testing import ManualClock, SimulatedDisk
from support.journals import read_sequences

NEVER = math.inf  # rounds of upkeep when the test says so


def payload(number: int) -> bytes:
    return b"event %d " % number * 3


def fill(writer: JournalWriter, count: int) -> list[int]:
    return [writer.append(payload(writer.next_sequence)) for _ in range(count)]


def read(directory: Path, after: int = 0) -> list[int]:
    reader = JournalReader(directory)
    records = [record for stream in reader.streams() for record in reader.read(stream, after)]
    assert all(record.payload == payload(record.sequence) for record in records)
    return [record.sequence for record in records]


def segments(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.seg"))


def test_what_was_appended_is_read_in_order(tmp_path):
    writer = JournalWriter(tmp_path).open()
    assert fill(writer, 100) == list(range(1, 101))
    assert (writer.recorded, writer.unrecorded, writer.lost) == (100, 0, 0)
    assert read(tmp_path) == list(range(1, 101))
    assert writer.close()
    assert read(tmp_path, after=98) == [99, 100]
    [report] = verify(tmp_path).streams
    assert (report.records, report.first_sequence, report.last_sequence, report.is_closed, report.is_intact) == (
        100,
        1,
        100,
        True,
        True,
    )


def test_files_are_for_the_owner_alone(tmp_path):
    writer = JournalWriter(tmp_path / "journal").open()
    fill(writer, 1)
    for path in [tmp_path / "journal", *(tmp_path / "journal").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    writer.close()


def test_a_later_writer_continues_the_stream_in_a_new_segment(tmp_path):
    for begin in (1, 11, 21):
        writer = JournalWriter(tmp_path).open()
        assert writer.next_sequence == begin
        fill(writer, 10)
        writer.close()
    assert len(JournalReader(tmp_path).streams()) == 1
    assert len(segments(tmp_path)) == 3
    assert read(tmp_path) == list(range(1, 31))
    assert verify(tmp_path).is_intact


def test_a_writer_that_recorded_nothing_leaves_no_segment(tmp_path):
    JournalWriter(tmp_path).open().close()
    assert segments(tmp_path) == []
    assert verify(tmp_path).is_intact


def test_a_second_live_writer_gets_a_stream_of_its_own_and_so_does_another_rank(tmp_path):
    writers = [JournalWriter(tmp_path, rank=rank).open() for rank in (0, 0, 1)]
    assert len({writer.stream for writer in writers}) == 3
    for writer in writers:
        fill(writer, 3)
        assert JournalReader(tmp_path).is_live(writer.stream)
        writer.close()
        assert not JournalReader(tmp_path).is_live(writer.stream)
    assert JournalWriter(tmp_path, rank=1).open().stream == writers[2].stream


def test_sequences_that_a_follower_has_had_are_not_given_again(tmp_path):
    writer = JournalWriter(tmp_path).open()
    fill(writer, 10)
    writer.close()
    CursorStore(str(tmp_path)).save("csv", Cursor({writer.stream: Position(10)}))
    [path] = segments(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    assert JournalWriter(tmp_path).open().next_sequence == 11


def test_after_a_power_cut_no_stream_is_continued():
    disk = SimulatedDisk()
    first = JournalWriter("/journal", disk=disk, flush_seconds=NEVER).open()
    fill(first, 3)
    first.flush()
    disk.sync_path(f"/journal/{first.stream}/lock")
    disk.restart("power")
    second = JournalWriter("/journal", disk=disk, flush_seconds=NEVER).open()
    assert second.stream != first.stream
    assert second.next_sequence == 1


def test_a_segment_is_followed_when_it_is_large_and_no_record_is_in_two(tmp_path):
    writer = JournalWriter(tmp_path, segment_bytes=500).open()
    fill(writer, 100)
    writer.close()
    paths = segments(tmp_path)
    assert len(paths) > 5
    assert all(path.stat().st_size < 700 for path in paths)
    assert read(tmp_path) == list(range(1, 101))
    for after in range(100):
        assert read(tmp_path, after)[0] == after + 1


def test_each_segment_begins_with_the_starts_of_what_is_open(tmp_path):
    def boundary(kind: str, run: str | None = None) -> bytes:
        return msgspec.msgpack.encode({"event": {"type": kind}, "run": run})

    writer = JournalWriter(tmp_path, segment_bytes=400).open()
    writer.append(boundary("experiment_start"), essential=True)
    writer.append(boundary("run_start", "run-a"), essential=True)
    fill(writer, 20)
    last_of_a = writer.append(boundary("run_end", "run-a"), essential=True)
    fill(writer, 20)
    writer.close()
    carried = {}
    for path in segments(tmp_path):
        first = int(path.stem.partition("-")[2])
        pieces = frame.scan(path.read_bytes(), frame.SEGMENT_HEADER_BYTES)
        carried[first] = [piece.sequence for piece in pieces if piece.kind == frame.CARRIED]
    assert carried[1] == []
    assert {tuple(each) for first, each in carried.items() if 1 < first <= last_of_a} == {(1, 2)}
    assert {tuple(each) for first, each in carried.items() if first > last_of_a + 10} == {(1,)}
    assert read_sequences(tmp_path) == list(range(1, writer.next_sequence))
    segments(tmp_path)[0].unlink()
    assert read_sequences(tmp_path)[:2] == [
        1,
        2,
    ]  # so that a late reader knows the runs


def test_segments_go_when_every_follower_is_done_with_them_and_not_before(tmp_path):
    writer = JournalWriter(tmp_path, segment_bytes=300, retain=RetentionPolicy(max_bytes=0), flush_seconds=NEVER).open()
    cursors = CursorStore(str(tmp_path))
    cursors.save("fast", Cursor({writer.stream: Position(50)}))
    cursors.save("slow/../x", Cursor({writer.stream: Position(20)}))
    assert cursors.list_adapters() == ["fast", "slow/../x"]
    fill(writer, 50)
    writer.flush()
    assert read(tmp_path)[0] <= 21
    firsts = [int(path.stem.partition("-")[2]) for path in segments(tmp_path)]
    assert 1 not in firsts
    assert firsts[1] > 21
    assert read(tmp_path, after=20)[0] == 21
    cursors.save("slow/../x", Cursor({writer.stream: Position(50)}))
    fill(writer, 20)
    writer.flush()
    assert read(tmp_path)[0] > 40
    writer.close()
    tail = JournalReader(tmp_path).tail(writer.stream, after=3)
    assert list(tail.poll())
    assert tail.missing_ranges  # a follower without a cursor on disk is told what it cannot have


def test_the_wall_clock_may_jump_by_a_day():
    disk, clock = SimulatedDisk(), ManualClock()
    retain = RetentionPolicy(max_age_seconds=3600)
    for jump in (0, -86400, 86400 * 2, -86400):
        clock.jump(jump)
        writer = JournalWriter(
            "/journal", disk=disk, clock=clock, segment_bytes=200, retain=retain, flush_seconds=NEVER
        ).open()
        CursorStore("/journal", disk).save("slow", Cursor({writer.stream: Position(0)}))
        fill(writer, 20)
        writer.flush()
        assert writer.close()
    reader = JournalReader("/journal", disk)
    [stream] = reader.streams()
    assert [record.sequence for record in reader.read(stream)] == list(range(1, 81))


class Unsteady(ManualClock):
    """Its wall clock is set back and forth by a day whenever it is read; the monotonic one is the machine's."""

    monotonic = staticmethod(time.monotonic)
    ahead = False

    def wall(self):
        self.ahead = not self.ahead
        self.jump(86_400 if self.ahead else -86_400)
        return super().wall()


def test_waiting_does_not_go_by_the_wall_clock(tmp_path):
    for _ in range(4):
        writer = JournalWriter(tmp_path, clock=Unsteady(), segment_bytes=200, flush_seconds=0.01).open()
        fill(writer, 20)
        assert writer.close(10.0)
    assert read(tmp_path) == list(range(1, 81))
    assert verify(tmp_path).is_intact


def test_a_clock_that_is_set_back_lets_no_segment_go_and_one_that_is_set_forward_no_newest_one():
    disk, clock = SimulatedDisk(), ManualClock()
    retain = RetentionPolicy(max_age_seconds=3600)
    writer = JournalWriter(
        "/journal", disk=disk, clock=clock, segment_bytes=200, retain=retain, flush_seconds=NEVER
    ).open()

    def first_of(jump, count):
        fill(writer, count)
        for path in disk.paths():
            disk.set_modified(path, clock.wall())
        clock.jump(jump)
        writer.flush()
        return next(JournalReader("/journal", disk).read(writer.stream)).sequence

    assert first_of(-86_400, 20) == 1
    assert 20 < first_of(86_400 + 3601, 20) <= 40
    assert writer.close()


def test_a_cursor_that_cannot_be_read_counts_as_none(tmp_path, caplog):
    cursors = CursorStore(str(tmp_path))
    cursors.save("csv", Cursor({"r0-x": Position(7)}))
    assert cursors.load("csv").position("r0-x").sequence == 7
    (tmp_path / "cursors" / "csv.json").write_text("{")
    assert cursors.load("csv") == Cursor()
    assert cursors.acknowledged_sequence("csv", "r0-x") == 0
    assert "file.damaged" in caplog.text


def test_append_before_open_and_after_close_is_a_clear_error(tmp_path):
    writer = JournalWriter(tmp_path)
    with pytest.raises(JournalClosedError, match="before it was opened"):
        writer.append(b"x")
    writer.open()
    fill(writer, 1)
    assert writer.close()
    with pytest.raises(JournalClosedError, match="after it was closed"):
        writer.append(b"x")
    assert writer.close()
    assert writer.recorded == 1


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalOpenError, match="cannot be written"):
        JournalWriter(tmp_path / "file" / "journal").open()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that there are threads is the point
def test_a_forked_child_gets_a_clear_error_and_the_parent_keeps_its_lock(tmp_path):
    writer = JournalWriter(tmp_path).open()
    fill(writer, 3)
    child = os.fork()
    if child == 0:
        try:
            writer.append(b"x")
        except ForkedBusError:
            held = any(str(tmp_path) in str(file.resolve()) for file in Path("/proc/self/fd").iterdir())
            writer.flush()
            os._exit(2 if held or writer.close() else 0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert JournalWriter(tmp_path).open().stream != writer.stream
    fill(writer, 3)
    assert writer.close()
    assert [record.sequence for record in JournalReader(tmp_path).read(writer.stream)] == list(range(1, 7))


def test_a_newer_format_is_named_and_not_continued(tmp_path, caplog):
    writer = JournalWriter(tmp_path).open()
    fill(writer, 3)
    writer.close()
    [path] = segments(tmp_path)
    path.write_bytes(frame.pack_segment_header(frame.VERSION + 1) + path.read_bytes()[frame.SEGMENT_HEADER_BYTES :])
    with pytest.raises(JournalVersionError, match=f"format {frame.VERSION + 1}; this version reads up to 1"):
        list(JournalReader(tmp_path).read(writer.stream))
    assert "format 2" in verify(tmp_path).streams[0].unreadable_segments[0]
    assert JournalWriter(tmp_path).open().stream != writer.stream
    assert "journal.not_continued" in caplog.text


def test_kinds_of_frames_that_are_not_known_are_passed_over(tmp_path):
    writer = JournalWriter(tmp_path).open()
    fill(writer, 1)
    writer.close()
    [path] = segments(tmp_path)
    with path.open("ab") as file:
        file.write(frame.pack(7, b"from the future", kind=9) + frame.pack(2, payload(2)))
    assert read(tmp_path) == [1, 2]
    assert verify(tmp_path).is_intact


def test_a_record_larger_than_what_is_read_at_once_is_read(tmp_path):
    writer = JournalWriter(tmp_path).open()
    big = os.urandom(3 << 20)
    for each in (b"a", big, b"b", big, big, b"c"):
        writer.append(each)
    writer.close()
    assert [record.payload for record in JournalReader(tmp_path).read(writer.stream)] == [
        b"a",
        big,
        b"b",
        big,
        big,
        b"c",
    ]
    assert verify(tmp_path).streams[0].records == 6


def test_a_tail_gives_out_each_record_once_over_segments_and_restarts(tmp_path):
    seen: list[int] = []
    writer = JournalWriter(tmp_path, segment_bytes=200).open()
    tail = JournalReader(tmp_path).tail(writer.stream)
    assert list(tail.poll()) == []
    for _ in range(3):
        for _ in range(10):
            fill(writer, 3)
            seen += [record.sequence for record in tail.poll()]
        writer.close()
        writer = JournalWriter(tmp_path, segment_bytes=200).open()
    assert seen == list(range(1, 91))
    assert (tail.corrupt_bytes, tail.torn_bytes, tail.missing_ranges) == (0, 0, [])
    writer.close()


class ListedWhileWritten(OsDisk):
    """Lists a stream's folder as a large one is listed: of what is written meanwhile it shows only the newest file."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write = write

    def names(self, path: str) -> list[str]:
        before = super().names(path)
        self.write()
        made = sorted({*super().names(path)} - {*before})
        return before + made[-1:]


@pytest.mark.parametrize("events", [1, 2, 10, 40])
def test_a_tail_gives_out_each_record_where_its_folder_is_listed_while_segments_are_begun(tmp_path, events):
    writer = JournalWriter(tmp_path, segment_bytes=200).open()
    fill(writer, 5)
    rounds = iter(range(20))
    disk = ListedWhileWritten(lambda: fill(writer, events) if next(rounds, None) is not None else None)
    tail = JournalReader(tmp_path, disk).tail(writer.stream)
    seen = [record.sequence for _ in range(40) for record in tail.poll()]
    assert seen == list(range(1, writer.next_sequence))
    assert tail.missing_ranges == []
    assert next(rounds, None) is None
    assert writer.close()


def test_a_tail_passes_over_segments_that_are_not_there_any_more(tmp_path):
    writer = JournalWriter(tmp_path, segment_bytes=200).open()
    fill(writer, 40)
    third, fourth = segments(tmp_path)[2:4]
    third.unlink()
    fourth.unlink()
    first, last = (int(each.stem.partition("-")[2]) for each in (third, segments(tmp_path)[2]))
    assert read(tmp_path) == [*range(1, first), *range(last, 41)]
    writer.close()


def test_a_writer_that_is_dropped_without_being_closed_leaves_no_thread_and_loses_nothing(tmp_path):
    before = threading.active_count()
    appended = []  # in one stream, or in several: the thread of the one before may still hold its lock
    for _ in range(5):
        writer = JournalWriter(tmp_path).open()
        appended.append((writer.stream, writer.append(b"event")))
        del writer
        gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    reader = JournalReader(tmp_path)
    found = [(stream, record.sequence) for stream in reader.streams() for record in reader.read(stream)]
    assert sorted(found) == sorted(appended)


def test_a_round_syncs_what_was_written_while_no_new_segment_could_be_begun():
    disk = SimulatedDisk()
    writer = JournalWriter("/journal", disk=disk, flush_seconds=NEVER, segment_bytes=800, reserve_bytes=0).open()
    writer.append(bytes(900))
    writer.flush()
    disk.unreadable.add(f"/journal/{writer.stream}")
    for _ in range(3):
        writer.append(bytes(300))
        writer.flush()
    disk.unreadable.clear()
    disk.restart("power")
    assert [each.sequence for each in JournalReader("/journal", disk).read(writer.stream)] == [1, 2, 3, 4]
