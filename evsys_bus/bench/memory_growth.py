"""P7: the cost of a publish and the memory of the process late in a long run, and the cost of a large backlog.

A bus that has published ``STEPS_PER_ROUND`` steps per round of samples (300,000 by default) is timed against a bus that
was just opened, in interleaved samples. ``--rounds 5000`` makes the run 10,000,000 steps long, which takes two minutes
and 4 GB of the temporary directory. Nothing reads the journal, so all these events are pending.

For couriers, a bus publishes as many steps to a sink that accepts none of them: memory of the program and of the
courier process, and the time to read the backlog. With ``--rounds 5000`` that takes five minutes.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from evsys_bus.bench.couriers import wait_for_courier_exit
from evsys_bus.bench.dispatch import publish_steps
from evsys_bus.bench.suite import (
    Budget,
    Candidate,
    Case,
    Row,
    Spread,
    Table,
    Target,
    TargetResult,
    TimedLoop,
    growth_table,
    measure,
    resident_megabytes,
    spread_of,
)
from evsys_bus.bus import EventBus
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import AdapterRef, Subscription
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus

STEPS_PER_ROUND: Final = 2_000
MAX_ROUNDS: Final = 150
"""Most rounds of samples; ``--rounds`` above this only makes the run longer."""
NEW_BUS: Final = "a bus at its first steps"


class MemoryGrowth:
    """The suite ``growth``."""

    name = "growth"
    promise = "the ten-millionth publish costs what the first one does, and memory stays flat"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the times, then the memory."""
        steps = budget.rounds * STEPS_PER_ROUND
        growth: list[float] = []
        old_bus = f"a bus after {steps:,} steps"
        case = Case(
            title=f"publish at step 1 and at step {steps:,}",
            candidates={
                NEW_BUS: Candidate(_fresh_bus, ours=True),
                old_bus: Candidate(partial(_long_running_bus, steps, growth), ours=True),
            },
            baseline=NEW_BUS,
            targets=(Target(candidate=old_bus, reference=NEW_BUS, at_most=1.1),),
        )
        yield measure(case, replace(budget, rounds=min(budget.rounds, MAX_ROUNDS)))
        if growth:
            yield growth_table("memory that the process has grown by", steps, {old_bus: ("memory", growth[0])})


@contextmanager
def _fresh_bus() -> Generator[TimedLoop, None, None]:
    """Time a new bus per sample, after its first step, which creates the journal."""

    def run(operations: int) -> int:
        with _open_bus() as bus:
            publish_steps(bus, 1)
            return publish_steps(bus, operations, 1)

    yield run


@contextmanager
def _long_running_bus(steps: int, growth: list[float]) -> Generator[TimedLoop, None, None]:
    """Time a bus that has published ``steps`` steps; appends the growth of memory in megabytes to ``growth``."""
    with _open_bus() as bus:
        publish_steps(bus, STEPS_PER_ROUND)
        before = resident_megabytes()
        for first in range(STEPS_PER_ROUND, steps, STEPS_PER_ROUND):
            publish_steps(bus, STEPS_PER_ROUND, first)
        after = resident_megabytes()
        if before is not None and after is not None:
            growth.append(after - before)

        def run(operations: int) -> int:
            nonlocal steps
            steps += operations
            return publish_steps(bus, operations, steps)

        yield run


@contextmanager
def _open_bus() -> Generator[EventBus, None, None]:
    with tempfile.TemporaryDirectory() as directory, EventBus([], journal=Path(directory, "journal")) as bus:
        yield bus


MEMORY_GROWTH: Final = MemoryGrowth()


MAX_HEALTH_MS: Final = 50.0
MIN_STATUS_MB_PER_SECOND: Final = 200
"""Megabytes of journal per second: counting what is pending from disk alone reads all of it."""
_HEALTH_CALLS: Final = 20
_STATUS_CALLS: Final = 3
_TIMEOUT_SECONDS: Final = 20.0


