"""What a run raised stands beside it: the whole traceback, until the run has ended well."""

import asyncio
import json
import os

import pytest

from evsys_bus import Callback, TrainingBatch
from evsys_bus.errors import TrainingError
from evsys_bus.run_files import MAX_CHARS, write_error_file
from evsys_bus.training import Experiment, RunComponents, TrainingLoop


class Toy:
    def __init__(self, error=None):
        self.error = error

    async def build_batch(self, step_idx):
        return TrainingBatch(data=1)

    async def forward_backward(self, batch):
        if self.error is not None:
            self.a_frame_of_the_backend()
        return {"loss": 1.0}

    def a_frame_of_the_backend(self):
        raise self.error from ValueError("the cause of it")

    async def optim_step(self): ...

    async def save_state(self, name):
        return f"memory://{name}"

    save_weights_for_sampler = save_state

    async def load_state(self, path): ...


class Panic(BaseException):
    """As Rust code raises it."""


def a_loop(folder, error=None, **more):
    return TrainingLoop(Toy(error), Toy(), num_steps=2, output_dir=folder, callbacks=[], **more)


@pytest.mark.parametrize("error", [RuntimeError("lost\nnode \ud800"), Panic("aborted"), asyncio.CancelledError("mine")])
async def test_the_traceback_of_a_loop_stays_beside_it_until_it_has_ended_well(tmp_path, error):
    with pytest.raises(type(error)):
        await a_loop(tmp_path, error).run()
    kept = (tmp_path / "error.txt").read_text()
    assert "a_frame_of_the_backend" in kept
    assert "ValueError: the cause of it" in kept
    assert str(error).split("\n")[0] in kept
    await a_loop(tmp_path, resume=True).run()
    assert not (tmp_path / "error.txt").exists()
    assert not list(tmp_path.glob(".error*"))


async def test_a_wish_to_leave_is_no_error(tmp_path):
    with pytest.raises(SystemExit):
        await a_loop(tmp_path, SystemExit(3)).run()
    assert not (tmp_path / "error.txt").exists()


async def test_a_second_cancellation_is_no_error(tmp_path):
    hanging = asyncio.Event()

    class Hangs(Toy):
        async def forward_backward(self, batch):
            hanging.set()
            await asyncio.Event().wait()

    run = asyncio.ensure_future(TrainingLoop(Hangs(), Toy(), num_steps=1, output_dir=tmp_path, callbacks=[]).run())
    await hanging.wait()
    run.cancel()
    await asyncio.wait([run], timeout=0.05)
    run.cancel()
    await asyncio.wait([run], timeout=5)
    assert run.cancelled()
    assert not (tmp_path / "error.txt").exists()


async def test_a_loop_that_is_refused_leaves_the_folder_of_another_alone(tmp_path):
    await a_loop(tmp_path).run()
    (tmp_path / "error.txt").write_text("of the other")
    with pytest.raises(TrainingError, match="holds a run already"):
        await a_loop(tmp_path).run()
    assert (tmp_path / "error.txt").read_text() == "of the other"


class UntoldError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def deep(left):
    return deep(left - 1) if left else 1 / 0


def test_a_traceback_is_bounded_and_both_ends_of_it_are_kept(tmp_path):
    for error in (raised(RuntimeError("begin" + "x" * 10**6 + "end")), raised(ExceptionGroup("y" * 9**6, [OSError()]))):
        path = write_error_file(tmp_path, error)
        assert path.stat().st_size < MAX_CHARS + 200
        assert path.read_text().startswith(("Traceback", "  + Exception"))
    assert "characters are left out here" in path.read_text()
    assert "UntoldError" in write_error_file(tmp_path, raised(UntoldError())).read_text()
    with pytest.raises(ZeroDivisionError) as caught:
        deep(900)
    assert write_error_file(tmp_path, caught.value).read_text().endswith("ZeroDivisionError: division by zero\n")


