"""The bridges under the frameworks' own trainers, in processes of their own, on a CPU.

They need the environment of .ci/frameworks.txt: `python -m pytest -m frameworks` there.
"""

import json

import pytest

from evsys_bus import Checkpoint, Eval, RunEnd, RunStart
from support.journals import read_events

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(240)]

STEPS = 20
FIRST_STEP = {"transformers": 1, "lightning": 0, "accelerate": 0}
CONFIG = {"transformers": ("max_steps", STEPS), "lightning": ("width", 4), "accelerate": ("lr", 0.01)}
EVALS = {"transformers": {"eval"}, "lightning": {"val"}, "accelerate": set()}
by_framework = pytest.mark.parametrize("framework", FIRST_STEP)


def train(framework, folder, *options):
    from benchmarks.frameworks import train

    return train(framework, folder, "--steps", STEPS, *options)


def steps_of(folder):
    """The steps of the run in its journal, in CSV and in TensorBoard."""
    from benchmarks.frameworks import steps_in_csv, steps_in_journal, steps_in_tensorboard

    run = folder / "run"
    return steps_in_journal(run), steps_in_csv(run), steps_in_tensorboard(folder / "tensorboard")


def events_of(folder, kind):
    return [event for event in read_events(folder / "run" / "journal") if isinstance(event, kind)]


def run_file(folder):
    return json.loads((folder / "run" / "run.json").read_text())


@by_framework
def test_a_training_that_is_killed_and_resumed_is_one_run_with_each_step_once(framework, tmp_path):
    killed = train(framework, tmp_path, "--kill-at", 13, "--workers", 2)
    assert killed.returncode == -9, killed.stderr
    resumed = train(framework, tmp_path, "--resume", "--workers", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "bridge.failed" not in killed.stderr + resumed.stderr
    first_step = FIRST_STEP[framework]
    for steps in steps_of(tmp_path):
        assert steps == list(range(first_step, first_step + STEPS))
    assert run_file(tmp_path)["status"] == "completed"
    assert run_file(tmp_path)["attempts"] == 2
    for start in events_of(tmp_path, RunStart):
        assert start.ctx.run_key == "run"
        key, value = CONFIG[framework]
        assert start.ctx.run_config[key] == value
    assert all(event.row.state_path for event in events_of(tmp_path, Checkpoint))
    assert {event.eval_name for event in events_of(tmp_path, Eval)} == EVALS[framework]


@by_framework
def test_a_callback_of_the_run_stops_the_training(framework, tmp_path):
    done = train(framework, tmp_path, "--stop-at", 6)
    assert done.returncode == 0, done.stderr
    steps, *_ = steps_of(tmp_path)
    assert 6 <= max(steps) <= 8
    assert run_file(tmp_path)["status"] == "completed"


@by_framework
def test_a_training_that_raises_is_a_failed_run(framework, tmp_path):
    done = train(framework, tmp_path, "--fault", "raise")
    assert "the loss is not a number" in done.stderr
    assert run_file(tmp_path)["status"] == "failed"
    assert "the loss is not a number" in events_of(tmp_path, RunEnd)[0].run_result.error


@by_framework
def test_a_training_that_is_terminated_is_a_cancelled_run(framework, tmp_path):
    train(framework, tmp_path, "--fault", "terminate")
    assert run_file(tmp_path)["status"] == "cancelled"


@by_framework
def test_a_run_that_cannot_be_written_does_not_end_the_training(framework, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal").write_text("in the way")
    done = train(framework, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bridge.failed") == 1
    assert list((tmp_path / {"accelerate": "checkpoints"}.get(framework, "out")).iterdir())
