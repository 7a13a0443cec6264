"""What the command line says, word for word; ``EVSYS_GOLDEN=write pytest tests/cli`` writes it anew."""

import os
import re

import pytest

from support import GOLDEN
from support.programs import run_evsys_bus

EXPERIMENT = """\
name: sweep
recipe: toy_recipe:recipe
run: {steps: 4, lr: 0.5}
runs:
  low: {lr: 0.1}
  high: {}
n_repeats: 2
success_metric: {name: test/score}
metadata: {hypothesis: a higher rate learns faster}
callbacks:
  - kind: print_progress
    params: {every: 2, keys: [loss]}
"""

RECIPE = """\
import json
from pathlib import Path
from evsys_bus import EvalResult, TrainingBatch
from evsys_bus.training.plan import RunComponents
from evsys_bus.training.protocols import Benchmark

class Descent:
    def __init__(self, params, run):
        self.params, self.run, self.x = params, run, 1.0 + run.seed
    async def forward_backward(self, batch):
        return {"loss": self.x ** 2}
    async def optim_step(self):
        self.x *= 1 - self.params["lr"]
    async def save_state(self, name):
        path = self.run.run_dir / f"{name}.json"
        path.write_text(json.dumps(self.x))
        return str(path)
    save_weights_for_sampler = save_state
    async def load_state(self, path):
        self.x = json.loads(Path(path).read_text())

class Steps:
    async def build_batch(self, step_idx):
        return TrainingBatch(data=[step_idx])

class Test:
    name = "test"
    async def evaluate(self, state):
        return Benchmark(EvalResult("test", metrics={"score": 1 / (1 + state.backend.x)}, tags=["test"]), [])

def recipe(params, run):
    return RunComponents(backend=Descent(params, run), step_builder=Steps(), num_steps=params["steps"],
                    benchmarks=[Test()], save_every=2)
"""


@pytest.fixture
def evsys_bus(tmp_path):
    """The command, in a folder with an experiment and its recipe."""
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT)
    (tmp_path / "toy_recipe.py").write_text(RECIPE)

    def command(*arguments, **files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
        return run_evsys_bus(*arguments, cwd=tmp_path, env=environment)

    return command


def same_as_golden(name, text, tmp_path):
    text = text.replace(str(tmp_path), "<here>")
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d([+-]\d\d:\d\d)?", "<time>", text)
    text = re.sub(r"^step_seconds .*$", "step_seconds <seconds>", text, flags=re.MULTILINE)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EVSYS_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 10)}]\n" for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)
HOOKS = """\
from evsys_bus import Callback, register_callback

@register_callback("uploads")
class Uploads(Callback):
    async def on_checkpoint(self, state, row):
        ...

@register_callback("counts")
class Counts(Callback):
    def on_step_ended(self, state, step_idx, batch, metrics):
        ...
"""

BAD_FILES = {
    "unknown_kind": EXPERIMENT.replace("print_progress", "print_progres"),
    "misspelt_param": EXPERIMENT.replace("every: 2", "evry: 2"),
    "wrong_type": EXPERIMENT.replace("every: 2", "every: often"),
    "wrong_top_level_type": EXPERIMENT.replace("n_repeats: 2", "n_repeats: two"),
    "unknown_recipe": EXPERIMENT.replace("toy_recipe:recipe", "toy_recipe:recipes"),
    "recipe_that_cannot_be_imported": EXPERIMENT.replace("toy_recipe:recipe", "no_such_module:recipe"),
    "unreadable_yaml": "name: sweep\nrun: {steps: 4\nruns:\n  low: {}\n",
    "yaml_bomb": BOMB,
    "several_at_once": EXPERIMENT.replace("print_progress", "print_progres")
    .replace("toy_recipe:recipe", "toy_recipe:recipes")
    .replace("n_repeats", "n_repeat"),
}


