"""What a chart draws, pixel by pixel: gaps and bands beside them, lone points, logarithms of nothing, marks, a view."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evsys_bus import Event, LogContext, RunStart, StepEnd, TrainStart
from support.browser import Tab, chromium
from support.dashboard_pages import Growing, PageServer
from support.dashboard_stores import open_store, state_of

pytestmark = pytest.mark.long

ARMS = ("full", "part")
SEEDS = 2
STEPS = 100
GAP = range(40, 60)
LONE = (0, 50, STEPS - 1)
EVERY = 10
MOST_OF_EDGES = 8
"""Pixels at the edges of a line or a mark, that are as faint as a band."""
START = time.time() - 2 * STEPS

_COLUMNS = """(metric, hue) => {
    const card = document.querySelector(`[aria-label="${metric}"]`);
    const canvas = card.querySelector("canvas");
    const [over, whole] = [card.querySelector(".u-over"), canvas].map((each) => each.getBoundingClientRect());
    const [left, top] = [Math.round(over.left - whole.left), Math.round(over.top - whole.top)];
    const [width, height] = [Math.round(over.width), Math.round(over.height)];
    const { data } = canvas.getContext("2d").getImageData(left, top, width, height);
    const columns = Array.from({ length: width }, () => [0, 0, 0]);
    for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
            const at = 4 * (y * width + x);
            const alpha = data[at + 3];
            const distance = Math.max(...hue.map((part, i) => Math.abs(part - data[at + i])));
            if (alpha < 20 || distance > 30) continue;
            columns[x][alpha < 150 ? 1 : y >= height - 9 ? 2 : 0]++;
        }
    }
    return columns;
}"""
_NOTE_TEXTS = """
    const draw = CanvasRenderingContext2D.prototype.fillText;
    window.texts = new Map();
    CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        const metric = this.canvas.closest(".card")?.getAttribute("aria-label");
        if (metric) texts.set(metric, [...(texts.get(metric) ?? []), text]);
        draw.call(this, text, ...rest);
    };
    const clear = CanvasRenderingContext2D.prototype.clearRect;
    CanvasRenderingContext2D.prototype.clearRect = function (...rest) {
        const metric = this.canvas.closest(".card")?.getAttribute("aria-label");
        if (metric) texts.delete(metric);
        clear.apply(this, rest);
    };
"""


def logged(arm: str, seed: int, step: int) -> dict[str, float]:
    """What a run logs at a step."""
    falling = 3 + seed + (arm == "part") - step / STEPS
    found = {
        "gap": math.nan if arm == "full" and step in GAP else falling,
        "gap_of_one": math.nan if (arm, seed) == ("full", 1) and step in GAP else falling,
        "lone": falling if step in LONE else math.nan,
        "never": math.nan,
        "negative_in_one": -falling if arm == "full" else falling,
        "negative": -falling,
        "tiny": 1e-5 * falling,
        "nearly_one": 1 + 1e-6 * falling,
    }
    if arm == "full" or step % EVERY == 0:
        found["sparse"] = falling
    return found


def contexts() -> dict[tuple[str, int], LogContext]:
    root = LogContext("/runs/edges", config={"name": "edges"})
    keys = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    return {(arm, seed): root.for_run(f"{arm}-s{seed}", {"arm": arm, "seed": seed}) for arm, seed in keys}


def steps_of(first: int, last: int) -> list[Event]:
    return [
        StepEnd(state_of(ctx, num_steps=4 * STEPS), step, metrics=logged(arm, seed, step))
        for (arm, seed), ctx in contexts().items()
        for step in range(first, last)
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del browser  # without one there is nothing to record
    folder = tmp_path_factory.mktemp("edges")
    with closing(open_store(folder)) as store:
        growing = Growing(store.ingest, "r0-edges", START)
        for ctx in contexts().values():
            growing.send(RunStart(ctx), TrainStart(state_of(ctx, num_steps=4 * STEPS)))
        growing.send(*steps_of(0, STEPS))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[PageServer]:
    with PageServer(folder, folder / "copy") as server:
        yield server


class Column(NamedTuple):
    """Pixels of a hue in a column of a chart."""

    line: int
    band: int
    mark: int
    """At the axis of steps."""


def with_band(columns: list[Column]) -> int:
    """How many columns have a band; lines of the grid hide it in a few."""
    return sum(column.band > MOST_OF_EDGES for column in columns)


class Charts(Tab):
    """A tab with charts, of which each step from 0 to the last one is in view."""

    def __init__(self, browser: Any) -> None:
        super().__init__(browser, 1280, 1_200)
        self.page.add_init_script(_NOTE_TEXTS)

    def show(self, server: PageServer, query: str = "") -> None:
        path = f"{server.path_of('edges')}/metrics?smooth=off&{query}"
        self.open(f"{server.url}{path}", self.drawn("train/gap"))

    def drawn(self, metric: str) -> str:
        return f"/point/.test(document.querySelector('[aria-label=\"{metric}\"] .drawn')?.textContent)"

    def label(self, metric: str) -> str:
        return self.text(f'[aria-label="{metric}"] .drawn')

    def columns(self, metric: str, arm: str) -> list[Column]:
        """The pixels of an arm's hue, from the left."""
        hue = self.page.evaluate(
            """(arm) => [...document.querySelectorAll(".legend button")].filter((each) => each.innerText.trim() === arm)
                .map((each) => getComputedStyle(each.querySelector("line")).stroke.match(/\\d+/g).map(Number))[0]""",
            arm,
        )
        return [Column(*each) for each in self.page.evaluate(f"({_COLUMNS})({json.dumps(metric)}, {json.dumps(hue)})")]

    def between(self, metric: str, arm: str, first: float, last: float) -> list[Column]:
        """The columns of some steps."""
        columns = self.columns(metric, arm)
        per_step = (len(columns) - 1) / (STEPS - 1)
        return columns[max(0, math.ceil(first * per_step)) : math.floor(last * per_step) + 1]

    def texts(self, metric: str) -> list[str]:
        """The texts that are drawn at the axes."""
        return [each.replace("\u2212", "-") for each in self.page.evaluate(f"texts.get({json.dumps(metric)})")]


