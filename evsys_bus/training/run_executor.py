"""`RunExecutor`: one run of an experiment, from RunStart to RunEnd.

    RunStart
    the recipe          builds the parts of the run
    TrainingLoop        TrainStart … TrainEnd
    each benchmark      BenchmarkEval(step=None)
    RunComponents.close
    RunEnd              always, also after an error

Errors of a run are isolated here: what the recipe, the backend or the disk raises ends this run and no other.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

import anyio
import msgspec

from evsys_bus.bus import EventBus
from evsys_bus.codec import to_builtins
from evsys_bus.codec.normalize import dict_or_empty
from evsys_bus.codec.redact import redact_text
from evsys_bus.config.experiment import Recipe
from evsys_bus.context import ArmResult, EvalResult, LogContext, RunResult, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import EvsysBusError, TrainingError
from evsys_bus.events import BenchmarkEval, RunEnd, RunStart
from evsys_bus.run_files import write_error_file
from evsys_bus.training.checkpoints import FINAL
from evsys_bus.training.loop import EXIT, TrainingLoop, should_propagate
from evsys_bus.training.plan import RunComponents, RunPlan
from evsys_bus.training.protocols import Benchmark, Scorer

CLOSE_SECONDS: Final = 10.0
"""Time limit of ``RunComponents.close``."""
_MAX_ERROR_CHARS: Final = 2_000
_NON_METRIC_KEYS: Final = ("step", "nonfinite", "replaced")
"""Keys of a row in ``metrics.jsonl`` that are not metrics."""
_NONFINITE: Final = ("nan", "inf", "-inf")


class RunExecutor:
    """Runs one run of an experiment.

    Args:
        plan: The run.
        recipe: Builds the parts of the run.
        ctx: The context of the run.
        bus: An open bus.
        is_stopping: Whether the experiment is being cancelled; a CancelledError at any other time is a failure of the
            run.
    """

    def __init__(
        self, plan: RunPlan, recipe: Recipe, *, ctx: LogContext, bus: EventBus, is_stopping: Callable[[], bool]
    ) -> None:
        self.plan = plan
        self.recipe = recipe
        self.ctx = ctx
        self._bus = bus
        self._is_stopping = is_stopping
        self._loop: TrainingLoop | None = None
        self._evals: list[EvalResult] = []
        self._eval_seconds = 0.0

    async def run(self, *, initial_state_path: str | None, resume: bool) -> ArmResult:
        """Train, run the benchmarks and return the result; errors of the run are returned, not raised.

        Args:
            initial_state_path: Path of a full state to load first: that of the previous stage.
            resume: Continue the run in its directory, if there is one.

        Raises:
            KeyboardInterrupt, SystemExit, GeneratorExit: After RunEnd.
        """
        self._bus.publish(RunStart(self.ctx))
        status: Status = "completed"
        error: str | None = None
        try:
            await self._train_and_score(initial_state_path, resume=resume)
        except EXIT as exit_error:
            self._finish("cancelled", type(exit_error).__name__)
            raise
        except _StoppedEarlyError as stopped_early:
            status, error = "cancelled", str(stopped_early)
        except BaseException as raised:
            is_cancelled = isinstance(raised, asyncio.CancelledError) and self._is_stopping()
            status, error = (
                ("cancelled", "the experiment was stopped") if is_cancelled else ("failed", _error_message(raised))
            )
            if not is_cancelled:
                log().warning("run.failed", run=self.plan.run_key, error=error, exc_info=raised)
                self._write_error_file(raised)
        return self._finish(status, error)

    async def _train_and_score(self, initial_state_path: str | None, *, resume: bool) -> None:
        components = await self._build_components()
        try:
            if initial_state_path is not None:
                await components.backend.load_state(initial_state_path)
            self._loop = TrainingLoop(
                components.backend,
                components.step_builder,
                num_steps=components.num_steps,
                evaluators=components.evaluators,
                bus=self._bus,
                ctx=self.ctx,
                save_every=components.save_every,
                steps_per_epoch=components.steps_per_epoch,
                resume=resume,
            )
            await self._loop.run()
            state = self._loop.state
            if state.stopped_early and state.step + 1 < state.num_steps:
                raise _StoppedEarlyError(state.stop_reason)
            for benchmark in components.benchmarks:
                await self._score(benchmark, self._loop)
        finally:
            if components.close is not None:
                await self._close(components.close)

    def _write_error_file(self, error: BaseException) -> None:
        """Write the traceback into the run's directory, unless the loop could not open that: another may use it."""
        if self._loop is None or self._loop.artifacts is not None:
            write_error_file(self.plan.run_dir, error)

    async def _build_components(self) -> RunComponents:
        components = cast("object", self.recipe.function(self.recipe.params(self.plan.params), self.plan))
        if inspect.isawaitable(components):
            components = await components
        if not isinstance(components, RunComponents):
            raise TrainingError(
                f"the recipe returned {type(components).__name__}, not RunComponents",
                fix="return RunComponents(backend=…, step_builder=…, num_steps=…)",
            )
        return components

    async def _score(self, benchmark: Scorer, loop: TrainingLoop) -> None:
        started = time.perf_counter()
        try:
            score = await benchmark.evaluate(loop.state)
            if isinstance(score, Mapping):
                score = Benchmark(EvalResult(benchmark.name, metrics=dict(score)), [])
            result, predictions = score
            seconds = time.perf_counter() - started
            result = msgspec.structs.replace(result, step=None, eval_seconds=result.eval_seconds or seconds)
            normalized = _normalized_result(result, benchmark.name)
        except BaseException as error:
            if should_propagate(error, cancelled=self._is_stopping()):
                raise
            message = _error_message(error)
            log().warning(
                "benchmark.failed", run=self.plan.run_key, benchmark=benchmark.name, error=message, exc_info=error
            )
        else:
            self._evals.append(normalized)
            self._eval_seconds += normalized.eval_seconds
            self._bus.publish(BenchmarkEval(self.ctx, result, predictions))

    async def _close(self, close: Callable[[], Awaitable[object]]) -> None:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
            try:
                await close()
            except BaseException as error:
                if should_propagate(error, cancelled=scope.cancel_called or self._is_stopping()):
                    raise
                log().warning("run.close_failed", run=self.plan.run_key, error=_error_message(error), exc_info=error)
        if scope.cancelled_caught:
            log().warning("run.close_abandoned", run=self.plan.run_key, after_seconds=CLOSE_SECONDS)

    def _finish(self, status: Status, error: str | None) -> ArmResult:
        loop = self._loop
        run_result = RunResult(
            run_id=id_text(self.ctx.ids.get("run_id")),
            status=status,
            metrics={} if loop is None else _measured_metrics(loop.last_metrics),
            artifacts=None if loop is None else loop.artifacts,
            error=error,
        )
        arm = ArmResult(
            name=self.plan.arm,
            run_config=self.ctx.run_config,
            status=status,
            metrics=run_result.metrics,
            eval_metrics={
                f"{result.name}/{metric}": value for result in self._evals for metric, value in result.metrics.items()
            },
            evals=self._evals,
            run_id=run_result.run_id,
            group_name=self.plan.group_name,
            error=error,
            train_seconds=run_result.artifacts.train_seconds if run_result.artifacts else 0.0,
            eval_seconds=self._eval_seconds,
            run_result=run_result,
        )
        self._bus.publish(RunEnd(self.ctx, run_result, arm))
        return arm


