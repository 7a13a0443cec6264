"""The JSON of pages: which arm wins, and whether anything is broken."""

import math
from contextlib import closing

import msgspec
import pytest

from evsys_adapters.checkpoints.events import CheckpointUploaded
from evsys_adapters.dashboard import delivery_views, eval_views, pages, views
from evsys_bus import (
    Alert,
    BenchmarkEval,
    Checkpoint,
    EvalResult,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    ManifestRow,
    RunStart,
    StepEnd,
    TrainStart,
)
from support.dashboard_stores import START, Delivery, context, open_store, state_of, train

pytestmark = pytest.mark.usefixtures("each_database")

CONFIG = {
    "name": "lr",
    "recipe": "m:f",
    "run": {"steps": 3, "model": {"width": 8}},
    "runs": {"low": {"lr": 0.1}, "high": {"lr": 0.2}},
    "n_repeats": 2,
    "success_metric": {"name": "loss", "mode": "min"},
    "metadata": {"hypothesis": "lower is better", "tags": ["sweep"]},
}
NOW = START + 100


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


@pytest.fixture
def delivery(store):
    return Delivery(store)


def arm_context(ctx, arm, seed):
    lr = CONFIG["runs"][arm]["lr"]
    return ctx.for_run(f"{arm}-s{seed}", {"model": {"width": 8}, "lr": lr, "arm": arm, "seed": seed}, None)


def start(delivery, config=CONFIG):
    ctx = LogContext(f"/runs/{config['name']}", config=config)
    delivery.send(ExperimentStart(ctx))
    return ctx


def page_of(store, now=NOW):
    (row,) = pages.home(store, now)["experiments"]
    found = pages.experiment(store, row["id"], now)
    msgspec.json.encode(found)
    return found


def test_an_experiment_in_progress_shows_arms_with_seeds_deltas_and_winner(store, delivery):
    ctx = start(delivery)
    for arm, seed, loss in (("low", 0, 2.0), ("low", 1, 4.0), ("high", 0, 1.0), ("high", 1, 1.5)):
        train(delivery, arm_context(ctx, arm, seed), [9.0, 8.0, loss])
    page = page_of(store)
    assert page["headlines"] == [{"name": "train/loss", "direction": "min", "rule": "success metric"}]
    low, high = page["arms"]
    assert (low["name"], low["state"], low["n"], low["winner"]) == ("low", "completed", 2, False)
    assert low["values"] == [
        {"mean": 3.0, "sd": math.sqrt(2), "n": 2, "nonfinite": 0, "delta": None, "delta_sd": None, "points": [2.0, 4.0]}
    ]
    assert high["winner"]
    assert (high["values"][0]["mean"], high["values"][0]["delta"]) == (1.25, -1.75)
    assert high["values"][0]["delta_sd"] == pytest.approx(math.sqrt((2 + 0.125) / 2))
    assert page["baseline"] == "low"
    assert page["progress"] == 1.0
    assert [run["name"] for run in page["runs"]] == ["low-s0", "low-s1", "high-s0", "high-s1"]
    assert [run["config"] for run in page["runs"]] == [{"lr": 0.1}] * 2 + [{"lr": 0.2}] * 2
    assert page["same"] == {"model.width": 8}
    assert (page["hypothesis"], page["tags"], page["config"]) == ("lower is better", ["sweep"], CONFIG)


def test_the_list_of_experiments_has_counts_progress_and_a_headline_with_its_curve(store, delivery):
    ctx = start(delivery)
    train(delivery, arm_context(ctx, "low", 0), [3.0, 2.0, 1.0])
    train(delivery, arm_context(ctx, "high", 0), [3.0], status=None)
    (row,) = pages.home(store, delivery.time)["experiments"]
    assert (row["name"], row["state"], row["arms"]) == ("lr", "running", 2)
    assert row["runs"] == {
        "total": 2,
        "planned": 4,
        "running": 1,
        "completed": 1,
        "failed": 0,
        "cancelled": 0,
        "stalled": 0,
        "stopped": 0,
        "pending": 0,
    }
    assert row["progress"] == pytest.approx((1 + 1 / 3) / 4)
    assert row["headline"] == {
        "name": "train/loss",
        "direction": "min",
        "rule": "success metric",
        "value": 1.0,
        "arm": "low",
        "spark_name": "train/loss",
        "spark": [3.0, 2.0, 1.0],
    }
    assert row["last_event"] == delivery.time - 1


