"""What ``logs`` shows of a run: its traceback, and the log of its couriers."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from evsys_bus.cli.output.screen import wrap
from evsys_bus.journal import JournalWriter
from support.programs import command_in, run_evsys_bus, run_python


@pytest.fixture
def evsys_bus(capsys, tmp_path):
    """The command line in this process and in tmp_path."""
    return command_in(tmp_path, capsys)


def log_line(at, level="WARNING", **facts):
    return json.dumps({"time": f"2026-11-30T10:00:{at:02}.000+00:00", "level": level, "logger": "evsys_bus", **facts})


@pytest.fixture
def sweep(tmp_path):
    """An experiment with two failed runs and the log of its couriers."""
    folder = tmp_path / "runs" / "sweep"
    writer = JournalWriter(folder / "journal")
    writer.open()
    writer.close()
    for key, at in (("low-s0", 3), ("high-s0", 5)):
        (folder / key).mkdir()
        error = folder / key / "error.txt"
        error.write_text(
            f'Traceback (most recent call last):\n  File "train.py", line 1\nRuntimeError: {key} ran out\n'
        )
        moment = 1796032800 + at  # 2026-11-30T10:00:00Z
        os.utime(error, (moment, moment))
    (folder / "experiment.json").write_text('{"name": "sweep", "status": "failed", "runs": {}}')
    (folder / "journal" / "couriers").mkdir(exist_ok=True)
    lines = [
        log_line(1, message="courier.retrying why=503", adapter="csv"),
        log_line(2, "INFO", message="courier.started", adapter="csv"),
        log_line(
            4, "ERROR", message="courier.parked why=\x1b[31m401", adapter="wandb", traceback="Traceback\nKeyError: x"
        ),
        "Fatal Python error: Segmentation fault",
        log_line(6, print="hello\n", level="", stream="stdout", adapter="csv"),
        log_line(7, message="hook.failed", adapter="csv", facts={"run": "high-s0"}),
        '{"time":"2026-11-30T10:00:08',
    ]
    (folder / "journal" / "couriers" / "process.log").write_text("\n".join(lines))
    return folder


def messages(done):
    return [json.loads(line)["message"] for line in done.stdout.splitlines()]


def test_logs_of_an_experiment_are_its_failures_and_warnings_with_the_newest_last(evsys_bus, sweep):
    done = evsys_bus("logs", sweep, "--json")
    assert messages(done)[:-1] == [
        "courier.retrying why=503",
        "the run failed: RuntimeError: low-s0 ran out",
        "courier.parked why=\x1b[31m401",
        "Fatal Python error: Segmentation fault",
        "the run failed: RuntimeError: high-s0 ran out",
        "hook.failed",
    ]
    assert done.returncode == 0


def test_all_adds_what_is_below_warning_and_what_was_printed(evsys_bus, sweep):
    shown = messages(evsys_bus("logs", sweep, "--json", "--all"))
    assert "courier.started" in shown
    assert "hello" in shown


def test_logs_of_one_adapter_are_only_its_own(evsys_bus, sweep):
    assert messages(evsys_bus("logs", sweep, "--json", "--adapter", "wandb")) == ["courier.parked why=\x1b[31m401"]
    done = evsys_bus("logs", sweep, "--adapter", "wandbb")
    assert 'nothing is logged for adapter "wandbb"; did you mean "wandb"?' in done.stderr


def test_logs_of_a_run_leave_out_other_runs(evsys_bus, sweep):
    shown = messages(evsys_bus("logs", sweep / "low-s0", "--json"))
    assert "the run failed: RuntimeError: low-s0 ran out" in shown
    assert not any("high-s0" in each or each == "hook.failed" for each in shown)


def test_text_shows_the_traceback_below_and_no_control_characters(evsys_bus, sweep):
    done = evsys_bus("logs", "sweep")
    assert "\x1b" not in done.stdout
    assert "   wandb      courier.parked why=\\x1b[31m401\n  Traceback\n  KeyError: x\n" in done.stdout
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d   warning   csv", done.stdout)


def test_without_a_run_the_newest_one_is_shown(evsys_bus, sweep):
    done = evsys_bus("logs", "-n", "1")
    assert done.stderr.splitlines()[0] == "runs/sweep"
    assert "before these; more: -n" in done.stderr


def test_only_the_end_of_a_large_log_is_read(evsys_bus, sweep):
    log = sweep / "journal" / "couriers" / "process.log"
    with log.open("w") as file:
        for _ in range(6):
            file.write(log_line(1, message="x" * (1 << 20)) + "\n")
    done = evsys_bus("logs", sweep, "--json", "--adapter", "couriers")
    assert len(done.stdout.splitlines()) == 3
    assert "only the end of" in done.stderr


def test_a_folder_without_a_journal_or_an_error_is_refused(evsys_bus, tmp_path):
    (tmp_path / "empty").mkdir()
    done = evsys_bus("logs", "empty")
    assert done.returncode == 2
    assert "error: empty holds neither a journal nor the error of a run" in done.stderr


def test_follow_shows_what_is_logged_from_then_on(sweep, tmp_path):
    program = [sys.executable, "-c", "from evsys_bus.cli import main; main()", "logs", "runs/sweep", "-n", "0", "-f"]
    with subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()  # the entries before these: all files are open by then
        log = sweep / "journal" / "couriers" / "process.log"
        with log.open("a") as file:
            file.write("\n" + log_line(9, message="courier.late", adapter="csv") + "\n")
        assert "courier.late" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.parametrize("width", [20, 31, 60])
def test_text_is_wrapped_at_words_and_a_command_stays_whole(width):
    text = "events not confirmed yet: wandb 43 owed; finish with: evsys-bus sync /data/runs/a/journal   or wait a while"
    lines = wrap(text, width)
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert any(line.strip() == "evsys-bus sync /data/runs/a/journal" for line in lines) or width == 60
    assert all(len(line) <= width or "evsys-bus" in line for line in lines)


def test_the_output_of_a_run_is_shown_with_all(tmp_path):
    opening = f"with evsys_bus.run({str(tmp_path / 'a')!r}, environment=False):"
    source = f"import evsys_bus\n{opening}\n    print('one')\n    print('two')"
    run_python(source)
    assert "one" not in run_evsys_bus("logs", tmp_path / "a").stdout
    shown = run_evsys_bus("logs", tmp_path / "a", "--all").stdout
    assert "output" in shown
    assert "a   one\n  two\n" in shown
