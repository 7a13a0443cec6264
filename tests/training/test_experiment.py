"""Experiments of small real parts: the order of events, isolation, stages, several at a time, resuming."""

import asyncio
import json
import logging
import os
import resource
from pathlib import Path

import anyio
import msgspec
import pytest

from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback
from evsys_bus.config.experiment import ExperimentConfig, Stage, SuccessMetric
from evsys_bus.context import EvalResult
from evsys_bus.errors import ConfigError, TrainingError
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.experiment_store import read_result
from evsys_bus.training.plan import RunComponents, run_sequences
from evsys_bus.training.protocols import Benchmark
from support.files import read_experiment, read_json_lines
from support.training_parts import IndexBatches


class Weight:
    """One number that every step adds ``lr`` to; its checkpoints are files."""

    def __init__(self, folder: Path, lr: float = 1.0, raises_at: int | None = None) -> None:
        self.value, self.lr, self.raises_at, self.folder = 0.0, lr, raises_at, folder
        self.steps = 0

    async def forward_backward(self, batch):
        await asyncio.sleep(0)
        if self.steps == self.raises_at:
            raise RuntimeError("out of memory")
        return {"value": self.value}

    async def optim_step(self):
        self.value += self.lr
        self.steps += 1

    async def save_state(self, name):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"value": self.value, "steps": self.steps}))
        return str(path)

    async def save_weights_for_sampler(self, name):
        return str(self.folder / f"{name}.json")

    async def load_state(self, path):
        saved = json.loads(Path(path).read_text())  # noqa: ASYNC240 # a few bytes
        self.value, self.steps = saved["value"], saved["steps"]


class Score:
    """A benchmark: how large the weight has become."""

    def __init__(self, name="size", *, tag="test", every=0, error=None, value=None) -> None:
        self.name, self.tag, self.every, self.error, self.value = name, tag, every, error, value

    async def evaluate(self, state):
        if self.error is not None:
            raise self.error
        value = state.backend.value if self.value is None else self.value
        return Benchmark(EvalResult(self.name, metrics={"value": value}, tags=[self.tag]), [{"task_id": "a"}])


def recipe(params, run):
    return RunComponents(
        backend=Weight(run.run_dir / "states", params.get("lr", 1.0), params.get("raises_at")),
        step_builder=IndexBatches(),
        num_steps=params.get("steps", 3),
        evaluators=[Score("val", tag="val", every=2)],
        benchmarks=[Score(value=params.get("score"))],
        save_every=params.get("save_every", 0),
    )


def config(**more) -> ExperimentConfig:
    return ExperimentConfig(**({"name": "lr", "recipe": ""} | more))


class Told(Callback):
    """Every hook's name, with the run it spoke of, in order."""

    def __init__(self) -> None:
        self.events = []
        self.arms = {}
        self.result = None

    def on_experiment_start(self, ctx):
        self.events.append(("experiment_start", ctx.run_key))

    def on_group_start(self, ctx, group_name):
        self.events.append((f"group_start {group_name}", ctx.run_key))

    def on_run_start(self, ctx):
        self.events.append(("run_start", ctx.run_key))

    def on_train_start(self, state):
        self.events.append(("train_start", state.ctx.run_key))

    def on_step_end(self, state, step_idx, batch, metrics):
        self.events.append((f"step_end {step_idx}", state.ctx.run_key))

    def on_checkpoint(self, state, row):
        self.events.append((f"checkpoint {row.name}", state.ctx.run_key))

    def on_eval(self, state, step_idx, eval_name, metrics):
        self.events.append((f"eval {eval_name}", state.ctx.run_key))

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.events.append((f"benchmark {eval_result.name} {step}", ctx.run_key))

    def on_train_end(self, state, artifacts):
        self.events.append(("train_end", state.ctx.run_key))

    def on_run_end(self, ctx, run_result, arm):
        self.events.append(("run_end", ctx.run_key))
        self.arms[ctx.run_key] = arm

    def on_experiment_end(self, ctx, result):
        self.events.append(("experiment_end", ctx.run_key))
        self.result = result

    def of(self, run_key):
        return [event for event, run in self.events if run == run_key]


def statuses(folder):
    return {key: run["status"] for key, run in read_experiment(folder)["runs"].items()}


async def experiment(folder, *callbacks, using=recipe, resume=False, only_arms=None, only_seeds=None, **settings):
    made = Experiment(
        config(**settings),
        recipe=using,
        callbacks=callbacks,
        output_dir=folder,
        resume=resume,
        only_arms=only_arms,
        only_seeds=only_seeds,
    )
    return await made.run()


# -- the order of things ----------------------------------------------------------------------------------------------


async def test_every_event_of_an_experiment_fires_at_its_moment(tmp_path):
    told = Told()
    await experiment(tmp_path, told, run={"steps": 2, "save_every": 2})
    assert told.events == [
        ("experiment_start", None),
        ("run_start", "run-s0"),
        ("train_start", "run-s0"),
        ("step_end 0", "run-s0"),
        ("step_end 1", "run-s0"),
        ("checkpoint step-000001", "run-s0"),
        ("eval val", "run-s0"),
        ("benchmark val 1", "run-s0"),
        ("checkpoint final", "run-s0"),
        ("train_end", "run-s0"),
        ("benchmark size None", "run-s0"),
        ("run_end", "run-s0"),
        ("experiment_end", None),
    ]


