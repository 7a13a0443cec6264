"""P7: what a publish costs late in a long run, and how much memory the process holds by then.

A bus that has published ``STEPS_PER_ROUND`` steps per round of samples (300,000 by default) is timed against a bus that
was just opened, in interleaved samples. ``--rounds 5000`` makes the run 10,000,000 steps long, which takes two minutes
and 4 GB of the temporary directory. Nothing reads the journal, so all these events are pending.
"""

import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Final, Literal

from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.harness import Spread, TimedLoop
from evsys_bus.bench.suite import Budget, Candidate, Case, Row, Table, Target, TargetResult, measure
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd

STEPS_PER_ROUND: Final = 2_000
MAX_ROUNDS: Final = 150
"""Most rounds of samples; ``--rounds`` above this only makes the run longer."""
MAX_GROWTH_MB: Final = 20
NEW_BUS: Final = "a bus at its first steps"


class MemoryGrowth:
    """The suite ``growth``."""

    name = "growth"
    promise = "P7: the ten-millionth publish costs what the first one does, and memory stays flat"

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
            [megabytes] = growth
            promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of memory"
            yield Table(
                title="memory that the process has grown by",
                unit="MB",
                rows=[Row(old_bus, Spread(megabytes, megabytes, megabytes), ours=True)],
                target_results=[TargetResult(promise, megabytes, megabytes <= MAX_GROWTH_MB, "MB")],
            )


@contextmanager
def _fresh_bus() -> Generator[TimedLoop, None, None]:
    """Time a new bus per sample, after its first step, which creates the journal."""

    def run(operations: int) -> int:
        with _open_bus() as bus:
            _publish(bus, 0, 1)
            return _publish(bus, 1, operations)

    yield run


@contextmanager
def _long_running_bus(steps: int, growth: list[float]) -> Generator[TimedLoop, None, None]:
    """Time a bus that has published ``steps`` steps; appends the growth of memory in megabytes to ``growth``."""
    with _open_bus() as bus:
        _publish(bus, 0, STEPS_PER_ROUND)
        before = resident_megabytes()
        for first in range(STEPS_PER_ROUND, steps, STEPS_PER_ROUND):
            _publish(bus, first, STEPS_PER_ROUND)
        after = resident_megabytes()
        if before is not None and after is not None:
            growth.append(after - before)

        def run(operations: int) -> int:
            nonlocal steps
            steps += operations
            return _publish(bus, steps, operations)

        yield run


@contextmanager
def _open_bus() -> Generator[EventBus, None, None]:
    with tempfile.TemporaryDirectory() as directory, EventBus([], journal=Path(directory, "journal")) as bus:
        yield bus


def _publish(bus: EventBus, first: int, steps: int) -> int:
    state, batch, metrics = STATE, BATCH, METRICS
    started = perf_counter_ns()
    for step in range(first, first + steps):
        bus.publish(StepEnd(state, step, batch, metrics))
    return perf_counter_ns() - started


def resident_megabytes(pid: int | Literal["self"] = "self") -> float | None:
    """Resident memory of this or another process; None where the system does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(kilobytes) / 1024


MEMORY_GROWTH: Final = MemoryGrowth()
