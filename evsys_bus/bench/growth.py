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
from evsys_bus.bench.harness import Run, Spread
from evsys_bus.bench.question import Case, Contender, Effort, Row, Table, Target, Verdict, measure
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd

STEPS_PER_ROUND: Final = 2_000
MOST_ROUNDS: Final = 150
"""Most rounds of samples; ``--rounds`` above this only makes the run longer."""
MAX_GROWTH_MB: Final = 20
NEW: Final = "a bus at its first steps"


class Growth:
    """The suite ``growth``."""

    name = "growth"
    promise = "P7: the ten-millionth publish costs what the first one does, and memory stays flat"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure the times, then the memory."""
        steps = effort.rounds * STEPS_PER_ROUND
        grown: list[float] = []
        old = f"a bus after {steps:,} steps"
        case = Case(
            title=f"publish at step 1 and at step {steps:,}",
            contenders={
                NEW: Contender(_new, ours=True),
                old: Contender(partial(_old, steps, grown), ours=True),
            },
            floor=NEW,
            targets=(Target(of=old, to=NEW, at_most=1.1),),
        )
        yield measure(case, replace(effort, rounds=min(effort.rounds, MOST_ROUNDS)))
        if grown:
            [megabytes] = grown
            promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of memory"
            yield Table(
                title="memory that the process has grown by",
                unit="MB",
                rows=[Row(old, Spread(megabytes, megabytes, megabytes), ours=True)],
                verdicts=[Verdict(promise, megabytes, megabytes <= MAX_GROWTH_MB, "MB")],
            )


@contextmanager
def _new() -> Generator[Run, None, None]:
    """Time a new bus per sample, after its first step, which creates the journal."""

    def run(operations: int) -> int:
        with _opened() as bus:
            _publish(bus, 0, 1)
            return _publish(bus, 1, operations)

    yield run


@contextmanager
def _old(steps: int, grown: list[float]) -> Generator[Run, None, None]:
    """Time a bus that has published ``steps`` steps; appends the growth of memory in megabytes to ``grown``."""
    with _opened() as bus:
        _publish(bus, 0, STEPS_PER_ROUND)
        before = resident_megabytes()
        for first in range(STEPS_PER_ROUND, steps, STEPS_PER_ROUND):
            _publish(bus, first, STEPS_PER_ROUND)
        after = resident_megabytes()
        if before is not None and after is not None:
            grown.append(after - before)

        def run(operations: int) -> int:
            nonlocal steps
            steps += operations
            return _publish(bus, steps, operations)

        yield run


@contextmanager
def _opened() -> Generator[EventBus, None, None]:
    with tempfile.TemporaryDirectory() as directory, EventBus([], journal=Path(directory, "journal")) as bus:
        yield bus


def _publish(bus: EventBus, first: int, steps: int) -> int:
    state, batch, metrics = STATE, BATCH, METRICS
    begun = perf_counter_ns()
    for step in range(first, first + steps):
        bus.publish(StepEnd(state, step, batch, metrics))
    return perf_counter_ns() - begun


def resident_megabytes(pid: int | Literal["self"] = "self") -> float | None:
    """Resident memory of this or another process; None where the system does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(kilobytes) / 1024


GROWTH: Final = Growth()
