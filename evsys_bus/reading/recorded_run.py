"""`RecordedRun`: what is recorded about one run, as values and columns, and its conversions to tables and HTML.

Metrics are arrays of steps and values, eight bytes a number, so that a run of a million steps fits in memory.
"""

import html
import importlib
import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

from evsys_bus.context import EvalResult, ManifestRow

State = Literal["running", "completed", "failed", "cancelled", "killed"]
Mode = Literal["min", "max"]
MICROSECONDS: Final = 1_000_000
_SMALLER_IS_BETTER: Final = {
    *("loss", "losses", "error", "errors", "err", "nll", "ppl", "perplexity", "mse", "mae", "rmse", "mape"),
    *("wer", "cer", "bpb", "bpc", "kl", "regret", "latency", "seconds"),
}
"""Words in names of metrics of which smaller values are better."""
_MAX_HTML_METRICS: Final = 20


class MetricSeries(NamedTuple):
    """The values of a metric, by ascending step, each step once. Both arrays can be viewed by numpy without a copy."""

    steps: "array[int]"
    values: "array[float]"
    """NaN and infinities as they were recorded; an integer is a float here."""


class TimeSeries(NamedTuple):
    """Samples of the machine that trains, in the order in which they were taken."""

    times: "array[float]"
    """Seconds since the epoch."""
    values: "array[float]"


class MetricSummary(NamedTuple):
    """A metric in a few numbers; NaN and infinities are counted, and left out of all others."""

    rows: int
    nonfinite: int
    first: float | None
    last: float | None
    least: float | None
    least_step: int | None
    greatest: float | None
    greatest_step: int | None


class RecordedStep(NamedTuple):
    """One row: all metrics of one step."""

    step: int
    time: float
    """When the last part of the row was published: seconds since the epoch."""
    metrics: dict[str, float]


class RecordedEval(NamedTuple):
    """An eval during training, or a benchmark."""

    step: int | None
    """None for a benchmark after training."""
    name: str
    metrics: dict[str, float]
    time: float
    is_benchmark: bool = False


class RecordedEpoch(NamedTuple):
    """The end of a pass over the data."""

    epoch: int
    """0-based."""
    metrics: dict[str, float]
    time: float


class RecordedAlert(NamedTuple):
    """An alert that the run has published."""

    title: str
    text: str
    level: str
    time: float


