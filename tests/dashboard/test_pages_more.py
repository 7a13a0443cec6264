"""The pages beside home and experiment: what they read of a store, and how they look in a browser."""

import math
import re
import urllib.error
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evsys_adapters.dashboard import delivery_views, eval_views, views
from evsys_adapters.dashboard.store import Store
from support.browser import Tab, chromium
from support.dashboard_details import (
    DELIVERY_ERROR,
    DELIVERY_FIX,
    MARKUP,
    QUESTIONS,
    QUIZ,
    QUIZ_STEPS,
    SWEEP,
    SWEEP_RUNS,
    fill_details,
    is_right,
)
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store

LOSS = '[aria-label="train/loss"] .drawn'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("details")
    fill_details(folder)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    with closing(open_store(folder)) as store:
        yield store


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(folder: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    store.checkpoint()
    with PageServer(folder, tmp_path_factory.mktemp("server") / "copy") as server:
        yield server


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.close()


def experiment_id(store: Store, name: str) -> str:
    return next(each.public for each in store.catalogue.records.experiments() if each.name == name)


def run_id(store: Store, name: str) -> str:
    found = views.runs(store, experiment_id(store, QUIZ))["rows"]
    return next(row["id"] for row in found if row["name"] == name)


# -- the list of runs


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", SWEEP_RUNS),
        ("lr>0.001185", 2),
        ("lr-11", 11),
        ("/^lr-[0-4]-/", 5),
        ("arm:lr-7", 1),
        ("state:failed", 0),
        ("state:completed -batch:1", SWEEP_RUNS * 4 // 5),
        ('"best loss"<1.3335 lr<0.002', 3),
        ("train/loss<1.3335", 3),
    ],
)
def test_runs_are_found_by_the_filter_of_the_command_line(store: Store, text: str, count: int) -> None:
    found = views.runs(store, experiment_id(store, SWEEP), text)
    assert (len(found["rows"]), found["total"], found["problem"]) == (count, SWEEP_RUNS, None)


def test_a_filter_that_is_none_says_why_and_hides_nothing(store: Store) -> None:
    found = views.runs(store, experiment_id(store, SWEEP), "lr>much")
    assert "compares with no number" in found["problem"]
    assert len(found["rows"]) == SWEEP_RUNS


def test_a_run_in_the_list_has_only_what_varies_of_its_config(store: Store) -> None:
    found = views.runs(store, experiment_id(store, QUIZ), metrics=["train/loss", "no such metric"])
    assert found["config"] == ["hints"]
    assert [each["name"] for each in found["shown"]] == ["train/loss"]
    row = found["rows"][0]
    assert (row["name"], row["state"], row["error"]) == (
        "with hints-s1",
        "failed",
        "ZeroDivisionError: no batch was left",
    )
    assert row["config"] == {"hints": True}
    assert row["last"] == row["best"] < [0.0]


def test_the_list_of_runs_draws_those_in_view_and_keeps_filter_and_order_in_the_url(
    tab: Tab, server: PageServer
) -> None:
    rows = "document.querySelectorAll('tbody tr').length"
    tab.open(f"{server.url}{server.path_of(SWEEP)}/runs", f"{rows} > 10")
    assert tab.page.evaluate(rows) < SWEEP_RUNS / 2
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("lr>0.001095")
    tab.until(f"{rows} == 11")
    tab.page.get_by_role("button", name="lr", exact=True).click()
    assert tab.text("tbody tr").strip().startswith("lr-119-s0")
    tab.page.get_by_role("checkbox").first.check()
    tab.page.get_by_role("checkbox").nth(1).check()
    assert tab.page.get_by_role("button", name="compare 2 runs").is_enabled()
    tab.page.reload()
    tab.until(f"{rows} == 11")
    assert tab.text("tbody tr").strip().startswith("lr-119-s0")
    assert tab.page.locator("tr.selected").count() == 2
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert (len(lines), lines[0].split(",")[:4]) == (12, ["run", "state", "steps", "lr"])
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Markdown").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert (len(lines), lines[0].split(" | ")[:3]) == (13, ["| run", "state", "steps"])
    assert tab.complaints == []


