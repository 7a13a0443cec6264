"""P4: how couriers that compute, stall and hang affect a training loop: its step times and its wake-up delays.

A loop of steps that wait (as for a remote backend) or compute publishes each step, without adapters and with badly
behaved ones in couriers. Blocks of both alternate. Each round measures two blocks without adapters, to know how much
two equal runs differ. Trainer and couriers are pinned to different cores where there are at least two, as on a training
node: otherwise a thread of the trainer could hold the interpreter lock while it waits for a core that a courier uses.
"""

import asyncio
import importlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final, Literal, NamedTuple

from evsys_bus.bench.couriers import wait_for_courier_exit
from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult, rotate
from evsys_bus.bus import EventBus
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.events import StepEnd
from evsys_bus.tasks import run_in_new_loop
from evsys_bus.tasks.loops import LOOP_NAME

StepKind = Literal["waits", "computes"]

STEPS: Final[dict[float, int]] = {0.002: 400, 0.02: 80, 0.2: 8}
"""Number of steps in a block, by their length in seconds."""
MAX_MEDIAN_RATIO: Final = 1.01
MAX_P99_RATIO: Final = 1.03
MAX_WAKEUP_DELAY_NS: Final = 500_000
"""Bound on the extra wake-up delay with courier threads, at p99."""
NO_ADAPTERS: Final = "no adapters"
NO_ADAPTERS_AGAIN: Final = "no adapters, again"
COURIER_PROCESS: Final = "adapters in the courier process"
COURIER_THREADS: Final = "adapters on threads"
_BAD_ADAPTERS: Final = ("bench_computes", "bench_stalls", "bench_hangs")
_THREAD_ADAPTERS: Final = ("bench_notes", "bench_stalls", "bench_hangs")
"""Without `ComputingCallback`: a hook that computes cannot be interrupted, so it belongs in the courier process."""
_DELIVERING_ADAPTERS: Final = ("bench_computes", "bench_notes", "bench_stalls")
_TIMEOUT_SECONDS: Final = 60.0
_MAX_ROUNDS: Final = 12


class Block(NamedTuple):
    """The steps of one candidate in one round, in seconds; both lists are sorted."""

    steps: list[float]
    wakeup_delays: list[float]
    """How much later than requested each sleep returned."""


