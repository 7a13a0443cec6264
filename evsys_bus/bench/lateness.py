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

from evsys_bus.bench.couriers import wait_for_their_end
from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.harness import Spread
from evsys_bus.bench.question import Effort, Row, Table, Verdict
from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback
from evsys_bus.delivery.followed import Followed
from evsys_bus.events import StepEnd
from evsys_bus.tasks import run_alone
from evsys_bus.tasks.loops import LOOP_NAME
from evsys_bus.wiring import CallbackSpec, build_callbacks

Kind = Literal["waits", "computes"]

STEPS: Final[dict[float, int]] = {0.002: 400, 0.02: 80, 0.2: 8}
"""Number of steps in a block, by their length in seconds."""
MEDIAN_WITHIN: Final = 1.01
P99_WITHIN: Final = 1.03
LATE_WITHIN_NS: Final = 500_000
"""Bound on the extra wake-up delay with courier threads, at p99."""
ALONE: Final = "no adapters"
ALIKE: Final = "no adapters, again"
PROCESS: Final = "adapters in the courier process"
THREAD: Final = "adapters on threads"
_BAD: Final = ("bench_computes", "bench_stalls", "bench_hangs")
_ON_THREADS: Final = ("bench_notes", "bench_stalls", "bench_hangs")
"""Without `Computes`: a hook that computes cannot be interrupted, so it belongs in the courier process."""
_DELIVERS: Final = ("bench_computes", "bench_notes", "bench_stalls")
_PATIENCE_SECONDS: Final = 60.0
_MOST_ROUNDS: Final = 12


class Block(NamedTuple):
    """The steps of one candidate in one round, in seconds; both lists are sorted."""

    steps: list[float]
    late: list[float]
    """How much later than requested each sleep returned."""


