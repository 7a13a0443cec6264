"""Benchmark suites: their cases, candidates and targets, and the results.

    Question ── Case ─┬─ Contender   one way to do it; one of them is the baseline that the others are compared with
                      └─ Target      a promise about the ratio of two candidates' times, within the same rounds

Running a suite gives an `Answer`: one `Table` per case, with a row per candidate and a `Verdict` per target. A suite
that does not measure times (how many tasks survive?) makes its tables itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import msgspec

from evsys_bus.bench.harness import Run, Samples, Spread, interleave


class Row(msgspec.Struct, frozen=True):
    """The result of one candidate, in the unit of its table."""

    contender: str
    value: Spread
    ratio: Spread | None = None
    """Ratio to the baseline, within the same rounds; None where there is no baseline."""
    ours: bool = False
    """Whether this candidate is evsys-bus; the plot highlights it."""


class Verdict(msgspec.Struct, frozen=True):
    """The result of one target."""

    promise: str
    measured: float | None = None
    """None if one of its candidates was absent."""
    kept: bool | None = None
    """Whether the target was met; None if it could not be measured."""
    unit: str = "x"
    """The unit of ``measured``."""


class Table(msgspec.Struct, frozen=True):
    """The result of one case."""

    title: str
    unit: str
    """``ns`` (per operation), or the name of what is counted."""
    rows: list[Row]
    floor: str | None = None
    """The candidate that the ratios refer to."""
    verdicts: list[Verdict] = msgspec.field(default_factory=list[Verdict])
    absent: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Reasons, by the name of each candidate that could not run."""


class Answer(msgspec.Struct, frozen=True):
    """The result of one suite."""

    question: str
    promise: str
    tables: list[Table]

    @property
    def missed(self) -> list[Verdict]:
        """The targets that were measured and not met."""
        return [each for table in self.tables for each in table.verdicts if each.kept is False]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    """Rounds of samples taken in this process; at least 2."""
    process_rounds: int
    """Rounds of samples that start a process each; at least 2."""
    sample_ns: int = 4_000_000


class Question(Protocol):
    """A benchmark suite."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    @property
    def promise(self) -> str:
        """What the suite checks, in one sentence."""
        ...

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure one case after another."""
        ...


def ask(question: Question, effort: Effort, progress: Callable[[str], None]) -> Answer:
    """Run one suite; ``progress`` is called with a line for each finished table."""
    tables: list[Table] = []
    progress(f"{question.name} ...")
    for table in question.tables(effort):
        progress(f"{question.name}: {table.title}")
        tables.append(table)
    return Answer(question.name, question.promise, tables)


@dataclass(frozen=True)
class Contender:
    """One way to do what a case measures."""

    open: Callable[[], AbstractContextManager[Run]]
    """Sets the candidate up, yields the function to time, and tears it down."""
    package: str | None = None
    """The package that it requires; the candidate is absent without it. None if it requires none."""
    ours: bool = False
    """Whether this candidate is evsys-bus."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Bounds on the ratio of one candidate's time to another's."""

    of: str
    to: str
    at_most: float | None = None
    """Upper bound on the ratio of ``of`` to ``to``."""
    at_least: float | None = None
    """Lower bound on the ratio of ``of`` to ``to``."""

    def judge(self, samples: Samples) -> Verdict:
        """Compare the median of the ratios within each round with the bounds."""
        bounds = [("at most", self.at_most), ("at least", self.at_least)]
        words = " and ".join(f"{word} {bound:g} x" for word, bound in bounds if bound is not None)
        promise = f"{self.of} takes {words} as long as {self.to}"
        if self.of not in samples or self.to not in samples:
            return Verdict(promise)
        measured = samples.ratio(self.of, self.to).median
        high_enough = self.at_least is None or measured >= self.at_least
        low_enough = self.at_most is None or measured <= self.at_most
        return Verdict(promise, measured, high_enough and low_enough)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Candidates that do the same thing."""

    title: str
    contenders: Mapping[str, Contender]
    floor: str
    """The candidate that the others are compared with; its package must be installed."""
    targets: tuple[Target, ...] = ()
    starts_processes: bool = False
    """Whether one operation starts a process, which is slow, so that `Effort.process_rounds` applies."""


def measure(case: Case, effort: Effort) -> Table:
    """Set up every available candidate of a case and time them against each other."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        for name, contender in case.contenders.items():
            try:
                runs[name] = stack.enter_context(contender.open())
            except ImportError as error:
                if contender.package is None:
                    raise
                absent[name] = f"needs {contender.package}: {error}"
        rounds = effort.process_rounds if case.starts_processes else effort.rounds
        samples = interleave(runs, rounds=rounds, sample_ns=effort.sample_ns)
    return Table(
        title=case.title,
        unit="ns",
        rows=[
            Row(name, samples.time(name), samples.ratio(name, case.floor), case.contenders[name].ours) for name in runs
        ],
        floor=case.floor,
        verdicts=[target.judge(samples) for target in case.targets],
        absent=absent,
    )


@dataclass(frozen=True, kw_only=True)
class TimedQuestion:
    """A suite of timed cases."""

    name: str
    promise: str
    cases: tuple[Case, ...]

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure one case after another."""
        for case in self.cases:
            yield measure(case, effort)
