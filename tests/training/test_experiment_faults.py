"""What strangers' code returns and raises, however odd, ends its own run at most, and can be read back."""

import asyncio

import pytest

from evsys_bus.callback import Callback
from evsys_bus.context import EvalResult, TrainingBatch
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.experiment_store import read_result
from evsys_bus.training.plan import RunComponents
from evsys_bus.training.protocols import Benchmark
from support.files import read_experiment
from support.training_parts import FixedEvaluator


class Steps:
    """A backend and a step builder of nothing; may raise at its second step."""

    def __init__(self, error=None, metrics=None) -> None:
        self.error, self.metrics = error, metrics or {"loss": 0.5}

    async def build_batch(self, step_idx):
        if step_idx == 1 and self.error is not None:
            raise self.error
        return TrainingBatch()

    async def forward_backward(self, batch):
        return self.metrics

    async def optim_step(self):
        return None

    async def save_state(self, name):
        return f"toy://{name}"

    save_weights_for_sampler = save_state

    async def load_state(self, path):
        pass


class Told(Callback):
    def __init__(self) -> None:
        self.events, self.results, self.result = [], [], None

    def on_run_start(self, ctx):
        self.events.append(("run_start", ctx.run_key))

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.results.append(eval_result)

    def on_run_end(self, ctx, run_result, arm):
        self.events.append(("run_end", ctx.run_key))

    def on_experiment_end(self, ctx, result):
        self.events.append(("experiment_end", None))
        self.result = result


class PanicException(BaseException):
    """As pyo3 raises it, for tokenizers and polars."""


def made_of(steps=None, score=None, close=None):
    """A recipe whose arm ``a`` is made of these, and whose arm ``b`` is sound."""

    def recipe(params, run):
        if run.arm == "b":
            return RunComponents(
                backend=Steps(), step_builder=Steps(), num_steps=2, benchmarks=[FixedEvaluator("t", 0, {"acc": 0.5})]
            )
        benchmarks = [] if score is None else [FixedEvaluator("t", 0, score)]
        parts = steps or Steps()
        return RunComponents(backend=parts, step_builder=parts, num_steps=2, benchmarks=benchmarks, close=close)

    return recipe


async def experiment(folder, recipe, *callbacks, resume=False, **settings):
    settings = {"name": "x", "recipe": "", "runs": {"a": {}, "b": {}}} | settings
    return await Experiment(settings, recipe=recipe, callbacks=callbacks, output_dir=folder, resume=resume).run()


async def assert_a_resume_repeats_nothing(folder, recipe, **settings):
    told = Told()
    result = await experiment(folder, recipe, told, resume=True, **settings)
    assert told.events == [("experiment_end", None)]
    return result


CIRCULAR = {}
CIRCULAR["itself"] = CIRCULAR
DEEP = []
for _ in range(2000):
    DEEP = [DEEP]

ODD_SCORES = {
    "texts among the metrics": {"acc": 0.5, "judge": "gpt-x", "\udcff": 0.1},
    "lists and nulls among the metrics": {"acc": 0.5, "all": [1, 2], "none": None, "ok": True, "by": {"x": 1}},
    "huge and strange numbers": {"acc": 0.5, "huge": 10**400, "nan": float("nan"), 7: 1.0},
    "no metrics": EvalResult("t", metrics=None),
    "circular breakdowns": EvalResult("t", metrics={"acc": 0.5}, breakdowns=CIRCULAR),
    "deep breakdowns": EvalResult("t", metrics={"acc": 0.5}, breakdowns={"deep": DEEP}),
    "breakdowns that are a list": EvalResult("t", metrics={"acc": 0.5}, breakdowns=["x"]),
    "parts that are missing": EvalResult(None, metrics={"acc": 0.5}, tags=None, benchmark_id=4711, eval_seconds=None),
    "a lone surrogate": EvalResult("t", metrics={"acc": 0.5}, tags=["\udcff"]),
    "an object as a breakdown": EvalResult("t", metrics={"acc": 0.5}, breakdowns={"x": object(), "y": b"\xff"}),
}


@pytest.mark.parametrize("odd", ODD_SCORES)
async def test_an_odd_evaluation_is_published_untouched_and_its_numbers_are_kept_and_read_back(tmp_path, odd):
    score = ODD_SCORES[odd]
    recipe = made_of(score=score if isinstance(score, dict) else Benchmark(score, []))
    told = Told()
    result = await experiment(tmp_path, recipe, told)
    assert result.status == read_experiment(tmp_path)["status"] == "completed"
    published = told.results[0]
    assert (published.metrics == score) if isinstance(score, dict) else (published.metrics is score.metrics)
    first = result.arms[0]
    assert first.eval_metrics.get("t/acc") == (None if odd == "no metrics" else 0.5)
    assert all(type(value) in (int, float) for value in first.eval_metrics.values())
    again = await assert_a_resume_repeats_nothing(tmp_path, recipe)
    assert repr(again.arms[0].evals) == repr(read_result(tmp_path / "a-s0").evals)
    assert repr(again.arms[0].eval_metrics) == repr(first.eval_metrics)


