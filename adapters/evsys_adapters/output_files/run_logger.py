"""`RunLogger` and `LoggedRun`: the common part of loggers that write a file of records for each run.

    hooks ── the run of the event ── `LoggedRunState`: what is void, late or new ── rows: stream, step, values

The streams are ``train``, ``eval/<name>`` and ``system``. Subclasses define how a row is encoded and what else is
logged of a run. A note beside the file records which events it has the rows of
(`evsys_adapters.output_files.output_positions`); without one, as beside files of 0.1.0, rows that may be delivered
again are compared with the existing ones.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Literal, TypeVar

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    first_step_of,
    is_repeated_start,
    is_run_of,
    list_or_empty,
    rank_of_event,
    ranked_key,
    run_id,
    step_of,
)
from evsys_adapters.common.logged_content import Content
from evsys_adapters.common.logged_values import EVAL, TRAIN, Table, table_of, values_of
from evsys_adapters.output_files.output_lease import has_courier
from evsys_adapters.output_files.output_positions import OutputRuns, Position, TrackedOutput
from evsys_adapters.output_files.record_file import RecordLog
from evsys_adapters.output_files.step_tracker import StepTracker
from evsys_adapters.system_metrics import SystemMetrics
from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback
from evsys_bus.context import (
    ContentItem,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    Prediction,
    TrainingBatch,
)
from evsys_bus.errors import RetryLaterError
from evsys_bus.savepoints import Mark

SYSTEM: Final = SystemMetrics.hook.removeprefix("on_").removesuffix("_metrics")
"""Stream of the samples of the machine."""
UNKNOWN_STEP: Final = 1 << 62
"""Larger than any step."""


class LoggedRunState(
    msgspec.Struct,
    omit_defaults=True,
    rename={"tracker": "course", "last_step": "last", "needs_reorder": "untidy", "largest_step": "top"},
):
    """State of one logged run."""

    tracker: StepTracker = msgspec.field(default_factory=StepTracker)
    last_step: int | None = None
    """The largest trained step."""
    evals: dict[str, tuple[int, dict[str, Any]]] = {}
    """The newest eval of each name: its step and values."""
    needs_reorder: bool = False
    """Whether steps came late or evals were repeated, so that the file has to be put in order."""
    described: bool = False
    """Whether the configuration was written."""
    largest_step: int = -1
    """The largest step in the file; `UNKNOWN_STEP` for a file of an earlier process."""
    unconfirmed_keys: list[int] = []
    """Keys of rows that were not in the file when they were delivered; a repeated start may show that they are void."""

    stepless: dict[str, tuple[int, str]] = {}
    """The newest artifact of each name, which a resumed program stores again: its step and digest."""

    def record_step(self, step: int) -> bool:
        """Record a step; returns whether it is the first of a training and voids rows in the file from it on."""
        is_late = self.last_step is not None and step < self.last_step
        void = self.tracker.record_step() and self.void_from(step)
        self.needs_reorder = self.needs_reorder or (is_late and not void)
        self.last_step = step if self.last_step is None else max(step, self.last_step)
        self.largest_step = max(self.largest_step, step)
        return void

    def new_values(self, name: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of an eval that were not logged yet; NaN equals NaN."""
        last_step, logged = self.evals.get(name, (step, {}))
        if last_step != step:
            logged = {}
        changed = {key: value for key, value in values.items() if key not in logged or repr(logged[key]) != repr(value)}
        self.needs_reorder = self.needs_reorder or last_step > step or any(key in logged for key in changed)
        if last_step <= step:
            self.evals[name] = (step, {**logged, **values})
        self.largest_step = max(self.largest_step, step)
        return changed

    def record_content(self, step: int) -> None:
        """Record that something other than a row of metrics was logged at a step."""
        self.needs_reorder = self.needs_reorder or (self.last_step is not None and step < self.last_step)
        self.largest_step = max(self.largest_step, step)

    def void_from(self, first_step: int) -> bool:
        """Training starts at this step; returns whether that voids rows in the file."""
        self.last_step = first_step - 1 if first_step > 0 else None
        if first_step > self.largest_step:
            return False
        self.largest_step = first_step - 1
        self.evals = {name: entry for name, entry in self.evals.items() if entry[0] < first_step}
        self.stepless = {name: entry for name, entry in self.stepless.items() if entry[0] < first_step}
        self.described = False
        return True


