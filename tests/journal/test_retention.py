"""`retain` waits for whoever is registered, whatever their files look like; what it removed is told."""

import errno
import math
import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.delivery.subscriptions import load_subscriptions, register
from evsys_bus.errors import RetryLaterError
from evsys_bus.journal import Cursor, CursorStore, JournalWriter, OsDisk, Position, RetentionPolicy, layout, verify
from evsys_bus.journal.retention import RetentionManager
from evsys_bus.testing import FailingSink, ManualClock, SimulatedDisk


class Counting(OsDisk):
    """Counts what is read, and refuses to list or to read what a test names."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.refused: tuple[str, ...] = ()

    def open_read(self, path: str) -> int:
        self.opened.append(path)
        self._refuse(path)
        return super().open_read(path)

    def names(self, path: str) -> list[str]:
        self._refuse(path)
        return list(super().names(path))

    def size(self, path: str) -> int:
        self.opened.append(path)
        return super().size(path)

    def _refuse(self, path: str) -> None:
        if path.endswith(self.refused) if self.refused else False:
            raise OSError(errno.EIO, "Input/output error", path)


@pytest.fixture
def stream(tmp_path: Path) -> str:
    """A stream of 40 segments, one event in each."""
    writer = JournalWriter(tmp_path, segment_bytes=50, flush_seconds=3600).open()
    for _ in range(40):
        writer.append(b"x" * 60)
    assert writer.close()
    return writer.stream


def retention(folder: Path, disk: OsDisk) -> RetentionManager:
    return RetentionManager(disk, ManualClock(time.time()), str(folder), RetentionPolicy(max_bytes=500))


def test_a_registered_follower_without_a_cursor_that_can_be_read_has_had_nothing(tmp_path, stream):
    disk = Counting()
    register(str(tmp_path), [Subscription("one")])
    cursor = Path(layout.cursor_path(str(tmp_path), "one"))
    cursor.unlink()
    assert retention(tmp_path, disk).prune(stream) == []
    shutil.rmtree(cursor.parent)
    assert retention(tmp_path, disk).prune(stream) == []
    for damage in (b"", b'{"streams": {"', b"[]", b"\x00" * 300):
        cursor.parent.mkdir(exist_ok=True)
        cursor.write_bytes(damage)
        assert retention(tmp_path, disk).prune(stream) == []
    cursor.unlink()
    cursor.mkdir()
    assert retention(tmp_path, disk).prune(stream) == []
    cursor.rmdir()
    CursorStore(str(tmp_path)).save("one", Cursor({stream: Position(20, 20)}))
    assert len(retention(tmp_path, disk).prune(stream)) == 20


def test_the_parts_of_a_row_that_is_open_stay_until_it_was_delivered(tmp_path, stream):
    """The next courier reads them again."""
    register(str(tmp_path), [Subscription("one")])
    CursorStore(str(tmp_path)).save("one", Cursor({stream: Position(30, 30)}, rows={stream: 11}))
    assert len(retention(tmp_path, OsDisk()).prune(stream)) == 10
    CursorStore(str(tmp_path)).save("one", Cursor({stream: Position(30, 30)}))
    assert len(retention(tmp_path, OsDisk()).prune(stream)) == 20


@pytest.mark.parametrize("refused", ["/cursors", "/couriers", "/cursors/one.json", "/cursors/two.json"])
def test_where_something_cannot_be_listed_or_read_now_nothing_goes_this_round(tmp_path, stream, refused):
    disk = Counting()
    register(str(tmp_path), [Subscription("one"), Subscription("two")])
    for name in ("one", "two"):
        CursorStore(str(tmp_path)).save(name, Cursor({stream: Position(40, 40)}))
    disk.refused = (refused,)
    pruned = retention(tmp_path, disk)
    with pytest.raises(OSError, match="Input/output"):
        pruned.prune(stream)
    assert len(list((tmp_path / stream).glob("*.seg"))) == 40
    disk.refused = ()
    gone = pruned.prune(stream)
    assert len(gone) > 30
    assert (pruned.removed.segments, pruned.removed.events) == (len(gone), len(gone))
    assert pruned.removed.up_to == len(gone)


def test_where_the_cursors_folder_is_a_file_nothing_goes(tmp_path, stream):
    (tmp_path / "cursors").write_text("not a folder")
    with pytest.raises(NotADirectoryError):
        retention(tmp_path, Counting()).prune(stream)


def test_a_follower_of_other_ranks_is_not_waited_for(tmp_path, stream):
    register(str(tmp_path), [Subscription("other", policy=Subscription("x").policy.__class__(ranks=(3,)))])
    assert retention(tmp_path, Counting()).prune(stream)


def test_each_cursor_is_read_once_a_round_and_each_segment_measured_once_in_all(tmp_path, stream):
    disk = Counting()
    names = [f"f{number}" for number in range(50)]
    register(str(tmp_path), [Subscription(name) for name in names])
    for name in names:
        CursorStore(str(tmp_path)).save(name, Cursor({stream: Position(30, 30)}))
    CursorStore(str(tmp_path)).save("f49", Cursor())
    pruned = retention(tmp_path, disk)
    assert pruned.prune(stream) == []
    assert len([each for each in disk.opened if "/cursors/" in each]) <= 50
    assert len([each for each in disk.opened if each.endswith("spec.json")]) == 2  # of those that hold something back
    disk.opened.clear()
    assert pruned.prune(stream) == []
    assert len([each for each in disk.opened if each.endswith(".seg")]) == 1  # the one that may still grow
    assert len(disk.opened) <= 53


def publish(bus: EventBus, steps: range) -> None:
    for step in steps:
        bus.publish(StepEnd(LoopState(step, 999, "run"), step, TrainingBatch(), {"loss": 0.5}))


def test_nobody_loses_events_because_the_disk_refused_to_register_him(tmp_path, caplog):
    """A file stands where the folders of the couriers and cursors belong, for a while."""
    journal = tmp_path / "journal"
    journal.mkdir()
    blocked = [journal / "couriers", journal / "cursors"]
    for each in blocked:
        each.write_text("in the way")
    sink = FailingSink([RetryLaterError("away")] * 100_000)
    writer = JournalWriter(journal, segment_bytes=1500, retain=RetentionPolicy(max_bytes=1), flush_seconds=3600)
    with EventBus(sinks=[follow(sink, "board")], journal=writer, drain_timeout=0.5) as bus:
        publish(bus, range(60))
        writer.flush()
        assert len(list(journal.glob("r0-*/*.seg"))) > 5
        assert bus.health().journal.removed_events == 0
        for each in blocked:
            each.unlink()
        deadline = time.monotonic() + 10
        while not load_subscriptions(str(journal)) and time.monotonic() < deadline:
            time.sleep(0.02)
        publish(bus, range(60, 120))
        writer.flush()
    assert "courier.not_enlisted" in caplog.text
    assert [each.name for each in load_subscriptions(str(journal))] == ["board"]
    assert bus.receipt.deliveries[0].pending == 120


def test_followers_are_on_record_before_the_first_event(tmp_path):
    journal = tmp_path / "journal"
    seen: list[list[str]] = []

    class Early(JournalWriter):
        def retain_for(self, followers) -> None:
            super().retain_for(followers)
            seen.append([*followers] or sorted(each.name for each in journal.glob("r0-*/*.seg")))

    with EventBus(sinks=[follow(FailingSink([]), "board")], journal=Early(journal)) as bus:
        assert [each.name for each in load_subscriptions(str(journal))] == ["board"]
        publish(bus, range(3))
    assert len(seen) == 1


def test_what_an_older_stream_holds_goes_before_anything_of_a_newer_one():
    disk = SimulatedDisk()
    streams = []
    for _ in range(3):
        writer = JournalWriter("/journal", disk=disk, segment_bytes=50, flush_seconds=math.inf, reserve_bytes=0).open()
        streams.append(writer.stream)
        for _ in range(4):
            writer.append(b"x" * 60)
        writer.close()
        disk.restart("power")
    retention = RetentionManager(disk, ManualClock(), "/journal", RetentionPolicy(max_bytes=500))
    cursors = CursorStore("/journal", disk)

    def left():
        """Segments with events."""
        folders = [f"/journal/{stream}" for stream in streams]
        return [sum(disk.size(f"{each}/{name}") > 50 for name in layout.list_segments(disk, each)) for each in folders]

    cursors.save("one", Cursor({streams[0]: Position(3), streams[2]: Position(4)}))
    assert retention.prune(streams[2]) == []
    assert left() == [1, 4, 4]
    cursors.save("one", Cursor({streams[0]: Position(4), streams[1]: Position(2), streams[2]: Position(4)}))
    assert retention.prune(streams[2]) == []
    assert left() == [0, 2, 4]
    cursors.save("one", Cursor({streams[0]: Position(4), streams[1]: Position(4), streams[2]: Position(4)}))
    retention.prune(streams[2])
    assert left() == [0, 1, 4]  # these are not too many
    assert JournalWriter("/journal", disk=disk, flush_seconds=math.inf).open().next_sequence == 1


def a_power_cut(folder: Path, events: int, *, rank: int = 0) -> str:
    """Leave a stream of one event in each segment whose writer died in another boot; nobody goes on with it."""
    writer = JournalWriter(folder, segment_bytes=50, flush_seconds=3600, rank=rank, reserve_bytes=4096).open()
    for _ in range(events):
        writer.append(b"x" * 60)
    assert writer.close()
    (folder / writer.stream / layout.RESERVE).write_bytes(bytes(4096))  # as a kill leaves it
    (folder / writer.stream / layout.LOCK).write_text('{"pid":1,"host":"elsewhere","since":"","boot":"before"}')
    return writer.stream


def segments_of(folder: Path, stream: str) -> list[str]:
    return [str(each) for each in layout.list_segments(OsDisk(), str(folder / stream))]


@pytest.fixture
def streams(tmp_path: Path) -> list[str]:
    """Three streams that power cuts left, 10 segments in each, and a fourth one."""
    return [a_power_cut(tmp_path, 10) for _ in range(4)]


def of_all(folder: Path, sequence: int) -> None:
    place = Position(sequence, sequence)
    CursorStore(str(folder)).save("one", Cursor(dict.fromkeys(layout.list_streams(OsDisk(), str(folder)), place)))


def test_older_streams_that_nobody_writes_shrink_too_the_oldest_first(tmp_path, streams):
    register(str(tmp_path), [Subscription("one")])
    pruned = RetentionManager(OsDisk(), ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=2500))
    assert pruned.prune(streams[-1]) == []
    assert [len(segments_of(tmp_path, each)) for each in streams] == [10] * 4
    of_all(tmp_path, 10)
    assert pruned.prune(streams[-1]) == []  # what is left is small enough
    counts = [len(segments_of(tmp_path, each)) for each in streams]
    assert counts[0] == 1
    assert 1 < counts[1] < 10
    assert counts[2:] == [10, 10]
    assert sum(each.stat().st_size for each in tmp_path.rglob("*.seg")) <= 2500 + 100
    assert pruned.removed.segments == 10 + 10 - counts[1]
    assert pruned.removed.events == pruned.removed.segments
    assert not (tmp_path / streams[0] / layout.RESERVE).exists()
    report = {each.stream: each for each in verify(tmp_path).streams}
    assert (report[streams[0]].removed_events, report[streams[0]].is_intact, report[streams[0]].is_closed) == (
        10,
        True,
        True,
    )
    assert report[streams[1]].removed_events == 10 - counts[1]


def test_a_follower_that_lags_in_an_older_stream_keeps_that_stream_and_what_is_behind_it(tmp_path, streams):
    register(str(tmp_path), [Subscription("one")])
    places = dict.fromkeys(streams, Position(10, 10)) | {streams[1]: Position(3, 3)}
    CursorStore(str(tmp_path)).save("one", Cursor(places))
    pruned = RetentionManager(OsDisk(), ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=0))
    assert pruned.prune(streams[3]) == []
    assert [len(segments_of(tmp_path, each)) for each in streams] == [1, 7, 10, 10]
    of_all(tmp_path, 10)
    assert len(pruned.prune(streams[3])) == 9
    assert [len(segments_of(tmp_path, each)) for each in streams] == [1, 1, 1, 1]


def test_the_sequences_of_a_stream_that_retention_emptied_are_not_given_out_again(tmp_path, streams):
    RetentionManager(OsDisk(), ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=0)).prune(streams[3])
    for each in streams[1:]:
        shutil.rmtree(tmp_path / each)  # by somebody who tidies up
    me = layout.LockOwner(1, os.uname().nodename, "", OsDisk().boot())
    (tmp_path / streams[0] / layout.LOCK).write_bytes(msgspec.json.encode(me))
    writer = JournalWriter(tmp_path, flush_seconds=3600).open()
    assert (writer.stream, writer.next_sequence) == (streams[0], 11)
    assert writer.close()


def test_streams_that_are_written_of_other_ranks_or_newer_are_left_alone(tmp_path):
    other, old = a_power_cut(tmp_path, 5, rank=1), a_power_cut(tmp_path, 5)
    live = JournalWriter(tmp_path, segment_bytes=50, flush_seconds=3600).open()
    own, newer = a_power_cut(tmp_path, 5), a_power_cut(tmp_path, 5)
    for _ in range(5):
        live.append(b"x" * 60)
    pruned = RetentionManager(OsDisk(), ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=0))
    assert len(pruned.prune(own)) == 4
    assert [len(segments_of(tmp_path, each)) for each in (other, old, live.stream, newer)] == [5, 1, 5, 5]
    assert live.close()
    pruned.prune(own)
    assert len(segments_of(tmp_path, live.stream)) == 1


def test_old_segments_of_older_streams_go_by_their_age_even_the_last_one(tmp_path, streams):
    clock = ManualClock(time.time())
    pruned = RetentionManager(OsDisk(), clock, str(tmp_path), RetentionPolicy(max_age_seconds=3600))
    pruned.prune(streams[3])
    assert [len(segments_of(tmp_path, each)) for each in streams] == [10] * 4
    clock.advance(4000)
    pruned.prune(streams[3])
    pruned.prune(streams[3])
    assert [segments_of(tmp_path, each) for each in streams] == [["000011-11.seg"]] * 3 + [["000010-10.seg"]]


def test_what_a_power_cut_tore_in_the_last_segment_does_not_keep_it(tmp_path):
    torn, own = a_power_cut(tmp_path, 3), a_power_cut(tmp_path, 1)
    last = tmp_path / torn / segments_of(tmp_path, torn)[-1]
    last.write_bytes(last.read_bytes()[:60] + bytes(100))
    empty = a_power_cut(tmp_path, 0)
    newest = a_power_cut(tmp_path, 1)
    RetentionManager(OsDisk(), ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=0)).prune(newest)
    assert [len(segments_of(tmp_path, each)) for each in (torn, own, empty, newest)] == [1, 1, 0, 1]
    assert (tmp_path / torn / segments_of(tmp_path, torn)[0]).stat().st_size < 50
    assert verify(tmp_path).is_intact


def test_older_streams_are_looked_at_once_and_cursors_once_a_round(tmp_path, streams):
    disk = Counting()
    names = [f"f{number}" for number in range(10)]
    register(str(tmp_path), [Subscription(name) for name in names])
    for name in names:
        CursorStore(str(tmp_path)).save(
            name, Cursor(dict.fromkeys(streams, Position(10, 10)) | {streams[0]: Position(4, 4)})
        )
    pruned = RetentionManager(disk, ManualClock(time.time()), str(tmp_path), RetentionPolicy(max_bytes=0))
    pruned.prune(streams[3])
    disk.opened.clear()
    pruned.prune(streams[3])
    assert [each for each in disk.opened if any(name in each for name in streams[1:3])] == []
    assert len([each for each in disk.opened if "/cursors/" in each]) <= 10
    assert len([each for each in disk.opened if each.endswith(".seg")]) == 1


def test_a_writer_shrinks_what_was_left_before_it(tmp_path):
    old = [a_power_cut(tmp_path, 10) for _ in range(3)]
    writer = JournalWriter(tmp_path, retain=RetentionPolicy(max_bytes=500), flush_seconds=3600).open()
    writer.append(b"x" * 60)
    writer.flush()
    assert [len(segments_of(tmp_path, each)) for each in old[:2]] == [1, 1]
    assert writer.removed.segments > 20
    assert writer.close()
