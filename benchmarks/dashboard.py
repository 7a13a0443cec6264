"""Whether the dashboard is as fast as promised: ingest, reads, a page in a browser, live charts; beside TensorBoard.

    uv run python -m benchmarks dashboard --figures docs/dashboard-figures.md
    uv run python -m benchmarks dashboard --quick --points 1_000_000

A dashboard runs in its own process on loopback, and chromium in its own. Twenty runs with ten metrics are sent to it by
four connections while a reader asks for charts. Then a browser loads it: cold is the first navigation of a new process,
warm the second one. A blank page and TensorBoard, which has the same number of points, take turns with it.
"""

import contextlib
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import dashboard_load as load
from benchmarks.dashboard_browser import (
    TENSORBOARD_CHART,
    Browser,
    Load,
    OpenBrowser,
    Relay,
    blank_page,
    chromium,
    write_tensorboard_run,
)
from benchmarks.dashboard_live import follow, quantile
from evsys_bus.bench.report import describe_machine, format_value
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult, spread_of

QUICK_POINTS: Final = 1_000_000
POINTS: Final = 10_000_000
CHARTS: Final = [f"train/metric_{index}" for index in range(8)]
BLANK: Final = "a blank page"
HOME: Final = "the dashboard's home page"
OURS: Final = "the dashboard's page of an experiment"
TENSORBOARD: Final = "TensorBoard"
_CONNECTIONS: Final = 4
_QUICK_ROUNDS: Final = 15
_PAGE_ROWS: Final = 50
_HAS_ROWS: Final = "document.querySelector('tbody tr')"
_NS: Final = 1_000_000
"""Nanoseconds of a millisecond."""

_IDLE_SECONDS: Final = 60
"""Longer than pings and refreshes are apart; in a few seconds there would be none."""


class _Plan(NamedTuple):
    """How much is measured."""

    points: int
    loads: int
    """Of each page, in a new browser each."""
    reads: int
    live_seconds: float
    catch_up_points: int
    predictions: int
    screens: int
    """Of the page with 1,000 metrics."""

    @property
    def steps(self) -> int:
        return self.points // (load.RUNS * load.METRICS)


