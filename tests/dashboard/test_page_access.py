"""The page without a mouse and with other eyes: keys, Tab and Enter, and what axe-core finds, in light and dark."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import evsys_bus
from evsys_adapters.dashboard.journals import import_journal
from support import ROOT
from support.browser import Tab, chromium, require
from support.dashboard_details import QUIZ, fill_details
from support.dashboard_pages import HOSTILE, PageServer, fill_hostile
from support.dashboard_stores import open_store

pytestmark = pytest.mark.long

AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = {
    "home": "table.experiments",
    "experiment": ".card canvas",
    "hostile": ".problems",
    "metrics": ".card canvas",
    "runs": "tbody tr",
    "evals": "table.answers tbody tr",
    "checkpoints": "tbody tr",
    "run": ".card canvas",
    "events": "table.events tbody tr",
    "compare": "table.paired tbody tr",
    "health": ".journal",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    del browser  # without one there is nothing to show
    folder = tmp_path_factory.mktemp("access")
    fill_details(folder)
    record(folder / "recorded" / "digits")
    with closing(open_store(folder)) as store:
        fill_hostile(store)
        import_journal(store, folder / "recorded" / "digits")
    with PageServer(folder, tmp_path_factory.mktemp("server") / "copy") as server:
        yield server


def record(folder: Path) -> None:
    with evsys_bus.run(folder, output=False, environment=False) as run:
        for step in run.steps(3):
            run.log({"loss": 1 / (step + 1)}, step=step)
        run.alert("loss is low", "so\n" * 90, level="info")


def path_of(server: PageServer, page: str) -> str:
    quiz = server.path_of(QUIZ)
    runs = [row["id"] for row in server.request(f"/api/experiments/{quiz[3:]}/runs")["rows"]]
    [recorded] = server.request(f"/api/experiments/{server.path_of('recorded')[3:]}/runs")["rows"]
    paths = {
        "home": "/",
        "experiment": quiz,
        "hostile": server.path_of(HOSTILE),
        "run": f"/r/{runs[0]}",
        "events": f"/r/{recorded['id']}/events",
        "compare": f"/c?r={','.join(runs)}",
        "health": "/health",
    }
    return paths.get(page, f"{quiz}/{page}")


@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_serious_in_light_and_dark(browser: Any, server: PageServer, page: str) -> None:
    require(AXE.is_file(), "axe-core: (cd web && npm ci --ignore-scripts)")
    path = path_of(server, page)
    found: list[str] = []
    for width in (1280, 390):
        tab = Tab(browser, width, 900)
        for scheme in ("light", "dark"):
            tab.page.emulate_media(color_scheme=scheme)
            tab.open(f"{server.url}{path}", f"!!document.querySelector('{PAGES[page]}, .card')")
            tab.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
            if page == "events":
                tab.page.locator(".events .open").last.click()
            tab.page.evaluate(AXE.read_text(encoding="utf-8"))
            for each in tab.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]:
                if each["impact"] in {"serious", "critical"}:
                    found += [f"{width} {scheme} {each['id']}: {node['html'][:200]}" for node in each["nodes"][:3]]
        tab.close()
    assert found == []


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    assert tab.complaints == []
    tab.close()


def tab_to(tab: Tab, condition: str, most: int = 60) -> None:
    """Press Tab until the element in focus meets a condition."""
    for _ in range(most):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate(f"((element) => {condition})(document.activeElement)"):
            return
    raise AssertionError(f"not reached by Tab: {condition}")


def test_an_experiment_its_arm_and_a_run_are_opened_by_tab_and_enter(tab: Tab, server: PageServer) -> None:
    tab.open(server.url, "document.querySelectorAll('tbody tr').length > 2")
    tab_to(tab, f"element.textContent === {QUIZ!r}")
    tab.page.keyboard.press("Enter")
    tab.until("!!document.querySelector('.arms')")
    tab_to(tab, "element.matches('.arms .open')")
    tab.page.keyboard.press("Enter")
    tab.until("document.querySelectorAll('tr.run').length === 2")
    tab_to(tab, "element.matches('tr.run a')")
    tab.page.keyboard.press("Enter")
    tab.until("location.pathname.startsWith('/r/')")


def test_the_keys_of_charts_change_the_chart_in_focus(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}{server.path_of(QUIZ)}", "document.querySelectorAll('.card canvas').length > 1")
    tab.until("/point/.test(document.querySelector('.card .drawn').textContent)")
    tab_to(tab, "element.matches('.card')")
    name = tab.page.evaluate("document.activeElement.ariaLabel")
    tab.page.keyboard.press("l")
    assert name in tab.page.evaluate("new URLSearchParams(location.search).get('log')")
    tab.page.keyboard.press("+")
    first, last = map(int, tab.page.evaluate("new URLSearchParams(location.search).get('zoom')").split(".."))
    assert 0 < first < last < 39
    tab.page.keyboard.press("]")
    moved = tab.page.evaluate("new URLSearchParams(location.search).get('zoom')")
    assert int(moved.split("..")[0]) > first
    tab.page.keyboard.press("0")
    assert "zoom" not in tab.page.url
    tab.page.keyboard.press("g")
    tab.until("[...document.querySelectorAll('.charts h2')].some((each) => each.textContent === 'quiz')")
    assert "group=yes" in tab.page.url
    tab_to(tab, "element.textContent === 'SVG'")


def test_the_list_of_keys_has_those_of_charts_only_where_charts_are(tab: Tab, server: PageServer) -> None:
    tab.open(server.url, "document.querySelectorAll('tbody tr').length > 2")
    tab.page.keyboard.press("?")
    assert "smoothing" not in tab.text("dialog[open]")
    assert "pause" in tab.text("dialog[open]")
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("s")
    assert "smooth" not in tab.page.url
    tab.open(f"{server.url}{server.path_of(QUIZ)}", "document.querySelectorAll('.card canvas').length > 1")
    tab.page.keyboard.press("?")
    assert "smoothing" in tab.text("dialog[open]")
    tab.page.keyboard.press("m")
    assert "lines" not in tab.page.url, "what is behind the list does not change"
    tab.page.keyboard.press("?")
    tab.until("!document.querySelector('dialog[open]')")
