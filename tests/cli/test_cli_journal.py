"""``tail``, ``status`` and ``journal``, on real journals; ``EVSYS_GOLDEN=write`` writes the golden files anew."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from evsys_bus import (
    BenchmarkEval,
    Checkpoint,
    Envelope,
    Eval,
    EvalResult,
    EventBus,
    LogContext,
    LoopState,
    ManifestRow,
    RunStart,
    StepEnd,
    TrainingBatch,
)
from evsys_bus.cli.events import EventFilter, EventReader
from evsys_bus.codec import encode, to_json
from evsys_bus.journal import Cursor, CursorStore, JournalReader, JournalWriter, OsDisk, Position, frame, verify
from support import GOLDEN
from support.files import parse_json_lines
from support.journals import read_envelopes


def step(folder, number, run="low", **metrics):
    ctx = LogContext(output_dir=folder, run_key=run)
    state = LoopState(step=number, num_steps=100, output_dir=folder / run, ctx=ctx)
    return StepEnd(state, number, TrainingBatch(), metrics)


def journal(folder, events=10, **options):
    """A closed journal of steps."""
    with EventBus([], journal=JournalWriter(folder / "journal", **options)) as bus:
        for number in range(events):
            bus.publish(step(folder, number, loss=1 / (number + 1)))
    return folder / "journal"


def damage(directory, *places):
    """Flip a byte in the payload of these events of the only segment; its path."""
    [segment] = directory.glob("*/*.seg")
    content = bytearray(segment.read_bytes())
    for piece in list(frame.scan(bytes(content), frame.SEGMENT_HEADER_BYTES)):
        if piece.kind == frame.EVENT and piece.sequence in places:
            content[piece.end - 5] ^= 1
    segment.write_bytes(content)
    return segment


def same_as_golden(name, text, tmp_path):
    text = text.replace(str(tmp_path), "<here>")
    text = re.sub(r"r0-\d{6}-\d{8}T\d{6}-[0-9a-f]{8}", "<stream>", text)
    text = re.sub(r"process \d+ on \S+", "process <pid> on <host>,", text)
    text = re.sub(r"\d+@\S+ ", "<pid>@<host> ", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d([+-]\d\d:\d\d)?", "<time>", text)
    text = re.sub(r"^\d\d-\d\d \d\d:\d\d:\d\d", "<time>", text, flags=re.MULTILINE)
    text = re.sub(r"\d+ s( ago)?$", "<age>", text, flags=re.MULTILINE)
    text = re.sub(r"\b[\d,.]+ (B|kB|bytes damaged)\b", r"<size> \1", text)  # which paths are in the events decides
    text = re.sub(r"at byte [\d,]+", "at byte <place>", text)
    text = re.sub(r" {3,}", "   ", text)  # how wide a column is depends on the process and the host
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EVSYS_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_tail_tells_every_event_in_a_line(evsys_bus, tmp_path):
    folder = tmp_path / "runs" / "sweep"
    ctx = LogContext(output_dir=folder, run_key="low")
    state = LoopState(step=0, num_steps=3, output_dir=folder / "low", ctx=ctx)
    with EventBus([], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(step(folder, 0, loss=0.5, lr=1e-3))
        bus.publish(step(folder, 1, **{f"m{number}": float(number) for number in range(9)}))
        bus.publish(Eval(state, 1, "val", {"acc": float("nan")}))
        bus.publish(Checkpoint(state, ManifestRow("final", 1, state_path="low/final.pt")))
        bus.publish(BenchmarkEval(ctx, EvalResult("test", metrics={"score": 0.25}), [{"task_id": "1"}]))
    code, out, err = evsys_bus("tail")
    assert (code, err) == (0, "runs/sweep/journal\n")
    same_as_golden("tail", out, tmp_path)


def test_tail_merges_the_streams_of_two_processes_by_time(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as one, EventBus([], journal=tmp_path / "journal", rank=1) as two:
        for number in range(6):
            (one, two)[number % 2].publish(step(tmp_path, number))
    _, out, _ = evsys_bus("tail", tmp_path, "-n", 4, "--json")
    assert [json.loads(line)["event"]["step_idx"] for line in out.splitlines()] == [2, 3, 4, 5]
    _, out, _ = evsys_bus("tail", tmp_path)
    assert [line.split()[2:5] for line in out.splitlines()][-2:] == [["low", "step_end", "4"], ["low", "rank", "1"]]


def test_the_events_of_a_stream_stay_in_order_when_its_clock_was_set_back_by_a_day(evsys_bus, tmp_path):
    for rank in (0, 1):
        writer = JournalWriter(tmp_path / "journal", rank=rank).open()
        for number in range(10):
            when = 1_700_000_000.0 + 10 * number + rank - (86_400 if number > 4 else 0)
            event = step(tmp_path, number)
            writer.append(encode(Envelope(writer.stream, writer.next_sequence, when, event, "low", rank)))
        writer.close()
    for command in (["tail", "-n", 20, "--json"], ["journal", "export", "--format", "jsonl"]):
        rows = parse_json_lines(evsys_bus(*command, tmp_path)[1])
        for rank in (0, 1):
            assert [row["seq"] for row in rows if row["rank"] == rank] == list(range(1, 11))
        assert [row["rank"] for row in rows[:9]] == [0, 1] * 4 + [0]


@pytest.mark.parametrize("segment_bytes", [700, 1 << 20])
def test_the_last_events_are_the_same_however_many_are_asked_for_and_wherever_segments_end(tmp_path, segment_bytes):
    directory = journal(tmp_path, 30, segment_bytes=segment_bytes)
    forward = [(each.stream, each.seq) for each in read_envelopes(directory)]
    assert len(list(directory.glob("*/*.seg"))) > (5 if segment_bytes == 700 else 0)
    for count in range(33):
        latest = EventReader(directory, EventFilter()).latest(count)
        assert [(each.stream, each.seq) for each in latest] == (forward[-count:] if count else [])


def test_a_record_that_was_written_twice_is_shown_once(tmp_path):
    directory = journal(tmp_path, 5)
    [segment] = directory.glob("*/*.seg")
    shutil.copy(segment, segment.with_name("000002-4.seg"))
    assert [each.seq for each in EventReader(directory, EventFilter()).latest(20)] == [1, 2, 3, 4, 5]


def test_records_larger_than_what_is_read_at_a_time_are_found_from_the_end(tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for number in range(4):
            row = {"task_id": str(number), "output": "x" * 200_000, "metadata": ["y" * 200_000] * 9}
            bus.publish(BenchmarkEval(LogContext(output_dir=tmp_path), EvalResult(f"b{number}"), [row] * (number % 2)))
    assert max(each.stat().st_size for each in tmp_path.glob("journal/*/*.seg")) > 3 << 20
    latest = EventReader(tmp_path / "journal", EventFilter()).latest(3)
    assert [each.event.eval_result.name for each in latest] == ["b1", "b2", "b3"]


class CountingDisk(OsDisk):
    bytes_read = 0

    def read(self, path, offset, size):
        data = super().read(path, offset, size)
        self.bytes_read += len(data)
        return data


def test_the_last_events_of_a_large_journal_are_had_without_reading_it(tmp_path):
    writer = JournalWriter(tmp_path / "journal", flush="never").open()
    payload = read_envelopes(journal(tmp_path / "small", 1))[0]
    data = next(JournalReader(tmp_path / "small" / "journal").read(payload.stream)).payload
    for _ in range(60_000):
        writer.append(data)
    writer.close()
    disk = CountingDisk()
    reader = EventReader(tmp_path / "journal", EventFilter(), disk)
    assert len(reader.latest(20)) == 20
    [segment] = tmp_path.glob("journal/*/*.seg")
    assert disk.bytes_read <= 2 << 20 < segment.stat().st_size / 4


def test_tail_json_is_the_event_as_the_codec_has_it(evsys_bus, tmp_path):
    directory = journal(tmp_path, 5)
    _, out, _ = evsys_bus("tail", directory, "--json")
    first, *others = read_envelopes(directory)  # the first one introduces its run
    published = [
        first,
        *(
            msgspec.structs.replace(each, event=step(tmp_path, number, loss=1 / (number + 1)))
            for number, each in enumerate(others, start=1)
        ),
    ]
    assert out.splitlines() == [to_json(each).decode() for each in published]
    assert json.loads(out.splitlines()[0])["event"]["state"]["run"] == "low"


@pytest.fixture
def mixed(tmp_path):
    """Two runs, with evals of one of them."""
    folder = tmp_path / "runs" / "mixed"
    (folder / "low").mkdir(parents=True)
    with EventBus([], journal=folder / "journal") as bus:
        for number in range(10):
            event = step(folder, number, run=("low", "high")[number % 2], loss=1.0)
            bus.publish(event)
            if number % 4 == 0:
                bus.publish(Eval(event.state, number, "val", {"acc": 0.5, "steps": 3}))
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type", "eval"], ["0e", "4e", "8e"]),
        (["--type", "eval,step_end", "-n", "4"], ["7s", "8s", "8e", "9s"]),
        (["--run", "high"], ["1s", "3s", "5s", "7s", "9s"]),
        (["--metric", "^val/a"], ["0e", "4e", "8e"]),
        (["--metric", "loss", "-n", "2"], ["8s", "9s"]),
        (["--since", "1h", "--type", "eval"], ["0e", "4e", "8e"]),
        (["--since", "2020-01-31", "-n", "1"], ["9s"]),
        (["--since", "2999-01-31T10:00:00"], []),
        (["--since", "2999-01-31T10:00:00", "-n", "5"], []),
        (["-n", "0"], []),
    ],
)
def test_tail_shows_only_what_is_wanted(evsys_bus, mixed, options, expected):
    code, out, _ = evsys_bus("tail", mixed, *options)
    cells = [line.split() for line in out.splitlines()]
    assert (code, [f"{each[4]}{each[3][0]}" for each in cells]) == (0, expected)


def test_since_reads_no_segment_that_is_older(tmp_path):
    directory = journal(tmp_path, 40, segment_bytes=1_000)
    everything = read_envelopes(directory)
    for envelope in everything[::7]:
        reader = EventReader(directory, EventFilter(since=envelope.time))
        reader.seek(envelope.time)
        assert [each.seq for each in reader.poll()] == list(range(envelope.seq, 41))
    disk = CountingDisk()
    reader = EventReader(directory, EventFilter(since=everything[-1].time), disk)
    reader.seek(everything[-1].time)
    assert len(list(reader.poll())) == 1
    assert disk.bytes_read < sum(each.stat().st_size for each in directory.glob("*/*.seg")) / 3


def test_a_run_of_an_experiment_shows_its_own_events_of_the_experiments_journal(evsys_bus, mixed):
    for name in (mixed / "low", "runs/mixed/low", "mixed/low"):
        _, out, _ = evsys_bus("tail", name, "--type", "step_end")
        assert {line.split()[2] for line in out.splitlines()} == {"low"}
        assert len(out.splitlines()) == 5


def test_without_a_run_the_newest_journal_below_runs_is_meant(evsys_bus, mixed, tmp_path):
    old = journal(tmp_path / "runs" / "old", 3)
    [segment] = old.glob("*/*.seg")
    os.utime(segment, (1e9, 1e9))
    assert evsys_bus("tail", "-n", 1)[2] == "runs/mixed/journal\n"
    os.utime(segment, (4e9, 4e9))
    assert evsys_bus("tail", "-n", 1)[2] == "runs/old/journal\n"


@pytest.mark.parametrize("command", [["tail"], ["status"], ["journal", "verify"], ["journal", "repair"]])
def test_a_run_that_is_not_there_is_told_with_the_nearest_and_exits_2(evsys_bus, mixed, command):
    code, out, err = evsys_bus(*command, "runs/mixd")
    assert (code, out) == (2, "")
    assert "error: there is no run runs/mixd\nfix: did you mean runs/mixed?" in err


def test_a_folder_without_a_journal_and_no_run_at_all_exit_2(evsys_bus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no journal" in evsys_bus("tail", "empty")[2]
    code, _, err = evsys_bus("status")
    assert (code, "there is no journal below" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--metric", "("], "is not a regular expression"),
        (["--since", "yesterday"], "neither a duration"),
        (["-n", "-1"], "-1 is not in the range"),
    ],
)
def test_an_option_that_makes_no_sense_is_told_and_exits_2(evsys_bus, mixed, options, told):
    code, out, err = evsys_bus("tail", mixed, *options)
    assert (code, out, told in err) == (2, "", True)


def test_a_type_that_nobody_knows_is_told_with_the_nearest(evsys_bus, mixed):
    code, out, err = evsys_bus("tail", mixed, "--type", "step_ends")
    assert (code, out) == (0, "")
    assert 'no event matches; "step_ends" is not a known type of event; did you mean "step_end"?' in err


EVIL = "\x1b]0;evil\x07\x9b2J\u202e\u2028"


def test_what_came_from_a_program_cannot_steer_the_terminal(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step(tmp_path, 0, run=f"low\n{EVIL}", **{EVIL: 1.0}))
    for command in (["tail"], ["status"], ["show"], ["tail", "--json"], ["status", "--json"]):
        code, out, _ = evsys_bus(*command, tmp_path)
        assert code == 0
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2028"} & set(out)
    [line] = evsys_bus("tail", tmp_path)[1].splitlines()
    assert "low\\n" in line
    assert "\\x1b]0;evil\\x07\\x9b2J\\u202e\\u2028 1.000" in line


def test_a_whole_record_that_is_no_envelope_is_passed_over_and_told(evsys_bus, tmp_path):
    writer = JournalWriter(tmp_path / "journal").open()
    writer.append(b"no envelope")
    writer.close()
    code, out, err = evsys_bus("tail", tmp_path)
    assert (code, out) == (0, "")
    assert "1 record that cannot be decoded; see: evsys-bus journal verify" in err


def test_tail_goes_on_behind_damage_and_says_what_is_missing(evsys_bus, tmp_path):
    directory = journal(tmp_path, 10)
    damage(directory, 4, 5)
    code, out, err = evsys_bus("tail", tmp_path)
    assert (code, [line.split()[4] for line in out.splitlines()]) == (0, list("01256789"))
    assert err.startswith("2 events missing; see: evsys-bus journal verify")
    _, out, err = evsys_bus("tail", tmp_path, "--since", "1h")
    assert len(out.splitlines()) == 8
    assert re.match(r"2 events missing, \d+ bytes damaged; see", err)


FOLLOW = "import sys; from evsys_bus.cli import run; sys.exit(run(sys.argv[1:]))"


def test_follow_shows_what_comes_across_segments_and_writers_until_ctrl_c(program, tmp_path):
    with EventBus([], journal=JournalWriter(tmp_path / "journal", segment_bytes=900)) as bus:
        for number in range(3):
            bus.publish(step(tmp_path, number))
        tail = program(FOLLOW, "tail", str(tmp_path), "-f", "-n", "2", "--json")
        seen = [tail.stdout.readline() for _ in range(2)]
        for number in range(3, 25):
            bus.publish(step(tmp_path, number))
        seen += [tail.stdout.readline() for _ in range(22)]
    for rank in (0, 1):  # one goes on in the stream, one begins another
        with EventBus([], journal=tmp_path / "journal", rank=rank) as bus:
            bus.publish(step(tmp_path, 25 + rank))
        seen.append(tail.stdout.readline())
    tail.send_signal(signal.SIGINT)
    rest, err = tail.communicate(timeout=10)
    assert [json.loads(line)["event"]["step_idx"] for line in seen] == list(range(1, 27))
    assert (rest, err, tail.returncode) == ("", "\ninterrupted\n", 130)


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    journal(tmp_path, 2_000)
    command = f"{sys.executable} -c '{FOLLOW}'"
    for arguments in ("tail -n 2000", "journal export --format jsonl", "journal export --format csv"):
        line = f"({command} {arguments.replace(' -', f' {tmp_path} -', 1)}; echo $? > {tmp_path}/code) | head -n 1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (done.stderr, len(done.stdout.splitlines()), (tmp_path / "code").read_text()) == ("", 1, "0\n")


def test_on_a_terminal_no_line_is_wider_than_it(tmp_path):
    import pty

    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step(tmp_path, 1, **{f"a/long/metric/{number}": 1.0 for number in range(9)}))
        bus.publish(step(tmp_path, 2, loss=1.0))
    end, other = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", FOLLOW, "tail", str(tmp_path)],
        stdout=other,
        check=True,
        env=os.environ | {"COLUMNS": "50", "TERM": "xterm"},
    )
    first, second = os.read(end, 10_000).decode().splitlines()
    os.close(end)
    os.close(other)
    assert len(first) <= 50
    assert first.endswith("  (+9)")
    assert second.endswith("loss 1.000")


def test_status_tells_live_closed_and_dead_streams_and_how_far_adapters_are(evsys_bus, program, tmp_path):
    directory = journal(tmp_path, 4)
    stream = JournalReader(directory).streams()[0]
    CursorStore(str(directory)).save("csv_metrics", Cursor({stream: Position(3, 3)}))
    code, out, _ = evsys_bus("status", tmp_path)
    assert code == 0
    same_as_golden("status", out, tmp_path)
    killed = program(
        """
        import os, sys
        from evsys_bus import *
        bus = EventBus([], journal=sys.argv[1], rank=1)
        bus.__enter__()
        bus.publish(Eval(None, 1, "val", {}))
        os._exit(9)
        """,
        str(directory),
    )
    assert killed.wait() == 9
    with EventBus([], journal=directory, rank=2) as bus:
        bus.publish(step(tmp_path, 0))
        rows = parse_json_lines(evsys_bus("status", tmp_path, "--json", "--verify")[1])
    assert [(row["state"], row["first"], row["last"]) for row in rows[:3]] == [
        ("closed", 1, 4),
        ("dead", 1, 1),
        ("live", 1, 1),
    ]
    assert rows[2]["owner"]["pid"] == os.getpid()
    assert time.time() - rows[2]["last_time"] < 60
    assert [row["verified"]["records"] for row in rows[:3]] == [4, 1, 1]
    assert [(row["type"], row["adapter"], row["state"]) for row in rows[3:]] == [
        ("adapter", "csv_metrics", "not running")
    ]
    assert (rows[3]["delivered"], rows[3]["pending"], rows[3]["lag_seconds"] < 60) == (3, 1, True)


def test_a_rank_that_entered_and_left_without_an_event_is_closed_and_one_that_was_killed_dead(
    evsys_bus, program, tmp_path
):
    directory = journal(tmp_path, 1)
    with EventBus([], journal=directory, rank=1):
        pass
    line = "import os, sys; from evsys_bus import *; EventBus([], journal=sys.argv[1], rank=2).__enter__(); os._exit(9)"
    assert program(line, str(directory)).wait() == 9
    rows = parse_json_lines(evsys_bus("status", tmp_path, "--json")[1])
    assert [(row["state"], row["last"]) for row in rows] == [("closed", 1), ("closed", None), ("dead", None)]


def test_status_of_a_journal_without_events_yet(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal"):
        code, out, _ = evsys_bus("status", tmp_path)
    assert (code, out.splitlines()[3].split()[1]) == (0, "live")


def test_a_whole_journal_is_told_so_and_exits_0(evsys_bus, tmp_path):
    journal(tmp_path)
    code, out, err = evsys_bus("journal", "verify", tmp_path)
    assert (code, err) == (0, "")
    same_as_golden("verify_whole", out, tmp_path)


def test_damage_is_told_with_what_is_lost_and_what_is_whole_and_exits_3(evsys_bus, tmp_path):
    directory = journal(tmp_path)
    segment = damage(directory, 4, 5, 8)
    with segment.open("ab") as file:
        file.write(b"cut")
    code, out, _ = evsys_bus("journal", "verify", tmp_path)
    assert code == 3
    same_as_golden("verify_damaged", out, tmp_path)
    code, out, _ = evsys_bus("journal", "verify", tmp_path, "--json")
    row = json.loads(out)
    assert (code, row["missing"], row["records"], row["whole"]) == (3, [[4, 5], [8, 8]], 7, False)


def test_whole_events_before_damage_are_counted_over_all_segments(evsys_bus, tmp_path):
    directory = journal(tmp_path, 20, segment_bytes=1_000)
    segments = sorted(directory.glob("*/*.seg"))
    content = bytearray(segments[3].read_bytes())
    # The first event; before it stands the one that introduced the run, carried.
    first = next(each for each in frame.scan(bytes(content), frame.SEGMENT_HEADER_BYTES) if each.kind == frame.EVENT)
    content[first.end - 5] ^= 1
    segments[3].write_bytes(content)
    lost = int(segments[3].stem.partition("-")[2])
    _, out, _ = evsys_bus("journal", "verify", tmp_path)
    assert f"{lost - 1} whole events before that" in out
    assert f"lost: event {lost}\n" in out


def test_repair_keeps_every_whole_record_and_the_damaged_segment_beside(evsys_bus, tmp_path):
    directory = journal(tmp_path)
    segment = damage(directory, 4, 8)
    os.utime(segment, (1e9, 1e9))
    damaged, before = segment.read_bytes(), read_envelopes(directory)
    code, out, _ = evsys_bus("journal", "repair", tmp_path, "--dry-run")
    assert (code, segment.read_bytes(), len(list(segment.parent.glob("*.damaged*")))) == (0, damaged, 0)
    same_as_golden("repair_dry_run", out, tmp_path)
    code, out, _ = evsys_bus("journal", "repair", tmp_path)
    assert (code, "1 segment repaired" in out) == (0, True)
    assert segment.with_name(f"{segment.name}.damaged").read_bytes() == damaged
    assert (segment.stat().st_mtime, segment.stat().st_mode & 0o777) == (1e9, 0o600)
    assert [(each.seq, each.event.metrics) for each in read_envelopes(directory)] == [
        (each.seq, each.event.metrics) for each in before
    ]
    [report] = verify(directory).streams
    assert (report.corrupt_ranges, report.missing_ranges, report.records, report.is_closed) == (
        [],
        [(4, 4), (8, 8)],
        8,
        True,
    )
    assert "nothing to repair" in evsys_bus("journal", "repair", tmp_path)[1]
    damage(directory, 2)
    assert evsys_bus("journal", "repair", tmp_path)[0] == 0
    assert (segment.with_name(f"{segment.name}.damaged").read_bytes(), segment.read_bytes()[:6]) == (damaged, b"EVSYSJ")
    assert segment.with_name(f"{segment.name}.damaged-2").exists()


def test_verify_is_content_after_a_repair_until_there_is_new_damage(evsys_bus, tmp_path):
    directory = journal(tmp_path)
    damage(directory, 4, 8)
    assert evsys_bus("journal", "verify", tmp_path)[0] == 3
    evsys_bus("journal", "repair", tmp_path)
    code, out, _ = evsys_bus("journal", "verify", tmp_path)
    assert (code, out.splitlines()[-1]) == (0, "repaired: 2 events lost before that; all others are whole")
    assert "lost before a repair, which retained the damaged segment: events 4, 8" in out
    damage(directory, 2)
    code, out, _ = evsys_bus("journal", "verify", tmp_path)
    assert (code, "! lost: event 2" in out or "damaged:" in out) == (3, True)


def test_the_next_writer_goes_on_behind_a_repaired_segment(evsys_bus, tmp_path):
    directory = journal(tmp_path)
    damage(directory, 4)
    evsys_bus("journal", "repair", tmp_path)
    journal(tmp_path, 3)
    assert [each.seq for each in read_envelopes(directory)] == [1, 2, 3, *range(5, 14)]


def test_repair_leaves_a_stream_alone_that_is_being_written_and_exits_3(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for number in range(5):
            bus.publish(step(tmp_path, number))
        assert evsys_bus("journal", "repair", tmp_path)[:2] == (0, "nothing to repair: no segment is damaged\n")
        segment = damage(tmp_path / "journal", 2)
        before = segment.read_bytes()
        code, out, err = evsys_bus("journal", "repair", tmp_path)
        assert (code, out, segment.read_bytes()) == (3, "", before)
        assert not list(segment.parent.glob("*.damaged"))
    same_as_golden("error_repair_live", err, tmp_path)


def test_jsonl_is_every_event_as_tail_shows_it(evsys_bus, mixed, tmp_path):
    _, out, err = evsys_bus("journal", "export", mixed, "--format", "jsonl")
    assert (out, err) == (evsys_bus("tail", mixed, "--json", "--since", "1h")[1], "")
    assert len(out.splitlines()) == 13
    _, nothing, err = evsys_bus("journal", "export", mixed, "--format", "jsonl", "--out", "x.jsonl", "--run", "high")
    assert (nothing, err) == ("", "5 events in x.jsonl\n")
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 5
    assert not list(tmp_path.glob(".x*"))


def test_csv_has_a_column_for_every_metric_also_late_ones_and_no_formulas(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step(tmp_path, 0, loss=float("nan")))
        event = step(tmp_path, 1, run="=1+1", loss=-0.5)
        event.metrics.update({"=cmd": 2.0, "step": 7.0, "run": 8.0})
        bus.publish(event)
        bus.publish(step(tmp_path, 2, late=1e-300))
    code, out, _ = evsys_bus("journal", "export", tmp_path, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0
    assert list(rows[0])[5:] == ["step", "loss", "'=cmd", "metrics.step", "metrics.run", "late"]
    assert [row["loss"] for row in rows] == ["nan", "-0.5", ""]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert (rows[1]["run"], rows[1]["metrics.run"], rows[2]["late"]) == ("'=1+1", "8.0", "1e-300")


def test_csv_of_several_types_is_a_table_each_in_a_folder(evsys_bus, mixed, tmp_path):
    export = ["journal", "export", mixed, "--format", "csv", "--type", "eval,step_end,checkpoint"]
    code, out, err = evsys_bus(*export)
    assert (code, out, "several tables do not fit on stdout" in err) == (2, "", True)
    code, out, err = evsys_bus(*export, "--out", "tables")
    assert (code, out) == (0, "")
    assert err == "3 eval rows, 10 step_end rows, 0 checkpoint rows in tables\n"
    rows = list(csv.DictReader((tmp_path / "tables" / "eval.csv").read_text().splitlines()))
    assert [(row["step"], row["eval"], row["acc"]) for row in rows] == [(each, "val", "0.5") for each in "048"]


def test_csv_of_any_other_type_has_its_fields_under_dotted_names(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(Checkpoint(step(tmp_path, 3).state, ManifestRow("final\nx", 3, state_path="a,b")))
    _, out, _ = evsys_bus("journal", "export", tmp_path, "--format", "csv", "--type", "checkpoint")
    [row] = csv.DictReader(out.splitlines())
    assert (row["row.name"], row["row.batch"], row["row.state_path"], row["run"]) == ("final\\nx", "3", "a,b", "low")


def test_an_export_that_fails_leaves_no_file_that_looks_complete(evsys_bus, mixed, tmp_path):
    (tmp_path / "x.csv").mkdir()
    code, out, err = evsys_bus("journal", "export", mixed, "--format", "csv", "--out", "x.csv")
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    code, _, err = evsys_bus("journal", "export", mixed, "--format", "jsonl", "--out", "no/x.jsonl")
    assert (code, err.partition("no/")[0]) == (3, f"error: No such file or directory: {tmp_path}/")


def test_a_journal_that_was_copied_elsewhere_is_read_as_well(evsys_bus, mixed, tmp_path):
    shutil.copytree(mixed / "journal", tmp_path / "copy")
    assert evsys_bus("journal", "verify", "copy")[0] == 0
    assert len(evsys_bus("tail", "copy")[1].splitlines()) == 13


def test_a_journal_of_a_newer_version_is_told_by_every_command_and_repaired_by_none(evsys_bus, tmp_path):
    directory = journal(tmp_path, 3)
    [segment] = directory.glob("*/*.seg")
    newer = frame.pack_segment_header(frame.VERSION + 1) + segment.read_bytes()[frame.SEGMENT_HEADER_BYTES :]
    segment.write_bytes(newer)
    for arguments in (["tail"], ["status"], ["journal", "export", "--format", "csv"]):
        code, _, err = evsys_bus(*arguments, tmp_path)
        assert (code, err[:12], "upgrade evsys-bus" in err) == (3, "error[EB803]", True)
    code, out, _ = evsys_bus("journal", "verify", tmp_path)
    assert (code, "could not be read: 000001-1.seg: error[EB803]" in out) == (3, True)
    code, out, err = evsys_bus("journal", "repair", tmp_path)
    assert (code, "not repaired" in err, segment.read_bytes()) == (3, True, newer)
