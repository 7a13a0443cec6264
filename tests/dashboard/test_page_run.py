"""The pages of a run that was recorded with all that a run may log, in a browser."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import evsys_bus
from evsys_adapters.dashboard.journals import import_journal
from evsys_bus import build_callbacks
from support.browser import Tab, chromium
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store

STEPS = 40
MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
HAS_CHART = "document.querySelectorAll('.card canvas').length >= 1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def record(folder: Path) -> None:
    """Run a training that logs numbers, a text, histograms, tables, a page, a file and alerts."""
    callbacks = build_callbacks([{"kind": "local_logger", "params": {"print_every": 0}}])
    (folder / "weights.bin").write_bytes(b"w" * 5_000)
    with evsys_bus.run(folder / "runs" / "digits", callbacks=callbacks, config={"lr": 0.1}, output=False) as run:
        for step in run.steps(STEPS):
            run.log({"loss": 1 / (step + 1), "note": f"{MARKUP} {step}"}, step=step)
            if step % 10 == 0:
                run.histogram("weights", [0.1 * step + k / 7 for k in range(30)], bins=6)
                run.table("samples", [[f"{step} + 2", MARKUP]], columns=["question", "answer"])
        run.text("notes", "It learns.")
        run.html("report", f"<h1>{MARKUP}</h1>")
        run.artifact("weights", folder / "weights.bin")
        run.alert("loss is low", "stop early?", level="info")
        run.alert("loss is odd", MARKUP, level="error")
        run.summary["best"] = 0.5


@pytest.fixture(scope="module")
def server(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    del browser  # without one there is nothing to show
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    with closing(open_store(folder)) as store:
        import_journal(store, folder / "runs" / "digits")
    with PageServer(folder, tmp_path_factory.mktemp("server") / "copy") as server:
        yield server


@pytest.fixture(params=["light", "dark"])
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Tab]:
    tab = Tab(browser)
    tab.page.emulate_media(color_scheme=request.param)
    yield tab
    assert tab.complaints == []
    tab.close()


def run_path(server: PageServer) -> str:
    experiment = server.path_of("runs").rpartition("/")[2]
    [row] = server.request(f"/api/experiments/{experiment}/runs")["rows"]
    return f"/r/{row['id']}"


def test_an_experiment_of_one_arm_has_its_value_and_nothing_leads(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}{server.path_of('runs')}", HAS_CHART)
    assert tab.text(".summary") == "train/loss: 0.02500. 1 run, none failed."
    assert tab.page.locator(".mark").count() == 0


def test_an_alert_has_its_level_as_a_word_and_a_sign_on_the_pages_of_experiment_and_run(
    tab: Tab, server: PageServer
) -> None:
    for path in (server.path_of("runs"), run_path(server)):
        tab.open(f"{server.url}{path}", HAS_CHART)
        alerts = [" ".join(each.split()) for each in tab.page.locator(".alert").all_inner_texts()]
        assert alerts[0].startswith(f"✕error loss is odd {MARKUP}")
        assert alerts[1].startswith("○info loss is low stop early?")
