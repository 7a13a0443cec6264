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
from evsys_bus.bench.harness import Spread, spread_of
from evsys_bus.bench.memory_growth import resident_megabytes
from evsys_bus.bench.suite import Budget, Row, Table, TargetResult
from evsys_bus.bus import EventBus
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.receiver import ProblemHandler
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.sink import BatchResult
from evsys_bus.tasks import run_in_new_loop

STEPS_PER_ROUND: Final = 1_000
MIN_EVENTS_PER_SECOND: Final = 200_000
"""Events per second."""
MAX_GROWTH_MB: Final = 20
_MAX_ROUNDS: Final = 7
_MIN_STEPS: Final = 50_000


class _DiscardingReceiver:
    """A receiver that accepts every batch and discards it."""

    max_events = 512
    max_bytes = 1 << 20
    max_seconds = 0.0

    def __init__(self) -> None:
        self.received = 0

    async def open(self, on_problem: ProblemHandler) -> None:
        pass

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:
        del sizes
        self.received += len(batch)
        return BatchResult(len(batch))

    def interrupted_result(self) -> None:
        pass

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        pass

    def mark(self) -> Any:
        pass

    def rewind(self, mark: Any) -> None:
        pass

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        pass


class Throughput:
    """The suite ``couriers``."""

    name = "couriers"
    promise = "P6: a courier that is behind catches up at 200,000 events a second, in memory that does not grow"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the rate, then the memory."""
        steps = max(budget.rounds * STEPS_PER_ROUND, _MIN_STEPS)
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory, "journal")
            with EventBus([], journal=journal) as bus:
                for step in range(steps):
                    bus.publish(StepEnd(STATE, step, BATCH, METRICS))
            before = resident_megabytes()
            rates = [_measure_rate(journal, steps) for _ in range(min(max(budget.process_rounds, 2), _MAX_ROUNDS))]
            after = resident_megabytes()
        rate = spread_of(rates)
        yield Table(
            title=f"{steps:,} events of 8 metrics, from disk to a receiver",
            unit="events/s",
            rows=[
                Row("courier", Spread(*(float(round(each)) for each in (rate.median, rate.low, rate.high))), ours=True)
            ],
            target_results=[
                TargetResult(
                    f"at least {MIN_EVENTS_PER_SECOND:,} events/s",
                    rate.median,
                    rate.median >= MIN_EVENTS_PER_SECOND,
                    "events/s",
                )
            ],
        )
        if before is not None and after is not None:
            growth = after - before
            promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of the courier's memory"
            yield Table(
                title="memory that the courier's process has grown by",
                unit="MB",
                rows=[Row("courier", Spread(growth, growth, growth), ours=True)],
                target_results=[TargetResult(promise, growth, growth <= MAX_GROWTH_MB, "MB")],
            )


def _measure_rate(journal: Path, steps: int) -> float:
    receiver = _DiscardingReceiver()
    courier = Courier(journal, "nothing", receiver, DeliveryPolicy(), persistent=False)
    courier.finish()
    started = time.perf_counter()
    run_in_new_loop(courier.run)
    elapsed = time.perf_counter() - started
    if receiver.received != steps:
        raise RuntimeError(f"the courier delivered {receiver.received:,} of {steps:,} events")
    return steps / elapsed


THROUGHPUT: Final = Throughput()
