"""`EarlyStoppingCallback`: stop a run when a metric of its evals no longer improves.

It decides when to stop; the loop decides what stopping means (`LoopState.request_stop`).
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, SupportsFloat

import msgspec

from evsys_adapters.common.hook_arguments import first_step_of, run_id, step_of
from evsys_adapters.common.params import validate_params
from evsys_bus.callback import Callback
from evsys_bus.context import LogContext, LoopArtifacts, LoopState
from evsys_bus.diagnostics import log


class EarlyStoppingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `EarlyStoppingCallback`."""

    metric: Annotated[str, msgspec.Meta(min_length=1)]
    """The name of the metric in the eval's metrics."""
    eval_name: str | None = None
    """The eval to watch. Default: every eval with the metric, each on its own; the first one to stall stops the run."""
    patience: Annotated[int, msgspec.Meta(ge=1)] = 3
    """Stop after this many evals without improvement."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""
    min_delta: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """The minimum change that counts as an improvement (exclusive)."""


MAX_MARKED_EVALS: Final = 256
"""How many of the newest evals a mark stores individually; older ones are summarized."""


class OlderEvals(NamedTuple):
    """Summary of evals whose values are not stored."""

    best: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    evals: int = 0
    last_step: int = -1


class EvalHistory:
    """The watched metric of one eval in one run, ordered by step regardless of arrival."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """``(step, value)`` for each step, including NaN. After a resume, the newest 256 and later ones."""
        self.best: float | None = None
        """The best finite value so far, or None."""
        self.best_step: int | None = None
        """The 0-based step of the best value."""
        self.evals_since_best: int = 0
        """Number of evals at later steps than the best; all of them if there is no best."""
        self.older = OlderEvals()
        """Summary of the evals before `points`."""


class EarlyStoppingCallback(Callback):
    """Requests a stop of the run after ``patience`` evals without improvement of a metric.

    NaN and infinities are never the best value and count as no improvement. A late eval of an older step is inserted in
    step order, so the order of arrival does not matter; one of the same step replaces the earlier one. A resumed run is
    judged by all its evals, including those before the interruption if the bus has a journal; evals at steps that are
    run again count once. If the criterion was met already, it stops before its first step.

    Subclass it for another policy: `improved` compares values, `should_stop` decides.

    Example:
        >>> class StopAtTarget(EarlyStoppingCallback):
        ...     def should_stop(self, history):
        ...         return history.best is not None and history.best >= 0.9
        >>> stopping, state = StopAtTarget("accuracy"), LoopState(step=7, num_steps=100, output_dir="run")
        >>> stopping.on_eval(state, 7, "validation", {"accuracy": 0.95})
        >>> state.stop_requested, stopping.history(state).best
        (True, 0.95)
    """

    name: ClassVar[str] = "early_stopping"
    stops_runs: ClassVar[bool] = True
    Config: ClassVar[type | None] = EarlyStoppingConfig

    def __init__(
        self,
        metric: str,
        eval_name: str | None = None,
        patience: int = 3,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
    ) -> None:
        params = {"metric": metric, "eval_name": eval_name, "patience": patience, "mode": mode, "min_delta": min_delta}
        self.config = validate_params(EarlyStoppingConfig, params)
        self._runs: dict[str, _Run] = {}

    def improved(self, value: float, best: float) -> bool:
        """Whether a finite value is better than the best one so far."""
        gain = value - best if self.config.mode == "max" else best - value
        return gain > self.config.min_delta

    def should_stop(self, history: EvalHistory) -> bool:
        """Whether to stop the run; called after every eval with the metric."""
        return history.evals_since_best >= self.config.patience

    def history(self, run: LoopState | LogContext, eval_name: str | None = None) -> EvalHistory:
        """Return the run's history of the given eval, else the configured one, else the first one with the metric."""
        histories = self._run(run).histories
        name = eval_name or self.config.eval_name or next(iter(histories), None)
        return histories.get(name, EvalHistory()) if name else EvalHistory()

    def on_train_start(self, state: LoopState) -> None:
        """Drop evals of steps that will be run again; stop at once if the criterion is met."""
        first = first_step_of(state) or 0
        for history in self._run(state).histories.values():
            history.points = [point for point in history.points if point[0] < first]
            self._recompute(history)
            if (history.points or history.older.evals) and self.should_stop(history):
                self._stop(state, history)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Record the eval, and request a stop if the criterion is met."""
        if self.config.eval_name not in {None, eval_name}:
            self._run(state).others.add(eval_name)
            return
        run = self._run(state)
        value = _number(metrics.get(self.config.metric))
        if value is None:
            self._warn_missing_metric(run, state, eval_name, metrics)
            return
        history = run.histories.setdefault(eval_name, EvalHistory())
        self._add(history, step_of(step_idx), value)
        if self.should_stop(history):
            self._stop(state, history)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Warn if there were evals but none with the metric."""
        del artifacts
        run = self._run(state)
        if run.others and not run.histories:
            log().warning(
                "early_stopping.never_judged",
                run=run_id(state),
                metric=self.config.metric,
                eval_name=self.config.eval_name,
                evals=", ".join(sorted(run.others)),
            )

    def mark(self) -> Any:
        """Return the state of all runs as plain data."""
        return {key: self._to_mark(run) for key, run in self._runs.items()}

    def rewind(self, mark: Any) -> None:
        """Restore the state of all runs."""
        self._runs = {key: self._from_mark(each) for key, each in mark.items()}

    def mark_run(self, run: LoopState | LogContext) -> Any:
        """Return the state of one run as plain data, for the bus to record."""
        return self._to_mark(self._run(run))

    def rewind_run(self, run: LoopState, mark: Any, newest: Any) -> None:
        """Restore the state of one run from a mark, including evals of older steps that arrived later."""
        first = first_step_of(run) or 0
        restored = self._runs[run_id(run)] = self._from_mark(mark)
        for name, later in self._from_mark(newest).histories.items():
            if later.older.last_step < first:  # otherwise its summary includes evals that are run again
                later.points = [point for point in later.points if point[0] < first]
                self._recompute(later)
                restored.histories[name] = later

    def _to_mark(self, run: "_Run") -> dict[str, Any]:
        evals: dict[str, Any] = {}
        for name, history in run.histories.items():
            points = sorted(history.points)
            older = EvalHistory()
            older.older = history.older
            older.points = points[:-MAX_MARKED_EVALS]
            evals[name] = {
                "older": list(self._recompute(older)),
                "points": [list(each) for each in points[-MAX_MARKED_EVALS:]],
            }
        return {"metric": self.config.metric, "mode": self.config.mode, "evals": evals, "others": sorted(run.others)}

    def _from_mark(self, mark: Any) -> "_Run":
        """Restore a run from a mark; a new run if the mark is of another metric."""
        run = _Run()
        if mark is None or (mark["metric"], mark["mode"]) != (self.config.metric, self.config.mode):
            return run
        run.others = set(mark["others"])
        for name, each in mark["evals"].items():
            history = run.histories[name] = EvalHistory()
            history.older = OlderEvals(*each["older"])
            history.points = [(int(step), float(value)) for step, value in each["points"]]
            self._recompute(history)
        return run

    def _stop(self, state: LoopState, history: EvalHistory) -> None:
        if hasattr(state, "stop_requested") and not hasattr(state, "request_stop"):  # the host's own state class
            state.stop_requested = True
            return
        metric = self.config.metric
        if history.best is None:
            reason = f"no finite value of {metric} in {history.older.evals + len(history.points)} evals"
        elif history.evals_since_best == 0:
            reason = f"{metric} has reached its target: best {history.best:.6g} at step {history.best_step}"
        else:
            reason = f"no improvement of {metric} for {history.evals_since_best} evals"
            reason += f"; best {history.best:.6g} at step {history.best_step}"
        state.request_stop(reason)

    def _add(self, history: EvalHistory, step: int, value: float) -> None:
        """Insert a point in step order, replacing one of the same step."""
        points = history.points
        index = bisect_left(points, step, key=itemgetter(0))
        if index == len(points):
            points.append((step, value))
            self._update_best(history, step, value)
        else:
            replaced = 1 if points[index][0] == step else 0
            points[index : index + replaced] = [(step, value)]
            self._recompute(history)

    def _recompute(self, history: EvalHistory) -> OlderEvals:
        """Recompute the best value from all evals in step order; returns the summary."""
        older = history.older
        history.best, history.best_step, history.evals_since_best = older[:3]
        for step, value in history.points:
            self._update_best(history, step, value)
        last = history.points[-1][0] if history.points else older.last_step
        count = older.evals + len(history.points)
        return OlderEvals(history.best, history.best_step, history.evals_since_best, count, last)

    def _update_best(self, history: EvalHistory, step: int, value: float) -> None:
        if math.isfinite(value) and (history.best is None or self.improved(value, history.best)):
            history.best, history.best_step, history.evals_since_best = value, step, 0
        else:
            history.evals_since_best += 1

    def _warn_missing_metric(
        self, run: "_Run", state: LoopState, eval_name: str, metrics: Mapping[str, object]
    ) -> None:
        """Warn once about a missing metric; if all evals are watched, only after each was seen once without it."""
        expected = self.config.eval_name is not None or (eval_name in run.others and not run.histories)
        run.others.add(eval_name)
        if expected and not run.warned:
            run.warned = True
            log().warning(
                "early_stopping.metric_missing",
                run=run_id(state),
                eval_name=eval_name,
                metric=self.config.metric,
                there=", ".join(map(str, metrics)) or "no metrics",
            )

    def _run(self, handle: LoopState | LogContext) -> "_Run":
        return self._runs.setdefault(run_id(handle), _Run())


class _Run:
    """State of one run."""

    __slots__ = ("histories", "others", "warned")

    def __init__(self) -> None:
        self.histories: dict[str, EvalHistory] = {}
        self.others: set[str] = set()
        """Evals without the metric."""
        self.warned = False


def _number(value: object) -> float | None:
    """Convert a number of any type, including numpy and torch, to a float; None for anything else."""
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        return None
