"""`HostedDelivery`: sends events to EvSys' hosted service: executes the gateway's operations, in order.

    ExperimentStart    create_experiment                RunStart        create_run (after create_group, if needed)
    GroupStart         create_group                     StepEnd, Eval   log_metrics, one per row
    Checkpoint         add_checkpoint                   BenchmarkEval   create_eval, then add_prediction, one per row
    RunEnd             update_run, with the summary     ExperimentEnd   update_experiment

Rows are grouped like in EvSys' own client: those of steps until there are ``flush_every``, those of evals until the
next step; at the end of a batch all are sent. Several requests run concurrently, without overtaking each other.

Objects are created exactly once: see `evsys_adapters.evsys_api.creation`.

Delivery is at least once. A row of metrics may be sent again with the same values and step: the last one counts. A
server that completes a request after the client's timeout, or that has no list operations, may store a row twice.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

import anyio

from evsys_adapters.common.hook_arguments import field as field_of
from evsys_adapters.common.hook_arguments import list_or_empty, run_id, step_of
from evsys_adapters.common.logged_values import values_of
from evsys_adapters.evsys_api.creation import MAX_EVAL_IDS, MAX_NAMES, PendingEval, Run, ServerObjectCreator
from evsys_adapters.evsys_api.gateway import EvsysLoggerConfig, Gateway, OperationRefusedError, configured_project
from evsys_adapters.evsys_api.records import (
    LEFT_OUT,
    Args,
    checkpoint_args,
    eval_args,
    numbers_of,
    prediction_args,
    without_nonfinite,
)
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import BatchTooLargeError, DeliveryError, RejectedError
from evsys_bus.events import (
    BenchmarkEval,
    Checkpoint,
    Envelope,
    Eval,
    Event,
    ExperimentEnd,
    ExperimentStart,
    GroupStart,
    RunEnd,
    RunStart,
    StepEnd,
    Summary,
    TrainEnd,
    TrainStart,
)

WRITE_SECONDS: Final = 2.0
"""Maximum time before the sent part of a batch is acknowledged, so that a crash repeats little."""

Key = tuple[str, int]
"""Stream and sequence number of an event."""


class EvsysRun(Event, frozen=True):
    """A run that started training without a RunStart, as seen by the inline half."""

    run: str
    ctx: LogContext


class _Row(NamedTuple):
    key: Key
    run: Run
    step: int
    split: str
    metrics: dict[str, float]
    left_out: list[str]


class HostedDelivery:
    """Sends events to the hosted service.

    Args:
        config: The adapter's parameters.
        server_url: Returns the URL of the service; called with the first request.
    """

    def __init__(self, config: EvsysLoggerConfig, server_url: Callable[[], str]) -> None:
        self._config: Final = config
        self._server_url: Final = server_url
        self._gateway: Gateway | None = None
        self._stored_project: str | None = None
        self._contexts: dict[str, object] = {}
        """Contexts of runs, by path."""
        self._outcomes: dict[Key, str | None] = {}
        """Finished events of the batch; the reason for rejected ones."""
        self._deferred_rows: dict[str, list[_Row]] = {}
        self._ready_rows: list[_Row] = []
        self._pending_evals: dict[Key, PendingEval] = {}
        """Evals that were not sent completely."""
        self._faults = FaultLog()
        self._creator = ServerObjectCreator(self._call, self._faults)
        self._known = self._creator.known
        self._handlers: dict[type, Callable[[Any, Envelope], Awaitable[None]]] = {
            ExperimentStart: self._on_experiment_start,
            GroupStart: self._on_group_start,
            RunStart: self._on_run_start,
            EvsysRun: self._on_run_start,
            TrainStart: self._on_train_start,
            StepEnd: self._on_step_end,
            Eval: self._on_eval,
            Checkpoint: self._on_checkpoint,
            BenchmarkEval: self._on_benchmark_eval,
            TrainEnd: self._on_train_end,
            Summary: self._on_summary,
            RunEnd: self._on_run_end,
            ExperimentEnd: self._on_experiment_end,
        }

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Send the batch, or as much of it as possible now."""
        self._deferred_rows, self._ready_rows = {}, []
        deadline, end, failure = time.monotonic() + WRITE_SECONDS, len(batch), None
        try:
            for index, envelope in enumerate(batch):
                await self._handle(envelope)
                if time.monotonic() > deadline:
                    end = index + 1
                    break
            for rows in self._deferred_rows.values():
                self._ready_rows += rows
            self._deferred_rows = {}
            await self._send_ready()
        except asyncio.CancelledError:
            sent = (self._outcomes.get((each.stream, each.seq), "not yet") is None for each in batch)
            done = next((index for index, each in enumerate(sent) if not each), len(batch))
            if not done:
                raise
            return done  # so that it is not repeated by a later process
        except (DeliveryError, OSError) as error:  # acknowledge first what was sent before it
            failure = error
        return self._batch_result(batch, end, failure)

    async def close(self) -> None:
        """Close the connections."""
        self._faults.flush()
        if self._gateway is not None:
            await self._gateway.close()
            self._gateway = None

    def mark(self) -> dict[str, Any]:
        """Return the server's IDs of our objects as plain data."""
        self._creator.prune()
        return {
            "project_id": configured_project(self._config) or self._stored_project,
            **self._known.to_builtins(),
        }

    def rewind(self, mark: dict[str, Any], *, has_known_ids: bool) -> None:
        """Restore the server's IDs from a mark, unless they are those of another server."""
        self._stored_project = mark.get("project_id")
        if has_known_ids:
            self._known.load(mark)

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Remember the contexts of open runs, for runs that are not created yet."""
        for each in starts:
            if isinstance(each.event, RunStart | EvsysRun):
                self._contexts[run_id(each.event.ctx)] = each.event.ctx

    async def _handle(self, envelope: Envelope) -> None:
        key = (envelope.stream, envelope.seq)
        if key in self._outcomes:
            return
        event = envelope.event
        handler = self._handlers.get(type(event))
        if handler is None:
            self._outcomes[key] = None
            return
        if not isinstance(event, StepEnd | Eval):
            await self._send_ready()
        try:
            await handler(event, envelope)
        except OperationRefusedError as refused:
            self._outcomes[key] = refused.what
            self._pending_evals.pop(key, None)
        else:
            if not isinstance(event, StepEnd | Eval):
                self._outcomes[key] = None

    def _batch_result(self, batch: Sequence[Envelope], end: int, error: Exception | None) -> int | None:
        """Return how much of the batch is done, or raise its error."""
        keys = [(each.stream, each.seq) for each in batch]
        done = next((index for index, key in enumerate(keys) if key not in self._outcomes), len(keys))
        done = min(done, end)
        rejected = {index: why for index, key in enumerate(keys[:done]) if (why := self._outcomes[key]) is not None}
        if rejected and done < len(keys):  # a rejection applies to a whole batch, and later events are not done
            done = min(rejected)
            if not done:
                raise BatchTooLargeError(rejected[0])
        elif error is not None and not done:
            raise error
        for key in keys[:done]:
            del self._outcomes[key]
        if rejected and done == len(keys):
            raise RejectedError(rejected)
        return None if done == len(keys) else done

    async def _send_ready(self) -> None:
        """Send the ready rows, several concurrently; two of the same step in order."""
        while self._ready_rows:
            rows: list[_Row] = []
            steps: set[tuple[str, int, str]] = set()
            for row in self._ready_rows:
                if (row.run.path, row.step, row.split) in steps:
                    break
                steps.add((row.run.path, row.step, row.split))
                rows.append(row)
            self._ready_rows = self._ready_rows[len(rows) :]
            await self._run_concurrently(rows, self._send_row)

    async def _run_concurrently(self, jobs: Sequence[Any], send: Callable[[Any], Awaitable[None]]) -> None:
        """Run the jobs concurrently, started in order; none is started after a failure.

        Raises:
            DeliveryError, OSError: The first error.
        """
        if len(jobs) <= self._config.in_flight or self._config.in_flight == 1:  # few jobs run in sequence
            for job in jobs:
                await send(job)
            return
        remaining = iter(jobs)  # shared: each worker takes the next one
        errors: list[Exception] = []

        async def work() -> None:
            for job in remaining:
                try:
                    await send(job)
                except (DeliveryError, OSError) as error:  # let the running jobs finish
                    errors.append(error)
                if errors:
                    return

        async with anyio.create_task_group() as group:
            for _ in range(min(self._config.in_flight, len(jobs))):
                group.start_soon(work)
        if errors:
            raise errors[0]

    async def _send_row(self, row: _Row) -> None:
        try:
            await self._log(row, row.metrics)
        except OperationRefusedError as refused:
            self._outcomes[row.key] = refused.what
        else:
            self._warn_left_out(row.run, row.left_out)
            self._outcomes[row.key] = None

    async def _log(self, row: _Row, metrics: dict[str, float]) -> None:
        """Send one row; in halves if it is too large."""
        args = {"run_id": row.run.id, "step": row.step, "metrics": metrics, "split": row.split}
        try:
            await self._call("log_metrics", args)
        except BatchTooLargeError as error:
            if len(metrics) == 1:
                raise OperationRefusedError(error.what) from error
            names = list(metrics)
            for half in (names[: len(names) // 2], names[len(names) // 2 :]):
                await self._log(row, {name: metrics[name] for name in half})

    async def _on_experiment_start(self, event: ExperimentStart, envelope: Envelope) -> None:
        experiment = self._creator.experiment_of(event.ctx, envelope)
        await self._creator.ensure_experiment(experiment, event.ctx, self._project())
        if experiment.ended:
            await self._call("update_experiment", {"experiment_id": experiment.id, "patch": {"status": "running"}})
            experiment.ended = False

    async def _on_group_start(self, event: GroupStart, envelope: Envelope) -> None:
        experiment = self._creator.experiment_of(event.ctx, envelope)
        await self._creator.ensure_experiment(experiment, event.ctx, self._project())
        await self._creator.ensure_group(experiment, event.ctx, event.group_name)

    async def _on_run_start(self, event: RunStart | EvsysRun, envelope: Envelope) -> None:
        self._contexts[run_id(event.ctx)] = event.ctx
        run = self._creator.run_of(event.ctx, envelope)
        run.announced = run.announced or isinstance(event, RunStart)
        await self._creator.ensure_run(run, event.ctx, self._project())
        await self._resume_run(run)

    async def _on_train_start(self, event: TrainStart, envelope: Envelope) -> None:
        del envelope
        run = self._known.run_at.get(run_id(event.state))
        if run is not None and run.id is not None:
            await self._resume_run(run)

    async def _on_step_end(self, event: StepEnd, envelope: Envelope) -> None:
        run = await self._run_of(event.state, envelope)
        step = step_of(event.step_idx)
        run.last_step = max(run.last_step, step)
        self._add_row(run, envelope, step, event.metrics, "train")

    async def _on_eval(self, event: Eval, envelope: Envelope) -> None:
        run = await self._run_of(event.state, envelope)
        self._add_row(run, envelope, step_of(event.step_idx), event.metrics, "val", f"{event.eval_name}/")

    async def _on_checkpoint(self, event: Checkpoint, envelope: Envelope) -> None:
        args = checkpoint_args(event.row)
        if args is not None:
            await self._creator.ensure_checkpoint(await self._run_of(event.state, envelope), args)

    async def _on_benchmark_eval(self, event: BenchmarkEval, envelope: Envelope) -> None:
        run = await self._run_of(event.ctx, envelope)
        result, key = event.eval_result, (envelope.stream, envelope.seq)
        known_step = field_of(result, "step") if event.step is None else event.step
        step = None if known_step is None else step_of(known_step)
        name = str(field_of(result, "name") or "benchmark")
        slot = -2 - run.last_step if step is None else step
        if slot in run.evals.get(name, ()):  # run again after a resume; the gateway cannot replace an eval
            self._faults.warn("evsys.eval_kept", (run.path, name), run=run.path, name=name, step=step, why=_EVAL_EXISTS)
            return
        pending = self._pending_evals.setdefault(key, PendingEval())
        args = {"run_id": run.id, **eval_args(result, step)}
        await self._creator.ensure_eval(run, pending, key, args)
        await self._send_predictions(run, pending, list_or_empty(event.predictions), step)
        del self._pending_evals[key]
        run.evals.setdefault(name, []).append(slot)  # not before all is stored: a crash would leave the eval without it
        if pending.id is not None:
            run.claimed = [*run.claimed, pending.id][-MAX_EVAL_IDS:]
        left_out = list_or_empty(field_of(args["breakdowns"], LEFT_OUT))
        self._warn_left_out(run, [f"{name}/{each}" for each in left_out])
        if pending.refused:
            first, why = next(iter(pending.refused.items()))
            number = f"{len(pending.refused)} of {len(event.predictions)} predictions"
            raise OperationRefusedError(f"{number}, the first {first}: {why}")

    async def _on_train_end(self, event: TrainEnd, envelope: Envelope) -> None:
        del envelope
        run = self._known.run_at.get(run_id(event.state))
        if run is not None and run.id is not None and not run.announced:
            error = getattr(event.state, "error", None)
            stopped = getattr(event.state, "stop_reason", None) == "cancelled"
            await self._end_run(run, "failed" if error else "cancelled" if stopped else "completed", error)

    async def _on_summary(self, event: Summary, envelope: Envelope) -> None:
        run = await self._run_of(event.ctx, envelope)
        left_out: list[str] = []
        run.summary |= without_nonfinite(values_of(event.values), left_out)
        self._warn_left_out(run, [f"summary/{each}" for each in left_out])

    async def _on_run_end(self, event: RunEnd, envelope: Envelope) -> None:
        run = await self._run_of(event.ctx, envelope)
        status, error = (field_of(event.run_result, name) or field_of(event.arm, name) for name in ("status", "error"))
        await self._end_run(run, status, error)

    async def _on_experiment_end(self, event: ExperimentEnd, envelope: Envelope) -> None:
        experiment = self._creator.experiment_of(event.ctx, envelope)
        await self._creator.ensure_experiment(experiment, event.ctx, self._project())
        patch: Args = {name: _text(field_of(event.result, name)) for name in ("status", "conclusion")}
        score = without_nonfinite(field_of(event.result, "best_score"), [])
        if score is not None:
            patch["best_score"] = score
        await self._call("update_experiment", {"experiment_id": experiment.id, "patch": patch})
        experiment.ended = True

    async def _end_run(self, run: Run, status: object, error: object) -> None:
        self._ready_rows += self._deferred_rows.pop(run.path, [])
        await self._send_ready()
        patch: Args = {"status": _text(status)}
        if error:
            patch["error_message"] = str(error)
        if run.left_out or run.summary:
            patch["summary"] = run.summary | ({LEFT_OUT: dict(run.left_out)} if run.left_out else {})
        await self._call("update_run", {"run_id": run.id, "patch": patch})
        run.ended = True
        self._contexts.pop(run.path, None)

    async def _resume_run(self, run: Run) -> None:
        """Mark a run that had ended as running again."""
        if run.ended:
            await self._call("update_run", {"run_id": run.id, "patch": {"status": "running"}})
            run.ended = False

    def _add_row(self, run: Run, envelope: Envelope, step: int, metrics: object, split: str, prefix: str = "") -> None:
        numbers = numbers_of(metrics, prefix)
        key = (envelope.stream, envelope.seq)
        if not numbers.values:
            self._warn_left_out(run, numbers.left_out)
            self._outcomes[key] = None
            return
        deferred = self._deferred_rows.setdefault(run.path, [])
        deferred.append(_Row(key, run, step, split, *numbers))
        if split == "train" and sum(each.split == "train" for each in deferred) >= self._config.flush_every:
            self._ready_rows += self._deferred_rows.pop(run.path)

    def _warn_left_out(self, run: Run, names: list[str]) -> None:
        if names:
            for name in names:
                if name in run.left_out or len(run.left_out) < MAX_NAMES:
                    run.left_out[name] = run.left_out.get(name, 0) + 1
            self._faults.warn(
                "evsys.values_left_out",
                run.path,
                run=run.path,
                values=sum(run.left_out.values()),
                names=dict(list(run.left_out.items())[:5]),
                why="EvSys accepts only finite numbers; the rest of the row was sent",
            )

    async def _send_predictions(self, run: Run, pending: PendingEval, predictions: list[Any], step: int | None) -> None:
        await self._creator.find_predictions(run, pending)
        unconfirmed: set[int] = set()

        async def send(index: int) -> None:
            args = {"run_id": run.id, "eval_id": pending.id, **prediction_args(predictions[index], index, step)}
            unconfirmed.add(index)
            try:
                await self._call("add_prediction", args)
            except (OperationRefusedError, BatchTooLargeError) as error:  # the other predictions are unaffected
                pending.refused[index] = error.what
            unconfirmed.discard(index)
            pending.sent.add(index)

        try:
            await self._run_concurrently(
                [index for index in range(len(predictions)) if index not in pending.sent], send
            )
        finally:
            pending.doubtful = bool(unconfirmed)

    async def _run_of(self, handle: object, envelope: Envelope) -> Run:
        """Return the run of an event; creates it if it was not announced.

        Raises:
            RefusedError: The server rejects it.
        """
        run = self._known.run_at.get(run_id(handle))
        if run is not None and run.id is not None:
            return run
        await self._send_ready()
        ctx = self._contexts.get(run_id(handle), handle)
        run = run or self._creator.run_of(ctx, envelope)
        await self._creator.ensure_run(run, ctx, self._project())
        return run

    def _project(self) -> str | None:
        return configured_project(self._config) or self._stored_project

    async def _call(self, op: str, args: Args) -> Any:
        if self._gateway is None:
            self._gateway = Gateway(self._config, self._server_url())
        return await self._gateway.call(op, args)


_EVAL_EXISTS: Final = "it exists since an earlier attempt at the step, and the gateway cannot replace an eval"


def _text(value: object) -> str | None:
    return None if value is None else str(value)