def test_a_metric_at_a_step_is_that_of_the_step_or_the_last_one_before_it(store: Store) -> None:
    at = [(20, "train/loss"), (20, "quiz/accuracy"), (5, "quiz/accuracy"), (QUIZ_STEPS, "train/loss"), (0, "none")]
    found = views.runs(store, experiment_id(store, QUIZ), at=at)
    row = next(each for each in found["rows"] if each["name"] == "baseline-s0")
    right = sum(is_right("baseline", 0, n) for n in range(QUESTIONS)) / QUESTIONS
    assert row["at"] == [pytest.approx(2 * math.exp(-20 / 12)), pytest.approx(right / 2), None, None, None]


def test_a_column_with_a_metric_at_a_step_is_added_and_is_in_the_url(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}{server.path_of(QUIZ)}/runs", "document.querySelectorAll('tbody tr').length == 4")
    tab.page.get_by_text("columns", exact=True).click()
    tab.page.get_by_label("metric", exact=True).select_option("train/loss")
    tab.page.get_by_label("at step").fill("20")
    tab.page.keyboard.press("Enter")
    tab.until("document.querySelector('thead')?.innerText.includes('train/loss at 20')")
    tab.until("document.querySelector('tbody')?.innerText.includes('0.3778')")
    tab.page.reload()
    tab.until("document.querySelector('tbody')?.innerText.includes('0.3778')")
    assert tab.complaints == []


# -- the page of an experiment


def test_the_leader_is_named_beside_a_better_arm_that_is_incomplete_and_a_failing_delivery(
    tab: Tab, server: PageServer
) -> None:
    tab.open(f"{server.url}{server.path_of(QUIZ)}", "document.querySelectorAll('.card canvas').length >= 1")
    assert tab.text(".summary") == (
        "baseline leads by quiz/accuracy (higher is better): 0.50 ± 0.04; "
        "with hints has 0.6885, but not of all its runs. ✕1 run failed of 4."
    )
    problems = tab.text(".problems")
    assert problems.index("with hints-s1 after 40 steps") < problems.index("evsys_logger 22 events not delivered")
    assert f"{DELIVERY_ERROR} fix: {DELIVERY_FIX}" in problems
    assert tab.complaints == []


def test_arms_are_sorted_by_a_headline_and_the_order_is_in_the_url(tab: Tab, server: PageServer) -> None:
    first = "document.querySelector('.arms tbody .text')?.innerText"
    tab.open(f"{server.url}{server.path_of(SWEEP)}", f"{first} == 'lr-0'")
    assert "to the second, lr-" in tab.text(".summary")
    tab.page.get_by_role("button", name="train/loss").click()
    tab.until(f"{first} == 'lr-0'")
    tab.page.get_by_role("button", name="train/loss").click()
    tab.until(f"{first} == 'lr-100'")
    assert "arms=1" in tab.page.url
    assert tab.complaints == []


# -- one run


def test_a_run_has_its_error_evals_checkpoints_texts_and_config(store: Store) -> None:
    run = views.run(store, run_id(store, "with hints-s1"))
    assert run["error"].startswith("Traceback")
    assert run["error"].endswith("no batch was left")
    assert [each["title"] for each in run["alerts"]] == ["no batch"]
    assert [each["step"] for each in run["checkpoints"]] == [9, 19, 29, 39]
    assert [each["step"] for each in run["evals"]] == [39, 29, 19, 9]
    assert run["texts"][0]["step"] == QUIZ_STEPS - 1
    assert run["config"]["model.layers"] == 12
    assert run["environment"]["host"] == "gpu-7"
    assert [each["name"] for each in run["metrics"]] == ["train/loss", "quiz/accuracy", "train/lr", "quiz/length"]


def test_a_run_that_is_not_there_is_a_clear_error(store: Store) -> None:
    with pytest.raises(LookupError):
        views.run(store, "none")


def test_the_page_of_a_run_shows_its_traceback_and_its_curves_and_no_markup_of_its_texts(
    browser: Any, server: PageServer, store: Store
) -> None:
    tab = Tab(browser, 390, 800)
    tab.open(
        f"{server.url}/r/{run_id(store, 'with hints-s1')}", "document.querySelectorAll('.card canvas').length >= 1"
    )
    assert 'File "train.py", line 7\nZeroDivisionError' in tab.text(".problems")
    assert MARKUP in tab.text("details.text")
    assert tab.page.evaluate("document.images.length") == 0
    assert tab.until("document.querySelector('.drawn')?.textContent") == "40 of 40 points"
    assert not tab.is_wider_than_the_screen()
    assert tab.complaints == []
    tab.close()