async def test_replicates_make_a_group_per_arm_before_its_first_run(tmp_path):
    told = Told()
    await experiment(tmp_path, told, runs={"a": {}, "b": {}}, n_repeats=2)
    starts = [each for each in told.events if each[0].startswith(("group", "run_start"))]
    assert starts == [
        ("group_start a", None),
        ("run_start", "a-s0"),
        ("run_start", "a-s1"),
        ("group_start b", None),
        ("run_start", "b-s0"),
        ("run_start", "b-s1"),
    ]


async def test_one_seed_makes_no_group(tmp_path):
    told = Told()
    await experiment(tmp_path, told, runs={"a": {}, "b": {}})
    assert not [each for each, _ in told.events if each.startswith("group")]


async def test_ids_go_from_the_experiment_and_the_group_to_the_runs_and_not_across(tmp_path):
    class Ids(Callback):
        def __init__(self) -> None:
            self.seen = {}

        def on_experiment_start(self, ctx):
            ctx.ids["experiment_id"] = "e1"

        def on_group_start(self, ctx, group_name):
            ctx.ids[f"group:{group_name}"] = f"g-{group_name}"

        def on_run_start(self, ctx):
            self.seen[ctx.run_key] = dict(ctx.ids)
            ctx.ids["run_id"] = f"r-{ctx.run_key}"

    ids = Ids()
    result = await experiment(tmp_path, ids, runs={"a": {}, "b": {}}, n_repeats=2)
    assert ids.seen["a-s1"] == {"experiment_id": "e1", "group:a": "g-a"}
    assert "run_id" not in ids.seen["b-s1"]
    assert [arm.run_id for arm in result.arms] == ["r-a-s0", "r-a-s1", "r-b-s0", "r-b-s1"]
    assert [arm.run_result.run_id for arm in result.arms] == [arm.run_id for arm in result.arms]
    assert result.experiment_id == "e1"


async def test_a_run_is_not_yet_completed_in_the_ledger_when_run_end_fires_and_is_so_after_it(tmp_path):
    class Looks(Callback):
        def on_run_end(self, ctx, run_result, arm):
            seen.append((statuses(tmp_path)[ctx.run_key], (tmp_path / ctx.run_key / "result.json").exists()))

        def on_experiment_end(self, ctx, result):
            seen.append((statuses(tmp_path)["run-s0"], (tmp_path / "run-s0" / "result.json").exists()))

    seen = []
    await experiment(tmp_path, Looks())
    assert seen == [("running", False), ("completed", True)]


async def test_a_run_is_told_its_parameters_its_seed_and_where_it_writes(tmp_path):
    plans = []

    async def late(params, run):
        plans.append((params, run))
        return recipe(params, run)

    class Starts(Callback):
        def on_run_start(self, ctx):
            configs.append(ctx.run_config)

    configs = []
    await experiment(tmp_path, Starts(), using=late, run={"lr": 2.0}, runs={"a": {"steps": 1}}, seeds=[7], n_repeats=1)
    (params, run), *_ = plans
    assert params == run.params == {"lr": 2.0, "steps": 1}
    assert (run.arm, run.seed, run.run_key, run.stage, run.run_dir) == ("a", 7, "a-s7", None, tmp_path / "a-s7")
    assert configs == [{"lr": 2.0, "steps": 1, "arm": "a", "seed": 7}]
    assert read_json_lines(tmp_path / "a-s7" / "metrics.jsonl")[0]["value"] == 0


async def test_a_recipe_whose_first_parameter_is_a_config_gets_it_built_and_checked(tmp_path):
    class Knobs(msgspec.Struct):
        lr: float = 1.0

    def typed(params: Knobs, run):
        got.append(params)
        return recipe({"steps": 1}, run)

    typed.__annotations__["params"] = Knobs
    got = []
    await experiment(tmp_path, using=typed, run={"lr": 3.0})
    assert got == [Knobs(3.0)]
    with pytest.raises(ConfigError):
        Experiment(config(run={"lr": "high"}), recipe=typed)


async def test_a_matrix_runs_every_combination(tmp_path):
    told = Told()
    result = await experiment(tmp_path, told, matrix={"lr": [0.5, 2.0], "steps": [1, 2]}, seeds=[3])
    assert [(arm.run_config["lr"], arm.run_config["steps"]) for arm in result.arms] == [
        (0.5, 1),
        (0.5, 2),
        (2.0, 1),
        (2.0, 2),
    ]
    assert [arm.metrics["value"] for arm in result.arms] == [0.0, 0.5, 0.0, 2.0]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*told.arms, "journal"}


