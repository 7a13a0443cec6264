"""P7 for couriers: what a large backlog costs: memory of the program and the courier process, and time to read it.

A bus publishes ``STEPS_PER_ROUND`` steps per round (300,000 by default) to a sink that accepts none of them.
``--rounds 5000`` makes it 10,000,000 steps, which takes five minutes and 4 GB of the temporary directory.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from evsys_bus.bench.couriers import wait_for_their_end
from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.growth import MAX_GROWTH_MB, STEPS_PER_ROUND, resident_megabytes
from evsys_bus.bench.harness import Spread, spread_of
from evsys_bus.bench.question import Effort, Row, Table, Verdict
from evsys_bus.bus import EventBus
from evsys_bus.delivery.accounts import accounts
from evsys_bus.delivery.followed import Followed, Recipe
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus

MAX_HEALTH_MS: Final = 50.0
STATUS_MB_A_SECOND: Final = 200
"""Megabytes of journal per second: counting what is pending from disk alone reads all of it."""
_HEALTH_CALLS: Final = 20
_STATUS_CALLS: Final = 3
_PATIENCE_SECONDS: Final = 20.0


class TakesNothing(Sink):
    """A sink whose destination is never available."""

    name = "takes_nothing"

    async def write(self, batch: Sequence[Envelope]) -> None:
        """Raise `RetryLaterError`."""
        del batch
        raise RetryLaterError("the destination is not available")


_FOLLOWED: Final = Followed("behind", Recipe("takes_nothing", {}, (f"{__name__}:{TakesNothing.__qualname__}",)))


class Lag:
    """The suite ``lag``."""

    name = "lag"
    promise = "P7: a destination that accepts nothing costs no memory, however much is pending; its lag is read fast"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure the memory, then the times."""
        steps = effort.rounds * STEPS_PER_ROUND
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory, "journal")
            with EventBus([_FOLLOWED], journal=journal, linger_seconds=0.0, drain_timeout=0.0) as bus:
                _publish(bus, 0, STEPS_PER_ROUND)
                courier = _courier_of(journal)
                before = resident_megabytes(), resident_megabytes(courier)
                began = time.perf_counter()
                for first in range(STEPS_PER_ROUND, steps, STEPS_PER_ROUND):
                    _publish(bus, first, STEPS_PER_ROUND)
                rate = (steps - STEPS_PER_ROUND) / (time.perf_counter() - began)
                after = resident_megabytes(), resident_megabytes(courier)
                health = [_milliseconds(bus.health) for _ in range(_HEALTH_CALLS)]
                status = [_milliseconds(lambda: _pending(journal, steps)) for _ in range(_STATUS_CALLS)]
                asked = resident_megabytes()
                megabytes = sum(path.stat().st_size for path in journal.glob("*/*.seg")) / 1e6
            wait_for_their_end(journal)
        yield _memory(steps, rate, {"program": (before[0], after[0]), "courier process": (before[1], after[1])})
        yield _memory(steps, rate, {"who asks for the status": (after[0], asked)}, what="asking")
        yield _times(steps, megabytes, spread_of(health), spread_of(status))


def _memory(
    steps: int, rate: float, held: dict[str, tuple[float | None, float | None]], what: str = "publishing"
) -> Table:
    rows: list[Row] = []
    verdicts: list[Verdict] = []
    for name, (before, after) in held.items():
        if before is None or after is None:
            continue
        grown = round(after - before, 1)
        rows.append(Row(name, Spread(grown, grown, grown), ours=True))
        promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of the {name}"
        verdicts.append(Verdict(promise, grown, grown <= MAX_GROWTH_MB, "MB"))
    title = f"memory that they have grown by, {what} ({rate:,.0f} events/s)"
    return Table(title=title, unit="MB", rows=rows, verdicts=verdicts)


def _times(steps: int, megabytes: float, health: Spread, status: Spread) -> Table:
    rate = megabytes / status.median * 1e3
    return Table(
        title=f"how long it takes to read that {steps:,} events ({megabytes:,.0f} MB) are pending",
        unit="ms",
        rows=[Row("health()", health, ours=True), Row("status, from disk alone", status, ours=True)],
        verdicts=[
            Verdict(f"health() within {MAX_HEALTH_MS:g} ms", health.median, health.median <= MAX_HEALTH_MS, "ms"),
            Verdict(f"status reads {STATUS_MB_A_SECOND} MB/s at least", rate, rate >= STATUS_MB_A_SECOND, "MB/s"),
        ],
    )


def _publish(bus: EventBus, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        bus.publish(StepEnd(STATE, step, BATCH, METRICS))


def _courier_of(journal: Path) -> int:
    """Return the pid of the courier process, once it has tried to deliver."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        for each in accounts(journal):
            if each.state == "retrying":
                return each.pid
        time.sleep(0.05)
    raise RuntimeError("the courier process has not started to deliver")


def _pending(journal: Path, steps: int) -> list[DeliveryStatus]:
    found = accounts(journal)
    if [each.pending for each in found] != [steps]:
        raise RuntimeError(f"{found} of {steps:,} events")
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


LAG: Final = Lag()