class Lateness:
    """The suite ``lateness``."""

    name = "lateness"
    promise = "P4: whatever the couriers go through, the training loop's steps take as long as without them"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure each kind and length of step."""
        rounds = min(max(effort.process_rounds, 2), _MOST_ROUNDS)
        kinds: tuple[Kind, ...] = ("waits", "computes")
        for kind in kinds:
            for seconds, steps in STEPS.items():
                yield _table(kind, seconds, steps, rounds)


def _table(kind: Kind, seconds: float, steps: int, rounds: int) -> Table:
    contenders = {
        ALONE: _bus_alone,
        ALIKE: _bus_alone,
        PROCESS: partial(_bus_with, _BAD, "process"),
        THREAD: partial(_bus_with, _ON_THREADS, "thread"),
    }
    found = blocks(contenders, kind, seconds, steps, rounds)
    verdicts = within(found[PROCESS], found[ALONE], found[ALIKE], "with the courier process")
    if kind == "waits":
        late, alone = (p99(sorted(chain.from_iterable(each.late for each in found[name]))) for name in (THREAD, ALONE))
        extra = max(0.0, late - alone) * 1e9
        promise = "couriers on threads make it wake at most 500 µs later at p99"
        verdicts.append(Verdict(promise, extra / 1e3, extra <= LATE_WITHIN_NS, "µs"))
    return Table(
        title=f"steps of {seconds * 1e3:g} ms that {kind.removesuffix('s')}: median, to p99",
        unit="ns",
        rows=[row(name, each, ours=name in {PROCESS, THREAD}) for name, each in found.items()],
        verdicts=verdicts,
    )


def row(name: str, blocks: Sequence[Block], *, ours: bool) -> Row:
    """Make the row of one candidate: the median step of all rounds, with the p99 as its upper end."""
    steps = sorted(chain.from_iterable(each.steps for each in blocks))
    median, most = statistics.median(steps) * 1e9, p99(steps) * 1e9
    return Row(name, Spread(median, median, most), ours=ours)


def within(with_it: Sequence[Block], alone: Sequence[Block], alike: Sequence[Block], what: str) -> list[Verdict]:
    """Check that steps take as long as without: within 1 % at the median and 3 % at p99, or as two equal runs differ.

    Args:
        with_it: The blocks to check, one per round.
        alone: Blocks without what is checked, of the same rounds.
        alike: A second set of blocks like ``alone``.
        what: The start of the promise.
    """
    verdicts: list[Verdict] = []
    for name, of, most in (("median", statistics.median, MEDIAN_WITHIN), ("p99", p99, P99_WITHIN)):
        rounds = [[of(each.steps) for each in turn] for turn in zip(with_it, alone, alike, strict=True)]
        spread = statistics.median(max(two) / min(two) for _, *two in rounds)
        measured = statistics.median(one / statistics.mean(two) for one, *two in rounds)
        bound = max(most, spread)
        promise = f"{what} the {name} is within {bound:.3f} x (two runs without: {spread:.3f} x)"
        verdicts.append(Verdict(promise, measured, measured <= bound))
    return verdicts


def p99(ordered: list[float]) -> float:
    """Return the 99th percentile of a sorted list."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def blocks(
    contenders: Mapping[str, Callable[[], AbstractContextManager[EventBus]]],
    kind: Kind,
    seconds: float,
    steps: int,
    rounds: int,
) -> dict[str, list[Block]]:
    """Measure one block per candidate and round; each round starts with a different candidate."""
    found: dict[str, list[Block]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with contenders[name]() as bus:
                found[name].append(run_alone(lambda bus=bus: block(bus, kind, seconds, steps)))
    return found


async def block(bus: EventBus, kind: Kind, seconds: float, steps: int) -> Block:
    """Run and publish ``steps`` steps of a training loop."""
    found = Block([], [])
    for step in range(steps):
        began = time.perf_counter()
        if kind == "waits":
            await asyncio.sleep(seconds)
            found.late.append(time.perf_counter() - began - seconds)
        else:
            while time.perf_counter() - began < seconds:
                sum(range(50))
            await asyncio.sleep(0)
        bus.publish(StepEnd(STATE, step, BATCH, METRICS))
        found.steps.append(time.perf_counter() - began)
    return Block(sorted(found.steps), sorted(found.late))


@contextmanager
def _bus(*adapters: Callback | Followed, couriers: Literal["process", "thread"]) -> Generator[EventBus, None, None]:
    with apart() as cores, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        journal = Path(folder, "journal")
        bus = EventBus(adapters, journal=journal, couriers=couriers, drain_timeout=0.0, linger_seconds=0.0)
        with bus:
            pin(cores[:1], threads=True)
            if couriers == "thread":
                for loop in [each for each in threading.enumerate() if each.name == LOOP_NAME]:
                    _pin(loop.native_id or 0, cores[1:])
            _wait_for_couriers(bus)
            yield bus
        wait_for_their_end(journal)


def _wait_for_couriers(bus: EventBus) -> None:
    """Wait until the adapters have started to deliver, so that the couriers are busy during the block."""
    bus.publish(StepEnd(STATE, 0, BATCH, METRICS))
    until = time.monotonic() + _PATIENCE_SECONDS
    while any(each.name in _DELIVERS and not each.delivered for each in bus.health().deliveries):
        if time.monotonic() > until:
            raise TimeoutError("the couriers do not start to deliver")
        time.sleep(0.01)


@contextmanager
def apart() -> Generator[list[int], None, None]:
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
        _pin(task, cores)


def _pin(task: int, cores: list[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(task, set(cores))


def _bus_alone() -> AbstractContextManager[EventBus]:
    return _bus(couriers="process")


def _bus_with(kinds: tuple[str, ...], couriers: Literal["process", "thread"]) -> AbstractContextManager[EventBus]:
    importlib.import_module("evsys_bus.bench.busy")  # registers the adapters
    return _bus(*build_callbacks([CallbackSpec(kind) for kind in kinds]), couriers=couriers)


LATENESS: Final = Lateness()
