"""Benchmark suites: their cases, candidates and targets, and the results.

    Suite ── Case ─┬─ Candidate   one way to do it; one of them is the baseline that the others are compared with
                   └─ Target      a promise about the ratio of two candidates' times, within the same rounds

Running a suite gives a `Result`: one `Table` per case, with a row per candidate and a `TargetResult` per target. A
suite that does not measure times (how many tasks survive?) makes its tables itself.

Every candidate is calibrated to samples of about the same length. Then each round samples all of them, starting with
a different one each time. A slow phase of a shared machine thus hits neighbours alike, and the ratio of two candidates
within a round is stable even when their times are not.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

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
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in rotate(runs, turn):
            elapsed = _run_without_gc(runs[name], operations[name])
            samples[name].append(max(elapsed, 1) / operations[name])
    return Samples(samples)


def rotate(names: Iterable[str], turn: int) -> list[str]:
    """Return the names in order, beginning with a different one at each turn."""
    ordered = list(names)
    first = turn % max(len(ordered), 1)
    return ordered[first:] + ordered[:first]


def _run_without_gc(run: TimedLoop, operations: int) -> int:
    gc.collect(0)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return run(operations)
    finally:
        if was_enabled:
            gc.enable()


class Row(msgspec.Struct, frozen=True, rename={"candidate": "contender"}):
    """The result of one candidate, in the unit of its table."""

    candidate: str
    value: Spread
    ratio: Spread | None = None
    """Ratio to the baseline, within the same rounds; None where there is no baseline."""
    ours: bool = False
    """Whether this candidate is evsys-bus; the plot highlights it."""


class TargetResult(msgspec.Struct, frozen=True, rename={"met": "kept"}):
    """The result of one target."""

    promise: str
    measured: float | None = None
    """None if one of its candidates was absent."""
    met: bool | None = None
    """Whether the target was met; None if it could not be measured."""
    unit: str = "x"
    """The unit of ``measured``."""


class Table(msgspec.Struct, frozen=True, rename={"baseline": "floor", "target_results": "verdicts"}):
    """The result of one case."""

    title: str
    unit: str
    """``ns`` (per operation), or the name of what is counted."""
    rows: list[Row]
    baseline: str | None = None
    """The candidate that the ratios refer to."""
    target_results: list[TargetResult] = msgspec.field(default_factory=list[TargetResult])
    absent: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Reasons, by the name of each candidate that could not run."""


class Result(msgspec.Struct, frozen=True, rename={"suite": "question"}):
    """The result of one suite."""

    suite: str
    promise: str
    tables: list[Table]

    @property
    def missed_targets(self) -> list[TargetResult]:
        """The targets that were measured and not met."""
        return [each for table in self.tables for each in table.target_results if each.met is False]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to measure."""

    rounds: int
    """Rounds of samples taken in this process; at least 2."""
    process_rounds: int
    """Rounds of samples that start a process each; at least 2."""
    sample_ns: int = 4_000_000


class Suite(Protocol):
    """A benchmark suite."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    @property
    def promise(self) -> str:
        """What the suite checks, in one sentence."""
        ...

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure one case after another."""
        ...


def run_suite(suite: Suite, budget: Budget, progress: Callable[[str], None]) -> Result:
    """Run one suite; ``progress`` is called with a line for each finished table."""
    tables: list[Table] = []
    progress(f"{suite.name} ...")
    for table in suite.measure_tables(budget):
        progress(f"{suite.name}: {table.title}")
        tables.append(table)
    return Result(suite.name, suite.promise, tables)


@dataclass(frozen=True)
class Candidate:
    """One way to do what a case measures."""

    open: Callable[[], AbstractContextManager[TimedLoop]]
    """Sets the candidate up, yields the function to time, and tears it down."""
    package: str | None = None
    """The package that it requires; the candidate is absent without it. None if it requires none."""
    ours: bool = False
    """Whether this candidate is evsys-bus."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Bounds on the ratio of one candidate's time to another's."""

    candidate: str
    reference: str
    at_most: float | None = None
    """Upper bound on the ratio of ``candidate`` to ``reference``."""
    at_least: float | None = None
    """Lower bound on the ratio of ``candidate`` to ``reference``."""

    def evaluate(self, samples: Samples) -> TargetResult:
        """Compare the median of the ratios within each round with the bounds."""
        bounds = [("at most", self.at_most), ("at least", self.at_least)]
        words = " and ".join(f"{word} {bound:g} x" for word, bound in bounds if bound is not None)
        promise = f"{self.candidate} takes {words} as long as {self.reference}"
        if self.candidate not in samples or self.reference not in samples:
            return TargetResult(promise)
        measured = samples.ratio(self.candidate, self.reference).median
        high_enough = self.at_least is None or measured >= self.at_least
        low_enough = self.at_most is None or measured <= self.at_most
        return TargetResult(promise, measured, high_enough and low_enough)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Candidates that do the same thing."""

    title: str
    candidates: Mapping[str, Candidate]
    baseline: str
    """The candidate that the others are compared with; its package must be installed."""
    targets: tuple[Target, ...] = ()
    starts_processes: bool = False
    """Whether one operation starts a process, which is slow, so that `Budget.process_rounds` applies."""


def measure(case: Case, budget: Budget) -> Table:
    """Set up every available candidate of a case and time them against each other."""
    runs: dict[str, TimedLoop] = {}
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        for name, candidate in case.candidates.items():
            try:
                runs[name] = stack.enter_context(candidate.open())
            except ImportError as error:
                if candidate.package is None:
                    raise
                absent[name] = f"needs {candidate.package}: {error}"
        rounds = budget.process_rounds if case.starts_processes else budget.rounds
        samples = interleave(runs, rounds=rounds, sample_ns=budget.sample_ns)
    return Table(
        title=case.title,
        unit="ns",
        rows=[
            Row(name, samples.time(name), samples.ratio(name, case.baseline), case.candidates[name].ours)
            for name in runs
        ],
        baseline=case.baseline,
        target_results=[target.evaluate(samples) for target in case.targets],
        absent=absent,
    )


@dataclass(frozen=True, kw_only=True)
class TimedSuite:
    """A suite of timed cases."""

    name: str
    promise: str
    cases: tuple[Case, ...]

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure one case after another."""
        for case in self.cases:
            yield measure(case, budget)


MAX_GROWTH_MB = 20


def growth_table(title: str, steps: int, growths: Mapping[str, tuple[str, float]]) -> Table:
    """Return how much memory grew while this many steps were published, with the bound as a target.

    Args:
        title: The title.
        steps: The number of pending events.
        growths: Whose memory it is, as in "of the courier", and the growth in megabytes, by the name of the row.
    """
    promise = f"{steps:,} pending events take at most {MAX_GROWTH_MB} MB of"
    return Table(
        title=title,
        unit="MB",
        rows=[Row(name, Spread(grown, grown, grown), ours=True) for name, (_, grown) in growths.items()],
        target_results=[
            TargetResult(f"{promise} {whose}", grown, grown <= MAX_GROWTH_MB, "MB") for whose, grown in growths.values()
        ],
    )


def resident_megabytes(pid: int | Literal["self"] = "self") -> float | None:
    """Resident memory of this or another process; None where the system does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(kilobytes) / 1024