async def test_the_best_arm_is_the_one_with_the_best_mean_over_its_seeds(tmp_path):
    result = await experiment(
        tmp_path,
        runs={"low": {"lr": 0.1}, "high": {"lr": 2.0}},
        n_repeats=2,
        success_metric=SuccessMetric("size/value"),
        metadata={"hypothesis": "larger is better"},
    )
    assert (result.status, result.best_arm, result.best_score) == ("completed", "high", 6.0)
    assert result.hypothesis == "larger is better"
    assert result.conclusion == "high is best: size/value 6 ± 0 over 2 seeds, ahead of low (0.3 ± 0)."
    assert {**read_experiment(tmp_path), "runs": None, "started": None, "ended": None} == {
        "name": "lr",
        "status": "completed",
        "started": None,
        "ended": None,
        "hypothesis": "larger is better",
        "best_arm": "high",
        "best_score": 6.0,
        "conclusion": result.conclusion,
        "runs": None,
    }


async def test_a_benchmark_after_training_that_raises_is_logged_and_the_others_are_scored(tmp_path, caplog):
    def some(params, run):
        made = recipe(params, run)
        benchmarks = [Score("broken", error=RuntimeError("no judge")), Score("size")]
        return RunComponents(backend=made.backend, step_builder=made.step_builder, num_steps=1, benchmarks=benchmarks)

    result = await experiment(tmp_path, using=some)
    (arm,) = result.arms
    assert (arm.status, arm.eval_metrics) == ("completed", {"size/value": 1.0})
    record = next(each for each in caplog.records if each.message.startswith("benchmark.failed"))
    assert (record.levelno, record.benchmark, record.run) == (logging.WARNING, "broken", "run-s0")


async def test_a_benchmark_may_return_plain_metrics(tmp_path):
    class Plain:
        name = "plain"

        async def evaluate(self, state):
            return {"acc": 0.5}

    told = Told()
    result = await experiment(
        tmp_path,
        told,
        using=lambda params, run: RunComponents(
            backend=Weight(run.run_dir), step_builder=IndexBatches(), num_steps=1, benchmarks=[Plain()]
        ),
    )
    assert result.arms[0].eval_metrics == {"plain/acc": 0.5}
    assert "benchmark plain None" in told.of("run-s0")


async def test_what_a_recipe_opened_is_closed_however_the_run_ends(tmp_path):
    closed = []

    def opening(params, run):
        async def close():
            closed.append(run.run_key)
            raise RuntimeError("the port is gone")

        made = recipe(params, run)
        return RunComponents(backend=made.backend, step_builder=made.step_builder, num_steps=2, close=close)

    result = await experiment(tmp_path, using=opening, runs={"good": {}, "bad": {"raises_at": 1}})
    assert closed == ["good-s0", "bad-s0"]
    assert [arm.status for arm in result.arms] == ["completed", "failed"]


# -- isolation --------------------------------------------------------------------------------------------------------


async def test_R11_a_failing_run_ends_with_run_end_and_its_error_and_the_others_go_on(tmp_path, caplog):
    told = Told()
    result = await experiment(tmp_path, told, runs={"a": {}, "bad": {"raises_at": 1}, "c": {}})
    assert [(arm.name, arm.status) for arm in result.arms] == [
        ("a", "completed"),
        ("bad", "failed"),
        ("c", "completed"),
    ]
    assert told.of("bad-s0")[-2:] == ["train_end", "run_end"]
    bad = told.arms["bad-s0"]
    assert bad.error == bad.run_result.error == "RuntimeError: out of memory"
    assert bad.metrics == bad.run_result.metrics
    assert bad.metrics["value"] == 0.0
    assert bad.run_result.artifacts.checkpoints == []
    assert result.status == "failed"
    assert "bad: 1 failed of 1 run." in result.conclusion
    assert statuses(tmp_path) == {"a-s0": "completed", "bad-s0": "failed", "c-s0": "completed"}
    assert any(each.message.startswith("run.failed") and each.levelno == logging.WARNING for each in caplog.records)


@pytest.mark.parametrize("returned", ["raises", "nothing"])
async def test_a_recipe_that_raises_or_returns_no_parts_fails_its_run_alone(tmp_path, returned):
    def broken(params, run):
        if run.arm == "b":
            if returned == "raises":
                raise OSError("no such dataset")
            return None
        return recipe(params, run)

    told = Told()
    result = await experiment(tmp_path, told, using=broken, runs={"a": {}, "b": {}, "c": {}})
    assert [arm.status for arm in result.arms] == ["completed", "failed", "completed"]
    assert told.of("b-s0") == ["run_start", "run_end"]
    assert result.arms[1].error.startswith("OSError: no such" if returned == "raises" else "TrainingError: the recipe")


async def test_a_backend_that_raises_cancelled_error_by_itself_fails_its_run_alone(tmp_path):
    class Cancels(Weight):
        async def forward_backward(self, batch):
            raise asyncio.CancelledError

    def cancelling(params, run):
        made = recipe(params, run)
        backend = Cancels(run.run_dir) if run.arm == "a" else made.backend
        return RunComponents(backend=backend, step_builder=made.step_builder, num_steps=2)

    result = await experiment(tmp_path, using=cancelling, runs={"a": {}, "b": {}})
    assert [arm.status for arm in result.arms] == ["failed", "completed"]