@pytest.fixture
def charts(browser: Any) -> Iterator[Charts]:
    charts = Charts(browser)
    yield charts
    assert [each for each in charts.complaints if "getImageData" not in each] == []  # of a test's own reading
    charts.close()


def test_neither_line_nor_band_crosses_a_gap(charts: Charts, server: PageServer) -> None:
    charts.show(server, "hide=part")  # whose band would lie above
    inside = charts.between("train/gap", "full", GAP[0], GAP[-1])
    assert not any(column.line for column in inside)
    assert with_band(inside) == 0
    for first, last in ((1, GAP[0] - 2), (GAP[-1] + 2, STEPS - 2)):
        beside = charts.between("train/gap", "full", first, last)
        assert all(column.line for column in beside)
        assert with_band(beside) > 0.9 * len(beside)
    charts.show(server)
    assert not any(column.line for column in charts.between("train/gap", "full", GAP[0], GAP[-1]))
    assert all(column.line for column in charts.between("train/gap", "part", 1, STEPS - 2))


def test_a_band_ends_where_a_single_seed_is_left_and_the_line_goes_on(charts: Charts, server: PageServer) -> None:
    charts.show(server, "hide=part")  # whose band would lie above
    inside = charts.between("train/gap_of_one", "full", GAP[0], GAP[-1])
    assert all(column.line for column in inside)
    assert with_band(inside) == 0
    beside = charts.between("train/gap_of_one", "full", 1, GAP[0] - 2)
    assert with_band(beside) > 0.9 * len(beside)


def test_a_lone_point_is_a_dot_at_its_step_also_at_both_ends(charts: Charts, server: PageServer) -> None:
    charts.show(server)
    assert charts.label("train/lone").startswith(f"{len(ARMS) * len(LONE)} of {len(ARMS) * SEEDS * STEPS} points")
    for step in LONE:
        assert max(column.line for column in charts.between("train/lone", "full", step - 0.8, step + 0.8)) >= 3
    for first, last in ((2, LONE[1] - 2), (LONE[1] + 2, STEPS - 3)):
        assert not any(column.line for column in charts.between("train/lone", "full", first, last))


def test_a_line_with_fewer_points_than_another_one_has_no_gaps(charts: Charts, server: PageServer) -> None:
    charts.show(server)
    assert all(column.line for column in charts.between("train/sparse", "part", 1, STEPS - EVERY))


