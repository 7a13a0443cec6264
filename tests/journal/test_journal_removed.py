"""A journal is removed while a program runs: it is not created again, its events are counted, and the run goes on."""

import shutil
import textwrap

import pytest

from evsys_bus import EventBus, follow
from evsys_bus.delivery.progress import ProgressReader
from evsys_bus.journal import JournalWriter, RetentionPolicy
from evsys_bus.testing import RecordingSink
from support.journals import read_records

PLUGIN = '''
    """A sink that counts."""
    from pathlib import Path
    from evsys_bus import Event, Sink, register_sink
    from evsys_bus.errors import RetryLaterError

    class Tick(Event, frozen=True):
        number: int

    @register_sink("counts")
    class Counts(Sink):
        async def write(self, batch):
            with Path(__file__).with_name("counted").open("a") as file:
                file.writelines(f"{each.seq}\\n" for each in batch)

    @register_sink("away")
    class Away(Sink):
        async def write(self, batch):
            raise RetryLaterError("it is away")
'''

PROGRAM = """
    import shutil, sys, time
    from counts import Tick
    from evsys_bus import EventBus, build_callbacks

    def until(condition):
        while not condition():
            time.sleep(0.02)

    followed = build_callbacks([{"kind": "counts", "ranks": None}])
    with EventBus(followed, journal="journal", couriers=sys.argv[1]) as bus:
        for number in range(1, 501):
            bus.publish(Tick(number))
        until(lambda: bus.health().deliveries[0].delivered == 500)
        shutil.rmtree("journal")
        until(lambda: bus.health().journal.lost)
        for number in range(501, 701):
            bus.publish(Tick(number))
        started = time.monotonic()
    receipt = bus.receipt
    print(receipt.recorded, receipt.unrecorded, time.monotonic() - started < 3.0, receipt.resume_command)
    print(*receipt.deliveries, sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize("couriers", ["process", pytest.param("thread", marks=pytest.mark.long)])
def test_a_journal_that_is_removed_is_not_created_again_and_the_run_goes_on_without(tmp_path, program, couriers):
    (tmp_path / "counts.py").write_text(textwrap.dedent(PLUGIN))
    process = program(PROGRAM, couriers)
    out, errors = process.communicate(timeout=20)
    assert out.split() == ["0", "700", "True", "None"], errors
    assert process.returncode == 0
    assert errors.count("journal.removed") == 1
    assert "leave a journal in use where it is" in errors
    assert "journal.unrecorded" not in errors
    assert [int(line) for line in (tmp_path / "counted").read_text().splitlines()] == [*range(1, 501)]
    assert not (tmp_path / "journal").exists()


def append(writer: JournalWriter, count: int) -> None:
    for _ in range(count):
        writer.append(bytes(100))


def test_a_reader_of_progress_does_not_count_what_was_removed(tmp_path):
    def begin(events: int) -> JournalWriter:
        with EventBus(sinks=[follow(RecordingSink(), "board")], journal=tmp_path / "journal"):
            pass
        writer = JournalWriter(tmp_path / "journal", flush_seconds=3600).open()
        append(writer, events)
        return writer

    progress = ProgressReader(tmp_path / "journal")
    first = begin(5)
    assert [each.pending for each in progress.read()] == [5]
    shutil.rmtree(tmp_path / "journal")
    assert progress.read() == []
    second = begin(3)
    assert [each.pending for each in progress.read()] == [3]
    assert second.close()
    assert not first.close()


def test_what_retention_takes_is_on_record_and_what_somebody_removes_is_not(tmp_path):
    retain = RetentionPolicy(max_bytes=4000)
    writer = JournalWriter(tmp_path / "journal", segment_bytes=2000, retain=retain, flush_seconds=3600).open()
    append(writer, 200)
    writer.flush()
    [folder] = (tmp_path / "journal").glob("r0-*")
    firsts = sorted(int(path.stem.partition("-")[2]) for path in folder.glob("*.seg"))
    assert len(firsts) < 4
    assert (writer.recorded, writer.lost) == (200, 0)
    for segment in folder.glob("*.seg"):
        segment.unlink()  # and nothing else
    writer.flush()
    assert writer.lost == 201 - firsts[0]
    assert writer.append(bytes(100)) == 201  # into a new segment
    assert (writer.recorded, writer.lost) == (firsts[0], 201 - firsts[0])
    assert not writer.close()
    assert (writer.recorded, writer.lost) == (firsts[0], 201 - firsts[0])


def test_a_courier_in_its_grace_period_creates_no_journal_that_was_removed(tmp_path, program):
    (tmp_path / "counts.py").write_text(textwrap.dedent(PLUGIN))
    process = program("""
        import os, shutil, time
        from counts import Tick
        from evsys_bus import EventBus, build_callbacks
        from evsys_bus.delivery.progress import read_progress

        followed = build_callbacks([{"kind": "away"}])
        with EventBus(followed, journal="journal", drain_timeout=0, linger_seconds=1) as bus:
            while not (state := read_progress("journal")[0]).state:
                time.sleep(0.02)
            pid = state.pid
            bus.publish(Tick(1))
        shutil.rmtree("journal")
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.02)
    """)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert not (tmp_path / "journal").exists()


def test_segments_that_are_removed_in_two_steps_are_counted_once(tmp_path):
    """As by an ``rm -r`` that takes its time."""
    writer = JournalWriter(tmp_path / "journal", segment_bytes=200, flush_seconds=3600).open()

    def append(count: int) -> None:
        for _ in range(count):
            writer.append(b"x" * 80)

    def remove(paths) -> None:
        for path in paths:
            path.unlink()
        writer.flush()

    append(12)
    segments = sorted((tmp_path / "journal").glob("r*/*.seg"))
    assert len(segments) > 3
    remove(segments[2:])
    append(4)
    remove(sorted((tmp_path / "journal").glob("r*/*.seg")))
    append(3)
    writer.close()
    assert (writer.recorded, writer.lost) == (3, 16)


def test_older_segments_that_are_removed_count_as_lost_although_the_newest_one_is_there(tmp_path):
    writer = JournalWriter(tmp_path / "journal", segment_bytes=200, flush_seconds=3600).open()
    for _ in range(12):
        writer.append(b"x" * 80)
    for path in sorted((tmp_path / "journal").glob("r*/*.seg"))[:-1]:
        path.unlink()
    writer.close()
    there = len(read_records(tmp_path / "journal"))
    assert (writer.recorded, writer.recorded + writer.lost) == (there, 12)