class DashboardSuite:
    """The suite ``dashboard``.

    Attributes:
        points: Number of points; None for ten million, or one million with ``--quick``.
        figures: A Markdown file to write; None for none.
    """

    name = "dashboard"
    promise = "The dashboard takes events as fast as they come, and shows ten million points without waiting"

    def __init__(self) -> None:
        self.points: int | None = None
        self.figures: Path | None = None

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure one part after another."""
        if budget.rounds <= _QUICK_ROUNDS:
            plan = _Plan(self.points or QUICK_POINTS, 2, 3, 3, 150_000, 100_000, 8)
        else:
            plan = _Plan(self.points or POINTS, 9, 15, 15, 1_000_000, 1_000_000, 80)
        before = os.getloadavg()[0]
        tables: list[Table] = []
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for table in _measure(Path(folder), plan):
                tables.append(table)
                yield table
        if self.figures is not None:
            self.figures.write_text(_as_markdown(tables, plan, before), encoding="utf-8")


def _measure(folder: Path, plan: _Plan) -> Iterator[Table]:
    database = folder / "dashboard.sqlite"
    yield from _measure_ingest(database, plan)
    yield _measure_predictions(folder / "predictions.sqlite", plan)
    with load.server(database) as server:
        with contextlib.closing(load.Client(server.url)) as client:
            yield _measure_reads(client, plan)
            load.send_all(server.url, list(load.bodies(load.MANY, 64, runs=2, metrics=1_000)), 2)
        try:
            with chromium() as (playwright, executable):
                yield from _measure_pages(
                    server.url, folder, plan, lambda *args: Browser(playwright, executable, *args)
                )
        except ImportError as error:
            yield Table(title="in a browser", unit="ns", rows=[], absent={OURS: str(error)})


def _measure_ingest(database: Path, plan: _Plan) -> Iterator[Table]:
    bodies = list(load.bodies(load.LARGE, plan.steps))
    points = sum(body.points for body in bodies)
    starts, rest = bodies[: load.RUNS], bodies[load.RUNS :]
    with load.server(database) as server:
        load.send_all(server.url, starts, 1)
        with _reader(server.url) as times:
            seconds = load.send_all(server.url, rest, _CONNECTIONS)
        written = server.bytes_written() / points
    size = sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*")) / points
    rate = points / seconds
    yield Table(
        title=f"ingest of {points:,} points by {_CONNECTIONS} connections, with a reader",
        unit="points/s",
        rows=[_row("the dashboard", rate)],
        target_results=[TargetResult("ingest of at least 80,000 points/s", rate, rate >= 80_000, "points/s")],  # noqa: PLR2004
    )
    yield _table("eight charts are read meanwhile", {"band of each arm": times})
    yield Table(
        title="disk",
        unit="bytes/point",
        rows=[_row("size", size), _row("written", written)],
        target_results=[TargetResult("at most 12 bytes/point on disk", size, size <= 12, "bytes/point")],  # noqa: PLR2004
    )


@contextlib.contextmanager
def _reader(url: str) -> Iterator[list[float]]:
    """Read eight charts five times a second; yields the milliseconds of each time."""
    times: list[float] = []
    is_over = threading.Event()

    def read() -> None:
        with contextlib.closing(load.Client(url)) as client:
            experiment = client.experiment(load.LARGE)
            while not is_over.wait(0.2) or len(times) < 2:  # noqa: PLR2004 # a spread needs two
                times.append(_milliseconds(lambda: client.charts(experiment, CHARTS, "band")))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield times
    finally:
        is_over.set()
        thread.join()


def _measure_reads(client: load.Client, plan: _Plan) -> Table:
    experiment = client.experiment(load.LARGE)
    reads: dict[str, Callable[[], object]] = {
        "a chart, band of each arm": lambda: client.charts(experiment, CHARTS[:1], "band"),
        f"a chart, {load.RUNS} lines": lambda: client.charts(experiment, CHARTS[:1], "members"),
        "eight charts, band of each arm": lambda: client.charts(experiment, CHARTS, "band"),
        f"eight charts, {load.RUNS} lines": lambda: client.charts(experiment, CHARTS, "members"),
        "the home page's JSON": lambda: client.request("/api/home"),
        "the experiment's JSON": lambda: client.request(f"/api/experiments/{experiment}"),
    }
    return _table(
        f"a read over HTTP: {load.RUNS} runs of {plan.steps:,} steps",
        {name: [_milliseconds(read) for _ in range(plan.reads)] for name, read in reads.items()},
    )


def _measure_predictions(database: Path, plan: _Plan) -> Table:
    from evsys_adapters.dashboard.store import Store

    evals = 20
    store = Store.open(database)
    for sequence, payloads in enumerate(load.evals(evals, plan.predictions // evals)):
        store.ingest("r0-predictions", sequence, payloads)
    [(run,)] = store.database.query("SELECT id FROM run")
    found = store.catalogue.evals.of_run(run)
    rng = random.Random(1)  # noqa: S311 # pages to look at
    size = plan.predictions // evals
    pages: dict[str, Callable[[], object]] = {
        "any page": lambda: store.catalogue.evals.predictions(
            (chosen := rng.choice(found)).id, (chosen.id << 24) + rng.randrange(size), _PAGE_ROWS
        ),
        "any page of those that are right here and wrong there": lambda: store.catalogue.evals.predictions(
            (chosen := rng.choice(found)).id,
            (chosen.id << 24) + rng.randrange(size),
            _PAGE_ROWS,
            {"min_reward": 0.5, "worse_in": rng.choice(found).id},
        ),
        "a page by a text that no row has": lambda: store.catalogue.evals.predictions(
            rng.choice(found).id, None, _PAGE_ROWS, {"text": "nowhere"}
        ),
    }
    times = {name: [_milliseconds(read) for _ in range(3 * plan.reads)] for name, read in pages.items()}
    store.close()
    worst = max(times["any page"])
    return _table(
        f"{_PAGE_ROWS} of {plan.predictions:,} predictions, from the store",
        times,
        [_below(f"any page of {plan.predictions:,} predictions", worst, 100)],
    )


def _measure_pages(url: str, folder: Path, plan: _Plan, open_browser: OpenBrowser) -> Iterator[Table]:
    with contextlib.closing(load.Client(url)) as client:
        large, many = client.experiment(load.LARGE), client.experiment(load.MANY)
    token = f"#token={load.TOKEN}"
    with blank_page() as blank, _tensorboard(folder / "tensorboard", plan) as tensorboard:
        pages = {
            BLANK: (blank, "performance.getEntriesByName('first-contentful-paint').length > 0"),
            HOME: (f"{url}/{token}", _HAS_ROWS),
            OURS: (f"{url}/e/{large}{token}", "bench.drawn.length > 0"),
        }
        absent: dict[str, str] = {}
        if isinstance(tensorboard, str):
            pages[TENSORBOARD] = (tensorboard, TENSORBOARD_CHART)
        else:
            absent = {TENSORBOARD: str(tensorboard)}
        yield from _measure_loads(pages, absent, plan, open_browser)
    with open_browser() as browser:
        yield _measure_drawing(browser, f"{url}/e/{large}/metrics", token, plan)
        yield from _measure_many(browser, f"{url}/e/{many}/metrics{token}", plan)
    yield _measure_idle(url, large, token, open_browser)
    yield from _measure_live(url, token, plan, open_browser)


def _measure_loads(
    pages: Mapping[str, tuple[str, str]],
    absent: dict[str, str],
    plan: _Plan,
    open_browser: OpenBrowser,
) -> Iterator[Table]:
    loads: dict[str, dict[str, list[Load]]] = {kind: {name: [] for name in pages} for kind in ("cold", "warm")}
    for turn in range(plan.loads):
        names = list(pages)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            address, condition = pages[name]
            with open_browser(condition) as browser:
                settle = 0.5 if turn == 0 else 0.0
                loads["cold"][name].append(browser.load(address, settle_seconds=settle))
                loads["warm"][name].append(browser.load(address))
    for kind, paint, chart in (("cold", 500, 800), ("warm", 200, 400)):
        found = loads[kind]
        paints = {name: [each.paint for each in some] for name, some in found.items()}
        charts = {name: [each.chart for each in some] for name, some in found.items() if name != HOME}
        yield _table(
            f"first paint, {kind}",
            paints,
            [_below(f"first paint of {name}, {kind}", _median(paints[name]), paint) for name in (HOME, OURS)],
            absent=absent,
        )
        yield _table(
            f"first chart, {kind}",
            charts,
            [_below(f"first chart, {kind}", _median(charts[OURS]), chart), *_beside(charts, kind)],
            absent=absent,
        )
    first = {name: found[0].requests for name, found in loads["cold"].items() if name != BLANK}
    sizes = {name: sum(size for _, size in requests) / 1_000 for name, requests in first.items()}
    ours = first[OURS]
    foreign = len({host for name in (HOME, OURS) for host, _ in first[name]}) - 1
    yield Table(
        title="fetched for the first view",
        unit="kB",
        rows=[_row(f"{name}, {len(first[name])} requests", size) for name, size in sizes.items()],
        target_results=[
            TargetResult("first view of at most 150 kB", sizes[OURS], sizes[OURS] <= 150, "kB"),  # noqa: PLR2004
            TargetResult("first view in at most 12 requests", len(ours), len(ours) <= 12, "requests"),  # noqa: PLR2004
            TargetResult("no request to another host", foreign, foreign == 0, "hosts"),
        ],
        absent=absent,
    )


def _beside(charts: Mapping[str, Sequence[float]], kind: str) -> list[TargetResult]:
    if TENSORBOARD not in charts:
        return []
    shares = [ours / theirs for ours, theirs in zip(charts[OURS], charts[TENSORBOARD], strict=True)]
    share = _median(shares)
    return [TargetResult(f"first chart, {kind}: sooner than {TENSORBOARD}'s", share, share < 1)]


def _measure_drawing(browser: Browser, page: str, token: str, plan: _Plan) -> Table:
    """Press ``m``, and measure until all charts of the view are drawn with what the server answers."""
    times: dict[str, list[float]] = {}
    for count, metrics in ((1, "metric_0$"), (8, "metric_[0-7]$")):
        browser.load(f"{page}?q={metrics}{token}")
        browser.until(f"document.querySelectorAll('.card canvas').length == {count}")
        for lines in ("members", "both", "band") * (1 + plan.reads // 3):
            name = f"{'a chart' if count == 1 else 'eight charts'}, {lines}"
            times.setdefault(name, []).append(browser.drawn_after_key("m", count))
    return _table(
        f"{load.RUNS} runs of {plan.steps:,} steps, from the key to the drawn chart",
        times,
        [
            _below(f"{load.RUNS} runs of {plan.steps:,} steps drawn", _median(times["a chart, members"]), 300),
            _below("eight charts drawn", _median(times["eight charts, members"]), 700),
        ],
    )


def _measure_many(browser: Browser, page: str, plan: _Plan) -> Iterator[Table]:
    opened = [browser.load(page).chart for _ in range(max(2, plan.loads // 3))]
    filtered: list[float] = []
    for number in (777, 123, 456):
        browser.page.fill("input[type=search]", f"c_{number}$")
        drawn = f"bench.drawn.find(([name, , stroke]) => name == 'train/metric_{number}' && stroke > bench.input)"
        browser.until(drawn)
        filtered.append(browser.page.evaluate(f"{drawn}[1] - bench.input"))
    browser.page.fill("input[type=search]", "")
    mounted = 0
    for _ in range(plan.screens):
        browser.page.mouse.wheel(0, 800)
        browser.page.wait_for_timeout(100)
        mounted = max(mounted, browser.page.evaluate("document.querySelectorAll('canvas').length"))
    yield _table(
        "an experiment with 1,000 metrics",
        {"its page, to the first chart": opened, "its filter, from the input to the chart": filtered},
        [
            _below("1,000 metrics are there", _median(opened), 1_000),
            _below("1,000 metrics are filtered", _median(filtered), 1_000),
        ],
    )
    yield Table(
        title="canvases while 1,000 metrics are scrolled through",
        unit="canvases",
        rows=[_row("the largest number at once", mounted)],
        target_results=[TargetResult("fewer than 30 canvases of 1,000 metrics", mounted, mounted < 30, "canvases")],  # noqa: PLR2004
    )


def _measure_idle(url: str, experiment: str, token: str, open_browser: OpenBrowser) -> Table:
    with Relay(url) as home, Relay(url) as page, open_browser() as ours, open_browser(_HAS_ROWS) as list_of_all:
        list_of_all.load(f"{home.url}/{token}")
        ours.load(f"{page.url}/e/{experiment}{token}", settle_seconds=1)
        before = home.bytes, page.bytes
        ours.page.wait_for_timeout(1_000 * _IDLE_SECONDS)
        per_minute = 60 / _IDLE_SECONDS / 1_000
        found = {HOME: (home.bytes - before[0]) * per_minute, OURS: (page.bytes - before[1]) * per_minute}
    return Table(
        title=f"bytes on the wire while nothing happens, over {_IDLE_SECONDS} s",
        unit="kB/min",
        rows=[_row(name, value) for name, value in found.items()],
        target_results=[
            TargetResult(f"{name} at rest for {_IDLE_SECONDS} s: less than 2 kB/min", value, value < 2, "kB/min")  # noqa: PLR2004
            for name, value in found.items()
        ],
    )


def _measure_live(url: str, token: str, plan: _Plan, open_browser: OpenBrowser) -> Iterator[Table]:
    with open_browser() as browser:
        published = follow(browser, url, token, "published", plan.live_seconds, 0)
    with open_browser() as browser:
        posted = follow(browser, url, token, "posted", plan.live_seconds, plan.catch_up_points)
    rows: list[Row] = []
    targets: list[TargetResult] = []
    for name, found in (
        ("published on a bus", published.alone),
        ("posted", posted.alone),
        ("posted while another client catches up", posted.beside),
    ):
        for what, times in (("drawn", found.drawn), ("received", found.received)):
            rows += [Row(f"{name}: {what}, p{p}", _spread([quantile(times, p / 100)] * 2), ours=True) for p in (50, 95)]
        targets += [
            _below(f"live latency, {name}, p95", quantile(found.drawn, 0.95), 300),
            TargetResult(f"live, {name}: no step is missing", found.missing, found.missing == 0, "steps"),
        ]
    rate = 1 / load.STEP_SECONDS
    yield Table(
        title=f"from a step of {load.RUNS} runs x {rate:g}/s x {load.LIVE_METRICS} metrics to its point in the page",
        unit="ns",
        rows=rows,
        target_results=targets,
    )
    yield Table(
        title="ingest of the client that catches up",
        unit="points/s",
        rows=[_row("beside twenty live runs", posted.points_per_second)],
    )


@contextlib.contextmanager
def _tensorboard(folder: Path, plan: _Plan) -> Iterator[str | ImportError]:
    """Run TensorBoard on as many points, and wait until it has read them; yields its URL, or why there is none."""
    try:
        import tensorboard

        write_tensorboard_run(folder, plan.steps, load.METRICS, load.RUNS)
    except ImportError as error:
        yield error
        return
    del tensorboard
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 # ours
    url = f"http://127.0.0.1:{port}"
    last = {"run": f"run-{load.RUNS - 1:02}", "tag": f"train/metric_{load.METRICS - 1}"}
    try:
        deadline = time.monotonic() + 300
        steps: list[Any] = [[0, 0, 0]]
        while steps[-1][1] < plan.steps - 1 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError, ValueError):
                query = f"run={last['run']}&tag={last['tag']}"
                with urllib.request.urlopen(f"{url}/data/plugin/scalars/scalars?{query}") as response:  # noqa: S310 # ours
                    steps = json.load(response)
        yield f"{url}/#timeseries"
    finally:
        process.terminate()
        process.wait()


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1_000 * (time.perf_counter() - began)


def _median(values: Sequence[float]) -> float:
    return spread_of(list(values) * 2).median if values else float("nan")


def _spread(milliseconds: Sequence[float]) -> Spread:
    return spread_of([_NS * each for each in milliseconds])


def _row(name: str, value: float) -> Row:
    return Row(name, Spread(value, value, value), ours=not name.startswith(TENSORBOARD))


def _below(what: str, milliseconds: float, target: float) -> TargetResult:
    return TargetResult(f"{what}: under {target:,} ms", milliseconds, milliseconds < target, "ms")


def _table(
    title: str,
    times: Mapping[str, Sequence[float]],
    target_results: Sequence[TargetResult] = (),
    absent: dict[str, str] | None = None,
) -> Table:
    """Return a table of milliseconds; beside a blank page, if there is one."""
    rows = [
        Row(
            name,
            _spread(each),
            spread_of([a / b for a, b in zip(each, times[BLANK], strict=True)]) if name != BLANK in times else None,
            ours=name not in {BLANK, TENSORBOARD},
        )
        for name, each in times.items()
    ]
    return Table(title, "ns", rows, BLANK if BLANK in times else None, list(target_results), absent or {})


_BUSY: Final = (
    ", so\n  other programs took most of the processor, and these times are longer than on a machine at rest."
)


def _as_markdown(tables: Sequence[Table], plan: _Plan, load_before: float) -> str:
    machine = describe_machine()
    lines = [
        "# Figures of the dashboard",
        "",
        f"`uv run python -m benchmarks {shlex.join(sys.argv[1:])}` wrote this page.",
        "The dashboard, its clients and chromium share a machine.",
        "",
        f"- {plan.points:,} points: {load.RUNS} runs of {plan.steps:,} steps with {load.METRICS} metrics each.",
        f"- {machine.cores} cores, {machine.platform}, Python {machine.python}. The machine's load before that was",
        f"  {load_before:.1f}" + (_BUSY if load_before > machine.cores else "."),
        f"- Cold: the first page of a new browser process; warm: its second. Medians of {plan.loads} processes. A",
        f"  multiple is that of a blank page in the same round. {TENSORBOARD} shows as many points, read before.",
        "- A chart is there at the frame after its drawing. Live: from when a step is due to the frame with its point,",
        f"  with {load.LIVE_METRICS} charts of {load.RUNS} lines open.",
        "",
        "| Promise | Measured | |",
        "|---|---:|---|",
    ]
    for each in (target for table in tables for target in table.target_results):
        measured = "" if each.measured is None else format_value(each.measured, each.unit)
        lines.append(f"| {each.promise} | {measured} | {'' if each.met else 'falls short'} |")
    lines += ["", "| What | Median | Quartiles | Multiple |", "|---|---:|---:|---:|"]
    for table in tables:
        lines.append(f"| **{table.title}** | | | |")
        for row in table.rows:
            low, median, high = (format_value(v, table.unit) for v in (row.value.low, row.value.median, row.value.high))
            quartiles = "" if low == high else f"{low} to {high}"
            ratio = "" if row.ratio is None else f"{row.ratio.median:.1f}"
            lines.append(f"| {row.candidate} | {median} | {quartiles} | {ratio} |")
        lines += [f"| {name} | | not measured: {reason} | |" for name, reason in table.absent.items()]
    return "\n".join([*lines, ""])
