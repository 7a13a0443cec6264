"""What logging a step to EvSys costs the loop: `evsys_logger` with ``follow`` and ``inline``, and a blocking POST.

The server of the tests runs in its own process. A loop publishes a step every few milliseconds and waits in between;
the duration of `publish` is the cost for its caller. The blocking POST does what EvSys' own client does, one new
connection and one awaited request per step, but with the standard library, which is faster than `requests`. Blocks of
steps are interleaved, so that a slow phase of the machine affects all alike.
"""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from evsys_bus import Callback, EventBus, LogContext, LoopState, RunStart, StepEnd, TrainingBatch, build_callbacks
from evsys_bus.bench.suite import Budget, Row, Table, TargetResult, spread_of
from evsys_bus.bench.wakeup_latency import other_cores, pin

STEPS: Final = 200
"""Number of steps in a block."""
STEP_SECONDS: Final = 0.005
BLOCKING: Final = "a blocking POST in the hook"
RECORDED: Final = "the journal alone"
FOLLOWED: Final = "followed"
INLINE: Final = "placed inline"
MAX_SHARE: Final = 1 / 20
_MAX_ROUNDS: Final = 8
_METRICS: Final = {f"metric_{number}": number / 8 for number in range(8)}

BlockTimes = dict[str, list[list[float]]]
"""Nanoseconds of each step, by candidate and round."""


class BlockingPostCallback(Callback):
    """A callback that sends every step by a blocking POST."""

    def __init__(self, url: str, key: str) -> None:
        self._host = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._run = self._call("create_run", {"status": "running"})["id"]

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Send the row and wait for the response."""
        del state, batch
        self._call("log_metrics", {"run_id": self._run, "step": step_idx, "metrics": metrics, "split": "train"})

    def _call(self, op: str, args: dict[str, object]) -> dict[str, str]:
        connection = http.client.HTTPConnection(self._host)
        body = json.dumps({"op": op, "args": args})
        connection.request("POST", "/api/dashboard/api/sdk/data/", body, self._headers)
        result = json.loads(connection.getresponse().read())["result"]
        connection.close()
        return result or {}


class EvsysLoggerSuite:
    """The suite ``evsys``."""

    name = "evsys"
    promise = "A step that is logged to EvSys costs the loop a twentieth of a blocking POST at most"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the call, and how late the loop wakes up after its wait."""
        missing = [each for each in ("aiohttp", "starlette", "uvicorn") if not importlib.util.find_spec(each)]
        if missing:
            absent = {BLOCKING: f"{', '.join(missing)} is not installed"}
            yield Table(title="a step to EvSys", unit="ns", rows=[], absent=absent)
            return
        with _server() as (url, key), _environment(url, key):
            calls, wakeup_delays = asyncio.run(_measure(url, key, min(max(budget.process_rounds, 2), _MAX_ROUNDS)))
        for title, found, quantile in (
            ("a step's call, its median", calls, 0.5),
            ("a step's call, its 99th percentile", calls, 0.99),
            ("the loop's wake-up is late by, the median", wakeup_delays, 0.5),
            ("the loop's wake-up is late by, the 99th percentile", wakeup_delays, 0.99),
        ):
            medians = {
                name: [sorted(each)[int(len(each) * quantile)] for each in blocks] for name, blocks in found.items()
            }
            ratios = {
                name: [ours / theirs for ours, theirs in zip(each, medians[BLOCKING], strict=True)]
                for name, each in medians.items()
            }
            target_results = [
                TargetResult(f"{name}: at most {MAX_SHARE:g} of {BLOCKING}", share, share <= MAX_SHARE)
                for name in (FOLLOWED, INLINE)
                if (share := spread_of(ratios[name]).median) is not None and found is calls and quantile == 0.5  # noqa: PLR2004
            ]
            yield Table(
                title=title,
                unit="ns",
                rows=[
                    Row(
                        name,
                        spread_of(each),
                        None if name == BLOCKING else spread_of(ratios[name]),
                        ours=name != BLOCKING,
                    )
                    for name, each in medians.items()
                ],
                baseline=BLOCKING,
                target_results=target_results,
            )


async def _measure(url: str, key: str, rounds: int) -> tuple[BlockTimes, BlockTimes]:
    candidates: dict[str, Callable[[], list[object]]] = {
        BLOCKING: lambda: [BlockingPostCallback(url, key)],
        RECORDED: list,
        FOLLOWED: lambda: list(build_callbacks([{"kind": "evsys_logger"}])),
        INLINE: lambda: list(build_callbacks([{"kind": "evsys_logger", "placement": "inline"}])),
    }
    calls: BlockTimes = {name: [] for name in candidates}
    wakeup_delays: BlockTimes = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            async with _open_bus(candidates[name]()) as (bus, state):
                durations, delays = await _measure_steps(bus, state)
            calls[name].append(durations)
            wakeup_delays[name].append(delays)
    return calls, wakeup_delays


@asynccontextmanager
async def _open_bus(callbacks: list[object]) -> AsyncGenerator[tuple[EventBus, LoopState], None]:
    with other_cores() as cores, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ctx = LogContext(Path(folder), config={"name": "bench"}, run_key="run")
        async with EventBus(callbacks, journal=Path(folder, "journal")) as bus:
            bus.publish(RunStart(ctx))
            await asyncio.sleep(1.0)  # the couriers have started, on other cores than the loop
            pin(cores[:1], threads=True)
            yield bus, LoopState(0, STEPS, Path(folder, "run"), ctx=ctx)
        if any(not each.complete for each in bus.receipt.deliveries) if bus.receipt else True:
            raise RuntimeError(f"not all was delivered: {bus.receipt}")


async def _measure_steps(bus: EventBus, state: LoopState) -> tuple[list[float], list[float]]:
    durations: list[float] = []
    delays: list[float] = []
    batch = TrainingBatch()
    for step in range(STEPS):
        started = time.perf_counter_ns()
        bus.publish(StepEnd(state, step, batch, dict(_METRICS)))
        published_at = time.perf_counter_ns()
        await asyncio.sleep(STEP_SECONDS)
        durations.append(published_at - started)
        delays.append(max(0.0, time.perf_counter_ns() - published_at - STEP_SECONDS * 1e9))
    return durations, delays


@contextlib.contextmanager
def _server() -> Iterator[tuple[str, str]]:
    """Run the server of the tests in its own process; yields its URL and its key."""
    path = Path(__file__).parent.parent / "tests" / "support" / "evsys_server.py"
    with other_cores():
        process = subprocess.Popen([sys.executable, str(path), "0"], stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
    try:
        assert process.stdout is not None
        url, _, key = process.stdout.readline().strip().partition(", key ")
        yield url, key
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _environment(url: str, key: str) -> Iterator[None]:
    names = ("EVSYS_API_URL", "EVSYS_API_KEY", "EVSYS_OFFLINE", "EVSYS_PROJECT_ID")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {"EVSYS_API_URL": url, "EVSYS_API_KEY": key}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