def test_a_row_of_the_list_changes_with_its_events_and_when_a_run_stalls(store, delivery):
    ctx = start(delivery)
    train(delivery, arm_context(ctx, "low", 0), [3.0], status=None)
    last = delivery.time - 1
    assert pages.home(store, last + 59)["experiments"][0]["state"] == "running"
    assert pages.home(store, last + 61)["experiments"][0]["state"] == "stalled"
    delivery.time = last + 70
    delivery.send(StepEnd(state_of(arm_context(ctx, "low", 0)), 1, metrics={"loss": 1.0}))
    (row,) = pages.home(store, last + 71)["experiments"]
    assert (row["state"], row["headline"]["value"]) == ("running", 1.0)


def test_long_texts_are_cut_in_the_list_and_whole_on_the_page(store, delivery):
    start(delivery, {**CONFIG, "metadata": {"hypothesis": "h" * 100_000, "tags": ["t" * 1_000] * 3}})
    (row,) = pages.home(store, NOW)["experiments"]
    assert (len(row["hypothesis"]), [len(tag) for tag in row["tags"]]) == (300, [300])
    assert len(page_of(store)["hypothesis"]) == 100_000


def test_failed_runs_come_first_and_do_not_count_for_their_arm(store, delivery):
    ctx = start(delivery)
    for arm, seed, status in (("low", 0, "completed"), ("low", 1, "failed"), ("high", 0, "completed")):
        train(delivery, arm_context(ctx, arm, seed), [3.0 - seed], status=status, error="ValueError: boom")
    page = page_of(store)
    assert (page["runs"][0]["name"], page["runs"][0]["state"]) == ("low-s1", "failed")
    assert page["runs"][0]["error"] == "ValueError: boom"
    low = page["arms"][0]
    assert (low["state"], low["values"][0]["n"], low["values"][0]["points"]) == ("failed", 1, [3.0, None])
    assert page["counts"]["failed"] == 1


def test_an_incomplete_arm_wins_only_if_no_arm_is_complete(store, delivery):
    ctx = start(delivery)
    for arm, seed, loss, status in (
        ("low", 0, 1.0, "completed"),
        ("low", 1, 1.0, "failed"),
        ("high", 0, 5.0, "completed"),
    ):
        train(delivery, arm_context(ctx, arm, seed), [loss], status=status)
    assert [arm["winner"] for arm in page_of(store)["arms"]] == [False, True]


def test_arms_that_have_not_started_are_shown_as_pending(store, delivery):
    start(delivery)
    page = page_of(store)
    assert [(arm["name"], arm["state"], arm["n"]) for arm in page["arms"]] == [
        ("low", "pending", 0),
        ("high", "pending", 0),
    ]
    assert page["arms"][0]["values"][0]["mean"] is None


def test_the_end_of_an_experiment_gives_state_conclusion_and_winner(store, delivery):
    ctx = start(delivery)
    train(delivery, arm_context(ctx, "low", 0))
    train(delivery, arm_context(ctx, "high", 0))
    delivery.send(ExperimentEnd(ctx, ExperimentResult("lr", "completed", [], "high", 1.0, "high is best.")))
    page = page_of(store, now=1e12)
    assert (page["state"], page["conclusion"], page["best_score"]) == ("completed", "high is best.", 1.0)
    assert [arm["winner"] for arm in page["arms"]] == [False, True]


@pytest.mark.parametrize(("key", "expected"), [("baseline", "high"), ("control", "high"), ("nothing", "low")], ids=str)
def test_the_baseline_is_the_arm_that_the_config_names_else_the_first(store, delivery, key, expected):
    start(delivery, {**CONFIG, "metadata": {key: "high"}})
    assert page_of(store)["baseline"] == expected


def test_an_arm_named_control_is_the_baseline(store, delivery):
    start(delivery, {**CONFIG, "runs": {"new": {}, "control": {}}})
    assert page_of(store)["baseline"] == "control"