def test_a_disk_that_refuses_it_is_told_in_the_log_and_nothing_is_raised(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert write_error_file(tmp_path / "file" / "run", raised(OSError())) is None
    assert "run.error_unwritten" in caplog.text


# -- an experiment ----------------------------------------------------------------------------------------------------


def an_experiment(folder, recipe, **more):
    config = {"name": "x", "recipe": "", "runs": {"good": {}, "bad": {}}}
    return Experiment(config, recipe=recipe, callbacks=[], output_dir=folder, **more)


def fails_in_loop(params, run):
    error = RuntimeError("out of memory") if run.arm == "bad" else None
    return RunComponents(backend=Toy(error), step_builder=Toy(), num_steps=1)


def fails_in_recipe(params, run):
    if run.arm == "bad":
        raise RuntimeError("out of memory")
    return RunComponents(backend=Toy(), step_builder=Toy(), num_steps=1)


def works(params, run):
    return RunComponents(backend=Toy(), step_builder=Toy(), num_steps=1)


@pytest.mark.parametrize("recipe", [fails_in_loop, fails_in_recipe])
async def test_the_traceback_of_a_run_of_an_experiment_stays_and_the_ledger_names_it(tmp_path, recipe):
    await an_experiment(tmp_path, recipe).run()
    kept = (tmp_path / "bad-s0" / "error.txt").read_text()
    assert kept.count("Traceback") >= 1
    assert kept.endswith("RuntimeError: out of memory\n")
    assert not (tmp_path / "good-s0" / "error.txt").exists()
    runs = json.loads((tmp_path / "experiment.json").read_text())["runs"]
    assert (runs["bad-s0"]["traceback"], runs["good-s0"]["traceback"]) == ("error.txt", None)
    await an_experiment(tmp_path, works, resume=True).run()
    assert not (tmp_path / "bad-s0" / "error.txt").exists()
    runs = json.loads((tmp_path / "experiment.json").read_text())["runs"]
    assert (runs["bad-s0"]["status"], runs["bad-s0"]["traceback"]) == ("completed", None)


async def test_a_run_whose_folder_is_held_by_another_writes_no_error_there(tmp_path):
    (tmp_path / "bad-s0").mkdir()
    (tmp_path / "bad-s0" / "metrics.jsonl").write_text('{"step":0}\n')
    result = await an_experiment(tmp_path, works).run()
    assert "holds a run already" in result.arms[1].error
    assert not (tmp_path / "bad-s0" / "error.txt").exists()


# -- where all that lies ----------------------------------------------------------------------------------------------


class MovesAway(Callback):
    """Changes the working directory in the middle of a run."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, state, step_idx, batch, metrics):
        os.chdir(self.folder)


async def test_a_relative_folder_and_one_at_home_are_absolute_from_the_start(tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, folder in (("runs/a", tmp_path / "runs/a"), ("~/b", tmp_path / "home/b")):
        monkeypatch.chdir(tmp_path)
        loop = TrainingLoop(Toy(), Toy(), num_steps=2, output_dir=given, callbacks=[MovesAway(tmp_path / "away")])
        monkeypatch.chdir(tmp_path / "away")
        await loop.run()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
        assert (folder / "journal").is_dir()
        monkeypatch.chdir(tmp_path)
        experiment = an_experiment(f"{given}-x", works)
        monkeypatch.chdir(tmp_path / "away")
        await experiment.run()
        assert (folder.parent / f"{folder.name}-x" / "good-s0" / "result.json").exists()
    assert not any((tmp_path / "away").iterdir())


def test_a_url_is_no_output_directory():
    with pytest.raises(ValueError, match="output_dir is 's3://bucket/run', which is a URL"):
        TrainingLoop(Toy(), Toy(), num_steps=2, output_dir="s3://bucket/run")
    with pytest.raises(ValueError, match="which is a URL"):
        an_experiment("gs://bucket/run", works)
