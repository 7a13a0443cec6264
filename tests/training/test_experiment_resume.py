"""One experiment in several sessions: never two at a time, and every session speaks of the whole."""

import asyncio
import json

import pytest

from evsys_bus.callback import Callback
from evsys_bus.context import TrainingBatch
from evsys_bus.errors import TrainingError
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.loop import TrainingLoop
from evsys_bus.training.plan import RunComponents
from support.files import read_experiment

ACCURACY = {"a": 0.1, "b": 0.9}


class Steps:
    """A backend and a step builder of nothing, and a benchmark that knows the result."""

    name = "t"

    def __init__(self, accuracy=0.0, gate=None) -> None:
        self.accuracy, self.gate = accuracy, gate

    async def build_batch(self, step_idx):
        return TrainingBatch()

    async def forward_backward(self, batch):
        if self.gate is not None:
            await self.gate.wait()
        return {"loss": 0.5}

    async def optim_step(self):
        return None

    async def save_state(self, name):
        return f"toy://{name}"

    save_weights_for_sampler = save_state

    async def load_state(self, path):
        pass

    async def evaluate(self, state):
        return {"acc": self.accuracy}


class Told(Callback):
    def __init__(self) -> None:
        self.runs, self.result = [], None

    def on_run_start(self, ctx):
        self.runs.append(ctx.run_key)

    def on_experiment_end(self, ctx, result):
        self.result = result


def recipe(params, run, *, gate=None):
    if (run.arm, run.seed) == params.get("fails"):
        raise RuntimeError("node lost")
    steps = Steps(ACCURACY[run.arm], gate)
    return RunComponents(backend=steps, step_builder=steps, num_steps=2, benchmarks=[steps])


def broken(params, run):
    return recipe({"fails": ("b", 1)}, run)


def experiment(folder, *callbacks, using=recipe, **more):
    settings = {
        "name": "x",
        "recipe": "",
        "runs": {"a": {}, "b": {}},
        "n_repeats": 2,
        "success_metric": {"name": "t/acc"},
    } | more.pop("settings", {})
    return Experiment(settings, recipe=using, callbacks=callbacks, output_dir=folder, **more)


def verdict(folder):
    page = read_experiment(folder)
    return {key: page[key] for key in ("status", "best_arm", "best_score", "conclusion")}


# -- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
async def test_an_experiment_that_is_under_way_is_refused_and_undisturbed(tmp_path, resume):
    gate = asyncio.Event()
    first, second = Told(), Told()
    under_way = asyncio.ensure_future(
        experiment(tmp_path, first, using=lambda params, run: recipe(params, run, gate=gate)).run()
    )
    while not first.runs:
        await asyncio.sleep(0)
    before = (tmp_path / "experiment.json").read_bytes()
    with pytest.raises(TrainingError, match="the experiment's directory .* is in use by process") as refused:
        await experiment(tmp_path, second, resume=resume).run()
    assert isinstance(refused.value.__cause__, OSError)
    assert (second.runs, second.result) == ([], None)
    assert (tmp_path / "experiment.json").read_bytes() == before
    gate.set()
    assert (await under_way).status == "completed"
    assert (await experiment(tmp_path, resume=True).run()).status == "completed"


async def test_a_loop_in_the_folder_of_another_that_is_under_way_is_refused(tmp_path):
    gate = asyncio.Event()
    steps = Steps(gate=gate)
    first = asyncio.ensure_future(TrainingLoop(steps, steps, num_steps=2, output_dir=tmp_path / "run").run())
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        await asyncio.sleep(0)
    with pytest.raises(TrainingError, match="the run's directory .* is in use by process"):
        await TrainingLoop(steps, steps, num_steps=2, output_dir=tmp_path / "run", resume=True).run()
    gate.set()
    await first
    await TrainingLoop(steps, steps, num_steps=3, output_dir=tmp_path / "run", resume=True).run()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


# -- some arms, some seeds --------------------------------------------------------------------------------------------


