"""The journal's directory is removed while a program runs: what the receipt says is true all the same."""

import shutil
import textwrap

import pytest

from evsys_bus import EventBus, follow
from evsys_bus.delivery.progress import ProgressReader, read_progress
from evsys_bus.delivery.subscriptions import load_subscriptions
from evsys_bus.journal import JournalReader, JournalWriter, RetentionPolicy
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

    def publish(first, last):
        for number in range(first, last + 1):
            bus.publish(Tick(number))

    def until(condition):
        while not condition():
            time.sleep(0.02)

    followed = build_callbacks([{"kind": "counts", "ranks": None}])
    with EventBus(followed, journal="journal", couriers=sys.argv[1]) as bus:
        publish(1, 500)
        until(lambda: bus.health().deliveries[0].delivered == 500)
        shutil.rmtree("journal")
        if "lose" in sys.argv:
            publish(501, 700)
        if "go_on" in sys.argv:
            until(lambda: bus.health().journal.lost)
            publish(701, 1000)
    receipt = bus.receipt
    [delivery] = receipt.deliveries
    print(receipt.recorded, receipt.unrecorded, delivery.delivered, delivery.dead, delivery.pending, delivery.trouble)
"""


@pytest.mark.parametrize(
    ("couriers", "more", "told"),
    [
        ("process", ["lose", "go_on"], "300 700 1000 0 0 None"),
        ("thread", ["lose", "go_on"], "300 700 1000 0 0 None"),
        ("process", ["lose"], "0 700 700 0 0 None"),
        ("thread", [], "0 500 500 0 0 None"),
    ],
)
def test_the_receipt_counts_what_is_there_and_what_was_delivered(tmp_path, program, couriers, more, told):
    (tmp_path / "counts.py").write_text(textwrap.dedent(PLUGIN))
    out, errors = program(PROGRAM, couriers, *more).communicate(timeout=20)
    assert out.strip() == told, errors
    assert errors.count("journal.removed") == 1
    delivered = [int(line) for line in (tmp_path / "counted").read_text().splitlines()]
    # The courier has the removed segment open, so it still gets what was written into it.
    last = 1000 if "go_on" in more else 700 if "lose" in more else 500
    assert delivered == [*range(1, last + 1)]
    journal = tmp_path / "journal"
    reader = JournalReader(journal)
    assert sum(len(list(reader.read(stream))) for stream in reader.streams()) == int(told.split()[0])
    assert [(each.name, each.policy.ranks) for each in load_subscriptions(str(journal))] == [("counts", None)]
    [account] = read_progress(journal)
    assert (account.recorded, account.delivered, account.pending) == (int(told.split()[2]), int(told.split()[2]), 0)


def append(writer: JournalWriter, count: int) -> None:
    for _ in range(count):
        writer.append(bytes(100))


def test_one_who_looks_again_and_again_does_not_count_what_was_removed(tmp_path):
    with EventBus(sinks=[follow(RecordingSink(), "board")], journal=tmp_path / "journal"):
        pass
    watch = ProgressReader(tmp_path / "journal")
    writer = JournalWriter(tmp_path / "journal", flush_seconds=3600).open()
    append(writer, 5)
    assert [each.pending for each in watch.read()] == [5]
    specs = {path: path.read_bytes() for path in (tmp_path / "journal" / "couriers").glob("*.spec.json")}
    shutil.rmtree(tmp_path / "journal")
    writer.flush()
    append(writer, 3)
    (tmp_path / "journal" / "couriers").mkdir()
    for path, spec in specs.items():
        path.write_bytes(spec)
    assert [each.pending for each in watch.read()] == [3]
    writer.close()


def test_what_retention_takes_is_on_record_and_what_somebody_removes_is_not(tmp_path):
    retain = RetentionPolicy(max_bytes=4000)
    writer = JournalWriter(tmp_path / "journal", segment_bytes=2000, retain=retain, flush_seconds=3600).open()
    append(writer, 200)
    writer.flush()
    [folder] = (tmp_path / "journal").glob("r0-*")
    firsts = sorted(int(path.stem.partition("-")[2]) for path in folder.glob("*.seg"))
    assert len(firsts) < 4
    assert (writer.recorded, writer.lost) == (200, 0)
    shutil.rmtree(tmp_path / "journal")
    writer.flush()
    assert writer.lost == 201 - firsts[0]
    assert JournalReader(tmp_path / "journal").is_live(writer.stream)  # begun again at once
    writer.append(bytes(100))
    assert (writer.recorded, writer.lost) == (firsts[0], 201 - firsts[0])
    [segment] = folder.glob("*.seg")
    segment.unlink()  # and nothing else
    writer.flush()
    assert JournalReader(tmp_path / "journal").is_live(writer.stream)
    firsts[0] -= 1
    assert not writer.close()
    assert (writer.recorded, writer.lost) == (firsts[0], 201 - firsts[0])


def test_a_courier_that_lingers_begins_no_journal_that_was_removed(tmp_path, program):
    (tmp_path / "counts.py").write_text(textwrap.dedent(PLUGIN))
    lingers = program("""
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
    _, err = lingers.communicate(timeout=15)
    assert lingers.returncode == 0, err
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
