"""Experiments run from the command line, in processes of their own: signals, streams, exit codes, the live table."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest

from support.files import parse_json_lines, read_json_lines
from support.programs import EVSYS_BUS

EXPERIMENT = """\
name: sweep
recipe: slow_recipe:recipe
run: {steps: 40, seconds: 0.002}
runs: {calm: {}, wild: {fail_at: 11}}
n_repeats: 2
max_concurrent_runs: 2
callbacks:
  - kind: print_progress
    params: {every: 20, keys: [loss]}
"""

RECIPE = """\
import asyncio, json
from pathlib import Path
from evsys_bus import Callback, TrainingBatch, register_callback
from evsys_bus.training.plan import RunComponents

class Countdown:
    def __init__(self, params, run):
        self.params, self.run, self.steps = params, run, 0
    async def forward_backward(self, batch):
        while self.steps == 25 and Path("hold").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.params["seconds"])
        if self.steps == self.params.get("fail_at") and self.run.seed == 1:
            raise ArithmeticError("loss is NaN")
        return {"loss": 1 / (1 + self.steps)}
    async def optim_step(self):
        self.steps += 1
    async def save_state(self, name):
        path = self.run.run_dir / f"{name}.json"
        path.write_text(json.dumps(self.steps))
        return str(path)
    save_weights_for_sampler = save_state
    async def load_state(self, path):
        self.steps = json.loads(Path(path).read_text())

class Steps:
    async def build_batch(self, step_idx):
        return TrainingBatch(data=[step_idx])

class Val:
    name, every = "val", 20
    async def evaluate(self, state):
        return {"score": 0.5}

def recipe(params, run):
    backend = Countdown(params, run)
    return RunComponents(
        backend=backend, step_builder=Steps(), num_steps=params["steps"], evaluators=[Val()], save_every=20
    )

@register_callback("uploads")
class Uploads(Callback):
    def on_train_end(self, state, artifacts):
        self.spawn(self.upload)
    async def upload(self):
        raise ConnectionError("no route to the bucket")

