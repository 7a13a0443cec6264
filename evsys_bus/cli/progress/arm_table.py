"""The table of arms as pure functions of a board: metrics, spreads, remaining time."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from evsys_bus.cli.formatting import NO_VALUE
from evsys_bus.cli.progress.run_state import RunProgress, RunStateTracker
from evsys_bus.codec import to_builtins

_HIDDEN_METRICS: Final = frozenset({"step", "epoch", "step_seconds"})
_MIN_WHOLE: Final = 1000
_TINY: Final = 1e-3


class MetricSpread(NamedTuple):
    """Mean and standard deviation of a metric over the runs of an arm."""

    mean: float
    sd: float | None
    """None for a single run."""
    runs: int


class ArmRow(NamedTuple):
    """One row of the table."""

    arm: str
    runs: int
    completed: int
    running: int
    failed: int
    step: int
    num_steps: int
    train: MetricSpread | None
    eval: MetricSpread | None
    eta: float | None


class ShownMetrics(NamedTuple):
    """The metrics that the table shows; None before they are known."""

    train: str | None
    eval: tuple[str, str] | None
    """Name of the eval and of its metric."""


def choose_metrics(tracker: RunStateTracker, success_metric: str | None) -> ShownMetrics:
    """Choose the success metric if it was reported, else the loss and the first eval, evals during training first."""
    runs = list(tracker.runs.values())
    names = list(dict.fromkeys(name for run in runs for name, value in run.metrics.items() if _is_number(value)))
    success_name = success_metric or ""
    visible = [name for name in names if name not in _HIDDEN_METRICS]
    train = next((name for name in (success_name, "loss", *visible) if name in names), None)
    evals = dict.fromkeys(
        (step is None, name, metric)
        for run in runs
        for name, (step, metrics) in run.evals.items()
        for metric, value in metrics.items()
        if _is_number(value)
    )
    success_metric_name = success_name.rpartition("/")[2]
    best = min(
        evals,
        key=lambda each: (each[0], "/".join(each[1:]) != success_name, each[2] != success_metric_name),
        default=None,
    )
    return ShownMetrics(train, None if best is None else best[1:])


def arm_rows(tracker: RunStateTracker, shown: ShownMetrics, now: float) -> list[ArmRow]:
    """Return the row of every arm, in the order of the plan."""
    arms: dict[str, list[RunProgress]] = {}
    for run in list(tracker.runs.values()):
        arms.setdefault(run.arm, []).append(run)
    return [_arm_row(arm, runs, shown, now) for arm, runs in arms.items()]


def _arm_row(arm: str, runs: Sequence[RunProgress], shown: ShownMetrics, now: float) -> ArmRow:
    running = [run for run in runs if run.status == "running"]
    started = [run for run in runs if run.started_at is not None and run.status != "failed"]
    measured = running or started or [run for run in runs if run.started_at is not None]
    train = compute_spread(_numbers(run.metrics.get(shown.train) for run in started) if shown.train else ())
    scored = compute_spread(_numbers(_eval_value(run, shown.eval) for run in started) if shown.eval else ())
    return ArmRow(
        arm,
        runs=len(runs),
        completed=sum(run.status == "completed" for run in runs),
        running=len(running),
        failed=sum(run.status == "failed" for run in runs),
        step=round(statistics.fmean(run.step for run in measured)) if measured else 0,
        num_steps=max((run.num_steps for run in measured), default=0),
        train=train,
        eval=scored,
        eta=_estimate_seconds_left(runs, running, now),
    )


def _estimate_seconds_left(runs: Sequence[RunProgress], running: Sequence[RunProgress], now: float) -> float | None:
    """Estimate the seconds until these runs are done, at the rate of the running ones; None if none is running."""
    rates = [rate for run in running if (rate := run.rate(now)) is not None]
    if not rates:
        return None
    horizon = max(run.num_steps for run in running)
    pending_runs = sum(run.status == "pending" for run in runs)
    steps_left = sum(max(run.num_steps - run.step, 0) for run in running) + pending_runs * horizon
    return steps_left / sum(rates)


def estimate_seconds_left(tracker: RunStateTracker, now: float) -> float | None:
    """Estimate the seconds until all runs are done, at the rate of the running ones."""
    runs = list(tracker.runs.values())
    return _estimate_seconds_left(runs, [run for run in runs if run.status == "running"], now)


def _eval_value(run: RunProgress, eval_metric: tuple[str, str]) -> object:
    name, metric = eval_metric
    return run.evals[name][1].get(metric) if name in run.evals else None


def compute_spread(values: Iterable[float]) -> MetricSpread | None:
    """Return mean and sample standard deviation; None for no values."""
    numbers = list(values)
    if not numbers:
        return None
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1 or not math.isfinite(mean):
        return MetricSpread(mean, None, len(numbers))
    return MetricSpread(mean, statistics.stdev(numbers), len(numbers))


def _numbers(values: Iterable[object]) -> list[float]:
    return [float(value) for value in map(_to_builtin, values) if _is_number(value) and isinstance(value, int | float)]


def _is_number(value: object) -> bool:
    plain = _to_builtin(value)
    return isinstance(plain, int | float) and not isinstance(plain, bool)


def _to_builtin(value: object) -> object:
    """Convert a number of numpy or a similar library to Python's type."""
    return value if isinstance(value, int | float) else to_builtins(value)[0]


def format_number(value: float) -> str:
    """Format a number with about four digits; the width depends on its magnitude only, so that columns do not move."""
    magnitude = abs(value)
    if magnitude == 0 or not math.isfinite(value):
        return f"{value:g}"
    if magnitude >= 1e6 or 0 < magnitude < _TINY:  # noqa: PLR2004 # plain digits are hard to read beyond
        return f"{value:.2e}"
    if magnitude >= _MIN_WHOLE:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(magnitude)}f}"


def format_mean_sd(spread: MetricSpread | None, *, sd: bool = True) -> str:
    """Format mean ± standard deviation."""
    if spread is None:
        return NO_VALUE
    if spread.sd is None or not sd:
        return format_number(spread.mean)
    magnitude = abs(spread.mean)
    if magnitude >= _MIN_WHOLE or 0 < magnitude < _TINY:
        return f"{format_number(spread.mean)} ± {format_number(spread.sd)}"
    return f"{format_number(spread.mean)} ± {spread.sd:.{_decimals(magnitude)}f}"


def _decimals(magnitude: float) -> int:
    return 4 if magnitude < 0.1 else 3 if magnitude < 10 else 2 if magnitude < 100 else 1  # noqa: PLR2004 # four digits in all