def test_a_delivery_that_fails_shows_its_error_and_the_fix_on_the_page_of_its_run(store: Store) -> None:
    run = views.run(store, run_id(store, "baseline-s0"))
    broken = next(each for each in run["deliveries"] if each["adapter"] == "evsys_logger")
    assert (broken["pending"], broken["last_error"], broken["suggested_fix"]) == (22, DELIVERY_ERROR, DELIVERY_FIX)
    assert run["receipt"] == {"complete": False, "recorded": 104, "delivered": 82, "dead": 0, "pending": 22, "owed": 0}
    assert run["hooks"][0]["per_step"] == pytest.approx(0.0002)
    assert run["step_seconds"] == pytest.approx(run["seconds"] / QUIZ_STEPS)
    whole = views.run(store, run_id(store, "with hints-s0"))
    assert whole["receipt"]["complete"]


# -- health


def test_health_has_the_journals_whose_delivery_fails_first(store: Store) -> None:
    health = delivery_views.health(store)
    assert [each["run"]["name"] for each in health["journals"]] == ["baseline-s0", "with hints-s0"]
    assert health["journals"][0]["experiment"]["name"] == QUIZ
    assert health["database"]["events"] > SWEEP_RUNS
    assert health["database"]["bytes"] > 0


def test_the_page_of_health_is_for_browsers_and_programs_get_the_service_there(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}/health", "document.querySelectorAll('.journal').length == 2")
    assert "1 journal with a delivery that fails. 22 events still to be delivered" in tab.text(".summary")
    assert DELIVERY_ERROR in tab.text(".journal.bad")
    assert f"fix {DELIVERY_FIX}" in tab.text(".journal.bad")
    assert "database" in tab.text(".facts")
    assert re.search(r"hooks take 220 µs of each step: 0\.0\d+ % of its time", tab.text(".hooks summary"))
    tab.until("/arriving 0 \\/ s, over \\d+ s/.test(document.querySelector('.facts').innerText)")
    assert tab.complaints == []
    assert server.request("/health")["service"] == "evsys-bus-dashboard"


# -- evals


def set_of(store: Store, run: str) -> int:
    """The id of the eval with the predictions of a run."""
    found = eval_views.evals(store, experiment_id(store, QUIZ))["sets"]
    return next(each["id"] for each in found if each["run_name"] == run)