@register_callback("faulty")
class Faulty(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise KeyError("missing")
"""

COMMAND = [sys.executable, "-c", "from evsys_bus.cli import main; main()"]
CLEAN = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT)
    (tmp_path / "slow_recipe.py").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def evsys_bus(folder):
    def command(*arguments):
        return subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=folder, env=CLEAN
        )

    return command


def test_a_failed_run_among_others_is_told_everywhere_and_exits_1(evsys_bus, folder):
    done = evsys_bus("run", "sweep.yaml")
    assert done.returncode == 1
    assert (
        "! wild seed 1 failed: ArithmeticError: loss is NaN   traceback: evsys-bus logs runs/sweep/wild-s1"
        in done.stdout
    )
    assert re.search(r"^calm +2/2 +0\.02500 ± 0\.00000$", done.stdout, re.MULTILINE)
    assert re.search(r"^wild +1/2 ! +0\.02500$", done.stdout, re.MULTILINE)
    assert "warning: run.failed run=wild-s1" in done.stderr
    assert "slow_recipe.py" in done.stderr, "the traceback of the training code"
    assert "event=run_ended run=wild-s1 step=11/40 status=failed error=" in done.stderr
    assert len(read_json_lines(folder / "runs" / "sweep" / "calm-s1" / "metrics.jsonl")) == 40


def test_plain_progress_is_key_value_lines_without_carriage_returns(evsys_bus):
    done = evsys_bus("run", "sweep.yaml", "--arm", "calm", "--seed", "0")
    assert done.returncode == 0
    head, hint, *lines = done.stderr.splitlines()
    assert head == "sweep   1 arm x 1 seed = 1 run   data: runs/sweep"
    assert hint == (
        "Ctrl-C stops after the current step; go on with: evsys-bus run sweep.yaml --arm calm --seed 0 --resume"
    )
    assert [re.sub(r"time=\S+ ", "", line) for line in lines] == [
        "event=run_started run=calm-s0",
        "event=checkpoint run=calm-s0 step=20/40 name=step-000019",
        "event=eval run=calm-s0 step=20/40 eval=val score=0.5",
        "event=checkpoint run=calm-s0 step=40/40 name=step-000039",
        "event=eval run=calm-s0 step=40/40 eval=val score=0.5",
        "event=checkpoint run=calm-s0 step=40/40 name=final",
        "event=run_ended run=calm-s0 step=40/40 status=completed",
        "event=experiment_ended status=completed",
    ]
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout


def test_with_json_every_line_of_both_streams_is_an_object(evsys_bus):
    quiet = ["--set", "callbacks=[{kind: faulty}]", "--set", "plugins=[slow_recipe]"]
    done = evsys_bus("run", "sweep.yaml", "--json", "--progress", "json", "--arm", "wild", *quiet)
    assert done.returncode == 1
    results = parse_json_lines(done.stdout)
    assert [(row["type"], row.get("status")) for row in results] == [
        ("run", "completed"),
        ("run", "failed"),
        ("arm", None),
        ("experiment", "failed"),
    ]
    progress = [json.loads(line) for line in done.stderr.splitlines() if not line.startswith("warning: faulty")]
    assert {"run_started", "eval", "checkpoint", "run_ended", "experiment_ended", "log"} <= {
        row["event"] for row in progress
    }
    (evaluated,) = [row for row in progress if row["event"] == "eval" and row["step"] == 20 and row["run"] == "wild-s0"]
    assert (evaluated["num_steps"], evaluated["metrics"]) == (40, {"score": 0.5})


def test_what_callbacks_print_leaves_stdout_to_the_result_with_json(evsys_bus):
    done = evsys_bus("run", "sweep.yaml", "--json", "--progress", "off", "--arm", "calm", "--seed", "0")
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["run", "arm", "experiment"]
    assert "step 20/40  loss 0.05" in done.stderr


def test_what_callbacks_print_is_json_too_where_progress_is(evsys_bus):
    done = evsys_bus("run", "sweep.yaml", "--json", "--progress", "json", "--arm", "calm", "--seed", "0")
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["run", "arm", "experiment"]
    printed = [row["text"] for line in done.stderr.splitlines() if (row := json.loads(line))["event"] == "printed"]
    assert any(text.startswith("step 20/40  loss 0.05") or "step 20/40  loss 0.05" in text for text in printed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_exits_130_and_the_line_it_prints_goes_on(evsys_bus, folder, number):
    hold = folder / "hold"  # while this is there, step 25 does not end
    hold.touch()
    arguments = ["run", "sweep.yaml", "--arm", "calm", "--set", "callbacks=[]"]
    running = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, cwd=folder, env=CLEAN)
    assert running.stderr is not None
    metrics = folder / "runs" / "sweep" / "calm-s0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") == 25):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    seen = ""
    while "event=stopping" not in seen:
        seen = running.stderr.readline()
    hold.unlink()
    told = seen + running.communicate(timeout=15)[1]
    assert running.returncode == 130
    assert f"event=stopping signal={number.name}" in told
    assert "interrupted: 0 of 2 runs done; stopped calm-s0 at step 26" in told
    assert len(read_json_lines(metrics)) == 26
    final = read_json_lines(metrics.with_name("checkpoints.jsonl"))[-1]
    assert (final["name"], final["batch"]) == ("final", 25)

    line = next(line for line in told.splitlines() if line.startswith("go on with: "))
    again = line.removeprefix("go on with: evsys-bus ").replace("'", "").split()
    done = evsys_bus(*again)
    assert done.returncode == 0, done.stderr
    for key in ("calm-s0", "calm-s1"):
        of_run = read_json_lines(folder / "runs" / "sweep" / key / "metrics.jsonl")
        assert [(row["step"], row["loss"]) for row in of_run] == [(step, 1 / (1 + step)) for step in range(40)]


def test_the_second_signal_ends_it_at_once(folder):
    arguments = ["run", "sweep.yaml", "--arm", "calm", "--set", "run.seconds=30"]
    running = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, cwd=folder, env=CLEAN)
    assert running.stderr is not None
    while "event=run_started" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    while "event=stopping" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=10)
    assert running.returncode == 130


def test_a_callback_in_trouble_is_counted_at_the_end_and_changes_no_exit_code(evsys_bus):
    line = ["run", "sweep.yaml", "--arm", "calm", "--seed", "0", "--set", "plugins=[slow_recipe]"]
    done = evsys_bus(*line, "--set", "callbacks=[{kind: faulty}, {kind: uploads}]")
    assert done.returncode == 0
    assert done.stderr.count("Traceback") == 2, "each kind of fault once"
    assert done.stderr.endswith(
        "warning: faulty.on_step_end raised in 40 of 40 calls\nwarning: tasks of uploads: 1 failed of 1\n"
    )
    strict = evsys_bus(*line, "--set", "callbacks=[{kind: uploads}]", "--output-dir", "runs/strict", "--strict")
    assert strict.returncode == 5


@pytest.mark.long
def test_the_default_output_dir_of_the_demo_is_a_new_one_under_runs_and_everything_is_in_it(evsys_bus, folder):
    done = evsys_bus("demo", "--set", "run.steps=2", "--seed", "0", "--progress", "off")
    assert done.returncode == 0, done.stderr
    (experiment,) = (folder / "runs").iterdir()
    assert experiment.name.startswith("demo-")
    assert f"data         runs/{experiment.name}" in done.stdout
    assert "conclusion   " in done.stdout
    assert (experiment / "journal").is_dir()
    run_dirs = [path for path in experiment.iterdir() if path.is_dir() and path.name not in {"journal", "archive"}]
    assert len(run_dirs) == 3
    for run_dir in run_dirs:
        assert {"metrics.jsonl", "metrics.csv", "checkpoints.jsonl"} <= {path.name for path in run_dir.iterdir()}
    assert {path.name for path in (experiment / "archive").iterdir()} == {path.name for path in run_dirs}
    told = evsys_bus("checkpoints", f"runs/{experiment.name}")
    archived = rf"^\S+ +final-000001 +1 +whole +uploaded +\S+ kB +file://{experiment}/archive$"
    assert len(re.findall(archived, told.stdout, re.MULTILINE)) == 3


def _is_readable(file):
    looking = select.poll()  # `select` knows no file beyond 1,023, and a worker of the test run may hold as many
    looking.register(file, select.POLLIN)
    return bool(looking.poll(100))


def on_a_terminal(arguments, folder, *, columns, rows, **environment):
    """Run it on a pseudo-terminal of this size; what it wrote, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(sys.executable, [*COMMAND, *arguments], CLEAN | {"TERM": "xterm-256color"} | environment)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    written = b""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if _is_readable(terminal):
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux says so at the end of a pty
                break
            if not part:
                break
            written += part
    os.close(terminal)
    return written.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("progress", ["plain", "json", "live"])
def test_what_the_runs_print_is_kept_beside_them_without_the_progress(folder, evsys_bus, progress):
    line = ["run", "sweep.yaml", "--arm", "calm", "--seed", "0"]
    if progress == "live":
        written, code = on_a_terminal(line, folder, columns=100, rows=24)
    else:
        done = evsys_bus(*line, "--progress", progress, *(["--json"] if progress == "json" else []))
        written, code = done.stdout + done.stderr, done.returncode
    assert code == 0
    output = (folder / "runs" / "sweep" / "output.log").read_text()
    printed = [each for each in output.splitlines() if each.startswith("calm-s0  step ")]
    assert len(printed) == 3, output
    assert output.splitlines() == printed, "neither lines of progress nor a table"
    assert all(each in written for each in printed)
    assert printed[0] in evsys_bus("logs", "runs/sweep", "--all").stdout


def test_no_output_keeps_nothing_of_what_the_runs_print(folder, evsys_bus):
    done = evsys_bus("run", "sweep.yaml", "--arm", "calm", "--seed", "0", "--no-output")
    assert done.returncode == 0
    assert "step " in done.stdout
    assert not (folder / "runs" / "sweep" / "output.log").exists()


@pytest.mark.parametrize(("columns", "sd"), [(120, True), (60, False)])
def test_on_a_terminal_a_table_redraws_itself_and_printed_lines_pass_above_it(folder, columns, sd):
    arguments = ["run", "sweep.yaml", "--set", "run.seconds=0.02"]
    written, code = on_a_terminal(arguments, folder, columns=columns, rows=24)
    assert code == 1
    frames = written.split("sweep   2 arms x 2 seeds = 4 runs   data: runs/sweep")
    assert 4 < len(frames) < 8 * 6, "at most eight a second"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert ("train/loss" in plain) == sd
    assert "! wild seed 1 failed at step 11: ArithmeticError" in plain
    assert ("±" in plain.partition("failed in")[0]) == sd
    assert all(len(line) <= columns for line in plain.replace("\r", "\n").splitlines() if "runs done" in line)
    for line in plain.replace("\r", "\n").splitlines():
        if "steps/s" in line:
            assert line.startswith(("calm-s", "wild-s", "step ")), "no line tore the table"
    assert "\x1b[?25h" in written.rpartition("\x1b[?25l")[2], "the cursor is shown again"
    assert "\x1b[3" in written, "in colour"


def test_no_color_is_honoured_on_a_terminal_and_force_color_in_a_pipe(folder):
    written, _ = on_a_terminal(["check", "no.yaml"], folder, columns=80, rows=24, NO_COLOR="1")
    assert "error[EB107]" in written
    assert "\x1b[3" not in written
    forced = [*COMMAND, "check", "no.yaml"]
    for arguments, environment in ((forced, {"FORCE_COLOR": "1"}), ([*forced, "--color", "always"], {"NO_COLOR": "1"})):
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, cwd=folder, env=CLEAN | environment
        )
        assert "\x1b[31m" in done.stderr