async def test_two_runs_at_a_time_do_not_mix(tmp_path):
    told, together = Told(), Told()
    runs = {"a": {"lr": 1.0, "steps": 20}, "b": {"lr": 10.0, "steps": 20}, "c": {"lr": 100.0, "steps": 20}}
    await experiment(tmp_path / "alone", told, runs=runs)
    await experiment(tmp_path / "together", together, runs=runs, max_concurrent_runs=2)
    order = [run for event, run in together.events if event.startswith("step_end")]
    assert order != sorted(order), "they did not run at the same time"
    for key in ("a-s0", "b-s0", "c-s0"):
        assert told.of(key) == together.of(key)
        alone, beside = (read_json_lines(tmp_path / each / key / "metrics.jsonl") for each in ("alone", "together"))
        assert [row["value"] for row in alone] == [row["value"] for row in beside]
    first_c = together.events.index(("run_start", "c-s0"))
    assert ("run_end", "a-s0") in together.events[:first_c], "three ran at a time"


async def test_a_run_that_fills_the_disk_fails_and_the_others_are_unharmed(tmp_path):
    class Heavy(Weight):
        async def save_state(self, name):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / name
            path.write_bytes(b"x" * 300_000)
            return str(path)

    def heavy(params, run):
        made = recipe(params, run)
        backend = Heavy(run.run_dir / "states") if run.arm == "heavy" else made.backend
        return RunComponents(backend=backend, step_builder=made.step_builder, num_steps=3, benchmarks=[Score()])

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        told = Told()
        result = await experiment(tmp_path, told, using=heavy, runs={"a": {}, "heavy": {}, "c": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [arm.status for arm in result.arms] == ["completed", "failed", "completed"]
    assert result.arms[1].error.startswith("OSError: [Errno 27] File too large")
    assert told.of("heavy-s0")[-1] == "run_end"
    assert len(read_json_lines(tmp_path / "heavy-s0" / "metrics.jsonl")) == 3
    assert result.arms[2].eval_metrics == {"size/value": 3.0}


async def test_a_disk_that_refuses_the_ledger_and_the_results_ends_no_run(tmp_path, caplog):
    class Full(Callback):
        def on_run_start(self, ctx):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))

        def on_run_end(self, ctx, run_result, arm):
            if ctx.run_key == "b-s0":
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    class Nowhere(Weight):
        async def save_state(self, name):
            return f"toy://{name}"

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = await experiment(
            tmp_path,
            Full(),
            using=lambda params, run: RunComponents(
                backend=Nowhere(run.run_dir), step_builder=IndexBatches(), num_steps=3
            ),
            runs={"a": {}, "b": {}},
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [arm.status for arm in result.arms] == ["completed", "completed"]
    assert any(each.message.startswith("ledger.unwritten") for each in caplog.records)
    assert statuses(tmp_path) == {"a-s0": "completed", "b-s0": "completed"}


# -- names ------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd",
    "/tmp/x",
    "",
    ".",
    "..",
    "a/b",
    "A\x00B\n",
    "x" * 5000,
    "é" * 200,
    " ",
    "-rf",
    ".hidden",
    "C:\\x",
]


