"""`RunLogger` and `LoggedRun`: what loggers have in common that write a file of records for each run.

    hooks ── the run that they speak of ── `RunNotes`: what is void, late or new ── rows: stream, step, values

The streams are ``train`` and ``eval/<name>``. How a row stands in the file, and what else is said of a run, is each
logger's own.
"""

import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

import msgspec

from evsys_adapters._logged_values import EVAL, TRAIN, Table, table_of, values_of
from evsys_adapters._marks import Mark, Marks
from evsys_adapters._record_file import RecordLog
from evsys_adapters._result_fields import field, items
from evsys_adapters._run_notes import NotesT, packed, unpacked
from evsys_adapters._runs import run_id
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


class LoggedRun(Generic[NotesT]):
    """One run, and the rows on their way to its file."""

    def __init__(self, log: RecordLog, notes: NotesT) -> None:
        self.log = log
        self.notes = notes

    def begin(self, first_step: int) -> None:
        """Training starts at this step: what is run again is void."""
        if self.notes.starts(first_step):
            self._void(first_step)

    def add_step(self, step: int, metrics: object) -> None:
        """A row of the training; None for one that is not to be logged."""
        if self.notes.steps(step):
            self._void(step)
        if metrics is not None:
            self._write(TRAIN, step, values_of(metrics))

    def add_eval(self, step: int, name: str, metrics: object) -> None:
        """A row of an eval: what was not said of it already."""
        news = self.notes.news(name, step, values_of(metrics))
        if news:
            self._write(f"{EVAL}{name}", step, news)

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

    def close(self, *, forget: bool = False) -> None:
        """Put the file in order, and write what waits."""
        if self.notes.untidy:
            self._tidy()
            self.notes.untidy = False
        self.log.close(forget=forget)

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


class RunLogger(Callback, Generic[RunT, NotesT]):
    """Logs every run to a file of its own; behind a courier, a crash doubles no row in it and loses none.

    Args:
        notes: What is known of a run besides what is in its file.
        max_pred_rows: Predictions in the table of one eval.
    """

    placement: ClassVar[Literal["inline", "follow"]] = "follow"

    def __init__(self, notes: type[NotesT], max_pred_rows: int) -> None:
        self._marks = Marks()
        self._runs: dict[str, RunT] = {}
        self._notes = notes
        self._rewound: dict[str, NotesT] = {}
        """Runs that were known at the mark, and are still to be heard of."""
        self._max_pred_rows = max_pred_rows

    def on_run_start(self, ctx: LogContext) -> None:
        """Write down what the run is."""
        self._announce(self._run(ctx), ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Void what is about to be run again."""
        run = self._run(state)
        run.begin(state.step)
        self._announce(run, state)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics."""
        del batch
        self._run(state).add_step(operator.index(step_idx), metrics)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the eval's metrics."""
        self._run(state).add_eval(operator.index(step_idx), str(eval_name), metrics)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log what the benchmark scored, and its predictions."""
        at = field(eval_result, "step") if step is None else step
        known = None if at is None else operator.index(at)
        self._run(ctx).add_benchmark(known, eval_result, predictions, self._max_pred_rows)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Put the file in order."""
        del artifacts
        run = self._run(state)
        run.notes.course.ends()
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the runs of the experiment."""
        del result
        for run in self._leave(ctx):
            run.close(forget=True)

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        for run in self._runs.values():
            run.log.settle()
        notes: dict[str, NotesT] = self._rewound | {key: run.notes for key, run in self._runs.items()}
        return msgspec.to_builtins(_LoggerMark(self._marks.take(), packed(notes)))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _LoggerMark)
        self._marks.rewind(said.files)
        self._rewound = unpacked(said.runs, self._notes)

    def _run(self, handle: LoopState | LogContext) -> RunT:
        key = run_id(handle)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = self._open(handle, key, self._rewound.pop(key, None))
        return run

    def _leave(self, ctx: LogContext) -> Iterator[RunT]:
        """The runs of an experiment, which are known no longer then."""
        inside = os.path.join(ctx.output_dir, "")  # noqa: PTH118  # with the separator, which a Path drops
        self._rewound = {key: notes for key, notes in self._rewound.items() if not key.startswith(inside)}
        for key in [each for each in self._runs if each.startswith(inside) or each == str(ctx.output_dir)]:
            yield self._runs.pop(key)

    def _open(self, handle: LoopState | LogContext, key: str, notes: NotesT | None) -> RunT:
        """The run, which is heard of for the first time, or since its rewinding; then with its notes."""
        raise NotImplementedError

    def _announce(self, run: RunT, handle: LoopState | LogContext) -> None:
        """Say what the run is, where that is not said."""
        raise NotImplementedError