async def test_a_session_with_some_arms_does_not_rewrite_what_is_known_of_the_others(tmp_path):
    whole = await experiment(tmp_path, using=broken).run()
    before = verdict(tmp_path)
    assert (whole.status, whole.best_arm) == ("failed", "a"), "b has lost a seed"
    told = Told()
    some = await experiment(tmp_path, told, using=broken, resume=True, only_arms=["a"]).run()
    assert told.runs == []
    assert verdict(tmp_path) == before
    assert (some.status, some.best_arm, some.best_score, some.conclusion) == tuple(before.values())
    assert [(arm.name, arm.run_config["seed"], arm.status) for arm in some.arms] == [
        ("a", 0, "completed"),
        ("a", 1, "completed"),
        ("b", 0, "completed"),
        ("b", 1, "failed"),
    ]
    assert some.arms[2].eval_metrics == {"t/acc": 0.9}
    assert some.arms[3].error == "RuntimeError: node lost"


async def test_of_two_equal_arms_the_first_is_best_whichever_is_run_last(tmp_path):
    def equal(params, run):
        steps = Steps(0.5)
        return RunComponents(backend=steps, step_builder=steps, num_steps=1, benchmarks=[steps])

    for only in (["b"], ["a"], None, ["b"]):
        some = await experiment(tmp_path, using=equal, resume=True, only_arms=only).run()
        assert some.best_arm == ("b" if only == ["b"] and len(some.arms) == 2 else "a")
    assert some.conclusion == verdict(tmp_path)["conclusion"]


async def test_a_failed_run_that_a_later_session_mends_makes_the_experiment_whole(tmp_path):
    await experiment(tmp_path, using=broken).run()
    told = Told()
    mended = await experiment(tmp_path, told, resume=True, only_arms=["b"], only_seeds=[1]).run()
    assert told.runs == ["b-s1"]
    assert (mended.status, mended.best_arm, mended.best_score) == ("completed", "b", 0.9)
    assert mended.conclusion == "b is best: t/acc 0.9 ± 0 over 2 seeds, ahead of a (0.1 ± 0)."
    assert told.result.arms == mended.arms
    assert len(mended.arms) == 4


async def test_runs_that_were_killed_or_never_begun_are_not_finished_and_neither_is_the_experiment(tmp_path):
    await experiment(tmp_path).run()
    page = read_experiment(tmp_path)
    page["runs"]["b-s0"]["status"] = "running"  # as a kill leaves it, beside the result of an earlier attempt
    page["runs"]["b-s1"] = {"arm": "b", "seed": 1, "group_name": "b"}
    (tmp_path / "experiment.json").write_text(json.dumps(page))
    some = await experiment(tmp_path, resume=True, only_arms=["a"]).run()
    assert some.status == read_experiment(tmp_path)["status"] == "cancelled"
    assert [(arm.status, arm.error) for arm in some.arms[2:]] == [("cancelled", "it has not run to its end")] * 2
    assert [arm.run_config["seed"] for arm in some.arms[2:]] == [0, 1]
    assert some.best_arm == "a"
    assert "b: 2 not finished of 2 runs." in some.conclusion
    whole = await experiment(tmp_path, resume=True).run()
    assert (whole.status, whole.best_arm) == ("completed", "b")


async def test_a_session_that_is_stopped_at_once_knows_what_was_completed_before_it(tmp_path):
    class Leaves(Callback):
        def on_experiment_start(self, ctx):
            raise SystemExit(3)

    whole = await experiment(tmp_path).run()
    told = Told()
    with pytest.raises(SystemExit):
        await experiment(tmp_path, Leaves(), told, resume=True).run()
    assert told.result.status == "cancelled"
    assert told.result.arms == whole.arms
    assert verdict(tmp_path) == verdict(tmp_path) | {"best_arm": "b", "conclusion": whole.conclusion}


async def test_a_completed_run_whose_result_is_lost_still_counts_as_completed(tmp_path):
    await experiment(tmp_path).run()
    for seed in (0, 1):
        (tmp_path / f"b-s{seed}" / "result.json").unlink()
    some = await experiment(tmp_path, resume=True, only_arms=["a"]).run()
    assert (some.status, some.best_arm) == ("completed", "a")
    assert "b: 2 without a score of 2 runs." in some.conclusion


async def test_of_stages_the_last_one_counts_whatever_is_resumed(tmp_path):
    settings = {"continual": [{"name": "pre"}, {"name": "post"}], "n_repeats": 1}
    whole = await experiment(tmp_path, settings=settings).run()
    for only in (["a"], ["b"]):
        some = await experiment(tmp_path, settings=settings, resume=True, only_arms=only).run()
        assert (some.best_arm, some.conclusion) == (whole.best_arm, whole.conclusion)
        assert sorted(arm.group_name for arm in some.arms) == ["post", "post", "pre", "pre"]
