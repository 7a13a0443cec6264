"""Ten questions of somebody who has only the browser; from the list of experiments, each answer is a few actions away.

The table of docs/dashboard.md has the number of actions: clicks, choices, keys and pointing at a chart.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from benchmarks.dashboard_recorded import (
    ERROR,
    FAILED,
    QUESTIONS,
    RUNNING,
    SPIKE_AT,
    SPIKED,
    STEPS,
    UNDELIVERED,
    UNDELIVERED_ERROR,
    WINNER,
    is_solved,
    questions,
)
from support import ROOT
from support.browser import Tab, chromium
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store

pytestmark = pytest.mark.long

DRAWN = """document.querySelectorAll('.card canvas').length > 2 &&
    /point/.test(document.querySelector('[aria-label="train/loss"] .drawn')?.textContent)"""


class Asking(Tab):
    """A tab that counts what a reader does."""

    def __init__(self, browser: Any, server: PageServer) -> None:
        super().__init__(browser, 1280, 900)
        self.server = server
        self.actions = 0
        self.open(server.url, "document.querySelectorAll('tbody tr').length > 0")
        self.started = time.monotonic()

    def click(self, text: str, until: str, role: str = "link") -> None:
        self.actions += 1
        self.page.get_by_role(role, name=text, exact=True).first.click()
        self.until(until)

    def choose(self, label: str, text: str) -> None:
        self.actions += 1
        self.page.get_by_label(label, exact=True).select_option(label=text)

    def press(self, key: str) -> None:
        self.actions += 1
        self.page.keyboard.press(key)

    def experiment(self) -> None:
        self.click(QUESTIONS, DRAWN)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    del browser  # without one there is nothing to record
    folder = tmp_path_factory.mktemp("recorded")
    with closing(open_store(folder)) as store:
        questions(store)
    with PageServer(folder, folder / "copy") as server:
        yield server


def which_arm_wins_and_by_how_much(tab: Asking) -> None:
    tab.experiment()
    summary = tab.text(".summary")
    assert summary.startswith(f"{WINNER} leads by gsm8k/accuracy (higher is better): 0.")
    assert "to baseline" in summary
    assert "+0." in summary


def which_run_failed_and_why(tab: Asking) -> None:
    tab.experiment()
    text = tab.text(".problems")
    assert f"{FAILED[0]}-s{FAILED[1]}" in text
    assert ERROR in text


def where_the_loss_spiked(tab: Asking) -> None:
    tab.experiment()
    tab.press("m")
    drawn = "document.querySelector('[aria-label=\"train/loss\"] .drawn').textContent"
    tab.until(f"parseInt({drawn}.replaceAll(',', '')) > 900")
    box = tab.page.locator('[aria-label="train/loss"] .u-over').bounding_box()
    tab.actions += 1  # to point at the spike
    tab.page.mouse.move(box["x"] + box["width"] * (SPIKE_AT + 2) / STEPS, box["y"] + 8)
    tip = tab.until("[...document.querySelectorAll('.tooltip:not([hidden])')].map((each) => each.innerText)[0]")
    step, *rows = tip.splitlines()
    assert abs(int(step.removeprefix("step ")) - SPIKE_AT) < STEPS / 100
    assert f"{SPIKED[0]} seed {SPIKED[1]}" in rows[0] + rows[1]


def which_tasks_a_solves_and_b_does_not(tab: Asking) -> None:
    tab.experiment()
    tab.click("evals", "!!document.querySelector('table.answers tbody tr')")
    tab.choose("A", f"gsm8k \u00b7 {WINNER}-s0")
    tab.choose("which", "A right, B wrong")
    tab.choose("B", "gsm8k \u00b7 baseline-s0")
    only = [n for n in range(160) if is_solved(WINNER, 0, "gsm8k", n) and not is_solved("baseline", 0, "gsm8k", n)]
    assert 5 < len(only) < 50
    tab.until(f"document.querySelectorAll('table.answers tbody tr').length == {len(only)}")
    assert [row.split(":")[0].split()[-1] for row in tab.page.locator("table.answers tbody tr").all_inner_texts()] == [
        str(each) for each in only
    ]


def which_checkpoint_to_take(tab: Asking) -> None:
    tab.experiment()
    tab.click("checkpoints", "!!document.querySelector('tbody tr')")
    tab.click("val/accuracy", "!!document.querySelector('tbody tr')", role="button")
    id_ = tab.server.request("/api/home")["experiments"][0]["id"]
    rows = tab.server.request(f"/api/experiments/{id_}/checkpoints")["rows"]
    best = max(rows, key=lambda row: row["values"][0] or 0)
    assert tab.text("tbody tr").split()[:2] == [best["run_name"], best["name"]]


def what_is_not_delivered(tab: Asking) -> None:
    tab.click("health", "!!document.querySelector('.journal')")
    text = tab.text("main")
    assert all(each in text for each in (UNDELIVERED, UNDELIVERED_ERROR, "9,908", "WANDB_API_KEY"))


def what_differs_between_arms(tab: Asking) -> None:
    tab.experiment()
    tab.click("runs", "!!document.querySelector('tbody tr')")
    head = tab.text("thead").split()
    assert {"lr", "optimizer", "warmup"} < {*head}
    assert not {"batch", "layers", "model.layers"} & {*head}


def is_the_run_alive(tab: Asking) -> None:
    tab.experiment()
    tab.click("runs", "!!document.querySelector('tbody tr')")
    rows = tab.page.locator("tbody tr").all_inner_texts()
    [row] = [each for each in rows if f"{RUNNING[0]}-s{RUNNING[1]}" in each]
    assert "running" in row


def when_did_it_end(tab: Asking) -> None:
    tab.experiment()
    tab.click("runs", "!!document.querySelector('tbody tr')")
    tab.click("baseline-s0", "!!document.querySelector('.card canvas')")
    assert "ended" in tab.text(".head")


def how_long_did_hooks_take(tab: Asking) -> None:
    tab.click("health", "!!document.querySelector('.journal')")
    text = tab.text(".journal")
    assert "hooks take" in text
    assert "hooks take 0 " not in text


ACTIONS: dict[Callable[[Asking], None], int] = {
    which_arm_wins_and_by_how_much: 1,
    which_run_failed_and_why: 1,
    where_the_loss_spiked: 3,
    which_tasks_a_solves_and_b_does_not: 5,
    which_checkpoint_to_take: 3,
    what_is_not_delivered: 1,
    what_differs_between_arms: 2,
    is_the_run_alive: 2,
    when_did_it_end: 3,
    how_long_did_hooks_take: 1,
}


@pytest.mark.parametrize("question", ACTIONS, ids=lambda question: question.__name__)
def test_a_reader_finds_the_answer_in_so_many_actions(
    browser: Any, server: PageServer, question: Callable[[Asking], None]
) -> None:
    tab = Asking(browser, server)
    question(tab)
    print(json.dumps([question.__name__, tab.actions, round(time.monotonic() - tab.started, 2)]))
    assert tab.actions == ACTIONS[question]
    assert tab.complaints == []
    tab.close()


def test_the_docs_have_the_number_of_actions_of_each_question() -> None:
    page = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")
    rows = [line.casefold() for line in page.splitlines() if line.startswith("| ")]
    for question, actions in ACTIONS.items():
        words = question.__name__.replace("_", " ")
        assert any(row.startswith(f"| {words} |") and row.endswith(f"| {actions} |") for row in rows), words