class TestHeadlines:
    def test_without_success_metric_the_first_eval_decides(self, store, delivery):
        ctx = context(config={"arm": "a"})
        train(delivery, ctx, evals={0: 0.5, 2: 0.75})
        page = page_of(store)
        assert page["headlines"] == [
            {"name": "val/acc", "direction": "max", "rule": "first eval"},
            {"name": "train/loss", "direction": "min", "rule": "training loss"},
        ]
        assert page["runs"][0]["values"] == [0.75, 1.0]

    def test_without_evals_the_training_loss_decides(self, store, delivery):
        train(delivery, context())
        assert page_of(store)["headlines"] == [{"name": "train/loss", "direction": "min", "rule": "training loss"}]

    def test_no_arm_is_marked_where_the_direction_is_not_known(self, store, delivery):
        for key, value in (("a", 1.0), ("b", 2.0)):
            ctx = context(key=key)
            delivery.send(RunStart(ctx), StepEnd(state_of(ctx), 0, metrics={"entropy": value}))
        page = page_of(store)
        assert page["headlines"] == [{"name": "train/entropy", "direction": None, "rule": "training loss"}]
        assert not any(arm["winner"] for arm in page["arms"])

    def test_a_benchmark_after_training_counts_more_than_the_last_step(self, store, delivery):
        ctx = context()
        delivery.send(
            RunStart(ctx),
            BenchmarkEval(ctx, EvalResult("gsm", metrics={"accuracy": 0.25}), [], step=1),
            BenchmarkEval(ctx, EvalResult("gsm", metrics={"accuracy": 0.75}), []),
        )
        page = page_of(store)
        assert page["headlines"][0]["name"] == "gsm/accuracy"
        assert page["runs"][0]["values"] == [0.75]

    def test_until_the_deciding_metric_is_there_the_next_one_marks_an_arm(self, store, delivery):
        ctx = start(delivery, {**CONFIG, "success_metric": {"name": "gsm/accuracy"}})
        for arm, loss in (("low", 2.0), ("high", 1.0)):
            train(delivery, arm_context(ctx, arm, 0), [loss, loss])
        assert [arm["winner"] for arm in page_of(store)["arms"]] == [False, True]
        for arm, accuracy in (("low", 0.9), ("high", 0.5)):
            delivery.send(
                BenchmarkEval(arm_context(ctx, arm, 0), EvalResult("gsm", metrics={"accuracy": accuracy}), [])
            )
        assert [arm["winner"] for arm in page_of(store)["arms"]] == [True, False]
        (row,) = pages.home(store, NOW)["experiments"]
        headline = row["headline"]
        assert (headline["name"], headline["value"], headline["arm"]) == ("gsm/accuracy", 0.9, "low")
        assert (headline["spark_name"], headline["spark"]) == ("train/loss", [2.0, 2.0])

    def test_a_value_that_is_nan_is_null_and_counted(self, store, delivery):
        for key, loss in (("a-s0", 1.0), ("a-s1", math.nan)):
            train(delivery, context(key=key, config={"arm": "a", "seed": int(key[-1])}), [loss])
        (arm,) = page_of(store)["arms"]
        assert (arm["values"][0]["n"], arm["values"][0]["nonfinite"]) == (1, 1)
        assert arm["values"][0]["points"] == [1.0, None]


class TestMetrics:
    def test_the_largest_numbers_do_not_break_the_page(self, store, delivery):
        for arm, seed, value in (("a", 0, 1.7e308), ("a", 1, 1.7e308), ("b", 0, -1.7e308), ("b", 1, 1e200)):
            ctx = context(key=f"{arm}-s{seed}", config={"arm": arm, "seed": seed})
            delivery.send(RunStart(ctx), StepEnd(state_of(ctx), 0, metrics={"loss": value, "x": value}))
        page = msgspec.json.decode(msgspec.json.encode(page_of(store)))
        assert len(page["metrics"]) == 2

    def test_metrics_come_by_meaning_and_constants_last(self, store, delivery):
        for arm, offset in (("a", 0.0), ("b", 10.0)):
            for seed in (0, 1):
                ctx = context(key=f"{arm}-s{seed}", config={"arm": arm, "seed": seed})
                delivery.send(RunStart(ctx))
                for step in range(3):
                    row = {"loss": 1.0 + seed, "apart": offset + seed / 10, "alike": 5.0 + seed * step, "lr": 0.125}
                    delivery.send(StepEnd(state_of(ctx), step, metrics=row))
        metrics = page_of(store)["metrics"]
        assert [each["name"] for each in metrics] == ["train/loss", "train/apart", "train/alike", "train/lr"]
        assert metrics[0] == {
            "name": "train/loss",
            "runs": 4,
            "points": 12,
            "constant": None,
            "section": "train",
            "direction": "min",
        }
        assert metrics[3]["constant"] == 0.125

    def test_one_point_is_no_constant(self, store, delivery):
        train(delivery, context(), [1.0], evals={0: 0.5})
        assert all(each["constant"] is None for each in page_of(store)["metrics"])


def test_stages_of_a_continual_experiment_compare_by_the_last_one(store, delivery):
    for stage, loss in (("warm", 9.0), ("main", 1.0)):
        ctx = context(key=f"a-s0-{stage}", config={"arm": "a", "seed": 0, "stage": stage}, group_name=stage)
        train(delivery, ctx, [loss])
    (arm,) = page_of(store)["arms"]
    assert (arm["values"][0]["mean"], arm["n"]) == (1.0, 2)


def test_alerts_name_their_run(store, delivery):
    ctx = context()
    delivery.send(RunStart(ctx), Alert(ctx, "loss is high", "by far"))
    page = page_of(store)
    alert = {
        "run": page["runs"][0]["id"],
        "title": "loss is high",
        "text": "by far",
        "level": "warning",
        "time": START + 1,
    }
    assert page["alerts"] == [alert]


