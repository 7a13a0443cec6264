"""The log of the courier process: lines of JSON, bounded; its warnings, and what adapters print, reach the program."""

import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from evsys_bus.bus.delivery_log import MAX_LINES_PER_POLL, DeliveryLog
from evsys_bus.delivery.process_log import MAX_LOG_BYTES, LogReader
from evsys_bus.journal import layout

PLUGIN = '''
    """Adapters that say things, in every way that there is."""
    import asyncio, logging, os, sys
    from evsys_bus import Callback, Sink, register_callback, register_sink
    from evsys_bus.errors import RejectedError

    logger = logging.getLogger("their.plots")

    @register_callback("talks")
    class Talks(Callback):
        placement = "follow"

        def on_step_end(self, state, step_idx, batch, metrics):
            print("tëxt", "step", step_idx, flush=True)
            print("half a line, ", end="")
            print("its end")
            print("to stderr", file=sys.stderr)
            logger.info("kept at %s", "INFO")
            logger.warning("few points: %d", step_idx)
            os.write(2, b"a raw line of a library in C\\n")

    @register_callback("breaks")
    class Breaks(Callback):
        placement = "follow"

        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx % 2:
                raise LookupError(f"no column {step_idx}")
            raise TimeoutError("no answer")

        def on_eval(self, state, step_idx, eval_name, metrics):
            yield step_idx

    @register_callback("does_not_import")
    class Unbuildable(Callback):
        placement = "follow"

        def __init__(self):
            if "courier_main" in " ".join(sys.orig_argv):
                raise ImportError("no module called plots")

        def on_step_end(self, state, step_idx, batch, metrics): ...

    @register_callback("fails_later")
    class FailsLater(Callback):
        placement = "follow"

        def on_step_end(self, state, step_idx, batch, metrics):
            asyncio.create_task(self.bare())
            self.spawn(self.slow, timeout=0.01)

        async def bare(self):
            raise ConnectionError("refused")

        async def slow(self):
            await asyncio.Event().wait()

    @register_callback("pages")
    class Pages(Callback):
        placement = "follow"

        def on_page_turned(self, number, words):
            print(number, words)

    @register_callback("old_pages")
    class OldPages(Callback):
        placement = "follow"

        def on_page_turned(self, number):
            print(number)

    @register_sink("refuses")
    class Refuses(Sink):
        async def write(self, batch):
            raise ZeroDivisionError("of its own")

    @register_sink("picky")
    class Picky(Sink):
        async def write(self, batch):
            raise RejectedError(dict.fromkeys(range(len(batch)), "too long"))
'''

PROGRAM = """
    import json, logging, sys
    import plugin
    from evsys_bus import Eval, Event, EventBus, StepEnd, build_callbacks

    class PageTurned(Event, frozen=True):
        number: int
        words: list[str]

    seen = []

    class Lines(logging.Handler):
        def emit(self, record):
            keys = ("event", "adapter", "hook", "why", "count", "file", "traceback")
            facts = {key: str(vars(record)[key]) for key in keys if vars(record).get(key) is not None}
            if record.exc_info:
                facts["traceback"] = logging.Formatter().formatException(record.exc_info)
            seen.append([record.name, record.levelname, record.getMessage(), facts])

    logging.getLogger().addHandler(Lines())
    kinds = sys.argv[1].split(",")
    couriers = sys.argv[2]
    callbacks = build_callbacks([{"kind": each} for each in kinds])
    bus = EventBus(callbacks, journal="journal", couriers=couriers, linger_seconds=0)
    with bus:
        for number in range(4):
            bus.publish(StepEnd(None, number, None, {}))
        bus.publish(Eval(None, 4, "val", {}))
        bus.publish(PageTurned(7, ["a", "b"]))
    (one, *_) = bus.receipt.deliveries
    seen.append([one.hook_failures, one.last_failure, one.log])
    with open("seen.json", "w") as file:
        json.dump(seen, file)
"""


@pytest.fixture
def run(program, tmp_path):
    """Run the program with adapters of these kinds: its log lines, what it said of the first one, stdout, stderr."""
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")

    def run(kinds, couriers="process"):
        process = program(PROGRAM, kinds, couriers, PYTHONIOENCODING="utf-8")
        out, err = process.communicate(timeout=18)
        assert process.returncode == 0, err
        *lines, told = json.loads((tmp_path / "seen.json").read_text())
        return lines, told, out, err

    return run


