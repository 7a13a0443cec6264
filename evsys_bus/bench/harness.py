"""Timing several candidates so that a busy machine affects all of them alike.

Every candidate is calibrated to samples of about the same length. Then each round samples all of them, starting with
a different one each time. A slow phase of a shared machine thus hits neighbours alike, and the ratio of two candidates
within a round is stable even when their times are not.
"""

import gc
import statistics
from collections.abc import Callable, Mapping

import msgspec

TimedLoop = Callable[[int], int]
"""Performs the operation the given number of times and returns the nanoseconds taken, without the set-up."""

_MAX_OPERATIONS = 1_000_000


class Spread(msgspec.Struct, frozen=True):
    """A median and its quartiles."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""


def spread_of(values: list[float]) -> Spread:
    """Compute the spread of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


class Samples:
    """Nanoseconds per operation, by candidate and round; the n-th values of all candidates are of the same round."""

    def __init__(self, rounds: Mapping[str, list[float]]) -> None:
        self._rounds = dict(rounds)

    def __contains__(self, candidate: object) -> bool:
        return candidate in self._rounds

    def time(self, candidate: str) -> Spread:
        """Nanoseconds per operation."""
        return spread_of(self._rounds[candidate])

    def ratio(self, candidate: str, reference: str) -> Spread:
        """Return the spread of the ratios of ``candidate`` to ``reference`` within each round."""
        return spread_of([a / b for a, b in zip(self._rounds[candidate], self._rounds[reference], strict=True)])


def calibrate(run: TimedLoop, sample_ns: int) -> int:
    """Return how many operations take about ``sample_ns``; at least one."""
    operations = 1
    while True:
        elapsed = max(run(operations), 1)
        if elapsed >= sample_ns // 4 or operations >= _MAX_OPERATIONS:
            return min(max(operations * sample_ns // elapsed, 1), _MAX_OPERATIONS)
        operations *= 4


def interleave(runs: Mapping[str, TimedLoop], *, rounds: int, sample_ns: int) -> Samples:
    """Sample every candidate once per round, with the garbage collector off during each sample."""
    operations = {name: calibrate(run, sample_ns) for name, run in runs.items()}
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            elapsed = _run_without_gc(runs[name], operations[name])
            samples[name].append(max(elapsed, 1) / operations[name])
    return Samples(samples)


def _run_without_gc(run: TimedLoop, operations: int) -> int:
    gc.collect(0)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return run(operations)
    finally:
        if was_enabled:
            gc.enable()
