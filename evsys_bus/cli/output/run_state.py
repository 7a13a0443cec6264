"""`RunStateTracker`: a callback that tracks the state of every run; `DrainStatus`: the drain after the last one.

Its hooks only store values; nothing is formatted or printed here. Views read it from another thread, so every field is
replaced as a whole and never changed in place.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.cli.output.deliveries import describe_counts
from evsys_bus.cli.output.formatting import pluralize
from evsys_bus.cli.output.screen import printable, printable_name
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Prediction,
    RunResult,
    Status,
    TrainingBatch,
)
from evsys_bus.tasks import DeliveryStatus

POLL_SECONDS: Final = 0.5
"""Interval between two polls, which read the journal's directory."""
RemainingWork = tuple[int, Iterable[DeliveryStatus]]
"""The number of unfinished tasks of callbacks, and the deliveries."""
MAX_PENDING_UPDATES: Final = 10_000
"""Limit of updates that no view has read yet; beyond it the oldest are dropped and counted."""
MAX_PENDING_ALERTS: Final = 100
"""Limit of alerts that the live view has not printed yet; beyond it the oldest are dropped."""


class DrainStatus:
    """The drain, which starts now. Used by the thread of one view.

    Args:
        poll: Returns the remaining work.
        seconds: The deadline of the drain.
        clock: Monotonic seconds.
    """

    def __init__(
        self, poll: Callable[[], RemainingWork], seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._poll: Final = poll
        self._clock: Final = clock
        self._started_at: Final = clock()
        self._seconds: Final = seconds
        self._next_poll = self._started_at
        self._tasks = 0
        self._deliveries: list[DeliveryStatus] = []

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the drain started."""
        return self._clock() - self._started_at

    def text(self) -> str | None:
        """Return a sentence for users; None if nothing remains."""
        if not self._has_remaining():
            return None
        parts = [pluralize(self._tasks, "task")] if self._tasks else []
        parts += map(_format_delivery, self._unfinished)
        others = [each for each in self._deliveries if each not in self._unfinished and describe_counts(each)]
        failed = "".join(f"; {printable_name(each.name)}: {', '.join(describe_counts(each))}" for each in others)
        return f"waiting for {', '.join(parts)}, at most {self._seconds_left} s more; {self._hint}{failed}"

    def facts(self) -> dict[str, Any] | None:
        """Return the facts of a line; None if nothing remains."""
        if not self._has_remaining():
            return None
        facts: dict[str, Any] = {"event": "waiting"}
        if self._tasks:
            facts["tasks"] = self._tasks
        if self._unfinished:
            facts["adapters"] = ",".join(each.name for each in self._unfinished)
            facts["events"] = sum(each.pending for each in self._unfinished)
        for count in ("owed", "dead", "hook_failures", "task_failures"):
            if number := sum(getattr(each, count) for each in self._deliveries):
                facts[count] = number
        facts |= {"at_most_seconds": self._seconds_left, "hint": self._hint}
        for each in self._unfinished:
            if each.last_error is not None:
                fix = each.suggested_fix
                return facts | {"adapter": each.name, "why": each.last_error} | ({"fix": fix} if fix else {})
        return facts

    @property
    def _seconds_left(self) -> int:
        return max(0, round(self._seconds - self.elapsed_seconds))

    @property
    def _hint(self) -> str:
        return "Ctrl-C twice ends it at once" if self._tasks else "Ctrl-C leaves them to sync"

    @property
    def _unfinished(self) -> list[DeliveryStatus]:
        return [each for each in self._deliveries if each.unfinished]

    def _has_remaining(self) -> bool:
        if self._clock() >= self._next_poll:
            self._next_poll = self._clock() + POLL_SECONDS
            self._tasks, deliveries = self._poll()
            self._deliveries = list(deliveries)
        return bool(self._tasks or self._unfinished)


def _format_delivery(status: DeliveryStatus) -> str:
    """Return ``csv: 58 events`` or ``wandb: 120 owed (no key; fix: wandb login)``."""
    words = describe_counts(status)
    if status.pending:
        words[0] = pluralize(status.pending, "event")
    fix = status.suggested_fix
    why = "" if status.last_error is None else f" ({status.last_error}{f'; fix: {fix}' if fix else ''})"
    return printable(f"{status.name}: {', '.join(words)}{why}")


class PlannedRun(NamedTuple):
    """A run that has not started yet."""

    key: str
    arm: str
    seed: int
    stage: str | None = None
    status: Status = "pending"
    """``completed`` for a run that an earlier session of a resumed experiment has completed."""


@dataclass(slots=True)
class RunProgress:
    """The progress of one run; the first fields are those of its `PlannedRun`."""

    key: str
    arm: str
    seed: int
    stage: str | None
    status: Status
    step: int = 0
    """Number of completed steps."""
    first_step: int = 0
    num_steps: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evals: dict[str, tuple[int | None, Mapping[str, Any]]] = field(
        default_factory=dict[str, tuple[int | None, Mapping[str, Any]]]
    )
    error: str | None = None

    def rate(self, now: float) -> float | None:
        """Return the steps per second since training started; None before the first step."""
        seconds = 0.0 if self.started_at is None else (self.ended_at or now) - self.started_at
        done = self.step - self.first_step
        return done / seconds if done > 0 and seconds > 0 else None

    def eta(self, now: float) -> float | None:
        """Return the estimated seconds until the last step."""
        rate = self.rate(now)
        return None if rate is None else max(self.num_steps - self.step, 0) / rate


class ShownAlert(NamedTuple):
    """An alert that the live view prints."""

    run: str
    level: str
    title: str
    text: str


class ProgressUpdate(msgspec.Struct, frozen=True):
    """An event that line views print."""

    time: float
    """Seconds since the epoch."""
    event: str
    run: str | None = None
    step: int = 0
    """Completed steps at that time; in async training those of an eval or a checkpoint lag behind the run's."""
    num_steps: int = 0
    facts: dict[str, Any] = {}


class RunStateTracker(Callback):
    """Tracks the state of every run. Place it last, so that it sees the values that earlier callbacks derive."""

    def __init__(
        self,
        planned: Iterable[PlannedRun],
        *,
        folder: str = "",
        clock: Callable[[], float] = time.monotonic,
        keep_updates: bool = True,
    ) -> None:
        self.runs: dict[str, RunProgress] = {plan.key: RunProgress(*plan) for plan in planned}
        self.folder = folder
        """The directory of the runs, as it is shown to users."""
        self.started_at = clock()
        self.clock = clock
        self.updates: deque[ProgressUpdate] = deque(maxlen=MAX_PENDING_UPDATES)
        self.updates_dropped = 0
        self.alerts: deque[ShownAlert] = deque(maxlen=MAX_PENDING_ALERTS)
        self.notice: str | None = None
        """A message shown to the user now."""
        self.drain_status: DrainStatus | None = None
        """The drain of tasks and deliveries, after the last run."""
        self._keep_updates = keep_updates

    def add_update(
        self, event: str, run: RunProgress | None = None, *, at_step: int | None = None, **facts: Any
    ) -> None:
        """Add an update with these facts."""
        if not self._keep_updates:
            return
        if len(self.updates) == MAX_PENDING_UPDATES:
            self.updates_dropped += 1
        if run is None:
            self.updates.append(ProgressUpdate(time.time(), event, facts=facts))
        else:
            step = run.step if at_step is None else at_step + 1
            self.updates.append(ProgressUpdate(time.time(), event, run.key, step, run.num_steps, facts))

    def on_run_start(self, ctx: LogContext) -> None:
        """Mark the run as running."""
        run = self._run_for_key(ctx.run_key or "", ctx.run_config)
        run.status = "running"
        self.add_update("run_started", run)

    def on_train_start(self, state: LoopState) -> None:
        """Start the clock of the run."""
        run = self._run_for_state(state)
        run.step = run.first_step = state.step
        run.num_steps = state.num_steps
        run.started_at, run.ended_at = self.clock(), None
        if state.step:
            self.add_update("resumed", run)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Store the step and its metrics; late and repeated steps do not lower the step."""
        del batch
        run = self._run_for_state(state)
        run.num_steps = state.num_steps
        run.metrics = metrics
        if step_idx >= run.step:
            run.step = step_idx + 1

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Report the checkpoint."""
        self.add_update("checkpoint", self._run_for_state(state), name=row.name, at_step=row.batch)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Store the latest metrics of each eval."""
        run = self._run_for_state(state)
        run.evals = {**run.evals, eval_name: (step_idx, metrics)}
        self.add_update("eval", run, eval=eval_name, at_step=step_idx, metrics=metrics)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Store an evaluation after training; earlier ones arrive as evals."""
        del predictions
        if step is None:
            run = self._run_for_key(ctx.run_key or "", ctx.run_config)
            run.evals = {**run.evals, eval_result.name: (None, eval_result.metrics)}
            self.add_update("benchmark", run, eval=eval_result.name, metrics=eval_result.metrics)

    def on_alert(self, ctx: LogContext, title: str, text: str, level: str) -> None:
        """Report the alert."""
        run = self._run_for_key(ctx.run_key or "", ctx.run_config)
        self.alerts.append(ShownAlert(run.key, level, title, text))
        self.add_update("alert", run, level=level, title=title, text=text or None)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Stop the clock of the run."""
        del artifacts
        run = self._run_for_state(state)
        run.ended_at = self.clock()
        if state.stop_requested and state.error is None:
            self.add_update("stopped", run, reason=state.stop_reason or "a callback asked for it")

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Store the run's status and error."""
        run = self._run_for_key(ctx.run_key or "", ctx.run_config)
        run.status = run_result.status
        run.error = run_result.error or arm.error
        self.add_update("run_ended", run, status=run.status, error=run.error)

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Report the end of the experiment."""
        del ctx
        self.add_update(
            "experiment_ended", status=result.status, best_arm=result.best_arm, best_score=result.best_score
        )

    def _run_for_state(self, state: LoopState) -> RunProgress:
        ctx = state.ctx
        if ctx is None or ctx.run_key is None:
            return self._run_for_key(state.output_dir.name, None)
        return self.runs.get(ctx.run_key) or self._run_for_key(ctx.run_key, ctx.run_config)

    def _run_for_key(self, key: str, run_config: Any) -> RunProgress:
        """Return the run of this key, and add it if it was not planned."""
        run = self.runs.get(key)
        if run is None:
            arm = _config_value(run_config, "arm") or key
            seed = _config_value(run_config, "seed")
            run = RunProgress(*PlannedRun(key, str(arm), seed if isinstance(seed, int) else 0))
            self.runs = {**self.runs, key: run}
        return run


def _config_value(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config).get(name)
    return getattr(config, name, None)