def log_lines(folder):
    path = folder / "journal" / layout.COURIERS / "process.log"
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def test_what_adapters_print_reaches_the_program_as_it_is(run, tmp_path):
    _, _, out, err = run("talks")
    lines = [f"tëxt step {number}\nhalf a line, its end\n" for number in range(4)]
    assert out == "".join(lines)
    assert err.count("to stderr\n") == 4
    assert "raw line" not in err
    prints = [each for each in log_lines(tmp_path) if each.get("print") is not None]
    assert {(each["adapter"], each["stream"]) for each in prints} == {("talks", "stdout"), ("talks", "stderr")}
    assert "a raw line of a library in C" in (tmp_path / "journal/couriers/process.log").read_text().splitlines()


def test_warnings_of_other_loggers_reach_the_program_under_their_name_once_a_second(run, tmp_path):
    lines, _, _, _ = run("talks")
    theirs = [each for each in lines if each[0] == "their.plots"]
    assert [each[:2] for each in theirs] == [["their.plots", "WARNING"]] * len(theirs)
    assert theirs[0][2] == "few points: 0"
    assert theirs[0][3]["adapter"] == "talks"
    assert len(theirs) == 2
    assert "(3 times)" in theirs[1][2]
    kept = [each["message"] for each in log_lines(tmp_path) if each.get("logger") == "their.plots"]
    assert kept == [text for number in range(4) for text in ("kept at INFO", f"few points: {number}")]


@pytest.mark.parametrize("couriers", ["process", pytest.param("thread", marks=pytest.mark.long)])
def test_the_first_failure_of_each_kind_of_a_followed_hook_is_in_the_programs_log(run, tmp_path, couriers):
    lines, told, _, _ = run("breaks", couriers)
    failed = [facts for _, _, _, facts in lines if facts.get("event") == "hook.failed"]
    assert {(each["adapter"], each["hook"]) for each in failed} == {("breaks", "on_step_end"), ("breaks", "on_eval")}
    first = [each["traceback"] for each in failed if "traceback" in each]
    assert [len(first), *("Error: no" in each for each in first)] == [3, True, True, False]
    assert "AsyncHookError" in first[2]
    assert all("Traceback (most recent call last)" in each["traceback"] for each in failed if "traceback" in each)
    assert "in on_step_end" in failed[0]["traceback"]
    assert told[0] == 5
    assert told[1].startswith("on_eval: AsyncHookError")
    assert told[2] == (str(tmp_path / "journal/couriers/process.log") if couriers == "process" else None)


@pytest.mark.parametrize("couriers", ["process", "thread"])
def test_tasks_that_fail_are_told_in_the_program_by_adapter_and_name(run, couriers):
    lines, _, _, _ = run("fails_later", couriers)
    failed = [[message, facts] for _, _, message, facts in lines if facts.get("event") == "task.failed"]
    assert {facts["adapter"] for _, facts in failed} == {"fails_later"}
    firsts = [[message, facts] for message, facts in failed if "traceback" in facts]
    assert "task=FailsLater.bare" in firsts[0][0]
    assert "ConnectionError: refused" in firsts[0][1]["traceback"]
    assert "timed out after 0.01 s" in firsts[1][1]["traceback"]
    assert "CancelledError" not in firsts[1][1]["traceback"]


def test_dead_letters_are_told_in_the_program_with_reason_and_file(run):
    lines, _, _, _ = run("picky")
    told = [facts for _, _, _, facts in lines if facts.get("event") == "delivery.dead_letter"]
    assert [each["why"] for each in told][:1] == ["too long"]
    assert max(int(each["count"]) for each in told) == 6
    assert {each["adapter"] for each in told} == {"picky"}
    assert len(Path(told[0]["file"]).read_text().splitlines()) == 6


@pytest.mark.long
def test_an_event_that_a_sink_fails_on_is_told_once_with_its_traceback(run):
    lines, _, _, _ = run("refuses")
    told = [facts for _, _, _, facts in lines if "dead" in facts.get("event", "")]
    assert {each["event"] for each in told} == {"delivery.dead_letter"}
    assert "ZeroDivisionError: of its own" in told[0]["traceback"]
    assert Path(told[0]["file"]).exists()


