"""P4: what a training loop notices of couriers that compute, stall and hang: its steps' time, and how late it wakes.

A loop of steps that wait (as for a remote backend) or compute publishes each of them, without adapters, and with
followed ones that are as bad as any. Blocks of both take turns; a block without adapters is measured twice in each
round, to know how far two equal runs lie apart. Trainer and couriers are pinned to cores of their own where there are
two, as they are on a training node: a thread of the trainer that waits for a core beside a courier that computes would
keep the interpreter from the loop meanwhile.
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
"""How many steps of each length, in seconds, a block has."""
MEDIAN_WITHIN: Final = 1.01
P99_WITHIN: Final = 1.03
LATE_WITHIN_NS: Final = 500_000
"""In thread mode, at p99."""
ALONE: Final = "no adapters"
ALIKE: Final = "no adapters, again"
PROCESS: Final = "adapters in the courier process"
THREAD: Final = "adapters on threads"
_BAD: Final = ("bench_computes", "bench_stalls", "bench_hangs")
_ON_THREADS: Final = ("bench_notes", "bench_stalls", "bench_hangs")
"""What a hook itself computes cannot be cut into slices: such a one belongs in the process."""
_DELIVERS: Final = ("bench_computes", "bench_notes", "bench_stalls")
_PATIENCE_SECONDS: Final = 60.0
_MOST_ROUNDS: Final = 12


class Block(NamedTuple):
    """The steps of one contender in one round, in seconds; both in order of size."""

    steps: list[float]
    late: list[float]
    """How much later than it should it went on after a wait."""


class Lateness:
    """The question."""

    name = "lateness"
    promise = "P4: whatever the couriers go through, the training loop's steps take as long as without them"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """A table for each kind and length of step."""
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
    """The median step of all rounds, to the p99."""
    steps = sorted(chain.from_iterable(each.steps for each in blocks))
    median, most = statistics.median(steps) * 1e9, p99(steps) * 1e9
    return Row(name, Spread(median, median, most), ours=ours)


def within(with_it: Sequence[Block], alone: Sequence[Block], alike: Sequence[Block], what: str) -> list[Verdict]:
    """Whether the steps are as long as without: within 1 % at the median and 3 % at p99, or as two equal runs are.

    Args:
        with_it: A block for each round.
        alone: A run without, in the same rounds.
        alike: Another one.
        what: Begins the promise.
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
    """The value that one in a hundred exceeds."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def blocks(
    contenders: Mapping[str, Callable[[], AbstractContextManager[EventBus]]],
    kind: Kind,
    seconds: float,
    steps: int,
    rounds: int,
) -> dict[str, list[Block]]:
    """The blocks of each contender, one in each round; they take turns, and in each round another one begins."""
    found: dict[str, list[Block]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with contenders[name]() as bus:
                found[name].append(run_alone(lambda bus=bus: block(bus, kind, seconds, steps)))
    return found


async def block(bus: EventBus, kind: Kind, seconds: float, steps: int) -> Block:
    """So many steps of a training loop, each published."""
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
    """Until those that deliver anything have begun to: what is asked is how it is while they are busy."""
    bus.publish(StepEnd(STATE, 0, BATCH, METRICS))
    until = time.monotonic() + _PATIENCE_SECONDS
    while any(each.name in _DELIVERS and not each.delivered for each in bus.health().deliveries):
        if time.monotonic() > until:
            raise TimeoutError("the couriers do not begin to deliver")
        time.sleep(0.01)


@contextmanager
def apart() -> Generator[list[int], None, None]:
    """What is started here is on all cores but the first; gives all of them, and takes them back at the end."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pin(cores[1:])
    try:
        yield cores
    finally:
        pin(cores, threads=True)


def pin(cores: list[int], *, threads: bool = False) -> None:
    """The calling thread, and what it starts from here on; or all threads that there are."""
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
    importlib.import_module("evsys_bus.bench.busy")  # registers them
    return _bus(*build_callbacks([CallbackSpec(kind) for kind in kinds]), couriers=couriers)


LATENESS: Final = Lateness()
