"""`TrainingLoop`: the reference loop. Read it from top to bottom, and copy what you need.

It owns the order in which things are written, saved and published.

    TrainStart
    every step:    build_batch, forward_backward, optim_step
                   metrics.jsonl,      then StepEnd
                   checkpoints.jsonl,  then Checkpoint                       if one is due
                   each evaluator due, then Eval, then BenchmarkEval         if it is a benchmark
    final:         checkpoints.jsonl,  then Checkpoint                       unless it raised
    TrainEnd                                                                 also when it raised
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.bus import EventBus, Health
from evsys_bus.context import LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import TrainingError
from evsys_bus.events import BenchmarkEval, Checkpoint, Eval, Event, StepEnd, TrainEnd, TrainStart
from evsys_bus.front import Run
from evsys_bus.location import local_path
from evsys_bus.run_files import (
    RowFile,
    journal_directory,
    lock_folder,
    remove_error_file,
    unwritable_error,
    write_error_file,
)
from evsys_bus.tasks import Receipt, run_to_completion
from evsys_bus.training.checkpoints import FINAL, Checkpoints
from evsys_bus.training.protocols import Backend, Benchmark, Evaluator, StepBuilder

_CANCELLED: Final = "cancelled"
_TRAIN_ON_FIX: Final = (
    'to train on, remove "stopped" from its row in checkpoints.jsonl, and the callback that stops it; a callback that '
    "only interrupts a run sets state.stopped_early = True beside its request_stop"
)


class TrainingLoop:
    """Trains for ``num_steps`` steps, writes metrics and checkpoints to the run's directory, and publishes events.

    Args:
        backend: Trains the model.
        step_builder: Builds the batch of each step.
        num_steps: The horizon of the whole run, including the steps before a resume.
        output_dir: The run's directory, created if necessary. Default: ``ctx.run_dir``.
        evaluators: Score the model during training, each at its own interval, one after another.
        callbacks: Callbacks of the loop's own bus, which is open while the loop runs and records into
            ``<output_dir>/journal``.
        bus: An open bus to publish to instead; it stays open.
        ctx: The run's context. Default: one for a run that is named after its directory.
        save_every: Steps between checkpoints; 0 saves only the final one.
        steps_per_epoch: Number of steps in one pass over the data; for the manifest.
        resume: Continue the run in the directory from its last full state, or from the start if there is none. A run
            that reached its horizon continues if ``num_steps`` is larger now. A run that a callback stopped for good
            (`LoopState.request_stop`, and not ``stopped_early``) takes no further step, and ends with the same result.
        redact: Of the loop's own bus: further keys that are not recorded, see `EventBus`.
        reveal: Likewise: keys that are recorded even if they look like credentials.

    Raises:
        TrainingError: Arguments contradict each other, or ``ctx.run_key`` points outside ``ctx.output_dir``.
        SettingError: The directory is a URL.
        HookError: A callback has a hook that could never be called.
    """

    def __init__(
        self,
        backend: Backend,
        step_builder: StepBuilder,
        *,
        num_steps: int,
        output_dir: Path | str | None = None,
        evaluators: Iterable[Evaluator] = (),
        callbacks: Iterable[object] | None = None,
        bus: EventBus | None = None,
        ctx: LogContext | None = None,
        save_every: int = 0,
        steps_per_epoch: int | None = None,
        resume: bool = False,
        redact: Iterable[str] = (),
        reveal: Iterable[str] = (),
    ) -> None:
        if bus is not None and callbacks is not None:
            raise TrainingError("a loop takes a bus or callbacks, not both", fix="give the callbacks to the bus")
        run_dir = local_path(output_dir, "output_dir") if output_dir else _run_dir(ctx)
        self.backend = backend
        self.step_builder = step_builder
        self.evaluators = tuple(evaluators)
        self.save_every = save_every
        self.steps_per_epoch = steps_per_epoch
        self.resume = resume
        used_bus = bus or EventBus(callbacks or (), journal=journal_directory(run_dir), redact=redact, reveal=reveal)
        self.metrics = RowFile(run_dir / "metrics.jsonl", redaction=used_bus.redaction)
        self.checkpoints = Checkpoints(backend, run_dir / "checkpoints.jsonl")
        self.state = LoopState(
            step=0,
            num_steps=num_steps,
            output_dir=run_dir,
            backend=backend,
            log_store=self.metrics,
            checkpoint_mgr=self.checkpoints,
            ctx=ctx or LogContext(output_dir=run_dir.parent, run_key=run_dir.name),
        )
        self.skipped_steps = 0
        """Number of steps without data."""
        self.failed_evals: Counter[str] = Counter()
        """Number of errors of each evaluator, by name."""
        self.last_metrics: dict[str, Any] = {}
        """Metrics of the last step, including those that hooks added."""
        self.artifacts: LoopArtifacts | None = None
        """What the loop produced, also if it raised; None until it has ended."""
        self._bus = used_bus
        self._is_own_bus = bus is None
        self._faults = FaultLog()
        self._done = 0  # number of steps done, and so the index of the next one
        self._started_at = 0.0

    async def run(self) -> LoopArtifacts:
        """Train to the end, or until a hook requests a stop; can be called once.

        On cancellation (the bus cancels on SIGTERM), the loop finishes the current step, saves ``final`` and publishes
        TrainEnd before it raises CancelledError. A second cancellation aborts at once.

        Raises:
            TrainingError: The directory cannot be written, is in use, or holds a run and ``resume`` is false.
            BaseException: Raised by the backend or the step builder; re-raised after TrainEnd.
        """
        if self._started_at:
            raise TrainingError("this loop ran already", fix="make a new TrainingLoop, with resume=True to go on")
        with lock_folder(self.state.output_dir, "the run's directory"):
            self._open_run_dir()
            async with self._bus if self._is_own_bus else nullcontext(self._bus) as bus:
                return await run_to_completion(self._train(bus), on_cancel=self._cancel)

    @property
    def receipt(self) -> Receipt | None:
        """The receipt of the loop's bus; None until that bus has closed."""
        return self._bus.receipt

    def health(self) -> Health:
        """Return the current counts of the loop's bus; callable from any thread."""
        return self._bus.health()

    def _cancel(self) -> None:
        if not self.state.stop_requested:  # else the run ends after this step anyway, with its own reason
            self.state.request_stop(_CANCELLED)

    async def _train(self, bus: EventBus) -> LoopArtifacts:
        state = self.state
        self._started_at = time.monotonic()
        try:
            if self.resume:
                await self._resume()
            bus.publish(TrainStart(state))
            with Run(bus, state).attached():
                while self._done < state.num_steps and not state.stop_requested:
                    await self._run_step(bus, self._done)
                    self._done += 1
                    # A backend may never suspend; tasks of hooks and a cancellation get to run here.
                    await asyncio.sleep(0)
                await self._save(bus, FINAL, self._done - 1, stopped=_stopped_for_good(state))
            remove_error_file(state.output_dir)
        except BaseException as error:
            state.error = error
            if not should_propagate(error, cancelled=_is_being_cancelled()):
                write_error_file(state.output_dir, error)
            raise
        finally:
            self.metrics.flush()
            self.checkpoints.flush()
            self._faults.flush()
            if self.skipped_steps:
                log().warning(
                    "step.skipped", run=state.run_key, count=self.skipped_steps, why="their batches are empty"
                )
            self.artifacts = self._artifacts()
            bus.publish(TrainEnd(state, self.artifacts))
        return self.artifacts

    async def _run_step(self, bus: EventBus, step_idx: int) -> None:
        self.state.step = step_idx
        batch = await self.step_builder.build_batch(step_idx)
        if batch is None or _is_empty(batch):
            self.skipped_steps += 1
        else:
            metrics = await self._train_step(batch)
            self.metrics.log_metrics(step_idx, metrics)
            self.last_metrics = metrics
            bus.publish(StepEnd(self.state, step_idx, batch, metrics))
        if _is_due(self.save_every, step_idx):
            await self._save(bus, f"step-{step_idx:06d}", step_idx)
        for evaluator in self.evaluators:
            if _is_due(evaluator.every, step_idx):
                await self._evaluate(bus, evaluator, step_idx)

    async def _train_step(self, batch: TrainingBatch) -> dict[str, float]:
        started = time.perf_counter()
        metrics = {**batch.metrics, **await self.backend.forward_backward(batch)}
        metrics.update(await self.backend.optim_step() or {})
        return metrics | {"step_seconds": time.perf_counter() - started}

    async def _save(self, bus: EventBus, name: str, step_idx: int, stopped: str | None = None) -> None:
        epoch = max(step_idx, 0) // self.steps_per_epoch if self.steps_per_epoch else 0
        row = await self.checkpoints.save(name, step_idx=step_idx, epoch=epoch, stopped=stopped)
        bus.publish(Checkpoint(self.state, row))

    async def _evaluate(self, bus: EventBus, evaluator: Evaluator, step_idx: int) -> None:
        started = time.perf_counter()
        try:
            score = await evaluator.evaluate(self.state)
            events = list(self._eval_events(evaluator.name, step_idx, score, time.perf_counter() - started))
        except BaseException as error:
            if should_propagate(error, cancelled=_is_being_cancelled()):
                raise
            self.failed_evals[evaluator.name] += 1
            self._faults.warn("evaluator.failed", evaluator.name, error=error, evaluator=evaluator.name, step=step_idx)
        else:
            for event in events:
                bus.publish(event)

    def _eval_events(
        self, name: str, step_idx: int, score: Mapping[str, float] | Benchmark, seconds: float
    ) -> Iterable[Event]:
        if isinstance(score, Mapping):
            yield Eval(self.state, step_idx, name, dict(score))
            return
        result, predictions = score
        result = msgspec.structs.replace(result, step=step_idx, eval_seconds=result.eval_seconds or seconds)
        yield Eval(self.state, step_idx, result.name, dict(result.metrics))
        assert self.state.ctx is not None
        yield BenchmarkEval(self.state.ctx, result, predictions, step=step_idx)

    async def _resume(self) -> None:
        """Load the last full state, and remove the metrics of later steps, which will run again."""
        self._done = self.state.step = first_step = await self.checkpoints.resume()
        removed = self.metrics.retain(lambda row: isinstance(row.get("step"), int) and row["step"] < first_step)
        for row in self.metrics.rows():
            self.last_metrics = row
        run, stopped = self.state.ctx and self.state.ctx.run_key, self.checkpoints.stopped
        log().info("training.resumed", run=run, first_step=first_step, rows_cut=removed)
        if stopped is not None:
            self.state.request_stop(stopped)
            log().warning(
                "training.stopped_earlier", run=run, after_step=first_step - 1, why=stopped, fix=_TRAIN_ON_FIX
            )

    def _open_run_dir(self) -> None:
        run_dir = self.state.output_dir
        if not self.resume and (self.metrics.path.exists() or self.checkpoints.manifest.exists()):
            raise TrainingError(
                f"{run_dir} holds a run already", fix="resume it (resume=True), or choose another output_dir"
            )
        try:
            self.metrics.path.touch()
        except OSError as error:
            raise unwritable_error(run_dir, "the run's directory", error) from error

    def _artifacts(self) -> LoopArtifacts:
        return LoopArtifacts(
            run_dir=str(self.state.output_dir),
            manifest_path=str(self.checkpoints.manifest),
            checkpoints=list(self.checkpoints.rows),
            total_requested_steps=self.state.num_steps,
            train_seconds=time.monotonic() - self._started_at,
        )


