"""P6: how fast a courier catches up with a journal, and P7: how much memory that takes.

A courier reads a journal of ``STEPS_PER_ROUND`` steps per round (150,000 by default) and delivers to a receiver that
discards everything, so what is measured is reading, verifying, decoding and handing over. ``--rounds 5000`` makes it
10,000,000 steps.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.growth import resident_megabytes
from evsys_bus.bench.harness import Spread, spread_of
from evsys_bus.bench.question import Effort, Row, Table, Verdict
from evsys_bus.bus import EventBus
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.followed import Terms
from evsys_bus.delivery.receiver import Report, Taken
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.tasks import run_alone

STEPS_PER_ROUND: Final = 1_000
AT_LEAST: Final = 200_000
"""Events per second."""
MAX_GROWTH_MB: Final = 20
_MOST_TURNS: Final = 7
_LEAST_STEPS: Final = 50_000


class _Nothing:
    """A receiver that accepts every batch and discards it."""

    max_events = 512
    max_bytes = 1 << 20
    max_seconds = 0.0

    def __init__(self) -> None:
        self.taken = 0

    async def open(self, report: Report) -> None:
        pass

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        del sizes
        self.taken += len(batch)
        return Taken(len(batch))

    def interrupted(self) -> None:
        pass

    def introduce(self, starts: Sequence[Envelope]) -> None:
        pass

    def mark(self) -> Any:
        pass

    def rewind(self, mark: Any) -> None:
        pass

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        pass


class CatchingUp:
    """The suite ``couriers``."""

    name = "couriers"
    promise = "P6: a courier that is behind catches up at 200,000 events a second, in memory that does not grow"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure the rate, then the memory."""
        steps = max(effort.rounds * STEPS_PER_ROUND, _LEAST_STEPS)
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory, "journal")
            with EventBus([], journal=journal) as bus:
                for step in range(steps):
                    bus.publish(StepEnd(STATE, step, BATCH, METRICS))
            before = resident_megabytes()
            rates = [_rate(journal, steps) for _ in range(min(max(effort.process_rounds, 2), _MOST_TURNS))]
            after = resident_megabytes()
        rate = spread_of(rates)
        yield Table(
            title=f"{steps:,} events of 8 metrics, from disk to a receiver",
            unit="events/s",
            rows=[
                Row("courier", Spread(*(float(round(each)) for each in (rate.median, rate.low, rate.high))), ours=True)
            ],
            verdicts=[Verdict(f"at least {AT_LEAST:,} events/s", rate.median, rate.median >= AT_LEAST, "events/s")],
        )
        if before is not None and after is not None:
            grown = after - before
            promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of the courier's memory"
            yield Table(
                title="memory that the courier's process has grown by",
                unit="MB",
                rows=[Row("courier", Spread(grown, grown, grown), ours=True)],
                verdicts=[Verdict(promise, grown, grown <= MAX_GROWTH_MB, "MB")],
            )


def _rate(journal: Path, steps: int) -> float:
    receiver = _Nothing()
    courier = Courier(journal, "nothing", receiver, Terms(), keep=False)
    courier.finish()
    began = time.perf_counter()
    run_alone(courier.run)
    taken = time.perf_counter() - began
    if receiver.taken != steps:
        raise RuntimeError(f"the courier delivered {receiver.taken:,} of {steps:,} events")
    return steps / taken


CATCHING_UP: Final = CatchingUp()