def test_a_reader_of_the_result_that_left_changes_no_exit_code(folder):
    line = f"({sys.executable} -c '{COMMAND[2]}' run sweep.yaml --set callbacks=[]; echo $? > code) | true"
    subprocess.run(["bash", "-c", line], capture_output=True, check=False, cwd=folder, env=CLEAN)
    assert (folder / "code").read_text() == "1\n", "one run failed"


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_progress_that_cannot_be_shown_changes_nothing(folder, stderr):
    line = f"{sys.executable} -c '{COMMAND[2]}' run sweep.yaml --arm calm --set callbacks=[] {stderr}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=folder, env=CLEAN)
    assert done.returncode == 0
    assert "sweep   completed in" in done.stdout


def test_modules_are_found_in_the_current_folder_first_and_then_beside_the_file(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "sweep.yaml").write_text(EXPERIMENT.replace("slow_recipe:", "recipes.slow:"))
    (folder / "configs" / "recipes").mkdir()
    (folder / "configs" / "recipes" / "slow.py").write_text(RECIPE)

    def check():
        command = [EVSYS_BUS, "check", "configs/sweep.yaml"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=CLEAN)

    assert check().returncode == 0
    (folder / "recipes").mkdir()
    (folder / "recipes" / "slow.py").write_text("")
    assert 'module "recipes.slow" has no recipe' in check().stderr
    (folder / "recipes" / "slow.py").write_text(RECIPE)
    (folder / "configs" / "recipes" / "slow.py").unlink()
    assert check().returncode == 0