class _StoppedEarlyError(Exception):
    """A callback stopped the run before its end; the message is its reason."""


def skipped_result(plan: RunPlan, why: str) -> ArmResult:
    """Return the result of a run that was not started."""
    return ArmResult(plan.arm, run_config=plan.run_config, status="cancelled", group_name=plan.group_name, error=why)


def final_state_path(arm: ArmResult) -> str | None:
    """Return the path of the full state that the run ended with, or None."""
    artifacts = arm.run_result and arm.run_result.artifacts
    rows = artifacts.checkpoints if artifacts else []
    return next((row.state_path for row in reversed(rows) if row.name == FINAL), None)


def id_text(identifier: object) -> str | None:
    """Convert an id that a callback set to text; a database may use numbers."""
    return None if identifier is None else str(to_builtins(identifier)[0])


def _error_message(error: BaseException) -> str:
    try:
        message = error.what if isinstance(error, EvsysBusError) else str(error)
    except Exception:  # raised by the error's own code
        message = ""
    text, _ = to_builtins(f"{type(error).__name__}: {message}".rstrip(": ")[:_MAX_ERROR_CHARS])
    return redact_text(text)


def _normalized_result(result: EvalResult, name: str) -> EvalResult:
    """Return a copy of an evaluation with only numeric metrics, and without fields of a wrong type."""
    plain = dict_or_empty(to_builtins(result)[0])
    fields: dict[str, Any] = {"name": name}
    for field in msgspec.structs.fields(EvalResult):
        with suppress(msgspec.ValidationError):
            fields[field.name] = msgspec.convert(plain.get(field.name), field.type)
    fields["metrics"] = _numeric_items(plain.get("metrics"))
    return EvalResult(**fields)


def _measured_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric metrics of a training row; in a row read from disk, ``nonfinite`` restores the nulls."""
    plain = dict_or_empty(to_builtins(row)[0])
    nonfinite = dict_or_empty(plain.get("nonfinite"))
    plain |= {key: float(nonfinite[key]) for key in plain if plain[key] is None and nonfinite.get(key) in _NONFINITE}
    return _numeric_items({key: value for key, value in plain.items() if key not in _NON_METRIC_KEYS})


def _numeric_items(metrics: object) -> dict[str, float]:
    """Return the entries whose values are numbers, without booleans."""
    return {
        key: value
        for key, value in dict_or_empty(to_builtins(metrics)[0]).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
