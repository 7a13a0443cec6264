"""How long a step takes to its point in the page: of twenty runs at once, and while another client catches up."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from benchmarks import dashboard_load as load
from benchmarks.dashboard_browser import Browser

_LEAD_SECONDS: Final = 5.0
"""Until the page shows the runs, and has done so for a while."""
_SETTLE_SECONDS: Final = 1.5
"""Until what has waited for the courier and the page to start is drawn."""


class Latencies(NamedTuple):
    """Of all points of a time, in milliseconds."""

    drawn: list[float]
    received: list[float]
    """By the page's socket, in the message with which the point was drawn."""
    missing: int
    """Points that were never drawn."""


class Followed(NamedTuple):
    """What was seen of live runs."""

    alone: Latencies
    beside: Latencies
    """While another client caught up."""
    points_per_second: float
    """Of that client."""


Drawing = tuple[str, float, float, dict[str, float]]
"""A metric, when it was drawn, when the last message before that was received, and the last step of each line."""


def follow(
    browser: Browser, url: str, token: str, mode: Literal["published", "posted"], seconds: float, catch_up_points: int
) -> Followed:
    """Show eight charts with a line for each of twenty runs, and note when their points are drawn.

    Args:
        browser: Shows them.
        url: The dashboard.
        token: The fragment with its token.
        mode: Whether the runs are those of a bus, or are posted as `evsys_logger` does.
        seconds: How long they are alone; then a client catches up for about as long.
        catch_up_points: Points of that client; 0 for none.
    """
    began, points_per_second = [0.0, float("inf"), float("inf")], 0.0
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(load.Client(url)))
        other: subprocess.Popen[str] | None = None
        if catch_up_points:
            other = stack.enter_context(load.process("catch-up", url, str(catch_up_points), f"beside-{mode}"))
            load.read_line(other)
        duration = _LEAD_SECONDS + (2 if other else 1) * seconds
        feed = stack.enter_context(load.process("post" if mode == "posted" else "publish", url, str(duration), mode))
        browser.load(f"{url}/e/{_experiment_of(client, mode, feed)}/metrics?lines=members{token}")
        browser.until(f"document.querySelectorAll('.card canvas').length == {load.LIVE_METRICS}")
        browser.page.evaluate("void (bench.isLive = true)")
        browser.page.wait_for_timeout(1_000 * _SETTLE_SECONDS)
        began[0] = time.time()
        if other is not None:
            browser.page.wait_for_timeout(1_000 * seconds)
            assert other.stdin is not None
            other.stdin.write("go\n")
            other.stdin.flush()
            caught = json.loads(_line_while(browser, other))
            points_per_second = caught["points"] / caught["seconds"]
            began[1:] = [caught["began"], caught["began"] + caught["seconds"]]
        published: dict[str, list[float]] = json.loads(_line_while(browser, feed))
        last, lines = len(next(iter(published.values()))) - 1, load.RUNS * load.LIVE_METRICS
        with contextlib.suppress(TimeoutError):  # the rest counts as missing
            browser.until(f"Object.values(bench.reached).filter((step) => step >= {last}).length == {lines}", 15)
        seen: list[Drawing] = browser.page.evaluate("bench.live")
    alone, beside = (_latencies(seen, published, *began[i : i + 2]) for i in range(2))
    return Followed(alone, beside, points_per_second)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed; NaN of none."""
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


def _latencies(seen: Sequence[Drawing], published: dict[str, list[float]], begin: float, end: float) -> Latencies:
    found = Latencies([], [], 0)
    missing = 0
    for metric in (f"train/metric_{number}" for number in range(load.LIVE_METRICS)):
        drawings = [each for each in seen if each[0] == metric]
        for line, times in published.items():
            rest = iter([(drawn, received, last[line]) for _, drawn, received, last in drawings if line in last])
            drawing = next(rest, None)
            for step, at in enumerate(times):
                while drawing is not None and drawing[2] < step:
                    drawing = next(rest, None)
                if not begin <= at < end:
                    continue
                if drawing is None:
                    missing += 1
                else:
                    found.drawn.append(1_000 * (drawing[0] - at))
                    found.received.append(1_000 * (drawing[1] - at))
    return found._replace(missing=missing)


def _line_while(browser: Browser, process: "subprocess.Popen[str]") -> str:
    """Return the next line of a process, while the browser works."""
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.append(load.read_line(process)), daemon=True)
    thread.start()
    while thread.is_alive():
        browser.page.wait_for_timeout(100)
    return lines[0]


def _experiment_of(client: load.Client, name: str, feed: "subprocess.Popen[str]") -> str:
    """Wait until an experiment and its metrics are there; return its ID."""
    while feed.poll() is None:
        with contextlib.suppress(StopIteration):
            found = client.experiment(name)
            page = json.loads(client.request(f"/api/experiments/{found}"))
            if len(page["metrics"]) == load.LIVE_METRICS and len(page["runs"]) == load.RUNS:
                return found
        time.sleep(0.1)
    raise RuntimeError(f"the feed ended with status {feed.returncode}")
