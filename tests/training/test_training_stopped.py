"""A run that a callback stopped for good stays stopped; one that was interrupted, or has more to do now, goes on."""

import asyncio
import json
import logging
import signal

import pytest

from evsys_adapters.early_stopping import EarlyStoppingCallback
from evsys_bus import Callback, TrainingBatch
from evsys_bus.errors import TrainingError
from evsys_bus.training import Experiment, RunComponents, TrainingLoop
from support.files import read_json_lines


class Toy:
    """A backend, a step builder, an evaluator and a benchmark of nothing; notes the steps that were trained."""

    name, every = "val", 1

    def __init__(self, at=lambda step: None):
        self.at, self.trained = at, []

    async def build_batch(self, step_idx):
        self.trained.append(step_idx)
        self.at(step_idx)
        return TrainingBatch(data=1)

    async def forward_backward(self, batch):
        return {"loss": 1.0}

    async def optim_step(self): ...

    async def save_state(self, name):
        return f"memory://{name}"

    save_weights_for_sampler = save_state

    async def load_state(self, path): ...

    async def evaluate(self, state):
        return {"score": 1.0}


class StopsAt(Callback):
    def __init__(self, step, reason=None, **more):
        self.step, self.reason, self.more = step, reason, more

    def on_step_end(self, state, step_idx, batch, metrics):
        if step_idx == self.step:
            state.request_stop(self.reason)
            for name, value in self.more.items():
                setattr(state, name, value)


def a_loop(folder, *callbacks, toy=None, steps=10, **more):
    toy = toy or Toy()
    return TrainingLoop(toy, toy, num_steps=steps, output_dir=folder, callbacks=callbacks, resume=True, **more)


async def trained(folder, *callbacks, **more):
    """The steps that an attempt trains."""
    toy = Toy()
    await a_loop(folder, *callbacks, toy=toy, **more).run()
    return toy.trained


def final(folder):
    rows = read_json_lines(folder / "checkpoints.jsonl")
    [row] = [row for row in rows if row["name"] == "final"]
    return row