def test_what_has_no_value_at_all_has_marks_and_a_count(charts: Charts, server: PageServer) -> None:
    charts.show(server)
    count = len(ARMS) * SEEDS * STEPS
    for _ in range(2):
        assert charts.label("train/never") == f"0 of {count} points \u00b7 {count} not finite"
        columns = charts.columns("train/never", "part")
        assert not any(column.line or column.band for column in columns)
        assert sum(column.mark > 0 for column in columns) > len(columns) / 2
        charts.page.keyboard.press("l")


def test_each_value_that_is_not_finite_is_counted_and_marked_at_its_step(charts: Charts, server: PageServer) -> None:
    charts.show(server)
    assert charts.label("train/gap").endswith(f" \u00b7 {SEEDS * len(GAP)} not finite")
    marked = charts.between("train/gap", "full", GAP[0], GAP[-1])
    assert sum(column.mark > 0 for column in marked) > len(marked) / 2
    for first, last in ((0, GAP[0] - 2), (GAP[-1] + 2, STEPS - 1)):
        assert not any(column.mark for column in charts.between("train/gap", "full", first, last))
    assert charts.label("train/gap_of_one").endswith(f" \u00b7 {len(GAP)} not finite")


def test_a_logarithmic_axis_leaves_out_an_arm_without_positive_values(charts: Charts, server: PageServer) -> None:
    charts.show(server, "log=*")
    charts.until(charts.drawn("train/negative_in_one"))
    for metric in ("train/negative_in_one", "train/negative"):
        assert "not positive: left out" in charts.label(metric)
        assert not any(column.line or column.band for column in charts.columns(metric, "full"))
    assert all(column.line for column in charts.between("train/negative_in_one", "part", 1, STEPS - 2))
    assert len(charts.texts("train/negative_in_one")) > 4, "both axes have texts"


def test_small_and_close_values_have_texts_that_differ_at_the_axis(charts: Charts, server: PageServer) -> None:
    charts.show(server, "q=tiny|nearly|gap")
    for log in ("", "log=*"):
        charts.show(server, f"q=tiny|nearly|gap&{log}")
        for metric in ("train/tiny", "train/nearly_one"):
            charts.until(charts.drawn(metric))
            texts = charts.texts(metric)
            values = [float(each) for each in texts if "e-5" in each or each.startswith("1.0000")]
            assert len(values) > 2, texts
            assert len(set(values)) == len(values)
        assert {*charts.texts("train/tiny")} & {"2e-5", "2.0e-5", "3e-5", "3.0e-5"}


def test_a_reload_draws_the_same_view(charts: Charts, server: PageServer) -> None:
    charts.show(server, "lines=both&log=train%2Ftiny&zoom=20..70&hide=part&q=gap|tiny")

    def seen() -> Any:
        charts.until(f"{charts.drawn('train/tiny')} && {charts.drawn('train/gap')}")
        metrics = ("train/gap", "train/tiny")
        return [
            [charts.texts(each), charts.label(each), [column.line for column in charts.columns(each, "full")]]
            for each in metrics
        ]

    before, url = seen(), charts.page.url
    assert before[0][0][:2] == ["20", "30"]
    charts.page.reload()
    assert (seen(), charts.page.url) == (before, url)


def test_a_live_update_leaves_a_zoomed_chart_as_it_is(charts: Charts, folder: Path, tmp_path: Path) -> None:
    with PageServer(folder, tmp_path / "copy") as server:
        charts.show(server, f"zoom=0..{STEPS - 1}")
        charts.until("document.querySelector('.connection').textContent.includes('live')")
        charts.page.set_viewport_size({"width": 1_280, "height": 400})
        charts.page.evaluate("document.querySelector('[aria-label=\"train/gap\"]').scrollIntoView()")
        charts.until(charts.drawn("train/gap"))
        top = charts.until("scrollY")
        names = charts.page.evaluate("[...document.querySelectorAll('.card')].map((card) => card.ariaLabel)")
        before = [charts.texts("train/gap"), charts.columns("train/gap", "full"), charts.columns("train/gap", "part")]
        total = charts.label("train/gap")
        growing = Growing(server.ingest, "r0-later", START)
        growing.send(*steps_of(STEPS, STEPS + 80))
        charts.until(f"document.querySelector('[aria-label=\"train/gap\"] .drawn').textContent != {json.dumps(total)}")
        after = [charts.texts("train/gap"), charts.columns("train/gap", "full"), charts.columns("train/gap", "part")]
        assert after == before
        assert charts.page.evaluate("scrollY") == top
        assert charts.page.evaluate("[...document.querySelectorAll('.card')].map((card) => card.ariaLabel)") == names
