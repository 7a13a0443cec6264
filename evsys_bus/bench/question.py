"""A question that a benchmark asks, how its contenders answer, and what the answer is.

    Question ── Case ─┬─ Contender   one way to do the thing, among them the floor that the others are compared with
                      └─ Target      a promise: how one contender's time relates to another's, in the same rounds

Asking gives an `Answer`: per case a `Table` with a row per contender and a verdict per target. A question that does not
measure times (how many tasks survive?) gives its tables in its own way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import msgspec

from evsys_bus.bench.harness import Run, Samples, Spread, interleave


class Row(msgspec.Struct, frozen=True):
    """One contender's result, in the unit of its table."""

    contender: str
    value: Spread
    ratio: Spread | None = None
    """To the floor, within the same rounds; None where there is no floor."""
    ours: bool = False
    """Whether it is evsys-bus that is measured here; the plot sets it off."""


class Verdict(msgspec.Struct, frozen=True):
    """One target, judged."""

    promise: str
    measured: float | None = None
    """None if one of its contenders was absent."""
    kept: bool | None = None
    """None if it could not be judged."""
    unit: str = "x"
    """Of what was measured."""


class Table(msgspec.Struct, frozen=True):
    """What one case gave."""

    title: str
    unit: str
    """``ns`` per operation, or what is counted."""
    rows: list[Row]
    floor: str | None = None
    """The contender that the ratios are to."""
    verdicts: list[Verdict] = msgspec.field(default_factory=list[Verdict])
    absent: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Contenders that could not take part, and why."""


class Answer(msgspec.Struct, frozen=True):
    """What one question gave."""

    question: str
    promise: str
    tables: list[Table]

    @property
    def missed(self) -> list[Verdict]:
        """The targets that were judged and not reached."""
        return [each for table in self.tables for each in table.verdicts if each.kept is False]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    """Of samples in this process; at least 2."""
    process_rounds: int
    """Of samples that start a process each; at least 2."""
    sample_ns: int = 4_000_000


class Question(Protocol):
    """Anything that can be asked."""

    @property
    def name(self) -> str:
        """The word on the command line."""
        ...

    @property
    def promise(self) -> str:
        """What we hold to be true, in one sentence."""
        ...

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure, one case after another."""
        ...


def ask(question: Question, effort: Effort, progress: Callable[[str], None]) -> Answer:
    """Ask one question; ``progress`` hears of every table that is done."""
    tables: list[Table] = []
    progress(f"{question.name} ...")
    for table in question.tables(effort):
        progress(f"{question.name}: {table.title}")
        tables.append(table)
    return Answer(question.name, question.promise, tables)


@dataclass(frozen=True)
class Contender:
    """One way to do the thing that a case measures."""

    open: Callable[[], AbstractContextManager[Run]]
    """Sets it up, yields what runs it, takes it down."""
    package: str | None = None
    """What must be installed for it; without that the contender is absent. None: it is always there."""
    ours: bool = False
    """Whether it is evsys-bus that is measured here."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise about the time of one contender over that of another."""

    of: str
    to: str
    at_most: float | None = None
    """Kept if ``of`` takes at most so many times as long as ``to``."""
    at_least: float | None = None
    """Kept if ``of`` takes at least so many times as long as ``to``."""

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
    """Contenders that do one and the same thing."""

    title: str
    contenders: Mapping[str, Contender]
    floor: str
    """The contender that the others are compared with; its package must be there."""
    targets: tuple[Target, ...] = ()
    starts_processes: bool = False
    """One operation takes a good part of a second, so fewer rounds must do."""


def measure(case: Case, effort: Effort) -> Table:
    """Set up every contender of a case that is there, and time them against each other."""
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
    """A question that is answered by the times of its cases."""

    name: str
    promise: str
    cases: tuple[Case, ...]

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure, one case after another."""
        for case in self.cases:
            yield measure(case, effort)