def all_predictions(store: Store, id_: int, **conditions: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = None
    while True:
        page = eval_views.predictions(store, id_, after, conditions, limit=40)  # pyright: ignore[reportArgumentType] # by name
        rows += page["rows"]
        if page["next"] is None:
            return rows
        after = int(page["next"])


def test_the_matrix_of_evals_compares_arms_by_the_result_after_training(store: Store) -> None:
    found = eval_views.evals(store, experiment_id(store, QUIZ))
    accuracy, length = found["rows"]
    assert (found["arms"], accuracy["name"], accuracy["best"]) == (["baseline", "with hints"], "quiz/accuracy", 1)
    right = [sum(is_right("baseline", seed, n) for n in range(QUESTIONS)) / QUESTIONS for seed in range(2)]
    assert accuracy["cells"][0]["mean"] == pytest.approx(sum(right) / 2)
    assert (length["direction"], length["best"]) == (None, None)


def test_predictions_that_one_run_has_right_and_another_wrong_are_found_page_by_page(store: Store) -> None:
    hinted, plain = set_of(store, "with hints-s0"), set_of(store, "baseline-s0")
    assert len(all_predictions(store, hinted)) == QUESTIONS
    found = all_predictions(store, hinted, min_reward=0.5, worse_in=plain)
    expected = [n for n in range(QUESTIONS) if is_right("with hints", 0, n) and not is_right("baseline", 0, n)]
    assert [each["task_id"] for each in found] == [f"q{n}" for n in expected]
    assert len(all_predictions(store, hinted, text="what is 25 +")) == 1


def test_a_prediction_stands_beside_those_of_the_other_runs_for_the_same_task(store: Store) -> None:
    first = eval_views.predictions(store, set_of(store, "baseline-s0"), None, {})["rows"][0]
    assert first["lengths"]["prediction"] > len(first["prediction"])
    found = eval_views.prediction(store, int(first["id"]))
    assert len(found["prediction"]["prediction"]) == first["lengths"]["prediction"]
    assert [each["of"]["run_name"] for each in found["others"]] == ["baseline-s1", "with hints-s0"]
    assert {each["task_id"] for each in found["others"]} == {"q0"}
    with pytest.raises(LookupError):
        eval_views.prediction(store, 1 << 60)


def test_the_page_of_evals_finds_predictions_and_opens_one_as_its_url_has_them(
    tab: Tab, server: PageServer, store: Store
) -> None:
    rows = "document.querySelectorAll('.answers tbody tr').length"
    tab.open(f"{server.url}{server.path_of(QUIZ)}/evals", f"{rows} == 50")
    assert "with hints" in tab.text(".matrix")
    tab.page.get_by_label("A", exact=True).select_option(str(set_of(store, "with hints-s0")))
    tab.page.get_by_label("which").select_option("A right, B wrong")
    tab.until("document.querySelector('.answers')?.textContent.includes('Question 3:')")
    tab.page.get_by_label("text in a prediction").fill("Question 21:")
    tab.until(f"{rows} == 1")
    tab.page.reload()
    tab.until(f"{rows} == 1")
    tab.page.locator(".answers button").click()
    tab.until("document.querySelectorAll('.drawer article').length == 3")
    assert tab.page.locator(".drawer mark").count() > 0
    assert "row=" in tab.page.url
    tab.page.keyboard.press("Escape")
    tab.until("!document.querySelector('.drawer')")
    assert tab.page.evaluate("document.images.length") == 0
    assert tab.complaints == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/predictions", 400),
        ("/api/predictions?eval=x", 400),
        ("/api/predictions?eval=1&filter=%5B%5D", 400),
        ("/api/predictions?eval=99999999999999999999", 404),
        ("/api/predictions?eval=123456", 404),
        ("/api/predictions/99999999999999999999", 404),
        ("/api/predictions/x", 404),
        ("/api/runs/none", 404),
        ("/api/runs/none/events", 404),
        ("/api/experiments/none/runs?at=x", 400),
        ("/api/compare/predictions?r=none", 404),
        ("/api/compare/predictions?pick=c", 400),
        ("/api/compare/predictions?after=-1", 400),
        ("/api/experiments/none/runs", 404),
        ("/api/experiments/none/evals", 404),
        ("/api/experiments/none/checkpoints", 404),
    ],
)
def test_a_request_for_what_is_not_there_gets_a_clear_error(server: PageServer, path: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        server.request(path)
    with failure.value as answer:
        assert answer.code == status
        assert msgspec.json.decode(answer.read())["error"]["fix"]


# -- checkpoints


def test_checkpoints_have_the_metrics_of_their_steps_and_what_is_known_of_their_upload(store: Store) -> None:
    found = eval_views.checkpoints(store, experiment_id(store, QUIZ))
    assert (found["total"], [each["name"] for each in found["shown"]]) == (16, ["quiz/accuracy", "train/loss"])
    row = next(each for each in found["rows"] if (each["run_name"], each["step"]) == ("baseline-s0", 19))
    right = sum(is_right("baseline", 0, n) for n in range(QUESTIONS)) / QUESTIONS
    assert row["values"] == pytest.approx([right / 2, 2 * math.exp(-19 / 12)])
    assert (row["upload"], row["bytes"], row["url"]) == (
        "uploaded",
        117,
        "s3://bucket/baseline-s0/step-19/manifest.json",
    )


def test_the_page_of_checkpoints_is_sorted_by_a_metric(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}{server.path_of(QUIZ)}/checkpoints", "document.querySelectorAll('tbody tr').length == 16")
    assert "uploaded" in tab.text("tbody")
    tab.page.get_by_role("button", name="quiz/accuracy").click()
    assert tab.text("tbody tr").split()[:4] == ["with", "hints-s1", "step-39", "39"]
    assert tab.complaints == []


# -- several runs side by side


def test_compared_runs_show_what_differs_in_their_configs_and_name_those_that_are_not_there(store: Store) -> None:
    ids = [run_id(store, "baseline-s0"), run_id(store, "with hints-s0")]
    found = views.compare(store, [*ids, ids[0], "gone"])
    assert ([each["id"] for each in found["runs"]], found["unknown"]) == (ids, ["gone"])
    assert found["config"] == [{"key": "hints", "values": [False, True]}]
    assert found["same"] == 2
    names = [each["name"] for each in found["metrics"]]
    assert names == ["quiz/accuracy", "train/loss", "quiz/length", "train/lr"]
    assert len(found["metrics"][0]["last"]) == 2
    assert views.compare(store, [])["runs"] == []


def test_compared_runs_are_paired_by_task_and_counted_by_who_is_right(store: Store) -> None:
    names = ("baseline-s0", "with hints-s0", "with hints-s1")
    ids = [run_id(store, each) for each in names]
    found = eval_views.paired(store, ids, "quiz")
    assert (found["names"], [each and each["step"] for each in found["evals"]]) == (["quiz"], [None, None, None])
    a, b = ([is_right(arm, 0, n) for n in range(QUESTIONS)] for arm in ("baseline", "with hints"))
    assert found["rows"][3]["scores"] == [a[3], b[3], None]
    only_a, only_b = (sum(x and not y for x, y in zip(*both, strict=True)) for both in ((a, b), (b, a)))
    counts = found["counts"]
    assert (counts["tasks"], counts["a"], counts["b"]) == (QUESTIONS, only_a, only_b)
    assert counts["both"] + counts["none"] + only_a + only_b == QUESTIONS
    page = eval_views.paired(store, ids, "quiz", "b")
    rows = list(page["rows"])
    while page["next"]:
        page = eval_views.paired(store, ids, "quiz", "b", int(page["next"]))
        rows += page["rows"]
    assert [each["task_id"] for each in rows] == [f"q{n}" for n in range(QUESTIONS) if b[n] and not a[n]]
    assert eval_views.paired(store, ids[:1], "quiz")["names"] == []


def test_the_page_of_compared_runs_shows_their_answers_side_by_side(tab: Tab, server: PageServer, store: Store) -> None:
    ids = ",".join(run_id(store, each) for each in ("baseline-s0", "with hints-s0"))
    rows = "document.querySelectorAll('.paired tbody tr').length"
    tab.open(f"{server.url}/c?r={ids}", f"{rows} == 50")
    assert "A baseline-s0" in tab.text(".paired thead")
    tab.page.get_by_label("which tasks").select_option("B right, A wrong")
    b_only = [n for n in range(QUESTIONS) if is_right("with hints", 0, n) and not is_right("baseline", 0, n)]
    tab.until(f"{rows} == {min(50, len(b_only))}")
    assert f"B right, A wrong {len(b_only)}" in tab.text(".predictions .tools")
    tab.page.locator(".paired .open").first.click()
    tab.until("document.querySelectorAll('.drawer article').length == 3")
    tab.page.keyboard.press("Escape")
    assert tab.text(".compared").count("40 of 40") == 2
    assert tab.complaints == []


def test_runs_of_two_experiments_are_drawn_in_one_chart_on_a_telephone(
    browser: Any, server: PageServer, store: Store
) -> None:
    sweep = views.runs(store, experiment_id(store, SWEEP), "arm:lr-7")["rows"][0]["id"]
    ids = f"{run_id(store, 'baseline-s0')},{run_id(store, 'with hints-s0')},{sweep}"
    tab = Tab(browser, 390, 800)
    tab.open(f"{server.url}/c?r={ids}", "!!document.querySelector('.card')")
    tab.page.locator(".card").first.scroll_into_view_if_needed()
    tab.page.locator('[aria-label="train/loss"]').scroll_into_view_if_needed()
    assert tab.until(f"document.querySelector('{LOSS}')?.textContent") == "83 of 83 points"
    assert [tab.text(f".legend button:nth-child({n})") for n in (1, 3)] == [
        f"{QUIZ} · baseline-s0",
        f"{SWEEP} · lr-7-s0",
    ]
    tab.page.get_by_role("button", name="leave out").nth(2).click()
    tab.until(f"document.querySelector('{LOSS}')?.textContent == '80 of 80 points'")
    assert tab.page.evaluate("new URLSearchParams(location.search).get('r')").count(",") == 1
    assert not tab.is_wider_than_the_screen()
    assert tab.complaints == []
    tab.close()