def test_the_page_of_an_experiment_has_each_long_error_once_and_shortened_alerts(store, delivery):
    lines = "".join(f'  File "train.py", line {n}, in step\n' for n in range(2_000))
    error = f"Traceback (most recent call last):\n{lines}ValueError: boom"
    for seed in range(3):
        ctx = context(key=f"a-s{seed}")
        train(delivery, ctx, status="failed", error=error)
        delivery.send(*(Alert(ctx, "loss is high", "x" * 100_000) for _ in range(5)))
    page = page_of(store)
    first, *others = [run["error"] for run in page["runs"]]
    assert first.startswith("Traceback")
    assert first.endswith("in step\nValueError: boom")
    assert others == ["ValueError: boom"] * 2
    assert len(page["alerts"]) == 15
    assert len(msgspec.json.encode(page)) < 30_000
    [whole] = {views.run(store, run["id"], NOW)["alerts"][0]["text"] for run in page["runs"]}
    assert len(whole) == 20_000
    listed = views.runs(store, page["id"], now=NOW)["rows"]
    assert {row["error"] for row in listed} == {"ValueError: boom"}


def test_an_upload_that_names_a_run_by_a_key_of_several_is_shown_of_none_of_them(store, delivery):
    row = ManifestRow("step-2", 2, state_path="/runs/lr/step-2")
    for root, keys in (("/runs/one", ["same", "only"]), ("/runs/two", ["same"])):
        for key in keys:
            ctx = context(root, key)
            delivery.send(RunStart(ctx), Checkpoint(state_of(ctx), row))
    for key in ("same", "only"):
        delivery.send(CheckpointUploaded(key, "step-2", 2, f"s3://one/{key}", 2, 117, 0.5))
    shown = {
        (each["name"], row["run_name"]): row["url"]
        for each in pages.home(store, NOW)["experiments"]
        for row in eval_views.checkpoints(store, each["id"], NOW)["rows"]
    }
    assert shown == {("one", "same"): None, ("one", "only"): "s3://one/only", ("two", "same"): None}


def test_predictions_for_the_same_task_are_found_beside_thousands_of_another_experiment(store, delivery):
    daily = [{"task_id": "q0", "sample_idx": 0, "output": str(n)} for n in range(2_100)]
    delivery.send(BenchmarkEval(context("/runs/daily", "daily"), EvalResult("gsm"), daily))
    own = [context("/runs/own", f"a-s{seed}") for seed in range(2)]
    for ctx in own:
        delivery.send(BenchmarkEval(ctx, EvalResult("gsm"), [{"task_id": "q0", "output": ctx.run_key}]))
        delivery.send(BenchmarkEval(ctx, EvalResult("other"), [{"task_id": "q0"}]))
    [run] = store.catalogue.records.ids_of_key("a-s0")
    first = next(each for each in store.catalogue.evals.of_run(run) if each.name == "gsm")
    found = eval_views.prediction(store, first.id << 24)["others"]
    assert [(each["output"], each["of"]["eval"]) for each in found] == [("a-s1", "gsm")]


def test_health_has_the_number_of_points_that_were_refused_because_of_their_step(store, delivery):
    state = state_of(context())
    delivery.send(*(StepEnd(state, step, metrics={"loss": 1.0, "lr": 0.1}) for step in (0, 1, 1 << 53)))
    assert delivery_views.health(store, NOW)["database"]["refused_points"] == 2


def test_a_run_shows_its_checkpoints_steps_and_unit(store, delivery):
    ctx = context(extras={"unit": "tokens"})
    state = state_of(ctx, num_steps=10)
    delivery.send(RunStart(ctx), TrainStart(state), StepEnd(state, 4, metrics={"loss": 1.0}))
    delivery.send(Checkpoint(state, ManifestRow("step_5", 4)))
    (run,) = page_of(store)["runs"]
    assert (run["step"], run["num_steps"], run["unit"], run["checkpoints"]) == (4, 10, "tokens", 1)


def test_an_experiment_that_is_not_there_or_in_the_trash_is_none(store, delivery):
    train(delivery, context())
    (row,) = pages.home(store, NOW)["experiments"]
    assert pages.experiment(store, "nothing", NOW) is None
    record = store.catalogue.records.experiment(store.catalogue.experiment_id(row["id"]))
    with store.transaction():
        record.hidden = NOW
        store.catalogue.records.touch(record)
    assert pages.experiment(store, row["id"], NOW) is None
    assert pages.home(store, NOW)["experiments"] == []


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("train/loss", "min"),
        ("val/perplexity", "min"),
        ("gsm/pass@3", "max"),
        ("val/f1", "max"),
        ("env/episode_reward", "max"),
        ("train/entropy", None),
    ],
)
def test_a_direction_is_known_by_words_of_a_name(name, direction):
    assert pages.direction_of(name) == direction