StateT = TypeVar("StateT", bound=LoggedRunState)


_MAX_UNCONFIRMED_KEYS: Final = 10_000
"""Every mark carries them."""
_MAX_STEPLESS: Final = 1_000


class LoggedRun(Generic[StateT]):
    """One run, and the rows on their way to its file.

    Args:
        log: Its file.
        state: State of the run that is not in the file.
        output: Which events the file has the rows of.
        lock: A reentrant lock, held while a method changes them, if another thread may.
    """

    def __init__(
        self,
        log: RecordLog,
        state: StateT,
        output: TrackedOutput,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.log = log
        self.output = output
        self.lock = threading.RLock() if lock is None else lock
        self.state = state
        self.event_time = 0.0
        """Publication time of the event being logged; seconds since the epoch."""
        self._recorded_keys: set[int] | None = None
        """Keys of the rows in the file, while rows may be delivered again; None until they are needed."""
        self._newest_time = 0.0

    def files(self) -> list[Path]:
        """Return the path of its file."""
        return [self.log.path]

    def settle(self) -> None:
        """Write buffered rows; raises OSError if the disk refuses them, or if rows were dropped."""
        self.log.settle()

    def check_written(self) -> None:
        """Raise OSError if a row is not in the file."""
        self.log.check_written()

    def resume(self) -> None:
        """The run's start event is repeated; its rows may be, unless the note records which are in the file."""
        with self.lock:
            tracker = self.state.tracker
            if self.output.is_known and not tracker.position_unknown:
                tracker.has_started, tracker.rewound = True, False
            else:
                tracker.resume()

    def begin(self, first_step: int) -> None:
        """Training starts at this step: later steps in the file become void."""
        with self.lock:
            if self._may_repeat():
                self.state.tracker.start_pending(first_step)
            else:
                self._apply_start(first_step)

    def add_step(self, step: int, metrics: object) -> None:
        """Log a training row; None only records the step."""
        with self.lock:
            if (
                not self.state.tracker.has_started
                and metrics is not None
                and self._has_row(TRAIN, step, values_of(metrics))
            ):
                self.state.tracker.resume()  # the start is missing, and this row was logged before
            if self.state.tracker.pending_start is not None and metrics is not None:
                self._resolve_pending_start(is_logged=self._has_row(TRAIN, step, values_of(metrics)))
            if self.state.record_step(step):
                self._void_from(step)
            if metrics is not None:
                self._write(TRAIN, step, values_of(metrics))

    def add_eval(self, step: int, name: str, metrics: object) -> None:
        """Log an eval: only the values that were not logged yet."""
        with self.lock:
            values, stream = values_of(metrics), f"{EVAL}{name}"
            new_values = self.state.new_values(name, step, values)
            if self.state.tracker.pending_start is not None:
                is_logged = not new_values or self._has_row(stream, step, new_values)
                self._resolve_pending_start(is_logged=is_logged)
                new_values = new_values if is_logged else self.state.new_values(name, step, values)
            if new_values:
                self._write(stream, step, new_values)

    def add_sample(self, step: int, values: object) -> None:
        """Log a sample of the machine; it is no row of the training, and voids none.

        It is left out while delivered rows are compared with existing ones: its time shows nothing about theirs,
        because samples are delivered in no order with them.
        """
        with self.lock:
            if self.state.tracker.position_unknown and (self._load_recorded_keys() or self._may_repeat()):
                return
            self._write(SYSTEM, step, values_of(values))

    def add_benchmark(self, step: int | None, result: object, predictions: object, max_predictions: int) -> None:
        """Log a benchmark with up to ``max_predictions`` predictions; one without a step was scored after training."""
        name = str(field(result, "name") or "benchmark")
        head = f"final/{name}" if step is None else f"{EVAL}{name}"
        if step is None:
            self._write_final_scores(head, values_of(field(result, "metrics")))
        else:
            self.add_eval(step, name, field(result, "metrics"))
        if list_or_empty(predictions):
            self._write_attachment(step, head, "predictions", table_of(predictions, max_predictions))
        breakdowns = field(result, "breakdowns")
        if breakdowns:
            self._write_attachment(step, head, "breakdowns", breakdowns)

    def add_content(self, step: int | None, content: Content, state_step: int | None) -> None:
        """Log a content; one without a step is logged at the current step, unless it was logged before."""
        with self.lock:
            at_step = max(self.state.last_step or 0, state_step or 0) if step is None else step
            name = f"{content.kind}/{content.name}"
            if step is None and content.digest:
                if self.state.stepless.get(name, (0, ""))[1] == content.digest:
                    return
                self.state.stepless.pop(name, None)
                if len(self.state.stepless) >= _MAX_STEPLESS:
                    del self.state.stepless[next(iter(self.state.stepless))]
                self.state.stepless[name] = (at_step, content.digest)
            self.state.record_content(at_step)
            self._write_content(at_step, content)

    def add_epoch(self, epoch: int, step: int | None, metrics: object) -> None:
        """Log an epoch's metrics at the step after which it ended; epochs that are run again are void like its rows."""
        with self.lock:
            at_step = max(self.state.last_step or 0, step or 0)
            self.state.record_content(at_step)
            values = values_of(metrics)
            self._write("epoch", at_step, values if "epoch" in values else {"epoch": epoch, **values})

    def add_summary(self, values: object) -> None:
        """Log values of the run as a whole."""
        with self.lock:
            self._write_final_scores("summary", values_of(values))

    def close(self, *, forget: bool = False) -> None:
        """Bring the file into order and write buffered rows; the next row opens it again."""
        with self.lock:
            if self.state.needs_reorder:
                self._reorder()
            self.log.close(forget_file=forget)

    def _is_repeated(self, key: int) -> bool:
        """Whether a row is in the file already, and is delivered again after a repeated start."""
        if not self._may_repeat() or self._recorded_keys is None:
            return False
        if key not in self._recorded_keys and len(self.state.unconfirmed_keys) < _MAX_UNCONFIRMED_KEYS:
            self.state.unconfirmed_keys.append(key)
        return key in self._recorded_keys

    def _may_repeat(self) -> bool:
        """Whether rows that are delivered now may be in the file."""
        tracker = self.state.tracker
        if not tracker.position_unknown:
            return False
        self._load_recorded_keys()
        if self.event_time > self._newest_time:  # everything from here on is new
            if tracker.pending_start is not None:
                self._apply_start(tracker.pending_start)
            tracker.position_unknown, self._recorded_keys = False, None
            self.state.unconfirmed_keys = []
        return tracker.position_unknown

    def _load_recorded_keys(self) -> AbstractSet[int]:
        """Return the keys of the rows that were in the file before any was delivered."""
        if self._recorded_keys is None:
            try:
                existing_keys, self._newest_time = self._existing_rows()
                self._recorded_keys = existing_keys.difference(self.state.unconfirmed_keys)
            except OSError as error:
                raise RetryLaterError(f"{self.log.path} cannot be read: {error}") from error
        return self._recorded_keys

    def _resolve_pending_start(self, *, is_logged: bool) -> None:
        """Decide about a repeated start by the row after it: if the file has that row, the start was applied before."""
        first, self.state.tracker.pending_start = self.state.tracker.pending_start, None
        if first is None:
            return
        if not is_logged:
            self._apply_start(first)
        elif self.state.unconfirmed_keys:
            self._drop_rows(frozenset(self.state.unconfirmed_keys))
        self.state.unconfirmed_keys = []

    def _apply_start(self, first_step: int) -> None:
        self._recorded_keys = None
        if self.state.tracker.start_training() and self.state.void_from(first_step):
            self._void_from(first_step)

    def _drop_rows(self, keys: AbstractSet[int]) -> None:
        """Remove the rows with these keys from the file."""
        raise NotImplementedError

    def _existing_rows(self) -> tuple[set[int], float]:
        """Return the keys of all rows in the file, and the time of the newest."""
        raise NotImplementedError

    def _has_row(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the file contains this row with the current event time."""
        raise NotImplementedError

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """Log a row."""
        raise NotImplementedError

    def _write_final_scores(self, head: str, values: Mapping[str, Any]) -> None:
        """Log the scores of a benchmark that was run after training."""
        raise NotImplementedError

    def _write_attachment(self, step: int | None, head: str, kind: str, content: Table | object) -> None:
        """Log what a benchmark has besides numbers."""
        raise NotImplementedError

    def _write_content(self, step: int, content: Content) -> None:
        """Log a text, image, table or the like."""
        raise NotImplementedError

    def add_alert(self, title: str, text: str, level: str) -> None:
        """Log an alert."""
        raise NotImplementedError

    def add_config(self, changed: Mapping[str, Any], ctx: object) -> None:
        """Log changed keys of the configuration, none if tags, notes or axes of the context have changed."""
        raise NotImplementedError

    def _void_from(self, first_step: int) -> None:
        """Make this step and later ones void in the file."""
        raise NotImplementedError

    def _reorder(self) -> None:
        """Bring the file into order, and record that in the state."""
        raise NotImplementedError


RunT = TypeVar("RunT", bound=LoggedRun[Any])


class _LoggerMark(msgspec.Struct, frozen=True, rename={"run_states": "runs"}):
    files: Mark
    run_states: dict[str, bytes]
    """The `LoggedRunState` of each run, encoded: a mark is JSON, which has no NaN."""
    positions: dict[str, Position] = {}


class RunLogger(Callback, Generic[RunT, StateT]):
    """Logs every run to its own file; behind a courier, a crash neither duplicates nor loses a row.

    Args:
        state_type: The type of the run's state.
        max_pred_rows: Maximum number of predictions in the table of one eval.
        position_file_for: Returns the path of the note of an output.
    """

    marks_inline: ClassVar[bool] = False
    placement: ClassVar[Literal["inline", "follow"]] = "follow"
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, state_type: type[StateT], max_pred_rows: int, position_file_for: Callable[[Path], Path]) -> None:
        self._runs: OutputRuns[RunT, StateT] = OutputRuns(position_file_for, lambda state: state.tracker)
        self._state_type = state_type
        self._max_pred_rows = max_pred_rows
        self._position_file_for = position_file_for

    def on_run_start(self, ctx: LogContext) -> None:
        """Write the description of the run."""
        self._describe_run(self._run(ctx), ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Make the steps void that will be run again."""
        run = self._run(state)
        first_step = first_step_of(state)
        if is_repeated_start(self.event):
            run.resume()
        elif first_step is not None:
            self._once(run, lambda: run.begin(first_step))
        self._describe_run(run, state)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics."""
        del batch
        run = self._run(state)
        self._once(run, lambda: run.add_step(step_of(step_idx), metrics))

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the eval's metrics."""
        run = self._run(state)
        self._once(run, lambda: run.add_eval(step_of(step_idx), str(eval_name), metrics))

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log the benchmark's scores and predictions."""
        at = field(eval_result, "step") if step is None else step
        known = None if at is None else step_of(at)
        run = self._run(ctx)
        self._once(run, lambda: run.add_benchmark(known, eval_result, predictions, self._max_pred_rows))

    def on_epoch_end(self, state: LoopState, epoch: int, metrics: dict[str, float]) -> None:
        """Log the epoch's metrics."""
        run = self._run(state)
        self._once(run, lambda: run.add_epoch(step_of(epoch), first_step_of(state), metrics))

    def on_content(self, state: LoopState, step_idx: int | None, item: ContentItem) -> None:
        """Log a text, image, table or the like."""
        run = self._run(state)
        step = None if step_idx is None else step_of(step_idx)
        self._once(run, lambda: run.add_content(step, Content(state, item), first_step_of(state)))

    def on_summary(self, ctx: LogContext, values: dict[str, Any]) -> None:
        """Log values of the run as a whole."""
        run = self._run(ctx)
        self._once(run, lambda: run.add_summary(values))

    def on_config_update(self, ctx: LogContext, config: dict[str, Any]) -> None:
        """Log what has changed in the run's configuration."""
        run = self._run(ctx)
        self._once(run, lambda: run.add_config(config, ctx))

    def on_alert(self, ctx: LogContext, title: str, text: str, level: str) -> None:
        """Log an alert."""
        run = self._run(ctx)
        self._once(run, lambda: run.add_alert(title, text, level))

    def on_system_metrics(self, ctx: LogContext, values: dict[str, float], step: int | None) -> None:
        """Log a sample of the machine; it is left out before the run's own start, which describes the run."""
        run = self._runs.open.get(self._key(ctx))
        if run is not None:
            run.event_time = self.event.time
            run.add_sample(0 if step is None else step_of(step), values)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Bring the file into order and close it."""
        del artifacts
        run = self._run(state)
        self._once(run, lambda: self._train_ends(run, state))
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Close the files of the experiment's runs, and drop their state."""
        for run in self._remove_runs(ctx):
            self._once(run, lambda run=run: self._experiment_ends(run, result))
            run.close(forget=True)

    def close(self) -> None:
        """Bring every file into order, write buffered rows and close it; a later hook continues.

        Raises:
            OSError: Inline, the disk has refused rows, which are lost; in a courier they stay pending.
        """
        for run in [*self._runs.open.values()]:
            run.close()
        self._runs.check_written(self)

    def mark(self) -> Any:
        """Return the position of all files as plain data; their rows are synced to disk first.

        Raises:
            OSError: Rows could not be written because the disk refuses them, or were dropped.
        """
        files, states, positions = self._runs.take_mark(
            lambda state: msgspec.json.encode(msgspec.msgpack.encode(state))
        )
        encoded = {key: msgspec.msgpack.encode(state) for key, state in states.items()}
        return msgspec.to_builtins(_LoggerMark(files, encoded, positions))

    def rewind(self, mark: Any) -> None:
        """Restore the files to their state at the mark. Call it before any hook.

        Raises:
            OSError: A file cannot be cut.
        """
        saved = msgspec.convert(mark, _LoggerMark)
        decode = msgspec.msgpack.Decoder(self._state_type).decode
        states = {key: decode(encoded) for key, encoded in saved.run_states.items()}
        self._runs.rewind(self, saved.files, states, saved.positions)

    def _run(self, handle: LoopState | LogContext) -> RunT:
        key = self._key(handle)
        run = self._runs.open.get(key)
        if run is None:
            is_followed = has_courier(self)
            state, position = self._runs.known_state(key) if is_followed else self._runs.rewound.get(key, (None, None))
            output = TrackedOutput(self._runs.savepoints, position, behind_courier=is_followed)
            try:
                run = self._runs.add(key, self._open(handle, state, output))
            except OSError as error:  # a row can be buffered, but the existing rows must be known first
                raise RetryLaterError(f"the files of {key} cannot be read: {error}") from error
            if state is None and not output.is_known and self._runs.may_repeat(self):
                run.state.tracker.position_unknown = True
        run.event_time = self.event.time
        return run

    def _key(self, handle: LoopState | LogContext) -> str:
        return ranked_key(run_id(handle), self._rank())

    def _rank(self) -> int:
        """Rank of the process that published the event: each rank has its own files."""
        return rank_of_event(self.event)

    def _restored_runs(self, ctx: LogContext) -> list[str]:
        """Return the runs of an experiment, of the event's rank, that `rewind` has restored and that had no event."""
        runs = (key.partition("\0")[0] for key in self._runs.rewound if is_run_of(key, ctx))
        return [run for run in dict.fromkeys(runs) if ranked_key(run, self._rank()) in self._runs.rewound]

    def _remove_runs(self, ctx: LogContext) -> Iterator[RunT]:
        """Yield the runs of an experiment while removing them from the registry."""
        runs = self._runs
        runs.rewound = {key: state for key, state in runs.rewound.items() if not is_run_of(key, ctx)}
        for key in [each for each in runs.open if is_run_of(each, ctx)]:
            run = runs.ended[key] = runs.open.pop(key)
            run.event_time = self.event.time
            yield run

    def _once(self, run: RunT, log: Callable[[], object]) -> None:
        """Call ``log`` unless the file has the event's rows: events repeat where a cursor was lost or is older."""
        event = self.event
        if not run.output.is_handled(event):
            log()
            run.output.add(event)

    def _known(self, output: TrackedOutput, place: Path, others: Iterable[Path] = ()) -> StateT | None:
        """Return the run's state from the note of an output that is newer than the mark, and restore its files to it.

        Raises:
            OSError: The disk refuses it.
        """
        known = output.restore(place, self._position_file_for(place), others)
        if known is None:
            return None
        return msgspec.msgpack.decode(msgspec.json.decode(known, type=bytes), type=self._state_type)

    def _train_ends(self, run: RunT, state: LoopState) -> None:
        """The training has ended."""
        del state
        run.state.tracker.rewound = False

    def _experiment_ends(self, run: RunT, result: ExperimentResult) -> None:
        """The run's experiment has ended."""

    def _open(self, handle: LoopState | LogContext, state: StateT | None, output: TrackedOutput) -> RunT:
        """Open the run on its first event, or its first event after `rewind`, then with its state."""
        raise NotImplementedError

    def _describe_run(self, run: RunT, handle: LoopState | LogContext) -> None:
        """Write the description of the run if it is missing."""
        raise NotImplementedError
