"""What ``check`` finds before anything is started, and the forms of errors, times and colours on all screens."""

import re
import shutil
import subprocess
import sys
from functools import partial

import pytest

from evsys_bus.cli.output.formatting import format_table, format_time
from support.programs import run_evsys_bus

EXPERIMENT = """\
name: sweep
recipe: descent:recipe
run: {steps: 2, lr: 0.5}
runs:
  low: {lr: 0.1}
  high: {}
success_metric: {name: test/score}
callbacks: []
"""

RECIPE = """\
from evsys_bus import EvalResult, TrainingBatch
from evsys_bus.training.plan import RunComponents
from evsys_bus.training.protocols import Benchmark

class Descent:
    def __init__(self, run):
        self.run = run
    async def forward_backward(self, batch):
        if self.run.arm == "broken":
            raise ArithmeticError("the loss is NaN")
        return {"loss": 1.0}
    async def optim_step(self): ...
    async def save_state(self, name):
        path = self.run.run_dir / name
        path.write_text("{}")
        return str(path)
    save_weights_for_sampler = save_state
    async def load_state(self, path): ...

class Steps:
    async def build_batch(self, step_idx):
        return TrainingBatch(data=[step_idx])

class Test:
    name = "test"
    async def evaluate(self, state):
        return Benchmark(EvalResult("test", metrics={"score": 1.0}, tags=[]), [])

def recipe(params, run):
    return RunComponents(backend=Descent(run), step_builder=Steps(), num_steps=params["steps"], benchmarks=[Test()])
"""


@pytest.fixture
def evsys_bus(tmp_path):
    """The command, in a folder with an experiment and its recipe."""
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT)
    (tmp_path / "descent.py").write_text(RECIPE)

    return partial(run_evsys_bus, cwd=tmp_path)


def test_mistakes_of_yaml_are_found_together_with_all_others_and_each_is_one_error(evsys_bus, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "name: sweep\nrecipe: descent:recip\nrun: {steps: 12e999, lr: !!str 5}\n"
        "runs:\n  low: {lr: 0.1}\n  low: {lr: 0.2}\n  high: *nowhere\n"
        "n_repeats: two\ncallbacks:\n  - kind: csv_metric\n"
    )
    done = evsys_bus("check", "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert [int(line) for line in re.findall(r"bad.yaml:(\d+):", done.stderr)] == [2, 3, 3, 6, 7, 8, 10]
    assert done.stderr.endswith("\n7 errors\n")


def test_a_plugin_that_cannot_be_imported_is_one_error(evsys_bus, tmp_path):
    text = EXPERIMENT.replace("descent:recipe", "descend:recipe").replace("[]", "[{kind: mine}]")
    (tmp_path / "bad.yaml").write_text(f"{text}plugins: [descend]\n")
    done = evsys_bus("check", "bad.yaml")
    assert done.returncode == 2
    assert done.stderr.count("error[") == 1
    assert 'plugin "descend" cannot be imported' in done.stderr


@pytest.fixture(scope="module")
def completed_runs(tmp_path_factory):
    """A folder ``runs`` with the experiment, completed."""
    folder = tmp_path_factory.mktemp("completed")
    (folder / "sweep.yaml").write_text(EXPERIMENT)
    (folder / "descent.py").write_text(RECIPE)
    program = [sys.executable, "-c", "from evsys_bus.cli import main; main()", "run", "sweep.yaml", "--quiet"]
    subprocess.run(program, capture_output=True, check=True, cwd=folder)
    return folder / "runs"


@pytest.fixture
def completed(completed_runs, tmp_path):
    """A copy of the completed experiment, in the folder of the command."""
    shutil.copytree(completed_runs, tmp_path / "runs")


@pytest.mark.usefixtures("completed")
def test_check_with_resume_refuses_changed_parameters_and_allows_more_steps(evsys_bus):
    assert evsys_bus("check", "sweep.yaml", "--resume").returncode == 0
    assert evsys_bus("check", "sweep.yaml", "--resume", "--set", "run.steps=9").returncode == 0
    done = evsys_bus("check", "sweep.yaml", "--resume", "--set", "run.lr=0.7")
    assert (done.returncode, done.stdout) == (2, "")
    assert "run high-s0 in runs/sweep was started with other parameters: lr was 0.5, now 0.7" in done.stderr
    assert evsys_bus("run", "sweep.yaml", "--resume", "--dry-run", "--set", "run.lr=0.7").returncode == 2


@pytest.mark.usefixtures("completed")
def test_check_warns_of_a_success_metric_that_no_completed_run_has(evsys_bus):
    assert evsys_bus("check", "sweep.yaml").stderr == ""
    for name, fix in {
        "test/scor": 'did you mean "test/score"?',
        "score": 'did you mean "test/score"?',
        "reward_per_episode": "choose one of them",
    }.items():
        done = evsys_bus("check", "sweep.yaml", "--set", f"success_metric.name={name}")
        assert done.returncode == 0
        what = f'no completed run has the success_metric "{name}"; they have loss, step_seconds, test/score'
        assert done.stderr == f"warning: {what}   fix: {fix}\n"


def test_check_shows_no_credentials_of_the_file_in_its_plan_and_its_errors(evsys_bus, tmp_path):
    params = "{steps: 2, api_key: S3CRETa1, hub: {token: S3CRETa2}, url: 'https://me:S3CRETa3@h', max_tokens: 5}"
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT.replace("{steps: 2, lr: 0.5}", params) + "reveal: [api_key]\n")
    for form in ([], ["--json"]):
        shown = evsys_bus("check", "sweep.yaml", *form)
        assert set(re.findall(r"S3CRET\w+", shown.stdout)) == {"S3CRETa1"}
        assert "max_tokens" in shown.stdout
    error = evsys_bus("check", "sweep.yaml", "--set", "run.nowhere.auth_token=S3CRETa4")
    assert error.returncode == 2
    assert "--set run.nowhere.auth_token=<redacted>" in error.stderr


