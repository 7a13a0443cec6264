"""``run --resume`` on a machine that has nothing of the run: what it fetches, from where, and what it then trains."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from evsys_bus.cli import run
from support.files import read_json_lines

RECIPE = """\
import os
from evsys_bus.demo import DigitsRun
from evsys_bus.demo import recipe as digits

def recipe(params: DigitsRun, run):
    parts = digits(params, run)
    network, batches, steps = parts.backend, parts.step_builder, []
    build, train = batches.build_batch, network.forward_backward
    async def build_batch(step_idx):
        steps.append(str(step_idx))
        return await build(step_idx)
    async def forward_backward(batch):
        if steps[-1] == os.environ.get("FAIL_AT"):
            raise ConnectionResetError("the node went away")
        return await train(batch)
    batches.build_batch, network.forward_backward = build_batch, forward_backward
    return parts
"""

EXPERIMENT = """\
name: sweep
recipe: node_recipe:recipe
run: {{steps: 40, eval_every: 10, hidden: 16}}
runs: {{low: {{lr: 0.001}}}}
success_metric: {{name: digits-test/accuracy}}
callbacks:
  - kind: checkpoint_upload
    params: {params}
"""


class Machine:
    """A working directory with the experiment's file, and the command line in it."""

    def __init__(self, folder, capsys, params):
        folder.mkdir()
        (folder / "sweep.yaml").write_text(EXPERIMENT.format(params=json.dumps(params)))
        (folder / "node_recipe.py").write_text(RECIPE)
        self.folder, self.run_dir = folder, folder / "runs" / "sweep" / "low-s0"
        self.capsys = capsys

    def run(self, *arguments):
        with contextlib.chdir(self.folder):
            code = run(["run", "sweep.yaml", *arguments])
        return code, *self.capsys.readouterr()

    def rows(self, name):
        return read_json_lines(self.run_dir / name)

    def steps(self):
        return [row["step"] for row in self.rows("metrics.jsonl")]

    def result(self):
        found = json.loads((self.run_dir / "result.json").read_text())
        measured = {name: value for name, value in found["metrics"].items() if name != "step_seconds"}
        return found["status"], measured, found["eval_metrics"], state_of(self.run_dir / "checkpoints")


def state_of(folder):
    with np.load(folder / "final.state.npz") as saved:
        return {name: saved[name].tolist() for name in saved.files}


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.servers)])
def bucket(request, tmp_path):
    """Params of the destination."""
    if request.param == "file":
        return {"url": f"file://{tmp_path}/bucket/{{experiment}}"}
    name, reach = request.getfixturevalue("s3_bucket")
    return {"url": f"s3://{name}/{{experiment}}", **reach}


@pytest.fixture
def archive(tmp_path):
    return tmp_path / "bucket" / "sweep" / "low-s0"


@pytest.fixture
def machine(tmp_path, capsys):
    """Makes machines."""
    return lambda name, params=None: Machine(
        tmp_path / name, capsys, params or {"url": f"file://{tmp_path}/bucket/{{experiment}}"}
    )


@pytest.fixture
def first(machine, monkeypatch):
    """A machine that went away at step 25, and left checkpoints of steps 9 and 19 at the destination."""
    return left_at("25", machine("first"), monkeypatch)


def left_at(step, machine, monkeypatch):
    monkeypatch.setenv("FAIL_AT", step)
    code, _, err = machine.run("--progress", "off")
    assert code == 1, err
    monkeypatch.delenv("FAIL_AT")
    return machine


@pytest.mark.long
def test_a_run_that_goes_on_elsewhere_ends_as_one_that_goes_on_where_it_was(machine, bucket, monkeypatch):
    first = left_at("25", machine("first", bucket), monkeypatch)
    second = machine("second", bucket)
    code, _, err = second.run("--resume", "--progress", "off")
    assert code == 0, err
    url = bucket["url"].replace("{experiment}", "sweep")
    assert err.startswith(
        f"low-s0 continues after step 19, from step-000019: 2 files, 43.0 kB, fetched from {url}, verif"
    )
    assert second.steps() == list(range(20, 40)), "it went on"
    assert first.run("--resume", "--progress", "off", "--set", "callbacks=[]")[0] == 0
    assert first.steps() == list(range(40))
    assert second.result() == first.result()
    [fetched, *own] = second.rows("checkpoints.jsonl")
    assert Path(fetched["state_path"]).is_relative_to(second.run_dir / "fetched/step-000019")
    assert [row["name"] for row in own] == ["step-000029", "step-000039", "final"]


