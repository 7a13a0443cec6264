"""Uploads under way, as the live table, the lines of a log and ``status`` tell of them."""

import io
import json
import shutil
import time

import pytest
from rich.console import Console

from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded, UploadProgress
from evsys_bus.cli import run
from evsys_bus.cli.output.formatting import format_rate, format_size_progress
from evsys_bus.cli.output.live import format_transfer_bar, render
from evsys_bus.cli.output.progress import LineView, format_json, format_plain
from evsys_bus.cli.output.run_state import PlannedRun, RunStateTracker
from evsys_bus.cli.output.transfers import SILENT_SECONDS, Transfer, make_byte_counter
from evsys_bus.cli.uploads import MAX_SILENT_SECONDS, UploadMonitor, read_active_uploads
from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from evsys_bus.journal import JournalWriter
from support.files import parse_json_lines

NOW = 1_800_000_000.0


class Courier:
    """Writes into a courier's stream of the journal, at times of our choice."""

    def __init__(self, directory):
        self.writer = JournalWriter(directory, family="c")
        self.writer.open()

    def tell(self, event, at=NOW):
        writer = self.writer
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, at, event, event.run)))


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "runs" / "sweep" / "journal"


@pytest.fixture
def courier(journal):
    found = Courier(journal)
    yield found
    found.writer.close()


@pytest.fixture
def clock():
    class Clock:
        seconds = 0.0

        def __call__(self):
            return self.seconds

    return Clock()


@pytest.fixture
def look(journal, clock):
    """What is under way, a second later, to a watch that looked before any courier said anything."""
    watch = UploadMonitor(journal, clock=clock, wall_clock=lambda: NOW + clock.seconds)
    watch.poll()

    def look(*, force=False):
        clock.seconds += 1
        return watch.poll(force=force)

    return look


def progress(done, *, checkpoint="step-000199", run="low", to="s3://bucket/sweep", total=400_000_000):
    return UploadProgress(run, checkpoint, done, total, 53e6, (total - done) / 53e6, f"{to}/{run}/{checkpoint}")


def uploaded(checkpoint="step-000199", to="s3://bucket/sweep"):
    return CheckpointUploaded("low", checkpoint, 199, f"{to}/low/{checkpoint}", 2, 400_000_000, 7.5)


def told(uploads):
    return [(each.name, each.done_bytes) for each in uploads.active]


def test_an_upload_is_under_way_from_its_first_word_to_its_manifest(look, courier):
    assert told(look()) == []
    courier.tell(progress(100_000_000))
    assert told(look()) == [("low/step-000199", 100_000_000)]
    courier.tell(progress(212_000_000))
    assert told(look()) == [("low/step-000199", 212_000_000)]
    courier.tell(uploaded())
    found = look()
    assert told(found) == []
    assert [each.checkpoint for each in found.finished] == ["step-000199"]
    assert look().finished == []


def test_a_conflict_ends_one_too(look, courier):
    courier.tell(progress(1))
    courier.tell(CheckpointConflict("low", "step-000199", 199, "s3://bucket/sweep/low/step-000199", "other content"))
    found = look()
    assert (told(found), len(found.finished)) == ([], 1)


def test_what_the_same_courier_sends_next_takes_its_place_and_another_destination_stands_beside_it(look, courier):
    courier.tell(progress(1))
    courier.tell(progress(2, to="file:///archive"))
    courier.tell(progress(3, checkpoint="step-000299"))
    assert told(look()) == [("low/step-000299", 3), ("low/step-000199", 2)]


def test_nothing_is_under_way_where_the_courier_has_ended_or_was_silent_for_very_long(look, courier, clock):
    courier.tell(progress(1))
    assert told(look())
    clock.seconds += MAX_SILENT_SECONDS
    assert told(look()) == []
    courier.tell(progress(2), at=NOW + clock.seconds)
    assert told(look())
    courier.writer.close()
    assert told(look()) == []


def test_what_was_on_record_when_the_watch_began_is_no_news(journal, courier, clock):
    courier.tell(uploaded())
    watch = UploadMonitor(journal, clock=clock, wall_clock=lambda: NOW)
    assert watch.poll().finished == []
    courier.tell(progress(5))
    clock.seconds = 1
    assert told(watch.poll()) == [("low/step-000199", 5)]


