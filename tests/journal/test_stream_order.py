"""Which stream comes first: a counter decides, never a clock; and what is a stream, and a journal, at all."""

import os
import re
from pathlib import Path

import pytest

from evsys_bus.bus.callback_marks import BusCallbackMarks, recorded_marks
from evsys_bus.cli.events import EventFilter, EventReader
from evsys_bus.cli.records import find_journal, list_journals_newest_first
from evsys_bus.codec import encode
from evsys_bus.delivery.source import Batch, EventSource
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope
from evsys_bus.journal import Cursor, JournalReader, JournalWriter, OsDisk, layout
from evsys_bus.journal.stream_lock import acquire_stream
from evsys_bus.testing import ManualClock, SimulatedDisk

DAY = 86_400.0
OLD = ("r0-20260131T120000-5f3a91c2", "r0-20260201T080000-00000000")


def life(directory, wall, rank=0, family="r", disk=None, event=b"x"):
    """A writer that records one event, as by this clock; the name of its stream."""
    clock = ManualClock(wall=wall)
    writer = JournalWriter(directory, rank=rank, family=family, disk=disk, clock=clock, reserve_bytes=0).open()
    writer.append(event)
    writer.close()
    return writer.stream


def restart_machine(directory):
    """As if the machine had been started again since, so that no stream is continued."""
    for lock in Path(directory).glob("[rc]*/lock"):
        lock.write_bytes(re.sub(rb'"boot":"[^"]*"', b'"boot":"before"', lock.read_bytes()))


@pytest.mark.parametrize("family", ["r", "c"])
def test_a_stream_that_is_begun_while_the_clock_is_behind_comes_after_the_older_ones(tmp_path, family):
    begun = []
    for wall in (40 * DAY, 39 * DAY, 0.0, 41 * DAY):
        begun.append(life(tmp_path, wall, family=family))
        restart_machine(tmp_path)
    assert JournalReader(tmp_path).streams(family) == begun
    assert [layout.stream_sort_key(each)[0] for each in begun] == [1, 2, 3, 4]


def test_each_rank_and_family_has_a_counter_of_its_own(tmp_path):
    for rank, family in ((0, "r"), (10, "r"), (10, "r"), (0, "c")):
        stream = life(tmp_path, DAY, rank, family)
        restart_machine(tmp_path)
        assert stream.startswith(
            f"{family}{rank}-00000{2 if layout.list_streams(OsDisk(), str(tmp_path), rank)[1:] else 1}-"
        )


def test_streams_of_0_1_0_keep_their_order_and_come_before_those_with_a_counter(tmp_path):
    for name in reversed(OLD):
        (tmp_path / name).mkdir()
    new = life(tmp_path, 0.0)  # a clock that is years behind
    assert JournalReader(tmp_path).streams() == [*OLD, new]


def test_the_counter_sorts_as_a_number_beyond_its_six_digits():
    names = [f"r0-{number:06d}-20260131T120000-5f3a91c2" for number in (10_000_001, 999_999, 1_000_000)]
    assert sorted(names, key=layout.stream_sort_key) == [names[1], names[2], names[0]]
    assert layout.stream_sort_key(layout.new_stream_name(0, DAY, "r", names))[0] == 10_000_002


@pytest.mark.parametrize("wall", [-5e9, 1e15])
def test_a_clock_that_is_out_of_all_bounds_still_gives_a_name(wall):
    name = layout.new_stream_name(3, wall)
    assert layout.stream_sort_key(name) == (1, name)
    assert layout.rank_of(name) == 3


def test_only_the_newest_stream_is_continued_so_a_third_life_on_the_first_host_comes_last(tmp_path):
    first = life(tmp_path, 10 * DAY)
    assert life(tmp_path, 10 * DAY) == first
    lock = tmp_path / first / "lock"
    signed = lock.read_bytes()
    lock.write_bytes(signed.replace(os.uname().nodename.encode(), b"elsewhere"))
    second = life(tmp_path, 9 * DAY)  # the job was moved to another host
    other = tmp_path / second / "lock"
    other.write_bytes(other.read_bytes().replace(os.uname().nodename.encode(), b"another"))
    lock.write_bytes(signed)  # and back to the first one
    third = life(tmp_path, 8 * DAY)
    assert len({first, second, third}) == 3
    assert JournalReader(tmp_path).streams() == [first, second, third]


def test_a_live_newest_stream_is_left_alone_and_no_older_one_is_taken_up_in_its_place(tmp_path):
    first = JournalWriter(tmp_path, reserve_bytes=0).open()
    second = JournalWriter(tmp_path, reserve_bytes=0).open()
    first.close()
    third = JournalWriter(tmp_path, reserve_bytes=0).open()
    assert JournalReader(tmp_path).streams() == [first.stream, second.stream, third.stream]
    for writer in (second, third):
        writer.close()
    assert life(tmp_path, DAY) == third.stream


@pytest.mark.parametrize("name", ["r7-lora", "c1", "r0-2026", "r16", "c0-x", "r0", "r1-20260131T120000", f"{OLD[0]}x"])
def test_a_run_whose_folder_is_called_much_like_a_stream_is_none(tmp_path, name):
    (tmp_path / "exp" / name).mkdir(parents=True)
    life(tmp_path / "exp" / "journal", DAY)
    assert JournalReader(tmp_path / "exp").streams() == []
    assert JournalReader(tmp_path / "exp").streams("c") == []
    assert find_journal(tmp_path / "exp").directory == tmp_path / "exp" / "journal"
    assert find_journal(tmp_path / "exp" / name).run == name