def test_where_nothing_was_uploaded_it_begins_from_the_start_and_says_so_in_one_line(machine, tmp_path):
    code, _, err = machine("second").run("--resume", "--progress", "off")
    assert code == 0
    nowhere = f"no checkpoint with its full state is here, or at file://{tmp_path}/bucket/sweep"
    assert err == f"low-s0 begins from the start: {nowhere}\n"


def test_what_is_here_and_newer_than_what_is_there_wins(machine, first, archive):
    shutil.rmtree(archive / "step-000019")
    latest = json.loads((archive / "latest.json").read_text())
    (archive / "latest.json").write_text(json.dumps(latest | {"checkpoint": "step-000009"}))
    code, _, err = first.run("--resume", "--progress", "off")
    assert (code, err) == (0, "")
    assert not (first.run_dir / "fetched").exists()


def test_what_is_here_and_older_than_what_is_there_gives_way(machine, first):
    second = machine("second")
    shutil.copytree(first.folder / "runs", second.folder / "runs")
    kept = second.rows("checkpoints.jsonl")[:1]
    (second.run_dir / "checkpoints.jsonl").write_text(json.dumps(kept[0]) + "\n")
    code, _, err = second.run("--resume", "--progress", "off")
    assert code == 0
    assert "low-s0 continues after step 19, from step-000019" in err
    assert second.steps() == list(range(40))
    assert [row["batch"] for row in second.rows("checkpoints.jsonl")] == [9, 19, 29, 39, 39]


def test_a_record_of_files_that_are_gone_is_not_what_is_here(machine, first, archive):
    shutil.rmtree(first.run_dir / "checkpoints")
    shutil.rmtree(archive / "step-000019")
    latest = json.loads((archive / "latest.json").read_text())
    (archive / "latest.json").write_text(json.dumps(latest | {"checkpoint": "step-000009"}))
    code, _, err = first.run("--resume", "--progress", "off")
    assert code == 0, err
    assert "low-s0 continues after step 9, from step-000009" in err
    assert first.steps() == list(range(40))
    assert [row["batch"] for row in first.rows("checkpoints.jsonl")] == [9, 19, 29, 39, 39]


def test_an_archive_in_the_experiment_s_own_folder_will_do_as_the_demo_has_one(machine, monkeypatch):
    first = left_at("25", machine("first", {"url": "file://{output_dir}/archive"}), monkeypatch)
    shutil.rmtree(first.run_dir / "checkpoints")
    code, _, err = first.run("--resume", "--progress", "off")
    assert code == 0, err
    assert err.endswith(f"fetched from file://{first.run_dir.parent}/archive, verified\n")
    assert first.steps() == list(range(40))