@pytest.mark.parametrize("reason", ["it is good enough", None])
async def test_a_run_that_a_callback_stopped_is_not_trained_on_and_ends_with_the_same_result(tmp_path, reason, caplog):
    await a_loop(tmp_path, StopsAt(4, reason)).run()
    before = final(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()
    for steps in (10, 10, 50):
        toy, caplog_start = Toy(), len(caplog.records)
        loop = a_loop(tmp_path, toy=toy, steps=steps)
        artifacts = await loop.run()
        assert (toy.trained, loop.state.stop_requested, loop.state.error) == ([], True, None)
        assert loop.state.stop_reason == (reason or "a callback asked for it")
        assert [row.name for row in artifacts.checkpoints] == ["final"]
        said = [each for each in caplog.records[caplog_start:] if each.message.startswith("training.stopped_earlier")]
        assert len(said) == 1
        assert (said[0].levelno, said[0].after_step) == (logging.WARNING, 4)
    assert (final(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()) == before


async def test_an_early_stop_at_a_saved_step_and_with_evals_is_told_from_an_interruption(tmp_path):
    toy = Toy()
    stopping = EarlyStoppingCallback("score", patience=3)
    await a_loop(tmp_path, stopping, toy=toy, evaluators=[toy], save_every=1).run()
    assert toy.trained == [0, 1, 2, 3]
    assert final(tmp_path)["stopped"] == "no improvement of score for 3 evals; best 1 at step 0"
    assert await trained(tmp_path, EarlyStoppingCallback("score", patience=30), save_every=1) == []


@pytest.mark.parametrize("how", [{"stopped_early": True}, {"stop_reason": "cancelled"}])
async def test_a_run_that_was_interrupted_goes_on(tmp_path, how):
    await a_loop(tmp_path, StopsAt(4, "soon", **how)).run()
    assert "stopped" not in final(tmp_path)
    assert await trained(tmp_path) == [5, 6, 7, 8, 9]


async def test_a_run_that_was_cancelled_goes_on(tmp_path):
    task = asyncio.current_task()
    with pytest.raises(asyncio.CancelledError):
        await a_loop(tmp_path, toy=Toy(lambda step: task.cancel() if step == 2 else None)).run()
    task.uncancel()
    first = final(tmp_path)["batch"] + 1
    assert "stopped" not in final(tmp_path)
    assert await trained(tmp_path) == list(range(first, 10))


async def test_a_cancellation_of_a_run_that_is_being_stopped_does_not_make_it_go_on(tmp_path):
    task = asyncio.current_task()

    class StopsAndIsCancelled(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 3:
                state.request_stop()
                task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await a_loop(tmp_path, StopsAndIsCancelled()).run()
    task.uncancel()
    assert await trained(tmp_path) == []


async def test_an_interrupted_run_that_a_callback_then_stops_before_its_first_step_is_stopped_for_good(tmp_path):
    class Enough(Callback):
        def on_train_start(self, state):
            state.request_stop("enough")

    await a_loop(tmp_path, StopsAt(4, "soon", stopped_early=True)).run()
    assert await trained(tmp_path, Enough()) == []
    assert (final(tmp_path)["batch"], final(tmp_path)["stopped"]) == (4, "enough")
    assert await trained(tmp_path) == []


async def test_a_run_that_reached_its_horizon_trains_longer_where_that_is_raised(tmp_path):
    assert await trained(tmp_path, steps=3) == [0, 1, 2]
    assert await trained(tmp_path, steps=3) == []
    assert await trained(tmp_path, steps=5) == [3, 4]
    assert final(tmp_path)["batch"] == 4


async def test_a_final_of_an_older_version_says_nothing_and_its_run_goes_on(tmp_path):
    row = {"name": "final", "batch": 2, "epoch": 0, "state_path": "memory://final", "sampler_path": None}
    (tmp_path / "checkpoints.jsonl").write_text(json.dumps(row) + "\n")
    assert await trained(tmp_path, steps=5) == [3, 4]


async def test_without_its_word_a_stopped_run_trains_on(tmp_path):
    await a_loop(tmp_path, StopsAt(4, "enough")).run()
    row = final(tmp_path)
    del row["stopped"]
    (tmp_path / "checkpoints.jsonl").write_text(json.dumps(row) + "\n")
    assert await trained(tmp_path) == [5, 6, 7, 8, 9]


def test_a_run_that_sigterm_ended_goes_on(tmp_path, program):
    source = """
        import asyncio, os, signal, sys
        from evsys_bus import TrainingBatch, TrainingLoop

        class Toy:
            async def build_batch(self, step_idx):
                if step_idx == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return TrainingBatch(data=1)

            async def forward_backward(self, batch):
                return {"loss": 1.0}

            async def optim_step(self): ...

            async def save_state(self, name):
                return f"memory://{name}"

            save_weights_for_sampler = save_state

        toy = Toy()
        asyncio.run(TrainingLoop(toy, toy, num_steps=9, output_dir=sys.argv[1], callbacks=[]).run())
    """
    process = program(source, str(tmp_path / "run"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    last = final(tmp_path / "run")
    assert "stopped" not in last
    assert asyncio.run(trained(tmp_path / "run", steps=9)) == list(range(last["batch"] + 1, 9))


# -- an experiment ----------------------------------------------------------------------------------------------------


def an_experiment(folder, toys, *callbacks, params=None, **settings):
    def recipe(params, run):
        toy = toys[run.run_key] = Toy()
        return RunComponents(backend=toy, step_builder=toy, num_steps=params["steps"], benchmarks=[toy])

    config = {"name": "x", "recipe": "", "run": {"steps": 6} | (params or {}), **settings}
    return Experiment(config, recipe=recipe, callbacks=callbacks, output_dir=folder, resume=True)


async def test_a_completed_run_of_an_experiment_trains_longer_where_its_steps_are_raised(tmp_path):
    toys = {}
    await an_experiment(tmp_path, toys, n_repeats=2).run()
    toys.clear()
    result = await an_experiment(tmp_path, toys, n_repeats=2, params={"steps": 8}).run()
    assert {key: toy.trained for key, toy in toys.items()} == {"run-s0": [6, 7], "run-s1": [6, 7]}
    assert (result.status, [arm.run_config["steps"] for arm in result.arms]) == ("completed", [8, 8])
    page = json.loads((tmp_path / "experiment.json").read_text())
    assert page["runs"]["run-s0"]["run_config"]["steps"] == 8
    toys.clear()
    await an_experiment(tmp_path, toys, n_repeats=2, params={"steps": 8}).run()
    assert toys == {}


async def test_fewer_steps_and_other_parameters_are_refused_as_ever(tmp_path):
    await an_experiment(tmp_path, {}).run()
    for params in ({"steps": 5}, {"steps": 8, "lr": 1}, {"steps": "8"}, {"steps": True}):
        with pytest.raises(TrainingError, match="was started with other parameters"):
            await an_experiment(tmp_path, {}, params=params).run()


async def test_an_experiment_whose_run_was_stopped_and_then_killed_scores_it_and_does_not_train_on(tmp_path):
    toys = {}
    await an_experiment(tmp_path, toys, StopsAt(2, "enough")).run()
    page = json.loads((tmp_path / "experiment.json").read_text())
    page["runs"]["run-s0"]["status"] = "running"  # as a kill leaves it
    (tmp_path / "experiment.json").write_text(json.dumps(page))
    result = await an_experiment(tmp_path, toys).run()
    assert toys["run-s0"].trained == []
    assert (result.arms[0].status, result.arms[0].eval_metrics) == ("completed", {"val/score": 1.0})