class UnavailableSink(Sink):
    """A sink whose destination is never available."""

    name = "takes_nothing"

    async def write(self, batch: Sequence[Envelope]) -> None:
        """Raise `RetryLaterError`."""
        del batch
        raise RetryLaterError("the destination is not available")


_SUBSCRIPTION: Final = Subscription(
    "behind", AdapterRef("takes_nothing", {}, (f"{__name__}:{UnavailableSink.__qualname__}",))
)


class BacklogMemory:
    """The suite ``lag``."""

    name = "lag"
    promise = "a destination that accepts nothing costs no memory, however much is pending; its lag is read fast"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the memory, then the times."""
        steps = budget.rounds * STEPS_PER_ROUND
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory, "journal")
            with EventBus([_SUBSCRIPTION], journal=journal, linger_seconds=0.0, drain_timeout=0.0) as bus:
                publish_steps(bus, STEPS_PER_ROUND)
                courier = _courier_pid(journal)
                before = resident_megabytes(), resident_megabytes(courier)
                started = time.perf_counter()
                for first in range(STEPS_PER_ROUND, steps, STEPS_PER_ROUND):
                    publish_steps(bus, STEPS_PER_ROUND, first)
                rate = (steps - STEPS_PER_ROUND) / (time.perf_counter() - started)
                after = resident_megabytes(), resident_megabytes(courier)
                health = [_time_ms(bus.health) for _ in range(_HEALTH_CALLS)]
                status = [_time_ms(lambda: _read_pending(journal, steps)) for _ in range(_STATUS_CALLS)]
                after_status = resident_megabytes()
                megabytes = sum(path.stat().st_size for path in journal.glob("*/*.seg")) / 1e6
            wait_for_courier_exit(journal)
        title = "memory that they have grown by"
        pairs = {"program": (before[0], after[0]), "courier process": (before[1], after[1])}
        yield growth_table(f"{title}, publishing ({rate:,.0f} events/s)", steps, _growths(pairs))
        pairs = {"who asks for the status": (after[0], after_status)}
        yield growth_table(f"{title}, asking ({rate:,.0f} events/s)", steps, _growths(pairs))
        yield _latency_table(steps, megabytes, spread_of(health), spread_of(status))


def _growths(resident: dict[str, tuple[float | None, float | None]]) -> dict[str, tuple[str, float]]:
    """Return the growth of each process whose resident megabytes before and after are known."""
    return {
        name: (f"the {name}", round(after - before, 1))
        for name, (before, after) in resident.items()
        if before is not None and after is not None
    }


def _latency_table(steps: int, megabytes: float, health: Spread, status: Spread) -> Table:
    rate = megabytes / status.median * 1e3
    return Table(
        title=f"how long it takes to read that {steps:,} events ({megabytes:,.0f} MB) are pending",
        unit="ms",
        rows=[Row("health()", health, ours=True), Row("status, from disk alone", status, ours=True)],
        target_results=[
            TargetResult(f"health() within {MAX_HEALTH_MS:g} ms", health.median, health.median <= MAX_HEALTH_MS, "ms"),
            TargetResult(
                f"status reads {MIN_STATUS_MB_PER_SECOND} MB/s at least", rate, rate >= MIN_STATUS_MB_PER_SECOND, "MB/s"
            ),
        ],
    )


def _courier_pid(journal: Path) -> int:
    """Return the pid of the courier process, once it has tried to deliver."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        for each in read_progress(journal):
            if each.state == "retrying":
                return each.pid
        time.sleep(0.05)
    raise RuntimeError("the courier process has not started to deliver")


def _read_pending(journal: Path, steps: int) -> list[DeliveryStatus]:
    found = read_progress(journal)
    if [each.pending for each in found] != [steps]:
        raise RuntimeError(f"{found} of {steps:,} events")
    return found


def _time_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


BACKLOG_MEMORY: Final = BacklogMemory()