def test_a_run_that_is_completed_here_is_not_looked_for(machine, first):
    assert first.run("--resume", "--progress", "off")[0] == 0
    shutil.rmtree(first.run_dir / "checkpoints")
    assert first.run("--resume", "--progress", "off")[::2] == (0, "")


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"url": "s3://bucket/x", "endpoint": "http://127.0.0.1:9"}, "EB901"),
        ({"url": "s3://bucket/x", "profile": "nobody"}, "EB902"),
        ({"url": "file:///dev/null/bucket"}, "EB902"),
    ],
)
def test_a_destination_that_cannot_be_asked_ends_it_rather_than_training_from_the_start(
    machine, tmp_path, monkeypatch, params, code
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    second = machine("second", params)
    exit_code, out, err = second.run("--resume", "--progress", "off")
    assert (exit_code, out) == (4, "")
    assert err.startswith(
        f"error[{code}]: {params['url']} cannot be asked for a checkpoint of low-s0, and there is no local one\n"
    )
    assert "To start over: without --resume" in err
    assert not (second.run_dir / "metrics.jsonl").exists()


def test_a_missing_extra_is_told_with_the_install_command(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiobotocore", None)
    code, out, err = machine("second", {"url": "s3://bucket/x"}).run("--resume", "--progress", "off")
    assert (code, out) == (3, "")
    assert err.startswith('error[EB106]: callback "checkpoint_upload" needs a package that is not installed')
    assert 'fix: pip install "evsys-bus[s3]"' in err


def test_where_something_is_here_a_destination_that_cannot_be_asked_is_no_reason_to_stop(machine, first, tmp_path):
    shutil.rmtree(tmp_path / "bucket")
    (tmp_path / "bucket").write_text("no folder")
    code, _, err = first.run("--resume", "--progress", "off")
    assert code == 0
    assert err.startswith(f"warning: resume.not_asked url=file://{tmp_path}/bucket/sweep error=Not a directory: ")
    assert first.steps() == list(range(40))


def test_what_is_damaged_there_is_not_gone_on_from_until_it_is_mended(machine, first, archive):
    weights = archive / "step-000019/sampler/step-000019.weights.npz"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"X")
    second = machine("second")
    code, out, err = second.run("--resume", "--progress", "off")
    assert (code, out) == (4, "")
    assert "error[EB404]" in err
    assert not (second.run_dir / "checkpoints.jsonl").exists()
    weights.write_bytes(whole)
    assert second.run("--resume", "--progress", "off")[0] == 0
    assert second.steps() == list(range(20, 40))


def test_a_fetch_that_was_interrupted_goes_on_with_the_files_that_are_not_here_yet(machine, first, archive):
    second = machine("second")
    left = second.run_dir / "fetched/step-000019/state/step-000019.state.npz"
    left.parent.mkdir(parents=True)
    shutil.copy(archive / "step-000019/state/step-000019.state.npz", left)
    before = left.stat().st_ino
    (left.parent / f".step-000019.state.npz.{16 * '0a'}.partial").write_text("of a fetch that was killed")
    assert second.run("--resume", "--progress", "off")[0] == 0
    assert left.stat().st_ino == before, "it was fetched again"
    assert [path.name for path in left.parent.iterdir()] == [left.name]
    assert second.steps() == list(range(20, 40))


def test_weights_alone_are_nothing_to_go_on_from(machine, monkeypatch, tmp_path):
    params = {"url": f"file://{tmp_path}/bucket", "what": "sampler"}
    left_at("25", machine("first", params), monkeypatch)
    code, _, err = machine("second", params).run("--resume", "--progress", "off")
    assert code == 0
    assert err.startswith("low-s0 begins from the start: no checkpoint with its full state is here")


def test_of_two_destinations_the_one_with_the_later_step_is_taken(machine, first, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(tmp_path / "bucket/sweep", older)
    latest = json.loads((older / "low-s0/latest.json").read_text())
    (older / "low-s0/latest.json").write_text(json.dumps(latest | {"checkpoint": "step-000009"}))
    second = machine("second")
    text = (second.folder / "sweep.yaml").read_text()
    more = f'  - kind: checkpoint_upload\n    name: older\n    params: {{url: "file://{older}"}}\n'
    (second.folder / "sweep.yaml").write_text(text.replace("callbacks:\n", f"callbacks:\n{more}"))
    code, _, err = second.run("--resume", "--progress", "off")
    assert code == 0
    assert f"after step 19, from step-000019: 2 files, 43.0 kB, fetched from file://{tmp_path}/bucket/sweep" in err


def test_programs_are_told_as_json_and_logs_as_key_and_value(machine, first, archive):
    second = machine("second")
    told = []
    for mode in ("json", "plain"):
        code, _, err = second.run("--resume", "--progress", mode, "--set", "callbacks[0].params.checkpoints=100")
        assert code == 0
        told.append(next(line for line in err.splitlines() if "fetched" in line))
        shutil.rmtree(second.folder / "runs")
        shutil.rmtree(archive / "final-000039")
        latest = json.loads((archive / "latest.json").read_text())
        (archive / "latest.json").write_text(json.dumps(latest | {"checkpoint": "step-000019"}))
    row = json.loads(told[0])
    assert (row["event"], row["run"], row["checkpoint"], row["batch"]) == ("fetched", "low-s0", "step-000019", 19)
    assert row["bytes"] > 30_000
    assert " event=fetched run=low-s0 checkpoint=step-000019 batch=19 files=2 bytes=" in told[1]


def test_while_somebody_trains_in_the_directory_nothing_is_put_there(machine, first):
    from evsys_bus.run_files import lock_folder

    second = machine("second")
    with lock_folder(second.run_dir.parent, "the experiment's directory"):
        code, _, err = second.run("--resume", "--progress", "off")
    assert code == 3
    assert "is in use by" in err
    assert not second.run_dir.exists()