def test_looking_reads_only_what_is_new_and_at_most_twice_a_second(journal, courier, clock):
    from evsys_bus.journal import OsDisk

    class Counted(OsDisk):
        bytes_read = calls = 0

        def read(self, path, start, length):
            self.calls += 1
            found = super().read(path, start, length)
            self.bytes_read += len(found)
            return found

        def names(self, path):
            self.calls += 1
            return super().names(path)

    disk = Counted()
    for count in range(5000):
        courier.tell(progress(count))
    watch = UploadMonitor(journal, clock=clock, wall_clock=lambda: NOW, disk=disk)
    watch.poll()
    disk.bytes_read = disk.calls = 0
    for _ in range(100):
        watch.poll()
    assert disk.calls == 0
    courier.tell(progress(7))
    clock.seconds = 1
    assert told(watch.poll()) == [("low/step-000199", 7)]
    assert disk.bytes_read < 2_000


def test_a_journal_that_goes_away_is_nothing_under_way(look, courier, journal):
    courier.tell(progress(1))
    assert told(look())
    shutil.rmtree(journal)
    assert told(look()) == []


def transfer(**more):
    fields = {"run": "low", "checkpoint": "step-000199", "done_bytes": 212_000_000, "total_bytes": 400_000_000}
    return Transfer(**fields | {"bytes_per_second": 53e6, "eta_seconds": 4.0, "reported_at": NOW} | more)


def test_the_line_has_name_bytes_rate_and_eta_and_a_bar_where_there_is_room():
    line = format_transfer_bar("checkpoints", "↑", transfer(), width=120, now=NOW).plain
    assert line == "checkpoints  low/step-000199  ━━━━━━━━━━╸━━━━━━━━━  212/400 MB  53 MB/s  eta 0:04"
    narrow = format_transfer_bar("checkpoints", "↑", transfer(), width=60, now=NOW).plain
    assert narrow == "checkpoints  low/step-000199  212/400 MB  53 MB/s  eta 0:04"
    narrower = format_transfer_bar("checkpoints", "↑", transfer(), width=58, now=NOW).plain
    assert narrower == "↑  low/step-000199  212/400 MB  53 MB/s  eta 0:04"


@pytest.mark.parametrize("width", [10, 20, 30, 40, 50, 60, 70, 80, 120])
def test_the_line_never_is_wider_than_the_terminal(width):
    line = format_transfer_bar(
        "checkpoints", "↑", transfer(run="a-run-with-a-name-that-is-very-long-s0"), width=width, now=NOW
    )
    assert line.cell_len <= width
    assert width < 30 or "step-000199" in line.plain
    assert width < 40 or "212/400 MB" in line.plain
    assert width < 50 or "  a-" in line.plain


def test_the_eta_runs_on_between_two_words_and_gives_way_to_silence():
    assert "eta 0:01" in format_transfer_bar("", "", transfer(), width=80, now=NOW + 3).plain
    assert "eta 0:00" in format_transfer_bar("", "", transfer(), width=80, now=NOW + 9).plain
    line = format_transfer_bar("", "", transfer(), width=80, now=NOW + SILENT_SECONDS).plain
    assert line.endswith("212/400 MB  silent 0:15")


def test_a_fetch_is_told_of_with_the_rate_since_it_began():
    told = []
    see = make_byte_counter("low", "step-000199", told.append)
    see(212_000_000, 400_000_000)
    see(400_000_000, 400_000_000)
    half, whole = told
    assert half.eta_seconds == pytest.approx(188_000_000 / half.bytes_per_second)
    assert (whole.fraction, whole.eta_seconds) == (1.0, 0.0)