def test_quiet_shows_the_result_and_errors_only(evsys_bus, tmp_path):
    (tmp_path / "broken.yaml").write_text(EXPERIMENT.replace("low:", "broken:"))
    done = evsys_bus("run", "broken.yaml", "-q")
    assert done.returncode == 1
    assert "traceback: evsys-bus logs runs/sweep/broken-s0" in done.stdout
    assert "warning" not in done.stderr
    assert "event=" not in done.stderr


def test_verbose_shows_what_is_less_than_a_warning(evsys_bus):
    assert evsys_bus("run", "sweep.yaml", "-q").returncode == 0
    again = evsys_bus("run", "sweep.yaml", "--resume", "--set", "run.steps=3", "-v")
    assert "info: training.resumed" in again.stderr
    more = evsys_bus("run", "sweep.yaml", "--resume", "--set", "run.steps=4")
    assert "training.resumed" not in more.stderr


@pytest.mark.usefixtures("completed")
def test_show_without_a_run_shows_the_newest_experiment(evsys_bus):
    done = evsys_bus("show")
    assert (done.returncode, done.stderr) == (0, "runs/sweep\n")
    assert done.stdout.startswith("sweep\n")


def test_without_any_run_show_says_where_it_looked(evsys_bus):
    done = evsys_bus("show")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no run below ")


@pytest.mark.usefixtures("completed")
def test_words_of_state_have_a_colour_only_where_colours_are_wanted(evsys_bus):
    assert "\x1b[32mcompleted\x1b[0m" in evsys_bus("show", "runs/sweep", "--color", "always").stdout
    assert "\x1b[32mclosed" not in evsys_bus("status", "runs/sweep", "--color", "never").stdout
    assert "\x1b" not in evsys_bus("show", "runs/sweep").stdout


@pytest.mark.usefixtures("completed")
def test_times_are_local_with_their_offset(evsys_bus):
    shown = evsys_bus("show", "runs/sweep", env={"TZ": "Asia/Kolkata", "PATH": ""}).stdout
    assert re.search(r"started +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+05:30\n", shown)
    assert format_time("no time at all") == "no time at all"


@pytest.mark.parametrize(("width", "gap"), [(31, "   "), (29, "  ")])
def test_columns_move_together_before_a_table_is_laid_out_differently(width, gap):
    rows = [["run", "status", "evaluation"], ["low-s0", "completed", "0.5"]]
    lines = format_table(rows, width)
    assert lines[0] == f"run   {gap}status   {gap}evaluation".rstrip()