class WakeupLatency:
    """The suite ``lateness``."""

    name = "lateness"
    promise = "whatever the couriers go through, the training loop's steps take as long as without them"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure each kind and length of step."""
        rounds = min(max(budget.process_rounds, 2), _MAX_ROUNDS)
        kinds: tuple[StepKind, ...] = ("waits", "computes")
        for kind in kinds:
            for seconds, steps in STEPS.items():
                yield _measure_table(kind, seconds, steps, rounds)


def _measure_table(kind: StepKind, seconds: float, steps: int, rounds: int) -> Table:
    candidates = {
        NO_ADAPTERS: partial(_open_bus, (), "process"),
        NO_ADAPTERS_AGAIN: partial(_open_bus, (), "process"),
        COURIER_PROCESS: partial(_open_bus, _BAD_ADAPTERS, "process"),
        COURIER_THREADS: partial(_open_bus, _THREAD_ADAPTERS, "thread"),
    }
    found = measure_blocks(candidates, kind, seconds, steps, rounds)
    target_results = compare_blocks(
        found[COURIER_PROCESS], found[NO_ADAPTERS], found[NO_ADAPTERS_AGAIN], "with the courier process"
    )
    if kind == "waits":
        delay, baseline_delay = (
            p99(sorted(chain.from_iterable(each.wakeup_delays for each in found[name])))
            for name in (COURIER_THREADS, NO_ADAPTERS)
        )
        extra = max(0.0, delay - baseline_delay) * 1e9
        promise = "couriers on threads make it wake at most 500 µs later at p99"
        target_results.append(TargetResult(promise, extra / 1e3, extra <= MAX_WAKEUP_DELAY_NS, "µs"))
    return Table(
        title=f"steps of {seconds * 1e3:g} ms that {kind.removesuffix('s')}: median, to p99",
        unit="ns",
        rows=[block_row(name, each, ours=name in {COURIER_PROCESS, COURIER_THREADS}) for name, each in found.items()],
        target_results=target_results,
    )


def block_row(name: str, blocks: Sequence[Block], *, ours: bool) -> Row:
    """Make the row of one candidate: the median step of all rounds, with the p99 as its upper end."""
    steps = sorted(chain.from_iterable(each.steps for each in blocks))
    median, high = statistics.median(steps) * 1e9, p99(steps) * 1e9
    return Row(name, Spread(median, median, high), ours=ours)


def compare_blocks(
    loaded: Sequence[Block], baseline: Sequence[Block], repeat: Sequence[Block], label: str
) -> list[TargetResult]:
    """Check that steps take as long as without: within 1 % at the median and 3 % at p99, or as two equal runs differ.

    Args:
        loaded: The blocks to check, one per round.
        baseline: Blocks without what is checked, of the same rounds.
        repeat: A second set of blocks like ``baseline``.
        label: The start of the promise.
    """
    target_results: list[TargetResult] = []
    for name, statistic, limit in (("median", statistics.median, MAX_MEDIAN_RATIO), ("p99", p99, MAX_P99_RATIO)):
        values = [[statistic(each.steps) for each in turn] for turn in zip(loaded, baseline, repeat, strict=True)]
        spread = statistics.median(max(baseline_values) / min(baseline_values) for _, *baseline_values in values)
        measured = statistics.median(
            loaded_value / statistics.mean(baseline_values) for loaded_value, *baseline_values in values
        )
        bound = max(limit, spread)
        promise = f"{label} the {name} is within {bound:.3f} x (two runs without: {spread:.3f} x)"
        target_results.append(TargetResult(promise, measured, measured <= bound))
    return target_results


def p99(ordered: list[float]) -> float:
    """Return the 99th percentile of a sorted list."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def measure_blocks(
    candidates: Mapping[str, Callable[[], AbstractContextManager[EventBus]]],
    kind: StepKind,
    seconds: float,
    steps: int,
    rounds: int,
) -> dict[str, list[Block]]:
    """Measure one block per candidate and round; each round starts with a different candidate."""
    found: dict[str, list[Block]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in rotate(candidates, turn):
            with candidates[name]() as bus:
                found[name].append(run_in_new_loop(lambda bus=bus: measure_block(bus, kind, seconds, steps)))
    return found


async def measure_block(bus: EventBus, kind: StepKind, seconds: float, steps: int) -> Block:
    """Run and publish ``steps`` steps of a training loop."""
    found = Block([], [])
    for step in range(steps):
        started = time.perf_counter()
        if kind == "waits":
            await asyncio.sleep(seconds)
            found.wakeup_delays.append(time.perf_counter() - started - seconds)
        else:
            while time.perf_counter() - started < seconds:
                sum(range(50))
            await asyncio.sleep(0)
        bus.publish(StepEnd(STATE, step, BATCH, METRICS))
        found.steps.append(time.perf_counter() - started)
    return Block(sorted(found.steps), sorted(found.wakeup_delays))


@contextmanager
def _open_bus(kinds: tuple[str, ...], couriers: Literal["process", "thread"]) -> Generator[EventBus, None, None]:
    importlib.import_module("evsys_bus.bench.bad_adapters")  # registers the adapters
    adapters = build_callbacks([CallbackSpec(kind) for kind in kinds])
    with other_cores() as cores, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        journal = Path(folder, "journal")
        bus = EventBus(adapters, journal=journal, couriers=couriers, drain_timeout=0.0, linger_seconds=0.0)
        with bus:
            pin(cores[:1], threads=True)
            if couriers == "thread":
                for loop in [each for each in threading.enumerate() if each.name == LOOP_NAME]:
                    _pin_thread(loop.native_id or 0, cores[1:])
            # Wait until the adapters have started to deliver, so that the couriers are busy during the block.
            bus.publish(StepEnd(STATE, 0, BATCH, METRICS))
            deadline = time.monotonic() + _TIMEOUT_SECONDS
            while any(each.name in _DELIVERING_ADAPTERS and not each.delivered for each in bus.health().deliveries):
                if time.monotonic() > deadline:
                    raise TimeoutError("the couriers do not start to deliver")
                time.sleep(0.01)
            yield bus
        wait_for_courier_exit(journal)


@contextmanager
def other_cores() -> Generator[list[int], None, None]:
    """Pin what is started in this block to all cores but the first; yields all cores and restores them at the end."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pin(cores[1:])
    try:
        yield cores
    finally:
        pin(cores, threads=True)


def pin(cores: list[int], *, threads: bool = False) -> None:
    """Pin the calling thread, and what it starts from now on, to these cores; or all threads of the process."""
    tasks = Path("/proc/self/task")
    for task in [int(each.name) for each in tasks.iterdir()] if threads and tasks.exists() else [0]:
        _pin_thread(task, cores)


def _pin_thread(task: int, cores: list[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(task, set(cores))


WAKEUP_LATENCY: Final = WakeupLatency()
