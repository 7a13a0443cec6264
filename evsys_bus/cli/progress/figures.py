"""The table of arms as pure functions of a board: metrics, spreads, remaining time."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from evsys_bus.cli.amounts import NONE
from evsys_bus.cli.progress.board import Board, RunProgress
from evsys_bus.codec import to_plain

_UNTOLD: Final = frozenset({"step", "epoch", "step_seconds"})
_WHOLE_FROM: Final = 1000
_TINY: Final = 1e-3


class Spread(NamedTuple):
    """Mean and standard deviation of a metric over the runs of an arm."""

    mean: float
    sd: float | None
    """None for a single run."""
    runs: int


class ArmFigures(NamedTuple):
    """One row of the table."""

    arm: str
    runs: int
    completed: int
    running: int
    failed: int
    step: int
    num_steps: int
    train: Spread | None
    eval: Spread | None
    eta: float | None


class Headline(NamedTuple):
    """The metrics that the table shows; None before they are known."""

    train: str | None
    eval: tuple[str, str] | None
    """Name of the eval and of its metric."""


def headline(board: Board, success_metric: str | None) -> Headline:
    """Choose the success metric if it was reported, else the loss and the first eval, evals during training first."""
    runs = list(board.runs.values())
    names = list(dict.fromkeys(name for run in runs for name, value in run.metrics.items() if _is_number(value)))
    wanted = success_metric or ""
    told = [name for name in names if name not in _UNTOLD]
    train = next((name for name in (wanted, "loss", *told) if name in names), None)
    evals = dict.fromkeys(
        (step is None, name, metric)
        for run in runs
        for name, (step, metrics) in run.evals.items()
        for metric, value in metrics.items()
        if _is_number(value)
    )
    metric_wanted = wanted.rpartition("/")[2]
    best = min(evals, key=lambda each: (each[0], "/".join(each[1:]) != wanted, each[2] != metric_wanted), default=None)
    return Headline(train, None if best is None else best[1:])


def arm_figures(board: Board, show: Headline, now: float) -> list[ArmFigures]:
    """Return the row of every arm, in the order of the plan."""
    arms: dict[str, list[RunProgress]] = {}
    for run in list(board.runs.values()):
        arms.setdefault(run.arm, []).append(run)
    return [_figures(arm, runs, show, now) for arm, runs in arms.items()]


def _figures(arm: str, runs: Sequence[RunProgress], show: Headline, now: float) -> ArmFigures:
    running = [run for run in runs if run.status == "running"]
    begun = [run for run in runs if run.began is not None and run.status != "failed"]
    at = running or begun or [run for run in runs if run.began is not None]
    train = spread(_numbers(run.metrics.get(show.train) for run in begun) if show.train else ())
    scored = spread(_numbers(_scored(run, show.eval) for run in begun) if show.eval else ())
    return ArmFigures(
        arm,
        runs=len(runs),
        completed=sum(run.status == "completed" for run in runs),
        running=len(running),
        failed=sum(run.status == "failed" for run in runs),
        step=round(statistics.fmean(run.step for run in at)) if at else 0,
        num_steps=max((run.num_steps for run in at), default=0),
        train=train,
        eval=scored,
        eta=_eta(runs, running, now),
    )


def _eta(runs: Sequence[RunProgress], running: Sequence[RunProgress], now: float) -> float | None:
    """Estimate the seconds until these runs are done, at the rate of the running ones; None if none is running."""
    rates = [rate for run in running if (rate := run.rate(now)) is not None]
    if not rates:
        return None
    horizon = max(run.num_steps for run in running)
    waiting = sum(run.status == "pending" for run in runs)
    left = sum(max(run.num_steps - run.step, 0) for run in running) + waiting * horizon
    return left / sum(rates)


def eta(board: Board, now: float) -> float | None:
    """Estimate the seconds until all runs are done, at the rate of the running ones."""
    runs = list(board.runs.values())
    return _eta(runs, [run for run in runs if run.status == "running"], now)


def _scored(run: RunProgress, wanted: tuple[str, str]) -> object:
    name, metric = wanted
    return run.evals[name][1].get(metric) if name in run.evals else None


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean and sample standard deviation; None for no values."""
    numbers = list(values)
    if not numbers:
        return None
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1 or not math.isfinite(mean):
        return Spread(mean, None, len(numbers))
    return Spread(mean, statistics.stdev(numbers), len(numbers))


def _numbers(values: Iterable[object]) -> list[float]:
    return [float(value) for value in map(_plain, values) if _is_number(value) and isinstance(value, int | float)]


def _is_number(value: object) -> bool:
    plain = _plain(value)
    return isinstance(plain, int | float) and not isinstance(plain, bool)


def _plain(value: object) -> object:
    """Convert a number of numpy or a similar library to Python's type."""
    return value if isinstance(value, int | float) else to_plain(value)[0]


def number(value: float) -> str:
    """Format a number with about four digits; the width depends on its magnitude only, so that columns do not move."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return f"{value:g}"
    if size >= 1e6 or 0 < size < _TINY:  # noqa: PLR2004 # plain digits are hard to read beyond
        return f"{value:.2e}"
    if size >= _WHOLE_FROM:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(size)}f}"


def pair(found: Spread | None, *, sd: bool = True) -> str:
    """Format mean ± standard deviation."""
    if found is None:
        return NONE
    if found.sd is None or not sd:
        return number(found.mean)
    size = abs(found.mean)
    if size >= _WHOLE_FROM or 0 < size < _TINY:
        return f"{number(found.mean)} ± {number(found.sd)}"
    return f"{number(found.mean)} ± {found.sd:.{_decimals(size)}f}"


def _decimals(size: float) -> int:
    return 4 if size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1  # noqa: PLR2004 # four digits in all
