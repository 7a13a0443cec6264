"""`RunLogger` and `LoggedRun`: what loggers have in common that write a file of records for each run.

    hooks ── the run that they speak of ── `RunNotes`: what is void, late or new ── rows: stream, step, values

The streams are ``train`` and ``eval/<name>``. How a row stands in the file, and what else is said of a run, is each
logger's own. A note beside the file says of which events it has the rows (`evsys_adapters._output_notes`); where there
is none, as beside files of 0.1.0, rows that may come again are compared with those that are there.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Literal, TypeVar

import msgspec

from evsys_adapters._logged_values import EVAL, TRAIN, Table, table_of, values_of
from evsys_adapters._output_claim import has_courier, without_others
from evsys_adapters._output_notes import FIRST, NotedOutput, OutputNotes, Position, without_newer
from evsys_adapters._record_file import RecordLog
from evsys_adapters._result_fields import field, items
from evsys_adapters._run_notes import NotesT, noted, notes_in, packed, unpacked
from evsys_adapters._runs import first_step_of, is_carried, is_run_of, rank_of_event, ranked_key, run_id, step_of
from evsys_bus.attached import Ranks
from evsys_bus.callback import Callback
from evsys_bus.context import (
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    Prediction,
    TrainingBatch,
)
from evsys_bus.errors import RetryLaterError
from evsys_bus.savepoints import Mark, Savepoints

_MOST_DOUBTFUL: Final = 10_000
"""Rows of which is remembered that they may be void: every mark carries them."""


class LoggedRun(Generic[NotesT]):
    """One run, and the rows on their way to its file.

    Args:
        log: Its file.
        notes: What is known of it besides.
        output: Which events the file has the rows of.
        lock: Held while a method changes them, where another thread may; a lock that its owner may take again.
    """

    def __init__(
        self,
        log: RecordLog,
        notes: NotesT,
        output: NotedOutput,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.log = log
        self.output = output
        self.lock = threading.RLock() if lock is None else lock
        self.notes = notes
        self.at = 0.0
        """When the event was published that is being logged; seconds since the epoch."""
        self._recorded: set[int] | None = None
        """Keys of the rows that are in the file, while rows may come again; None until they are asked for."""
        self._newest = 0.0

    def introduced(self) -> None:
        """The training's start is given again. Rows of it may come again, unless it is known which are in the file."""
        with self.lock:
            if self.output.is_known and not self.notes.course.unplaced:
                self.notes.course.continued()
            else:
                self.notes.course.introduced()

    def begin(self, first_step: int) -> None:
        """Training starts at this step: what is run again is void."""
        with self.lock:
            if self._may_repeat():
                self.notes.course.starts_pending(first_step)
            else:
                self._carry_out(first_step)

    def add_step(self, step: int, metrics: object) -> None:
        """A row of the training; None for one that is not to be logged."""
        with self.lock:
            if not self.notes.course.begun and metrics is not None and self._is_there(TRAIN, step, values_of(metrics)):
                self.notes.course.introduced()  # there was no start, and this very event was logged before
            if self.notes.course.pending is not None and metrics is not None:
                self._decide(there=self._is_there(TRAIN, step, values_of(metrics)))
            if self.notes.steps(step):
                self._void(step)
            if metrics is not None:
                self._write(TRAIN, step, values_of(metrics))

    def add_eval(self, step: int, name: str, metrics: object) -> None:
        """A row of an eval: what was not said of it already."""
        with self.lock:
            values, stream = values_of(metrics), f"{EVAL}{name}"
            news = self.notes.news(name, step, values)
            if self.notes.course.pending is not None:
                there = not news or self._is_there(stream, step, news)
                self._decide(there=there)
                news = news if there else self.notes.news(name, step, values)
            if news:
                self._write(stream, step, news)

    def add_benchmark(self, step: int | None, result: object, predictions: object, most: int) -> None:
        """A benchmark, with so many predictions at the most; one without a step was scored after training."""
        name = str(field(result, "name") or "benchmark")
        head = f"final/{name}" if step is None else f"{EVAL}{name}"
        if step is None:
            self._conclude(head, values_of(field(result, "metrics")))
        else:
            self.add_eval(step, name, field(result, "metrics"))
        if items(predictions):
            self._show(step, head, "predictions", table_of(predictions, most))
        breakdowns = field(result, "breakdowns")
        if breakdowns:
            self._show(step, head, "breakdowns", breakdowns)

    def state(self) -> bytes:
        """What the note beside the file says of the run."""
        return noted(self.notes)

    def close(self, *, forget: bool = False) -> None:
        """Put the file in order, and write what waits; the next row opens it again."""
        with self.lock:
            if self.notes.untidy:
                self._tidy()
                self.notes.untidy = False
            self.log.close(forget=forget)

    def _is_repeated(self, key: int) -> bool:
        """Whether a row is in the file, and comes again behind a start that was given again."""
        if not self._may_repeat() or self._recorded is None:
            return False
        if key not in self._recorded and len(self.notes.doubtful) < _MOST_DOUBTFUL:
            self.notes.doubtful.append(key)
        return key in self._recorded

    def _may_repeat(self) -> bool:
        """Whether what comes now may be in the file."""
        course = self.notes.course
        if not course.unplaced:
            return False
        if self._recorded is None:
            try:
                recorded, self._newest = self._rows_there()
                self._recorded = recorded.difference(self.notes.doubtful)
            except OSError as error:
                raise RetryLaterError(f"{self.log.path} cannot be read: {error}") from error
        if self.at > self._newest:  # from here on all is new
            if course.pending is not None:
                self._carry_out(course.pending)
            course.unplaced, self._recorded = False, None
            self.notes.doubtful = []
        return course.unplaced

    def _decide(self, *, there: bool) -> None:
        """The first row behind a start that came again is in the file, or not: whether that start was carried out."""
        first, self.notes.course.pending = self.notes.course.pending, None
        if first is None:
            return
        if not there:
            self._carry_out(first)
        elif self.notes.doubtful:
            self._drop(frozenset(self.notes.doubtful))
        self.notes.doubtful = []

    def _carry_out(self, first_step: int) -> None:
        self._recorded = None
        if self.notes.starts(first_step):
            self._void(first_step)

    def _drop(self, keys: AbstractSet[int]) -> None:
        """Take the rows with these keys out of the file."""
        raise NotImplementedError

    def _rows_there(self) -> tuple[set[int], float]:
        """A key for each row in the file, and the time of the newest one."""
        raise NotImplementedError

    def _is_there(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the file has this very row, of this very time. Any: plain values."""
        raise NotImplementedError

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """Log a row. Any: plain values."""
        raise NotImplementedError

    def _conclude(self, head: str, values: Mapping[str, Any]) -> None:
        """Log what a benchmark scored after training. Any: plain values."""
        raise NotImplementedError

    def _show(self, step: int | None, head: str, what: str, shown: Table | object) -> None:
        """Log what a benchmark has to show besides numbers."""
        raise NotImplementedError

    def _void(self, first_step: int) -> None:
        """Have that step and later ones void in the file."""
        raise NotImplementedError

    def _tidy(self) -> None:
        """Put the file in order."""
        raise NotImplementedError


RunT = TypeVar("RunT", bound=LoggedRun[Any])


class _LoggerMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, bytes]
    """Their notes."""
    positions: dict[str, Position] = {}


class RunLogger(Callback, Generic[RunT, NotesT]):
    """Logs every run to a file of its own; behind a courier, a crash doubles no row in it and loses none.

    Args:
        notes: What is known of a run besides what is in its file.
        max_pred_rows: Predictions in the table of one eval.
    """

    marks_inline: ClassVar[bool] = False
    placement: ClassVar[Literal["inline", "follow"]] = "follow"
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, notes: type[NotesT], max_pred_rows: int) -> None:
        self._marks = Savepoints()
        self._has_mark = False
        self._runs: dict[str, RunT] = {}
        self._notes = notes
        self._output_notes = OutputNotes(self._marks)
        self._rewound: dict[str, tuple[NotesT, Position]] = {}
        """Runs that were known at the mark, and are still to be heard of."""
        self._left: dict[str, RunT] = {}
        """Runs whose experiment has ended since the mark."""
        self._max_pred_rows = max_pred_rows

    def on_run_start(self, ctx: LogContext) -> None:
        """Write down what the run is."""
        self._announce(self._run(ctx), ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Void what is about to be run again."""
        run = self._run(state)
        first_step = first_step_of(state)
        if is_carried(self.event):
            run.introduced()
        elif first_step is not None:
            self._once(run, lambda: run.begin(first_step))
        self._announce(run, state)

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
        """Log what the benchmark scored, and its predictions."""
        at = field(eval_result, "step") if step is None else step
        known = None if at is None else step_of(at)
        run = self._run(ctx)
        self._once(run, lambda: run.add_benchmark(known, eval_result, predictions, self._max_pred_rows))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Put the file in order."""
        del artifacts
        run = self._run(state)
        self._once(run, lambda: self._train_ends(run, state))
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the runs of the experiment."""
        for run in self._leave(ctx):
            self._once(run, lambda run=run: self._experiment_ends(run, result))
            run.close(forget=True)

    def close(self) -> None:
        """Put every file in order, write what waits, and close it; a later hook goes on where it was."""
        for run in [*self._runs.values()]:
            run.close()

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        written = [*self._left.values(), *self._runs.values()]
        for run in written:
            run.log.settle()
        files = self._output_notes.take((run.output, run.state(), [run.log.path]) for run in written)
        self._left = {}
        known = self._rewound | {key: (run.notes, run.output.position) for key, run in self._runs.items()}
        notes = packed({key: notes for key, (notes, _) in known.items()})
        return msgspec.to_builtins(_LoggerMark(files, notes, {key: position for key, (_, position) in known.items()}))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _LoggerMark)
        files = without_others(said.files, self)
        self._marks.rewind(without_newer(files, said.positions.values(), self._note_of))
        self._has_mark = True
        for key, notes in unpacked(said.runs, self._notes).items():
            position = said.positions.get(key) or Position(since=FIRST if notes.course.begun else "")
            if files is not said.files and not position.handled:
                notes.course.unplaced = True
            self._rewound[key] = (notes, position)

    def _run(self, handle: LoopState | LogContext) -> RunT:
        key = self._key(handle)
        run = self._runs.get(key)
        if run is None:
            is_followed = has_courier(self)
            notes, position = self._rewound.get(key) or (None, None)
            if is_followed and key in self._left:
                notes, position = self._left[key].notes, self._left[key].output.position
            output = NotedOutput(self._marks, position, is_followed=is_followed)
            try:
                run = self._runs[key] = self._open(handle, notes, output)
            except OSError as error:  # a row that is not written yet can wait; what is there must be known first
                raise RetryLaterError(f"the files of {key} cannot be looked at: {error}") from error
            self._rewound.pop(key, None)
            self._left.pop(key, None)
            if notes is None and not output.is_known and not self._has_mark and is_followed:  # its cursor may be lost
                run.notes.course.unplaced = True
        run.at = self.event.time
        return run

    def _key(self, handle: LoopState | LogContext) -> str:
        return ranked_key(run_id(handle), self._rank())

    def _rank(self) -> int:
        """Of the process whose event this is: each has files of its own."""
        return rank_of_event(self.event)

    def _leave(self, ctx: LogContext) -> Iterator[RunT]:
        """The runs of an experiment, which are known no longer then."""
        self._rewound = {key: notes for key, notes in self._rewound.items() if not is_run_of(key, ctx)}
        for key in [each for each in self._runs if is_run_of(each, ctx)]:
            run = self._left[key] = self._runs.pop(key)
            run.at = self.event.time
            yield run

    def _once(self, run: RunT, log: Callable[[], object]) -> None:
        """Log what the event says, unless the file has it: it comes again where a cursor was lost, or is older."""
        event = self.event
        if not run.output.is_handled(event):
            log()
            run.output.add(event)

    def _known(self, output: NotedOutput, place: Path, others: Iterable[Path] = ()) -> NotesT | None:
        """What the note of an output says of the run, if it is newer than the mark; its files are as they were then.

        Raises:
            OSError: The disk refuses it.
        """
        known = output.found(place, self._note_of(place), others)
        return None if known is None else notes_in(known, self._notes)

    def _train_ends(self, run: RunT, state: LoopState) -> None:
        """The training has ended."""
        del state
        run.notes.course.ends()

    def _experiment_ends(self, run: RunT, result: ExperimentResult) -> None:
        """The run's experiment has ended."""

    @staticmethod
    def _note_of(place: Path) -> Path:
        """Where the note of an output lies."""
        raise NotImplementedError

    def _open(self, handle: LoopState | LogContext, notes: NotesT | None, output: NotedOutput) -> RunT:
        """The run, which is heard of for the first time, or since its rewinding; then with its notes."""
        raise NotImplementedError

    def _announce(self, run: RunT, handle: LoopState | LogContext) -> None:
        """Say what the run is, where that is not said."""
        raise NotImplementedError
