"""What each page may fetch before a reader sees it, and that these tests cannot be left out where all checks run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dashboard_recorded import questions
from support import ROOT
from support.browser import Tab, chromium
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store

MOST_BYTES = 150_000
MOST_REQUESTS = 12
READY = """!!document.querySelector("main") && !document.querySelector("[aria-busy=true]") &&
    [...document.querySelectorAll(".card")].every((card) =>
        card.getBoundingClientRect().top > innerHeight || /point/.test(card.querySelector(".drawn")?.textContent))"""
PAGES = {
    "home": "table.experiments",
    "experiment": ".card canvas",
    "metrics": ".card canvas",
    "runs": "tbody tr",
    "evals": "table.answers tbody tr",
    "checkpoints": "tbody tr",
    "run": ".card canvas",
    "compare": ".card canvas",
    "health": ".journal",
}
"""Each page, and what it shows once it is there."""


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


def path_of(server: PageServer, page: str) -> str:
    if page in {"home", "health"}:
        return {"home": "/", "health": "/health"}[page]
    [row] = server.request("/api/home")["experiments"]
    runs = [run["id"] for run in server.request(f"/api/experiments/{row['id']}")["runs"]]
    special = {"experiment": f"/e/{row['id']}", "run": f"/r/{runs[0]}", "compare": f"/c?r={','.join(runs[:4])}"}
    return special.get(page, f"/e/{row['id']}/{page}")


@pytest.mark.parametrize(
    ("page", "width"), [*((page, 1280) for page in PAGES), ("experiment", 2560), ("metrics", 2560)]
)
def test_the_first_view_of_each_page_is_small_and_comes_from_one_host(
    browser: Any, server: PageServer, page: str, width: int
) -> None:
    tab = Tab(browser, width, 800 if width < 2_000 else 1_400)
    tab.open(f"{server.url}{path_of(server, page)}", f"{READY} && !!document.querySelector('{PAGES[page]}')")
    sizes = [request.sizes() for request in tab.requests if request.response() is not None]
    size = sum(each["responseBodySize"] + each["responseHeadersSize"] for each in sizes)
    assert size <= MOST_BYTES, (size, [request.url for request in tab.requests])
    assert len(tab.requests) <= MOST_REQUESTS, [request.url for request in tab.requests]
    assert {request.url.split("/")[2] for request in tab.requests} == {f"127.0.0.1:{server.port}"}
    assert tab.complaints == []
    tab.close()


def test_where_all_checks_run_a_missing_browser_fails_the_tests_of_the_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "first_view"],
        env=os.environ | {"CI": "true", "PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "there is no chromium" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
