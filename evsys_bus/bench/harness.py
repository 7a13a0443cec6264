"""Timing several contenders so that a busy machine is unfair to none of them.

Every contender is calibrated to samples of about the same length; then they are sampled round after round, each round
beginning with another one. A slow spell of a shared machine so falls on neighbours alike, and the ratio of two
contenders within one round holds when their times do not. This module owns that and nothing of what is measured.
"""

import gc
import statistics
from collections.abc import Callable, Mapping

import msgspec

Run = Callable[[int], int]
"""Do the operation so many times; returns the nanoseconds that they took, set-up not counted."""

_MOST_OPERATIONS = 1_000_000


class Spread(msgspec.Struct, frozen=True):
    """A median, and the quartiles that half of the rounds lay between."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""


def spread_of(values: list[float]) -> Spread:
    """The spread of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


class Samples:
    """Nanoseconds per operation of every contender in every round; the n-th of each were taken in the same round."""

    def __init__(self, rounds: Mapping[str, list[float]]) -> None:
        self._rounds = dict(rounds)

    def __contains__(self, contender: object) -> bool:
        return contender in self._rounds

    def time(self, contender: str) -> Spread:
        """Nanoseconds per operation."""
        return spread_of(self._rounds[contender])

    def ratio(self, of: str, to: str) -> Spread:
        """How many times as long ``of`` takes as ``to``: the spread of the ratios within each round."""
        return spread_of([a / b for a, b in zip(self._rounds[of], self._rounds[to], strict=True)])


def calibrate(run: Run, sample_ns: int) -> int:
    """How many operations make up a sample of about this length; at least one."""
    operations = 1
    while True:
        taken = max(run(operations), 1)
        if taken >= sample_ns // 4 or operations >= _MOST_OPERATIONS:
            return min(max(operations * sample_ns // taken, 1), _MOST_OPERATIONS)
        operations *= 4


def interleave(runs: Mapping[str, Run], *, rounds: int, sample_ns: int) -> Samples:
    """Sample every contender once per round, the garbage collector off within the sample, for all alike."""
    operations = {name: calibrate(run, sample_ns) for name, run in runs.items()}
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            taken = _without_collector(runs[name], operations[name])
            samples[name].append(max(taken, 1) / operations[name])
    return Samples(samples)


def _without_collector(run: Run, operations: int) -> int:
    gc.collect(0)
    collected = gc.isenabled()
    gc.disable()
    try:
        return run(operations)
    finally:
        if collected:
            gc.enable()