@pytest.mark.parametrize(
    ("command", "name"), [*(("check", name) for name in BAD_FILES), ("run", "several_at_once"), ("run", "yaml_bomb")]
)
def test_a_bad_file_is_told_with_place_and_remedy_and_exits_2(evsys_bus, tmp_path, command, name):
    done = evsys_bus(command, "bad.yaml", bad__yaml=BAD_FILES[name])
    assert (done.returncode, done.stdout) == (2, "")
    same_as_golden(f"error_{name}", done.stderr, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_not_there_is_told_and_exits_2(evsys_bus, tmp_path):
    done = evsys_bus("run", "swep.yaml")
    assert done.returncode == 2
    same_as_golden("error_no_file", done.stderr, tmp_path)


def test_an_override_that_leads_nowhere_is_told_as_it_was_written(evsys_bus, tmp_path):
    done = evsys_bus("check", "sweep.yaml", "--set", "callbacks[3].params.every=1", "--set", "n_repeats=many")
    assert done.returncode == 2
    same_as_golden("error_override", done.stderr, tmp_path)


def test_an_arm_that_is_not_there_is_told_with_the_nearest(evsys_bus, tmp_path):
    done = evsys_bus("run", "sweep.yaml", "--arm", "hihg")
    assert done.returncode == 2
    same_as_golden("error_unknown_arm", done.stderr, tmp_path)


@pytest.mark.parametrize("kind", ["uploads", "counts"])
def test_a_hook_that_would_never_be_called_is_told_before_anything_starts(evsys_bus, tmp_path, kind):
    text = EXPERIMENT.partition("callbacks:")[0] + f"plugins: [my_hooks]\ncallbacks:\n  - kind: {kind}\n"
    done = evsys_bus("run", "hooks.yaml", "--progress", "off", hooks__yaml=text, my_hooks__py=HOOKS)
    assert (done.returncode, done.stdout) == (2, "")
    same_as_golden(f"error_hook_{kind}", done.stderr, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_an_output_dir_that_cannot_be_made_exits_3(evsys_bus, tmp_path):
    (tmp_path / "file").write_text("")
    done = evsys_bus("run", "sweep.yaml", "--progress", "off", "--output-dir", "file/sweep")
    assert (done.returncode, done.stdout) == (3, "")
    same_as_golden("error_output_dir", done.stderr, tmp_path)


def test_a_used_directory_is_refused_with_the_command_that_goes_on(evsys_bus, tmp_path):
    assert evsys_bus("run", "sweep.yaml", "--set", "run.steps=2").returncode == 0
    before = (tmp_path / "runs" / "sweep" / "experiment.json").read_bytes()
    done = evsys_bus("run", "sweep.yaml", "--set", "run.steps=2", "--arm", "low")
    assert (done.returncode, done.stdout) == (2, "")
    same_as_golden("error_used_directory", done.stderr, tmp_path)
    assert (tmp_path / "runs" / "sweep" / "experiment.json").read_bytes() == before


def test_check_shows_the_plan_and_writes_nothing(evsys_bus, tmp_path):
    done = evsys_bus("check", "sweep.yaml", "--set", "run.steps=6")
    assert (done.returncode, done.stderr) == (0, "")
    same_as_golden("check", done.stdout, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "sweep.yaml",
        "toy_recipe.py",
    ]
    assert evsys_bus("run", "sweep.yaml", "--set", "run.steps=6", "--dry-run").stdout == done.stdout


def test_run_ends_with_the_table_the_conclusion_and_the_paths_and_show_reads_them_back(evsys_bus, tmp_path):
    done = evsys_bus("run", "sweep.yaml", "--set", "callbacks=[]", "--progress", "off")
    assert (done.returncode, done.stderr) == (0, "")
    same_as_golden("run", re.sub(r"in \d:\d\d", "in <time>", done.stdout), tmp_path)
    experiment, run = evsys_bus("show", "runs/sweep"), evsys_bus("show", "high-s1")
    assert (experiment.returncode, run.returncode) == (0, 0)
    same_as_golden("show_experiment", experiment.stdout, tmp_path)
    same_as_golden("show_run", run.stdout, tmp_path)


def test_adapters_with_a_kind_shows_schema_defaults_and_an_example(evsys_bus, tmp_path):
    done = evsys_bus("adapters", "print_progress")
    assert (done.returncode, done.stderr) == (0, "")
    same_as_golden("adapters_print_progress", done.stdout, tmp_path)