async def test_a_training_metric_that_is_no_number_costs_no_other(tmp_path):
    odd = {"loss": 0.5, "note": "warm", "grads": [1.0], "nonfinite": {"loss": "lots", "z": "nan"}, "z": None}
    result = await experiment(tmp_path, made_of(Steps(metrics=odd)), success_metric={"name": "loss", "mode": "min"})
    metrics = {key: repr(value) for key, value in result.arms[0].metrics.items() if key != "step_seconds"}
    assert metrics == {"loss": "0.5", "z": "nan"}
    assert result.best_score == 0.5


@pytest.mark.parametrize("run_id", [4711, b"\x00\xff", "\udcff", object()])
async def test_an_id_that_is_no_text_is_kept_as_text_and_its_run_is_not_repeated(tmp_path, run_id):
    class Ids(Callback):
        def on_experiment_start(self, ctx):
            ctx.ids["experiment_id"] = run_id

        def on_run_start(self, ctx):
            ctx.ids["run_id"] = run_id

    result = await experiment(tmp_path, made_of(), Ids())
    (arm, _) = result.arms
    assert type(arm.run_id) is type(arm.run_result.run_id) is type(result.experiment_id) is str
    again = await assert_a_resume_repeats_nothing(tmp_path, made_of())
    assert again.arms[0].run_id == arm.run_id
    if run_id == 4711:
        assert (arm.run_id, result.experiment_id) == ("4711", "4711")


class Speechless(Exception):  # noqa: N818 # it cannot even say that it is one
    def __str__(self):
        raise RuntimeError("not even that")


ERRORS = [
    RuntimeError("no shard " + b"/data/\xff.bin".decode(errors="surrogateescape")),
    Speechless(),
    PanicException(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["a lone surrogate", "no text at all", "a panic"])
async def test_R11_whatever_a_run_raises_the_others_go_on_and_the_ledger_can_be_written(tmp_path, error):
    told = Told()
    result = await experiment(tmp_path, made_of(Steps(error)), told)
    assert [arm.status for arm in result.arms] == ["failed", "completed"]
    assert result.arms[0].error.startswith(type(error).__name__)
    assert told.events == [(what, f"{arm}-s0") for arm in "ab" for what in ("run_start", "run_end")] + [
        ("experiment_end", None)
    ]
    assert {key: run["status"] for key, run in read_experiment(tmp_path)["runs"].items()} == {
        "a-s0": "failed",
        "b-s0": "completed",
    }
    assert (
        read_experiment(tmp_path)["runs"]["a-s0"]["error"]
        == read_result(tmp_path / "a-s0").error
        == result.arms[0].error
    )


@pytest.mark.parametrize("error", [*ERRORS, asyncio.CancelledError()])
async def test_whatever_a_benchmark_or_a_close_raises_the_run_is_completed(tmp_path, error, caplog):
    async def close():
        raise error

    result = await experiment(tmp_path, made_of(score=error, close=close))
    assert [arm.status for arm in result.arms] == ["completed", "completed"]
    for phrase in ("benchmark.failed", "run.close_failed"):
        assert [each.run for each in caplog.records if each.message.startswith(phrase)] == ["a-s0"]


async def test_a_generator_exit_ends_the_run_with_its_events_and_passes(tmp_path):
    told = Told()
    with pytest.raises(BaseExceptionGroup) as raised:
        await experiment(tmp_path, made_of(Steps(GeneratorExit())), told)
    assert isinstance(raised.value.exceptions[0], GeneratorExit)
    assert told.events[-2:] == [("run_end", "a-s0"), ("experiment_end", None)]
    assert told.result.status != "completed"


@pytest.mark.parametrize(("leaves", "status"), [(True, "cancelled"), (False, "failed")])
async def test_the_experiment_is_not_called_completed_while_an_exception_passes(tmp_path, leaves, status):
    class Harms(Callback):
        def on_experiment_start(self, ctx):
            if leaves:
                raise SystemExit(3)
            ctx.extras = None  # no run can begin with that

    told = Told()
    with pytest.raises(SystemExit if leaves else BaseExceptionGroup):
        await experiment(tmp_path, made_of(), Harms(), told)
    assert told.result.status == read_experiment(tmp_path)["status"] == status


async def test_a_text_with_a_lone_surrogate_in_the_config_does_not_keep_the_ledger_from_being_written(tmp_path):
    settings = {"runs": {"a": {"text": "\udc80"}, "b": {}}, "metadata": {"hypothesis": "\udcff"}}
    result = await experiment(tmp_path, made_of(), **settings)
    assert [arm.status for arm in result.arms] == ["completed", "completed"]
    assert read_experiment(tmp_path)["hypothesis"] == "\\udcff"
    await assert_a_resume_repeats_nothing(tmp_path, made_of(), **settings)


def test_a_success_metric_that_an_odd_evaluation_has_decides(tmp_path):
    score = {"acc": 0.75, "judge": "gpt-x"}
    result = asyncio.run(experiment(tmp_path, made_of(score=score), success_metric={"name": "t/acc"}))
    assert (result.best_arm, result.best_score) == ("a", 0.75)