async def test_arms_with_hostile_names_stay_inside_the_directory_and_apart(tmp_path):
    told = Told()
    root = tmp_path / "in" / "here"
    result = await experiment(root, told, runs={name: {"steps": 1} for name in HOSTILE}, seeds=[0])
    assert [arm.status for arm in result.arms] == ["completed"] * len(HOSTILE)
    assert [arm.name for arm in result.arms] == HOSTILE
    assert len(told.arms) == len(HOSTILE)
    for key in told.arms:
        assert (root / key / "metrics.jsonl").exists()
        assert (root / key).resolve().parent == root.resolve()
        assert not key.startswith((".", "-"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_that_differ_only_in_case_or_in_what_was_cut_get_keys_of_their_own(tmp_path):
    names = ["a", "A", "a!", "a?", "x" * 70, "x" * 71, "a-s1", "a"]
    keys = [chain[0].run_key for chain in run_sequences(config(runs={name: {} for name in names}), tmp_path)]
    assert len({key.casefold() for key in keys}) == len(set(names))


def test_a_run_key_leaves_room_for_what_is_made_of_it_and_is_still_its_own(tmp_path):
    runs = {f"{'学' * 59}{end}": {} for end in "一二"} | {"short": {}}
    chains = run_sequences(config(runs=runs, continual=[Stage("習" * 60), Stage("習" * 61)]), tmp_path)
    keys = [plan.run_key for chain in chains for plan in chain]
    assert len(set(keys)) == 6
    assert all(len(key.encode()) <= 200 for key in keys)
    (chain,) = run_sequences(config(runs={"short": {}}), tmp_path)
    assert chain[0].run_key == "short-s0", "one that fits stays as it is"


def test_the_keys_of_runs_do_not_depend_on_which_of_them_are_run(tmp_path):
    settings = config(runs={"a": {}, "A": {}, "b": {}}, n_repeats=3)
    every = {plan.run_key for (plan,) in run_sequences(settings, tmp_path)}
    some = [plan.run_key for (plan,) in run_sequences(settings, tmp_path, only_arms=["A"], only_seeds=[2])]
    assert len(some) == 1
    assert set(some) < every


@pytest.mark.parametrize("asked", [{"only_arms": ["bb"]}, {"only_seeds": [9]}])
def test_an_arm_or_a_seed_that_there_is_not_is_refused(tmp_path, asked):
    with pytest.raises(ConfigError, match="the experiment has no"):
        Experiment(config(runs={"b": {}}), recipe=recipe, output_dir=tmp_path, **asked)


# -- stages -----------------------------------------------------------------------------------------------------------

STAGES = [Stage("pre", {"steps": 2}), Stage("post", {"steps": 3, "lr": 10.0})]


async def test_every_stage_begins_with_the_weights_of_the_one_before(tmp_path):
    told = Told()
    result = await experiment(
        tmp_path,
        told,
        runs={"a": {"lr": 1.0}, "b": {"lr": 5.0}},
        continual=STAGES,
        success_metric=SuccessMetric("size/value"),
    )
    assert [arm.eval_metrics["size/value"] for arm in result.arms] == [2.0, 32.0, 10.0, 40.0]
    starts = [each for each in told.events if each[0].startswith(("group", "run_start"))]
    assert starts == [
        ("group_start pre", None),
        ("run_start", "a-s0-pre"),
        ("group_start post", None),
        ("run_start", "a-s0-post"),
        ("run_start", "b-s0-pre"),
        ("run_start", "b-s0-post"),
    ]
    assert [arm.group_name for arm in result.arms] == ["pre", "post", "pre", "post"]
    assert (result.best_arm, result.best_score) == ("b", 40.0), "the last stage counts"


async def test_a_failed_stage_cancels_those_that_follow_it_and_says_why(tmp_path):
    told = Told()
    result = await experiment(tmp_path, told, runs={"a": {"raises_at": 1}, "b": {}}, continual=STAGES)
    assert [arm.status for arm in result.arms] == ["failed", "cancelled", "completed", "completed"]
    assert result.arms[1].error == "stage pre failed: RuntimeError: out of memory"
    assert told.of("a-s0-post") == []


async def test_a_resumed_stage_goes_on_from_its_own_state_and_a_new_one_from_the_last_stage(tmp_path):
    await experiment(tmp_path / "whole", continual=STAGES)
    broken = {"healthy": False}

    def failing_once(params, run):
        made = recipe({**params, "save_every": 1}, run)
        if run.stage == "post" and not broken["healthy"]:
            made.backend.raises_at = 4
        return made

    first = await experiment(tmp_path / "two", using=failing_once, continual=STAGES)
    assert [arm.status for arm in first.arms] == ["completed", "failed"]
    broken["healthy"] = True
    told = Told()
    second = await experiment(tmp_path / "two", told, using=failing_once, continual=STAGES, resume=True)
    assert [arm.status for arm in second.arms] == ["completed", "completed"]
    assert [event for event in told.of("run-s0-post") if event.startswith("step_end")] == ["step_end 2"]
    values = [
        [row["value"] for row in read_json_lines(tmp_path / each / "run-s0-post" / "metrics.jsonl")]
        for each in ("two", "whole")
    ]
    assert values[0] == values[1] == [2.0, 12.0, 22.0]


# -- stopping and resuming --------------------------------------------------------------------------------------------


class At(Callback):
    def __init__(self, run_key, step, act) -> None:
        self.run_key, self.step, self.act = run_key, step, act

    def on_step_end(self, state, step_idx, batch, metrics):
        if (state.ctx.run_key, step_idx) == (self.run_key, self.step):
            self.act()


RUNS = {"a": {"steps": 3}, "b": {"steps": 30}, "c": {"steps": 30}, "d": {"steps": 3}}


async def cancelled(folder, *callbacks, cancels=1, **more):
    """An experiment that is cancelled at step 5 of b, beside which c runs."""
    told = Told()
    task = asyncio.current_task()

    def cancel():
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await experiment(folder, told, At("b-s0", 5, cancel), *callbacks, runs=RUNS, max_concurrent_runs=2, **more)
    task.uncancel()
    return told


async def test_a_cancelled_experiment_saves_what_runs_and_ends_every_run_and_itself(tmp_path):
    told = await cancelled(tmp_path)
    assert told.events[-1] == ("experiment_end", None)
    assert told.result.status == "cancelled"
    assert {arm.name: arm.status for arm in told.result.arms} == {
        "a": "completed",
        "b": "cancelled",
        "c": "cancelled",
        "d": "cancelled",
    }
    for key in ("b-s0", "c-s0"):
        assert told.of(key)[-3:] == ["checkpoint final", "train_end", "run_end"]
    assert "step_end 9" not in told.of("b-s0"), "it stops soon after the step in hand"
    assert told.of("d-s0") == []
    assert read_experiment(tmp_path)["status"] == "cancelled"


async def test_a_resumed_experiment_skips_what_is_completed_and_goes_on_with_the_rest(tmp_path):
    before = await cancelled(tmp_path)
    again, whole = Told(), Told()
    resumed = await experiment(tmp_path, again, runs=RUNS, max_concurrent_runs=2, resume=True)
    undisturbed = await experiment(tmp_path / "undisturbed", whole, runs=RUNS, max_concurrent_runs=2)
    assert again.of("a-s0") == []
    steps = [[event for event in told.of("b-s0") if event.startswith("step_end")] for told in (before, again)]
    assert [*steps[0], *steps[1]] == [f"step_end {step}" for step in range(30)]
    assert len(steps[0]) < 10
    assert resumed.status == "completed"
    assert set(statuses(tmp_path).values()) == {"completed"}
    for key in ("a-s0", "b-s0", "c-s0", "d-s0"):
        one, other = (
            read_json_lines(folder / key / "metrics.jsonl") for folder in (tmp_path, tmp_path / "undisturbed")
        )
        assert [(row["step"], row["value"]) for row in one] == [(row["step"], row["value"]) for row in other]
    assert [arm.eval_metrics for arm in resumed.arms] == [arm.eval_metrics for arm in undisturbed.arms]


async def test_an_enclosing_scope_that_is_cancelled_lets_the_runs_come_to_a_good_end(tmp_path):
    told = Told()
    with anyio.CancelScope() as scope:
        await experiment(tmp_path, told, At("b-s0", 5, scope.cancel), runs=RUNS, max_concurrent_runs=2)
    assert scope.cancelled_caught
    assert told.of("b-s0")[-3:] == told.of("c-s0")[-3:] == ["checkpoint final", "train_end", "run_end"]
    assert told.events[-1] == ("experiment_end", None)


async def test_a_second_cancellation_ends_a_step_that_never_ends(tmp_path):
    class Hangs(Weight):
        async def forward_backward(self, batch):
            if self.steps == 2:
                hanging.set()
                await asyncio.Event().wait()
            return await super().forward_backward(batch)

    def hangs(params, run):
        return RunComponents(backend=Hangs(run.run_dir), step_builder=IndexBatches(), num_steps=5)

    hanging = asyncio.Event()
    told = Told()
    running = asyncio.ensure_future(experiment(tmp_path, told, using=hangs))
    await hanging.wait()
    for _ in range(2):
        running.cancel()
        await asyncio.wait([running], timeout=0.1)
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()
    assert told.events[-1] == ("experiment_end", None)
    assert told.arms["run-s0"].status == "cancelled"


async def test_system_exit_from_a_hook_ends_the_experiment_with_its_events(tmp_path):
    def leave():
        raise SystemExit(3)

    told = Told()
    with pytest.raises(SystemExit) as left:
        await experiment(tmp_path, told, At("b-s0", 5, leave), runs=RUNS, max_concurrent_runs=2)
    assert left.value.code == 3
    assert told.of("b-s0")[-2:] == told.of("c-s0")[-2:] == ["train_end", "run_end"]
    assert told.events[-1] == ("experiment_end", None)
    assert told.result.status == "cancelled"


async def test_a_failed_run_is_tried_again_from_its_last_full_state(tmp_path):
    def fails_once(params, run):
        made = recipe({"steps": 4, "save_every": 2}, run)
        made.backend.raises_at = None if (tmp_path / "healthy").exists() else 3
        return made

    await experiment(tmp_path / "e", using=fails_once)
    assert statuses(tmp_path / "e") == {"run-s0": "failed"}
    (tmp_path / "healthy").touch()
    told = Told()
    result = await experiment(tmp_path / "e", told, using=fails_once, resume=True)
    assert result.status == "completed"
    assert told.of("run-s0")[2] == "step_end 2"
    assert read_experiment(tmp_path / "e")["runs"]["run-s0"]["error"] is None


async def test_some_arms_first_and_the_others_later_make_one_experiment(tmp_path):
    runs = {"a": {"score": 1.0}, "b": {"score": 2.0}}
    metric = SuccessMetric("size/value")
    await experiment(tmp_path, runs=runs, only_arms=["b"], success_metric=metric)
    result = await experiment(tmp_path, runs=runs, resume=True, success_metric=metric)
    assert [(arm.name, arm.status) for arm in result.arms] == [("a", "completed"), ("b", "completed")]
    assert result.best_arm == "b"


async def test_a_used_directory_is_refused_without_resume_and_left_as_it_was(tmp_path):
    await experiment(tmp_path)
    before = (tmp_path / "experiment.json").read_bytes()
    told = Told()
    with pytest.raises(TrainingError, match="holds an experiment already"):
        await experiment(tmp_path, told)
    assert told.events == []
    assert (tmp_path / "experiment.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"run": {"lr": 2.0}}, "lr was 1.0, now 2.0"),
        ({"name": "other", "runs": {"lr": {}}}, 'holds the experiment "lr"'),
    ],
)
async def test_an_experiment_is_not_resumed_as_another_one(tmp_path, changed, says):
    await experiment(tmp_path, run={"lr": 1.0})
    with pytest.raises(TrainingError, match=says):
        await experiment(tmp_path, **({"run": {"lr": 1.0}} | changed), resume=True)


async def test_a_completed_run_whose_result_is_damaged_is_run_on_from_its_end(tmp_path):
    await experiment(tmp_path, run={"steps": 3})
    (tmp_path / "run-s0" / "result.json").write_text("{")
    told = Told()
    result = await experiment(tmp_path, told, run={"steps": 3}, resume=True)
    assert not [event for event in told.of("run-s0") if event.startswith("step_end")]
    assert (result.arms[0].metrics["value"], result.arms[0].eval_metrics) == (2.0, {"size/value": 3.0})
    assert [row["name"] for row in read_json_lines(tmp_path / "run-s0" / "checkpoints.jsonl")] == ["final"]


DAMAGED = ["", "{", "[]", '{"name": 3}', "\xff", "\0\0\0\0", '{"name":"n","x":' + "[" * 99_999]


@pytest.mark.parametrize("content", DAMAGED)
async def test_a_damaged_ledger_is_left_alone_by_who_does_not_resume(tmp_path, content):
    (tmp_path / "experiment.json").write_bytes(content.encode("latin1"))
    with pytest.raises(TrainingError, match=r"holds an experiment already, and its experiment\.json is damaged"):
        await experiment(tmp_path)
    assert (tmp_path / "experiment.json").read_bytes() == content.encode("latin1")


@pytest.mark.parametrize("content", [*DAMAGED, None])
async def test_a_damaged_ledger_is_rebuilt_from_the_results_by_who_resumes(tmp_path, content, caplog):
    runs = {"a": {"steps": 2}, "b": {"steps": 2}}
    first = await experiment(tmp_path, runs=runs)
    ledger = tmp_path / "experiment.json"
    ledger.unlink()
    if content is not None:
        ledger.write_bytes(content.encode("latin1"))
    told = Told()
    second = await experiment(tmp_path, told, runs=runs, resume=True)
    assert not [event for run in ("a-s0", "b-s0") for event in told.of(run) if event.startswith("step_end")]
    assert [(arm.name, arm.status, arm.metrics) for arm in second.arms] == [
        (arm.name, arm.status, arm.metrics) for arm in first.arms
    ]
    assert (tmp_path / "experiment.json.damaged").exists() == (content is not None)
    assert "ledger.rebuilt" in [record.event for record in caplog.records]


async def test_a_ledger_that_is_a_directory_or_a_fifo_is_rebuilt_too(tmp_path):
    await experiment(tmp_path)
    for make in (os.mkdir, os.mkfifo):
        (tmp_path / "experiment.json").unlink()
        make(tmp_path / "experiment.json")
        result = await experiment(tmp_path, resume=True)
        assert [arm.status for arm in result.arms] == ["completed"]


async def test_a_directory_that_cannot_be_made_is_said_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    told = Told()
    with pytest.raises(TrainingError, match="cannot be written"):
        await experiment(tmp_path / "file" / "e", told)
    assert told.events == []


async def test_nan_and_infinities_in_a_result_are_read_back_as_they_were(tmp_path):
    first = await experiment(tmp_path, runs={"a": {"score": float("nan")}, "b": {"score": float("-inf")}})
    for arm in first.arms:
        back = read_result(tmp_path / f"{arm.name}-s0")
        assert repr(back.eval_metrics) == repr(arm.eval_metrics)
        assert repr(back.evals) == repr(arm.evals)
        assert back.run_result.artifacts == arm.run_result.artifacts


async def test_an_arm_with_nan_is_marked_and_not_best(tmp_path):
    result = await experiment(
        tmp_path,
        runs={"nan": {"score": float("nan")}, "fine": {"score": 0.5}},
        success_metric=SuccessMetric("size/value"),
    )
    assert result.best_arm == "fine"
    assert "nan: 1 NaN or infinite of 1 run." in result.conclusion


# -- what the reference pages name ------------------------------------------------------------------------------------


async def test_a_run_that_is_stopped_before_it_is_done_is_cancelled_and_a_resume_goes_on_with_it(tmp_path):
    class NeedsADisk(Callback):
        away = True

        def on_step_end(self, state, step_idx, batch, metrics):
            if self.away and step_idx == 3:
                state.request_stop("the bucket refuses the key")
                state.stopped_early = True

    needs, told = NeedsADisk(), Told()
    result = await experiment(tmp_path, needs, told, run={"steps": 8})
    assert (result.status, result.arms[0].status) == ("cancelled", "cancelled")
    assert result.arms[0].error == "the bucket refuses the key"
    assert "benchmark size None" not in told.of("run-s0"), "it is not scored before it is done"
    assert "checkpoint final" in told.of("run-s0")
    needs.away = False
    again = Told()
    result = await experiment(tmp_path, needs, again, run={"steps": 8}, resume=True)
    assert [each for each in again.of("run-s0") if each.startswith("step")] == [f"step_end {at}" for at in range(4, 8)]
    assert (result.status, statuses(tmp_path)) == ("completed", {"run-s0": "completed"})


async def test_a_run_that_is_stopped_as_unfinished_at_its_last_step_is_done(tmp_path):
    class TooLate(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 1:
                state.request_stop("too late")
                state.stopped_early = True

    assert (await experiment(tmp_path, TooLate(), run={"steps": 2})).status == "completed"


async def test_R11_an_early_stop_ends_one_run_with_its_final_checkpoint_and_it_counts_as_completed(tmp_path):
    class StopsA(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if (state.ctx.run_key, step_idx) == ("a-s0", 1):
                state.request_stop("enough")

    told = Told()
    result = await experiment(tmp_path, StopsA(), told, runs={"a": {"steps": 9}, "b": {"steps": 9}})
    assert [(arm.status, arm.eval_metrics["size/value"]) for arm in result.arms] == [
        ("completed", 2.0),
        ("completed", 9.0),
    ]
    assert read_json_lines(tmp_path / "a-s0" / "checkpoints.jsonl")[-1]["name"] == "final"
    assert told.of("a-s0")[-4:] == ["checkpoint final", "train_end", "benchmark size None", "run_end"]


async def test_R13_old_checkpoints_are_pruned_in_on_checkpoint_and_the_run_can_still_be_resumed(tmp_path):
    class Prune(Callback):
        def on_checkpoint(self, state, row):
            for older in state.checkpoint_mgr.rows[:-1]:
                Path(older.state_path).unlink(missing_ok=True)

    def fails_at_5(params, run):
        made = recipe({"steps": 8, "save_every": 1}, run)
        made.backend.raises_at = 5 if not (tmp_path / "healthy").exists() else None
        return made

    await experiment(tmp_path / "e", Prune(), using=fails_at_5)
    assert [path.name for path in (tmp_path / "e" / "run-s0" / "states").iterdir()] == ["step-000004.json"]
    (tmp_path / "healthy").touch()
    result = await experiment(tmp_path / "e", Prune(), using=fails_at_5, resume=True)
    assert result.arms[0].eval_metrics == {"size/value": 8.0}
    assert [path.name for path in (tmp_path / "e" / "run-s0" / "states").iterdir()] == ["final.json"]


async def test_R13_a_snapshot_of_the_config_can_be_taken_at_the_start(tmp_path):
    class Snapshot(Callback):
        def on_experiment_start(self, ctx):
            (ctx.output_dir / "config.json").write_bytes(msgspec.json.encode(ctx.config))

        def on_run_start(self, ctx):
            ctx.run_dir.mkdir()
            (ctx.run_dir / "run.json").write_bytes(msgspec.json.encode(ctx.run_config))

    await experiment(tmp_path, Snapshot(), matrix={"lr": [0.5]}, metadata={"tags": ["a"]})
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["matrix"], saved["metadata"]) == ({"lr": [0.5]}, {"tags": ["a"]})
    run = next(tmp_path.glob("*/run.json"))
    assert json.loads(run.read_text()) == {"lr": 0.5, "arm": "lr=0.5", "seed": 0}


async def test_R13_a_metric_that_a_hook_derives_is_in_the_result_and_not_in_the_file(tmp_path):
    class Derive(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            metrics["twice"] = 2 * metrics["value"]

    result = await experiment(tmp_path, Derive(), success_metric=SuccessMetric("twice"))
    assert (result.arms[0].metrics["twice"], result.best_score) == (4.0, 4.0)
    assert "twice" not in read_json_lines(tmp_path / "run-s0" / "metrics.jsonl")[-1]


# -- how it is called -------------------------------------------------------------------------------------------------


async def test_a_given_bus_gets_the_events_and_stays_open(tmp_path):
    told = Told()
    async with EventBus([told]) as bus:
        await Experiment(config(), recipe=recipe, bus=bus, output_dir=tmp_path).run()
        assert bus.health().state == "open"
    assert told.events[-1] == ("experiment_end", None)


async def test_callbacks_of_the_config_are_built_where_none_are_given(tmp_path, capsys):
    settings = config(callbacks=[{"kind": "print_progress", "params": {"every": 1, "keys": ["value"]}}])
    await Experiment(settings, recipe=recipe, output_dir=tmp_path).run()
    assert capsys.readouterr().out.startswith("run-s0  step 1/3  value 0")


async def test_an_experiment_runs_once(tmp_path):
    made = Experiment(config(), recipe=recipe, callbacks=[], output_dir=tmp_path, resume=True)
    await made.run()
    with pytest.raises(TrainingError, match="ran already"):
        await made.run()


async def test_no_runs_at_all_make_an_experiment_of_two_events(tmp_path):
    told = Told()
    result = await experiment(tmp_path, told, only_arms=[])
    assert [event for event, _ in told.events] == ["experiment_start", "experiment_end"]
    assert (result.status, result.arms) == ("completed", [])


def test_a_bus_and_callbacks_together_are_refused():
    with pytest.raises(TrainingError, match="not both"):
        Experiment(config(), recipe=recipe, bus=EventBus(), callbacks=[])


async def test_a_config_may_be_a_mapping_and_a_wrong_one_is_a_config_error(tmp_path):
    made = Experiment({"name": "m", "recipe": "", "n_repeats": 2}, recipe=recipe, output_dir=tmp_path, callbacks=[])
    assert [plan.run_key for plan in made.plans] == ["run-s0", "run-s1"]
    with pytest.raises(ConfigError, match="n_repeats"):
        Experiment({"name": "m", "recipe": "", "n_repeats": 0}, recipe=recipe)
