"""The pages beside home and experiment: what they read of a store, and how they look in a browser."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evsys_adapters.dashboard import views
from evsys_adapters.dashboard.store import Store
from support.browser import Tab, chromium
from support.dashboard_details import (
    DELIVERY_ERROR,
    DELIVERY_FIX,
    MARKUP,
    QUIZ,
    QUIZ_STEPS,
    SWEEP,
    SWEEP_RUNS,
    fill_details,
)
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store


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
    assert (len(lines), lines[0].split(",")[:4]) == (12, ["run", "state", "step", "lr"])
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
    assert 'File "train.py", line 7\nZeroDivisionError' in tab.text(".broken")
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
    whole = views.run(store, run_id(store, "with hints-s0"))
    assert whole["receipt"]["complete"]


# -- health


def test_health_has_the_journals_whose_delivery_fails_first(store: Store) -> None:
    health = views.health(store)
    assert [each["run"]["name"] for each in health["journals"]] == ["baseline-s0", "with hints-s0"]
    assert health["journals"][0]["experiment"]["name"] == QUIZ
    assert health["database"]["events"] > SWEEP_RUNS
    assert health["database"]["bytes"] > 0


def test_the_page_of_health_is_for_browsers_and_programs_get_the_service_there(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}/health", "document.querySelectorAll('.journal').length == 2")
    assert "1 journal with a delivery that fails. 22 events still to be delivered" in tab.text(".answer")
    assert DELIVERY_ERROR in tab.text(".journal.bad")
    assert f"fix {DELIVERY_FIX}" in tab.text(".journal.bad")
    assert "database" in tab.text(".facts")
    assert tab.complaints == []
    assert server.request("/health")["service"] == "evsys-bus-dashboard"