@dataclass(kw_only=True, repr=False, eq=False)
class RecordedRun:
    """What the journal has about one run. A run that was resumed reads as one."""

    id: str
    """The run key."""
    directory: Path
    """The journal."""
    folder: Path
    """The run's directory; it need not exist."""
    experiment: str | None = None
    """The name of the experiment's directory, if the run belongs to one."""
    arm: str | None = None
    seed: int | None = None
    group: str | None = None
    state: State = "running"
    """Without an end event: running if a process writes the journal; killed if its writer did not close it; else
    completed, or cancelled if steps are missing."""
    error: str | None = None
    end_event: Literal["RunEnd", "TrainEnd"] | None = None
    """The event by which the run has ended; None if it has none."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """With all later changes."""
    tags: list[str] = field(default_factory=list[str])
    notes: str | None = None
    started: datetime | None = None
    """In UTC, by the clock of the machine that trained."""
    ended: datetime | None = None
    """None while the run is running; of a killed run the time of its last event."""
    last_time: datetime | None = None
    """When its last event was published."""
    num_steps: int | None = None
    """The requested number of steps, if it is known."""
    metrics: dict[str, MetricSeries] = field(default_factory=dict[str, MetricSeries])
    """By name. If processes of several ranks recorded one name, that of the lowest rank."""
    times: MetricSeries = field(default_factory=lambda: MetricSeries(array("q"), array("d")))
    """Of all steps: when the last part of each row was published, in seconds since the epoch."""
    system: dict[str, TimeSeries] = field(default_factory=dict[str, TimeSeries])
    """Samples by ``system_metrics``, such as ``cpu/percent``; of all ranks together."""
    evals: list[RecordedEval] = field(default_factory=list[RecordedEval])
    benchmarks: list[EvalResult] = field(default_factory=list[EvalResult])
    epochs: list[RecordedEpoch] = field(default_factory=list[RecordedEpoch])
    """In order, each once: of one that was run again, the last record."""
    checkpoints: list[ManifestRow] = field(default_factory=list[ManifestRow])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the program has set, and the final metrics of a run of an experiment."""
    alerts: list[RecordedAlert] = field(default_factory=list[RecordedAlert])
    contents: list[Any] = field(default_factory=list[Any])
    """Recorded texts, tables, images and so on: the events, in order."""
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where it ran, last: commit, command line, packages, host."""
    extras: dict[str, Any] = field(default_factory=dict[str, Any])
    """What loggers have published about the run, such as ``wandb_url``."""
    success_metric: str | None = None
    """The success metric of its experiment."""
    success_mode: Mode = "max"
    """Which values of the success metric are better."""
    problems: list[str] = field(default_factory=list[str])
    """What could not be read: missing events, damaged bytes, records of a newer version. Empty if all was read."""
    is_whole: bool = True
    """Whether all events were read; otherwise only the first and last ones, and `best` is unknown."""

    @property
    def last_step(self) -> int | None:
        """The last step that has a row."""
        return self.times.steps[-1] if self.times.steps else None

    @property
    def seconds(self) -> float | None:
        """From the first event to the end, or to the last event of a run that is running."""
        end = self.ended or self.last_time
        return None if self.started is None or end is None else max(0.0, (end - self.started).total_seconds())

    @cached_property
    def eval_metrics(self) -> dict[str, MetricSeries]:
        """The metrics of evals and benchmarks by step, named ``val/acc``; a benchmark after training counts as last."""
        return eval_series(self.evals, self.last_step or 0)

    def series(self, name: str) -> MetricSeries | None:
        """Return a metric of the steps, or one of the evals (``val/acc``); None if the run has none of this name."""
        return self.metrics.get(name) or self.eval_metrics.get(name)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, or what the summary has under this name; None if the run has neither."""
        found = self.series(name)
        if found is not None and found.values:
            return found.values[-1]
        return _as_float(self.summary.get(name))

    def best(self, name: str, mode: Mode | None = None) -> float | None:
        """Return the best finite value of a metric, or None.

        Args:
            name: The metric.
            mode: Which value is better. None for that of the experiment's success metric, or by the name: ``min`` for
                losses, errors and times, else ``max``.
        """
        found = self._best(name, mode)
        return None if found is None else found[0]

    def best_step(self, name: str, mode: Mode | None = None) -> int | None:
        """Return the first step that has the best finite value of a metric, or None."""
        found = self._best(name, mode)
        return None if found is None else found[1]

    def _best(self, name: str, mode: Mode | None) -> tuple[float, int] | None:
        found = self.series(name)
        if found is None or not self.is_whole:
            return None
        summary = summarize_series(found)
        if (mode or (self.success_mode if name == self.success_metric else better_mode(name))) == "min":
            value, step = summary.least, summary.least_step
        else:
            value, step = summary.greatest, summary.greatest_step
        return None if value is None or step is None else (value, step)

    def steps(self) -> Iterator[RecordedStep]:
        """Yield the rows by ascending step."""
        positions = dict.fromkeys(self.metrics, 0)
        for step, time in zip(*self.times, strict=True):
            row: dict[str, float] = {}
            for name, (steps, values) in self.metrics.items():
                position = positions[name]
                if position < len(steps) and steps[position] == step:
                    row[name] = values[position]
                    positions[name] = position + 1
            yield RecordedStep(step, time, row)

    def columns(self) -> dict[str, "array[int] | array[float] | list[float | None]"]:
        """Return the rows as columns of equal length: ``step``, ``time``, and each metric, None where it has no value.

        A metric named like one of the first two is called ``metric/step`` or ``metric/time``.
        """
        found: dict[str, array[int] | array[float] | list[float | None]] = {
            "step": self.times.steps,
            "time": self.times.values,
        }
        for name, series in self.metrics.items():
            found[f"metric/{name}" if name in {"step", "time"} else name] = _align(series, self.times.steps)
        return found

    def to_pandas(self) -> Any:
        """Return the rows as a pandas ``DataFrame``: `columns`, with ``time`` in UTC.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas = _import_package("pandas")
        columns = self.columns()
        return pandas.DataFrame(
            {
                name: pandas.Series(values, dtype=None if name == "step" else "float64")
                for name, values in columns.items()
            }
        ).assign(time=pandas.to_datetime(pandas.Series(columns["time"], dtype="float64"), unit="s", utc=True))

    def to_polars(self) -> Any:
        """Return the rows as a polars ``DataFrame``: `columns`, with ``time`` in UTC.

        Raises:
            ModuleNotFoundError: polars is not installed.
        """
        polars = _import_package("polars")
        columns = self.columns()
        data = {
            name: polars.Series(name, values, dtype=polars.Int64 if name == "step" else polars.Float64, strict=False)
            for name, values in columns.items()
            if name != "time"
        }
        times = polars.Series("time", _microseconds(self.times.values), dtype=polars.Int64)
        data["time"] = times.cast(polars.Datetime("us", "UTC"))
        return polars.DataFrame({name: data[name] for name in columns})

    def to_arrow(self) -> Any:
        """Return the rows as a pyarrow ``Table``: `columns`, with ``time`` in UTC.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
        """
        arrow = _import_package("pyarrow")
        columns = {
            name: arrow.array(values, type=arrow.int64() if name == "step" else arrow.float64())
            for name, values in self.columns().items()
        }
        columns["time"] = arrow.array(_microseconds(self.times.values), type=arrow.timestamp("us", tz="UTC"))
        return arrow.table(columns)

    def __repr__(self) -> str:
        steps = 0 if self.last_step is None else self.last_step + 1
        of = "" if self.num_steps is None else f" of {self.num_steps}"
        return f"<RecordedRun {self.id!r}: {self.state}, {steps}{of} steps, {len(self.metrics)} metrics>"

    def _repr_html_(self) -> str:
        """Return the run as a small table for notebooks, in the colours of the page."""
        steps = 0 if self.last_step is None else self.last_step + 1
        facts = {
            "state": self.state + (f": {self.error}" if self.error else ""),
            "arm": self.arm,
            "seed": self.seed,
            "started": None if self.started is None else self.started.isoformat(" ", "seconds"),
            "steps": f"{steps:,}" + ("" if self.num_steps is None else f" of {self.num_steps:,}"),
            "tags": ", ".join(self.tags) or None,
            "notes": self.notes,
            "config": ", ".join(f"{name}={value!r}" for name, value in self.config.items()) or None,
            "problems": "; ".join(self.problems) or None,
        }
        rows = [f"<tr><th>{name}</th><td>{_escape(text)}</td></tr>" for name, text in facts.items() if text is not None]
        every = {**self.metrics, **self.eval_metrics}
        lines: list[str] = []
        for name in [*every][:_MAX_HTML_METRICS]:
            numbers = (self.last(name), self.best(name), self.best_step(name))
            cells = "".join(f"<td>{'' if each is None else f'{each:.6g}'}</td>" for each in numbers)
            lines.append(f"<tr><th>{_escape(name)}</th>{cells}</tr>")
        head = "<tr><th>metric</th><th>last</th><th>best</th><th>at step</th></tr>"
        table = f"<table>{head}{''.join(lines)}</table>" if lines else ""
        more = f"<p>and {len(every) - len(lines)} more metrics</p>" if len(every) > len(lines) else ""
        return f"<div><b>{_escape(self.id)}</b><table>{''.join(rows)}</table>{table}{more}</div>"


def eval_series(evals: Iterable[RecordedEval], last_step: int = 0) -> dict[str, MetricSeries]:
    """Return the metrics of evals by step, named ``val/acc``; those without a step come at the last one."""
    found: dict[str, dict[int, float]] = {}
    evals = [*evals]
    last_step = max((last_step, *(each.step for each in evals if each.step is not None)))
    for each in evals:
        for name, value in each.metrics.items():
            found.setdefault(f"{each.name}/{name}", {})[last_step if each.step is None else each.step] = value
    by_name = {name: sorted(values.items()) for name, values in found.items()}
    return {
        name: MetricSeries(array("q", [step for step, _ in rows]), array("d", [value for _, value in rows]))
        for name, rows in by_name.items()
    }


def better_mode(name: str) -> Mode:
    """Return which values of a metric are better, by its name: ``min`` for losses, errors and times, else ``max``."""
    words = set(re.findall(r"[a-z]+", name.lower()))
    return "min" if words & _SMALLER_IS_BETTER else "max"


def summarize_series(series: MetricSeries) -> MetricSummary:
    """Return a metric in a few numbers."""
    steps, values = series
    finite: Sequence[float] = values
    at: Sequence[int] = steps
    if not all(map(math.isfinite, values)):
        pairs = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        at, finite = [step for step, _ in pairs], [value for _, value in pairs]
    nonfinite = len(values) - len(finite)
    if not finite:
        return MetricSummary(len(values), nonfinite, None, None, None, None, None, None)
    least, greatest = min(finite), max(finite)
    return MetricSummary(
        len(values),
        nonfinite,
        finite[0],
        finite[-1],
        least,
        at[finite.index(least)],
        greatest,
        at[finite.index(greatest)],
    )


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without nested mappings: ``{"optimizer": {"lr": 1}}`` becomes ``{"optimizer.lr": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = to_mapping(value)
        flat |= {f"{name}.{key}": each for key, each in flatten_config(inner).items()} if inner else {name: value}
    return flat


def to_mapping(value: object) -> dict[str, Any]:
    """Return a mapping with text keys; an empty one if the value is no dict."""
    return {str(key): each for key, each in cast("dict[object, Any]", value).items()} if isinstance(value, dict) else {}


def to_datetime(seconds: float) -> datetime | None:
    """Return a time in UTC from seconds since the epoch; None if no calendar has it."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _as_float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _align(series: MetricSeries, steps: "array[int]") -> "array[float] | list[float | None]":
    """Return the values for these steps, which include the steps of the series."""
    if len(series.steps) == len(steps):
        return series.values
    aligned: list[float | None] = [None] * len(steps)
    position = 0
    for step, value in zip(*series, strict=True):
        position = bisect_left(steps, step, position)
        aligned[position] = value
    return aligned


def _microseconds(times: "array[float]") -> "array[int]":
    return array("q", [round(each * MICROSECONDS) for each in times])


def _escape(value: object) -> str:
    return html.escape(str(value))


def _import_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"RecordedRun.to_{name.removeprefix('py')} needs {name}; pip install {name}", name=name
        ) from None
