"""The rows of a run while they are collected: columns of metrics that grow, merge parts of a step, and can be cut."""

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from typing import Final, Literal

from evsys_bus.context import EvalResult, ManifestRow
from evsys_bus.reading.recorded_run import MetricSeries, RecordedEpoch, RecordedEval, State

MAX_STEPS: Final = 1 << 62
"""A number of steps from here on is no request, but means without end."""


class MetricColumn:
    """The values of one metric by step; one of a step that comes again replaces the earlier one."""

    __slots__ = ("is_sorted", "steps", "values")

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")
        self.is_sorted = True

    def add(self, step: int, value: float) -> None:
        """Add a value; it replaces the last one if that has the same step."""
        steps = self.steps
        if steps and step <= steps[-1]:
            if step == steps[-1]:
                self.values[-1] = value
                return
            self.is_sorted = False
        steps.append(step)
        self.values.append(value)

    def cut(self, first_step: int) -> None:
        """Drop the values from this step on."""
        self.sort()
        position = bisect_left(self.steps, first_step)
        del self.steps[position:], self.values[position:]

    def sort(self) -> None:
        """Sort by step; of several values of one step the last one stays."""
        if not self.is_sorted:
            steps, values = self.steps, self.values
            self.steps, self.values, self.is_sorted = array("q"), array("d"), True
            for position in sorted(range(len(steps)), key=steps.__getitem__):  # stable: the last one comes last
                self.add(steps[position], values[position])

    def series(self) -> MetricSeries:
        """Return the values, sorted; nothing may be added afterwards."""
        self.sort()
        return MetricSeries(self.steps, self.values)


class RankRecord:
    """What the processes of one rank have recorded about a run."""

    def __init__(self) -> None:
        self.times: Final = MetricColumn()
        self.metrics: Final[dict[str, MetricColumn]] = {}
        self.evals: list[RecordedEval] = []
        self.benchmarks: list[EvalResult] = []
        self.checkpoints: list[ManifestRow] = []
        self.epochs: dict[int, tuple[int, RecordedEpoch]] = {}
        """By number, each with the step at its end."""
        self.streams: Final[dict[str, None]] = {}
        """In order."""
        self.trains = False
        """Whether it has steps, or start or end events: a process that only evaluates has none."""
        self.status: State | None = None
        """By its end event."""
        self.end_event: Literal["RunEnd", "TrainEnd"] | None = None
        self.error: str | None = None

    def add_row(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Add a row, or a part of one."""
        self.times.add(step, time)
        for name, value in metrics.items():
            column = self.metrics.get(name)
            if column is None:
                column = self.metrics[name] = MetricColumn()
            column.add(step, value)

    @property
    def last_step(self) -> int:
        """The step of the newest row; -1 if there is none."""
        return self.times.steps[-1] if self.times.steps else -1

    def reopen(self) -> None:
        """Forget how an earlier training ended."""
        self.status, self.error, self.end_event = None, None, None

    def cut(self, first_step: int) -> None:
        """Drop what an earlier training has from this step on: the one that starts creates it again."""
        for column in (self.times, *self.metrics.values()):
            column.cut(first_step)
        self.evals = [each for each in self.evals if each.step is not None and each.step < first_step]
        self.benchmarks = [each for each in self.benchmarks if each.step is not None and each.step < first_step]
        self.epochs = {number: each for number, each in self.epochs.items() if each[0] < first_step}
        self.checkpoints = [each for each in self.checkpoints if to_step(each.batch, 0) < first_step]


def is_step(value: object) -> bool:
    """Return whether a value can be a step."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_STEPS


def to_step(value: object, default: int) -> int:
    """Return a value that is a step, else the default."""
    return value if isinstance(value, int) else default
