"""Pictures of all pages of the dashboard, of recorded experiments, light and dark, on narrow and wide screens.

    python -m benchmarks.dashboard_screens DIRECTORY            of all experiments of `dashboard_recorded`
    python -m benchmarks.dashboard_screens DIRECTORY questions  of some of them, by their names there

Prints for each picture when the page was ready, and what is wrong with it: what the browser complained of, and whether
the page is wider than the screen.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from benchmarks.dashboard_browser import chromium
from benchmarks.dashboard_load import TOKEN, Client, server
from benchmarks.dashboard_recorded import EXPERIMENTS
from evsys_adapters.dashboard.store import Store

SIZES: Final = {390: 1_700, 1_280: 1_400, 2_560: 1_440}
"""Widths and heights of the screens."""
THEMES: Final = ("light", "dark")
PAGES: Final = ("", "/metrics", "/runs", "/evals", "/checkpoints")
_STILL_SECONDS: Final = 0.4
_SECONDS: Final = 20.0
_STATE: Final = """[
    !!document.querySelector("main") && !document.querySelector("[aria-busy=true]") &&
        [...document.querySelectorAll(".card")].every((card) =>
            card.getBoundingClientRect().top > innerHeight || card.querySelector("canvas")),
    document.body.innerText,
]"""
"""Whether all that is in view is there, and what it is."""


def paths(client: Client) -> Iterator[tuple[str, str]]:
    """Yield names and paths of all pages: those of no experiment, then those of each."""
    yield "home", "/"
    yield "health", "/health"
    for row in json.loads(client.request("/api/home"))["experiments"]:
        name = "".join(letter if letter.isalnum() else "-" for letter in row["name"])[:24].strip("-")
        for page in PAGES:
            yield f"{name}.{page.lstrip('/') or 'experiment'}", f"/e/{row['id']}{page}"
        runs = [run["id"] for run in json.loads(client.request(f"/api/experiments/{row['id']}"))["runs"]]
        if runs:
            yield f"{name}.run", f"/r/{runs[0]}"
            yield f"{name}.compare", f"/c?r={quote(','.join(runs[:3]))}"


def wait_until_still(page: Any) -> float:
    """Wait until a page neither loads nor changes; returns the time of its last change. Raises TimeoutError."""
    end = time.monotonic() + _SECONDS
    last, since = None, time.monotonic()
    while True:
        now, state = time.monotonic(), page.evaluate(_STATE)
        if state != last:
            last, since = state, now
        elif state[0] and now - since > _STILL_SECONDS:
            return since
        if now > end:
            raise TimeoutError(page.url)
        page.wait_for_timeout(30)


def take(folder: Path, names: Sequence[str]) -> None:
    """Record the experiments beside the pictures, unless they are there, and take the pictures."""
    database = folder / "dashboard.sqlite"
    folder.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        with closing(Store.open(database)) as store:
            for name in names or EXPERIMENTS:
                EXPERIMENTS[name](store)
    with server(database) as running, chromium() as (playwright, executable):
        client = Client(running.url)
        all_paths = list(paths(client))
        client.close()
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for theme in THEMES:
            for width, height in SIZES.items():
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                for name, path in all_paths:
                    _take(context, f"{running.url}{path}#token={TOKEN}", folder / f"{name}.{theme}.{width}.png")
                context.close()
        browser.close()


def _take(context: Any, url: str, file: Path) -> None:
    page = context.new_page()
    wrong: list[str] = []

    def note(message: Any) -> None:
        if message.type in {"error", "warning"}:
            wrong.append(message.text)

    def note_error(error: Any) -> None:
        wrong.append(str(error))

    page.on("console", note)
    page.on("pageerror", note_error)
    began = time.monotonic()
    page.goto(url)
    try:
        took = f"{wait_until_still(page) - began:.2f} s"
    except TimeoutError:
        took = "never still"
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        wrong.append("wider than the screen")
    page.screenshot(path=str(file))
    page.close()
    print(f"{file.name}: {took}", *wrong, sep="; ", flush=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), sys.argv[2:])