def test_a_run_called_exactly_as_a_stream_is_told_by_what_is_in_its_folder(tmp_path):
    (tmp_path / "exp" / OLD[0]).mkdir(parents=True)
    (tmp_path / "exp" / OLD[0] / "metrics.csv").touch()
    (tmp_path / "exp" / OLD[1]).touch()
    life(tmp_path / "exp" / "journal", DAY)
    assert find_journal(tmp_path / "exp").directory == tmp_path / "exp" / "journal"


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"evsys_bus_journal": "x"}', b"\xff" * 10_000, b'{"mine": 1}'])
def test_a_journal_file_that_is_missing_or_damaged_stops_nothing_and_is_written_again(tmp_path, content):
    stream = life(tmp_path / "j", DAY)
    file = tmp_path / "j" / "journal.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert find_journal(tmp_path / "j").directory == tmp_path / "j"
    assert life(tmp_path / "j", DAY) == stream
    assert layout.is_journal(OsDisk(), str(tmp_path / "j"))
    assert b'"evsys_bus_journal":1' in file.read_bytes()


def test_a_journal_file_of_a_later_version_stays_as_it_is(tmp_path):
    (tmp_path / "journal.json").write_text('{"evsys_bus_journal": 2, "more": true}')
    life(tmp_path, DAY)
    assert "more" in (tmp_path / "journal.json").read_text()


def test_what_stands_in_the_place_of_the_journal_file_is_set_aside_with_a_warning_and_costs_no_event(tmp_path, caplog):
    (tmp_path / "journal.json" / "in the way").mkdir(parents=True)
    stream = life(tmp_path, DAY)
    assert [record.payload for record in JournalReader(tmp_path).read(stream)] == [b"x"]
    assert "file.damaged" in caplog.text
    assert (tmp_path / "journal.json.damaged" / "in the way").is_dir()
    assert find_journal(tmp_path).directory == tmp_path


def test_a_journal_without_a_stream_says_what_it_is(tmp_path):
    disk = SimulatedDisk()
    disk.make_directory("/run")
    assert not layout.is_journal(disk, "/run")
    acquire_stream(disk, ManualClock(), "/run/journal", 0)
    disk.take_away(f"/run/journal/{layout.list_streams(disk, '/run/journal')[0]}")
    assert layout.is_journal(disk, "/run/journal")


def test_journals_below_runs_are_found_by_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    life(tmp_path / "runs" / "a" / "journal", DAY)
    (tmp_path / "runs" / "journal" / "r7-lora").mkdir(parents=True)
    assert list_journals_newest_first() == [Path("runs/a/journal")]


def record(directory, numbers, wall, rank=0):
    """A life that records marks with these numbers, by a clock that says this; its stream."""
    writer = JournalWriter(directory, rank=rank, clock=ManualClock(wall=wall), reserve_bytes=0).open()
    for at, number in enumerate(numbers):
        event = BusCallbackMarks("run", "/run", number, {"stop": number})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, wall + at, event, "run", rank)))
    return writer


@pytest.mark.parametrize("behind", [DAY, 2.0, -DAY])
def test_a_resumed_life_is_read_behind_the_one_it_resumes_whatever_its_clock_says(tmp_path, behind):
    record(tmp_path, range(5), 10 * DAY).close()
    restart_machine(tmp_path)
    record(tmp_path, range(3, 8), 10 * DAY - behind).close()
    expected = [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert [each.event.step for each in EventReader(tmp_path, EventFilter()).poll()] == expected
    assert [each.event.step for each in EventReader(tmp_path, EventFilter()).latest(7)] == expected[-7:]
    assert [each.step for each in recorded_marks(str(tmp_path), "run")] == expected[::-1]


@pytest.mark.parametrize("behind", [DAY, 2.0, -DAY])
def test_a_follower_gets_three_lives_in_the_order_in_which_they_were_lived(tmp_path, behind):
    for life_number in range(3):
        record(tmp_path, range(10 * life_number, 10 * life_number + 4), 10 * DAY - life_number * behind).close()
        restart_machine(tmp_path)
    feed = EventSource(str(tmp_path), Cursor(), ranks=None, disk=OsDisk(), clock=ManualClock(), faults=FaultLog())
    steps = []
    while True:
        batch = Batch()
        if feed.read_batch(batch, 3, 1 << 20, include_idle=True) == "dry" and not batch.items:
            break
        steps += [each.event.step for each in batch.items]
    assert steps == [*range(4), *range(10, 14), *range(20, 24)]


def test_ranks_and_writers_that_live_at_the_same_time_are_merged_by_time(tmp_path):
    record(tmp_path, [0, 2, 4], 0.5, rank=0).close()
    record(tmp_path, [1, 3, 5], 1.0, rank=1).close()
    assert [each.event.step for each in EventReader(tmp_path, EventFilter()).poll()] == [0, 1, 2, 3, 4, 5]
    writers = [record(tmp_path / "live", [0, 2, 4], 0.5), record(tmp_path / "live", [1, 3, 5], 1.0)]
    assert [each.event.step for each in EventReader(tmp_path / "live", EventFilter()).poll()] == [0, 1, 2, 3, 4, 5]
    for writer in writers:
        writer.close()


def test_the_place_of_a_time_is_found_in_a_stream_of_many_segments(tmp_path):
    writer = JournalWriter(tmp_path, segment_bytes=1, reserve_bytes=0).open()
    for step in range(40):
        event = BusCallbackMarks("run", "/run", step, {})
        writer.append(encode(Envelope(writer.stream, step + 1, float(step), event, "run", 0)))
    writer.close()
    reader = EventReader(tmp_path, EventFilter(since=30.0))
    reader.seek(30.0)
    assert [each.event.step for each in reader.poll()] == list(range(30, 40))