def test_a_fetch_of_nothing_has_no_rate_and_divides_by_nothing():
    told = []
    make_byte_counter("low", "step-000199", told.append)(0, 0)
    assert (told[0].fraction, told[0].bytes_per_second, told[0].eta_seconds) == (1.0, 0.0, None)
    assert format_transfer_bar("", "", told[0], width=80, now=told[0].reported_at).plain.endswith("0/0 B  0 B/s  eta -")


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [(212_000_000, 400_000_000, "212/400 MB"), (210_000_000, 3_100_000_000, "0.21/3.10 GB"), (0, 18, "0/18 B")],
)
def test_both_amounts_are_in_the_unit_of_the_whole(done, total, text):
    assert format_size_progress(done, total) == text


@pytest.mark.parametrize(
    ("value", "text"), [(53.4e6, "53 MB/s"), (5.34e6, "5.3 MB/s"), (0.0, "0 B/s"), (2e12, "2.0 TB/s")]
)
def test_rates(value, text):
    assert format_rate(value) == text


def test_the_live_table_has_a_line_for_each_and_still_fits(look, courier, tmp_path):
    for place in range(5):
        courier.tell(progress(place, to=f"file:///archive-{place}"))
    board = RunStateTracker([PlannedRun(f"arm-{arm}-s0", f"arm-{arm}", 0) for arm in range(30)])
    uploads = look().active
    assert len(uploads) == 5
    for width, height in ((120, 24), (60, 14)):
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
        console.print(render(board, "title", None, width=width, height=height, uploads=uploads))
        lines = console.file.getvalue().splitlines()
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        assert sum("step-000199" in line for line in lines) == 2
        assert any("and 3 more uploads" in line for line in lines)
        assert "runs done" in lines[-1]


@pytest.mark.parametrize("form", [format_plain, format_json])
def test_a_log_has_a_line_every_half_minute_and_one_when_a_checkpoint_is_there(look, courier, clock, form):
    written = io.StringIO()
    view = LineView(RunStateTracker([], clock=clock), written, form, poll_uploads=look)
    courier.tell(progress(212_000_000))
    view.tick()
    assert written.getvalue() == ""
    clock.seconds = 30
    view.tick()
    (line,) = written.getvalue().splitlines()
    if form is format_json:
        row = json.loads(line)
        assert (row["event"], row["done_bytes"], row["total_bytes"]) == ("uploading", 212_000_000, 400_000_000)
    else:
        assert line.partition(" ")[2] == (
            "event=uploading run=low checkpoint=step-000199 done_bytes=212000000 total_bytes=400000000 "
            "bytes_per_second=53000000 eta_seconds=4"
        )
    courier.tell(uploaded())
    view.tick()
    assert "uploaded" in written.getvalue().splitlines()[1]
    assert "s3://bucket/sweep/low/step-000199" in written.getvalue().splitlines()[1]


def test_the_last_line_of_a_log_does_not_miss_what_was_uploaded_just_now(journal, courier, clock):
    written = io.StringIO()
    watch = UploadMonitor(journal, clock=clock, wall_clock=lambda: NOW)
    view = LineView(RunStateTracker([], clock=clock), written, format_plain, poll_uploads=watch.poll)
    view.tick()
    courier.tell(uploaded())
    courier.writer.close()
    view.close()
    assert "event=uploaded run=low checkpoint=step-000199 bytes=400000000 seconds=7.5" in written.getvalue()


def test_status_tells_what_is_on_its_way(journal, courier, capsys):
    JournalWriter(journal).open().close()  # the trainer's
    courier.tell(uploaded("step-000099"), at=time.time())
    courier.tell(progress(212_000_000), at=time.time())
    assert run(["status", str(journal)]) == 0
    assert "uploading   low/step-000199  212/400 MB  53 MB/s  eta 0:0" in capsys.readouterr().out
    assert run(["status", str(journal), "--json"]) == 0
    rows = parse_json_lines(capsys.readouterr().out)
    (row,) = [row for row in rows if row["type"] == "upload"]
    assert (row["run"], row["checkpoint"], row["done_bytes"]) == ("low", "step-000199", 212_000_000)
    courier.tell(uploaded(), at=time.time())
    assert read_active_uploads(journal) == []


def test_status_does_not_take_what_a_dead_courier_said_last_for_an_upload(journal, courier):
    courier.tell(progress(1), at=time.time())
    assert len(read_active_uploads(journal)) == 1
    courier.writer.close()
    assert read_active_uploads(journal) == []