def test_an_event_that_only_the_program_declares_is_delivered_or_a_dead_letter_with_the_reason(run):
    lines, _, out, err = run("pages,old_pages")
    assert out == "7 ['a', 'b']\n", err
    (dead,) = [facts for _, _, _, facts in lines if facts.get("event") == "delivery.dead_letter"]
    assert dead["adapter"] == "old_pages"
    assert "page_turned" in dead["why"]


def test_an_adapter_that_cannot_be_built_is_told_once_with_its_traceback(run):
    lines, _, _, _ = run("does_not_import")
    events = [facts.get("event") for _, _, _, facts in lines]
    assert events.count("delivery.failed") == 1
    assert "courier.failed" not in events
    (failed,) = [facts for _, _, _, facts in lines if facts.get("event") == "delivery.failed"]
    assert "no module called plots" in failed["traceback"]


WRITER = """
    import logging, os, sys
    from evsys_bus.delivery.process_log import flush_log, log_to_file, open_log
    from evsys_bus.diagnostics import log

    path, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    file = open_log(path)
    os.dup2(file, 1)
    os.dup2(file, 2)
    log_to_file(path)
    for number in range(count):
        log().warning("row.written", number=number, text="x" * size)
    log().warning("odd", name="n", bytes=b"\\xff", nan=float("nan"), text="\\udc80", deep=[[{1: object()}]])
    print("no end", end="")
    flush_log()
    os._exit(0)
"""


@pytest.fixture
def write(tmp_path):
    """Have a process log into the file."""
    path = str(tmp_path / layout.COURIERS / "process.log")
    Path(path).parent.mkdir()

    def write(count, size=10):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), path, str(count), str(size)]
        subprocess.run(command, check=True, timeout=18, env=os.environ | {"PYTHONUTF8": "1"})
        return Path(path)

    return write


@pytest.mark.long
def test_the_log_is_its_owners_alone_and_bounded_and_a_reader_misses_nothing(write, tmp_path):
    reader = LogReader(str(tmp_path / layout.COURIERS / "process.log"))
    path = write(3000, 2000)  # 6 MB
    earlier = path.with_name("process.log.1")
    for each in (path, earlier):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
        assert each.stat().st_size < MAX_LOG_BYTES + (1 << 17)
    assert path.stat().st_size + earlier.stat().st_size > 6_000_000
    reader.close()
    whole = LogReader(str(earlier))
    whole.close()


def test_a_reader_follows_into_the_next_file(write, tmp_path):
    path = write(1)
    reader = LogReader(str(path))
    with path.open("a") as file:
        file.write('{"event": "before"}\nnot json\n{"broken\n{"event": "cut')
    assert [each.event for each in reader.read(1 << 20)] == ["before"]
    with path.open("a") as file:
        file.write('"}\n')
    path.rename(path.with_name("process.log.1"))
    assert [each.event for each in reader.read(None)] == ["cut"]
    path.write_text('{"event": "after"}\n')
    assert [each.event for each in reader.read(None)] == ["after"]
    path.write_text('{"event": "x"}\n')  # somebody emptied it
    assert [each.event for each in reader.read(None)] == ["x"]
    assert list(reader.read(None)) == []


def test_a_reader_that_comes_before_the_file_reads_all_of_it_in_portions(write, tmp_path):
    reader = LogReader(str(tmp_path / layout.COURIERS / "process.log"))
    write(50)
    events = []
    for _ in range(200):
        events += reader.read(500)
    assert len([each for each in events if each.event == "row.written"]) == 50
    odd, printed = events[-2:]
    assert (odd.event, odd.facts["name_"], odd.adapter) == ("odd", "n", None)
    assert (printed.print, printed.stream) == ("no end", "stdout")


def test_a_flood_of_warnings_is_shortened_with_a_count(write, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    news = DeliveryLog(str(tmp_path), ["it"])
    write(500)
    news.poll(final=True)
    said = [vars(each) for each in caplog.records]
    assert len(said) <= MAX_LINES_PER_POLL + 1
    assert said[-1]["event"] == "couriers.log_shortened"
    assert said[-1]["count"] == 501 - MAX_LINES_PER_POLL


def test_while_nothing_changes_a_look_reads_nothing_again(write, tmp_path, caplog):
    write(3)
    news = DeliveryLog(str(tmp_path), ["it"], every_seconds=0.0)
    for _ in range(3):
        news.poll()
    assert caplog.records == []
    write(1)
    news.poll()
    news.poll()
    assert [vars(each)["event"] for each in caplog.records] == ["row.written", "odd"]
