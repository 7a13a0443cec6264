"""What pages answer of an experiment as it is recorded by a run: five arms of four seeds, with one journal."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.dashboard_recorded import BEST, FAILED, QUESTIONS, SEEDS, TASKS, WINNER, is_solved, questions, simple
from evsys_adapters.dashboard import delivery_views, eval_views, pages, views
from evsys_adapters.dashboard.pages import Json
from evsys_adapters.dashboard.store import Store
from evsys_bus.adapter import DeliveryChanged
from support.dashboard_stores import Delivery, open_store

SCORE = "gsm8k/accuracy"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with closing(open_store(tmp_path_factory.mktemp("recorded"))) as store:
        questions(store)
        yield store


@pytest.fixture(scope="module")
def page(store: Store) -> Json:
    return page_of(store)


def page_of(store: Store) -> Json:
    [row] = pages.home(store)["experiments"]
    found = pages.experiment(store, row["id"])
    assert found is not None
    return found


def run_of(page: Json, arm: str, seed: int) -> str:
    return next(run["id"] for run in page["runs"] if (run["arm"], run["seed"]) == (arm, seed))


def solved(arm: str, seed: int) -> float:
    return sum(is_solved(arm, seed, "gsm8k", task) for task in range(TASKS["gsm8k"])) / TASKS["gsm8k"]


def test_the_best_arm_is_compared_with_the_second_one(page: Json) -> None:
    means = {arm["name"]: arm["values"][0]["mean"] for arm in page["arms"]}
    first, second = sorted(means, key=lambda name: -means[name])[:2]
    lead = page["lead"]
    assert (page["name"], lead["arm"], lead["second"]) == (QUESTIONS, first, second)
    assert (first, lead["delta"]) == (WINNER, pytest.approx(means[first] - means[second]))
    assert 0 < lead["delta_sd"] < lead["delta"]


def test_without_a_best_arm_none_is_compared_with_the_second_one(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        simple(store, "one arm", 1, 2, steps=80)
        assert page_of(store)["lead"] is None


def test_the_best_value_of_a_score_after_training_is_that_score(store: Store, page: Json) -> None:
    found = views.runs(store, page["id"], f"arm:{WINNER} seed:0", [SCORE])
    [row] = found["rows"]
    assert row["last"] == row["best"] == [pytest.approx(solved(WINNER, 0))]


def test_compared_runs_have_their_scores_after_training_first(store: Store, page: Json) -> None:
    ids = [run_of(page, arm, 0) for arm in ("baseline", WINNER)]
    found = views.compare(store, ids)
    first = found["metrics"][0]
    assert (first["name"], first["direction"]) == (SCORE, "max")
    assert first["last"] == [pytest.approx(solved(arm, 0)) for arm in ("baseline", WINNER)]
    names = [each["name"] for each in views.compare(store, [*ids, run_of(page, *FAILED)])["metrics"]]
    assert names.index("mbpp/accuracy") < names.index("train/grad_norm"), "also if a failed run has none"
    assert {"mbpp/accuracy", "val/accuracy", "train/loss"} < {*names}


def test_the_table_of_evals_begins_with_the_metric_that_decides(store: Store, page: Json) -> None:
    names = [row["name"] for row in eval_views.evals(store, page["id"])["rows"]]
    assert names[:2] == [SCORE, "val/accuracy"]
    assert {*names} == {SCORE, "mbpp/accuracy", "val/accuracy", "val/loss"}


def test_checkpoints_have_no_column_of_a_metric_that_none_of_them_has(store: Store, page: Json) -> None:
    found = eval_views.checkpoints(store, page["id"])
    assert [each["name"] for each in found["shown"]] == ["val/accuracy", "train/loss"]
    assert all(len(row["values"]) == 2 for row in found["rows"])
    of_best = [row for row in found["rows"] if (row["arm"], row["seed"]) == BEST]
    assert max(of_best, key=lambda row: row["values"][0])["name"] == "step-749"


def test_a_run_has_how_far_the_uploads_of_its_checkpoints_are(store: Store, page: Json) -> None:
    found = views.run(store, run_of(page, *FAILED))["checkpoints"]
    assert [(each["name"], each["upload"], each["bytes"]) for each in found] == [
        ("step-249", "uploaded", 2_469_000_000),
        ("step-499", "uploaded", 2_469_000_000),
    ]
    assert found[1]["url"] == "s3://bucket/lion-s3/step-499/manifest.json"


def test_metrics_with_numbers_in_their_names_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        simple(store, "many metrics", 1, 2, metrics=120, steps=4)
        names = [each["name"] for each in page_of(store)["metrics"] if each["name"].startswith("expert/bias")]
        assert names == [f"expert/bias_{n}" for n in range(len(names))]
        ids = [run["id"] for run in page_of(store)["runs"]]
        names = [each["name"] for each in views.compare(store, ids)["metrics"]]
        names = [each for each in names if each.startswith("expert/bias")]
        assert names == [f"expert/bias_{n}" for n in range(len(names))]
        assert len(names) > SEEDS


def test_hooks_and_deliveries_of_an_experiments_journal_are_those_of_its_runs(store: Store, page: Json) -> None:
    [journal] = delivery_views.health(store)["journals"]
    steps = sum(run["step"] + 1 for run in page["runs"])
    assert [hook["per_step"] for hook in journal["hooks"]] == [
        pytest.approx(hook["calls"] * hook["mean_seconds"] / steps) for hook in journal["hooks"]
    ]
    assert journal["step_seconds"] == pytest.approx(60, rel=0.02)
    assert (journal["receipt"], journal["experiment"]["name"]) == (None, QUESTIONS)  # a run goes on
    of_run = views.run(store, run_of(page, *FAILED))
    assert of_run["journal"] == journal["journal"]
    assert [of_run[name] for name in ("deliveries", "hooks", "receipt")] == [
        journal[name] for name in ("deliveries", "hooks", "receipt")
    ]


def test_an_experiment_that_has_ended_has_a_receipt_of_its_journal(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        simple(store, "done", 1, 2, steps=80)
        experiment = page_of(store)
        journal = "/runs/done/journal"
        status = {"name": "wandb_logger", "recorded": 9, "delivered": 7, "pending": 2}
        Delivery(store, "c0-done").send(DeliveryChanged("wandb_logger", journal, status))
        [found] = delivery_views.health(store)["journals"]
        assert (found["receipt"]["complete"], found["receipt"]["pending"]) == (False, 2)
        of_run = views.run(store, experiment["runs"][0]["id"])
        assert (of_run["journal"], of_run["receipt"]) == (journal, found["receipt"])