def _stopped_for_good(state: LoopState) -> str | None:
    """Return the reason if a hook ended the run for good; None if a resume should continue it."""
    if not state.stop_requested or state.stopped_early or state.stop_reason == _CANCELLED:
        return None
    return str(state.stop_reason or "a callback asked for it")


def _is_due(every: int, step_idx: int) -> bool:
    return every > 0 and (step_idx + 1) % every == 0


def _is_empty(batch: TrainingBatch) -> bool:
    """Whether the batch has zero examples; data without a length counts as not empty (the backend may hold it)."""
    return hasattr(batch.data, "__len__") and len(batch.data) == 0


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _run_dir(ctx: LogContext | None) -> Path:
    if ctx is None:
        raise TrainingError("the loop has nowhere to write", fix="give it an output_dir or a ctx")
    run_dir, root = local_path(ctx.run_dir, "ctx.output_dir"), local_path(ctx.output_dir, "ctx.output_dir")
    if not Path(os.path.normpath(run_dir)).is_relative_to(os.path.normpath(root)):
        raise TrainingError(
            f"the run_key {ctx.run_key!r} leads out of the experiment's directory {root}",
            fix="give the ctx a run_key that is the name of one folder, or the loop an output_dir",
        )
    return run_dir


EXIT: Final = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Requests to exit the program or the coroutine; they always propagate."""


def should_propagate(error: BaseException, *, cancelled: bool) -> bool:
    """Whether an error must propagate: a request to exit, or a cancellation of the work itself.

    All other errors are isolated, whatever they inherit from: a panic in Rust code (tokenizers, polars) is not an
    Exception.

    Args:
        error: The error that the isolated code raised.
        cancelled: Whether the work is being cancelled; if not, the isolated code raised a CancelledError by itself.
    """
    return isinstance(error, EXIT) or (cancelled and isinstance(error, asyncio.CancelledError))
