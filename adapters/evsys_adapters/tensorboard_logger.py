"""`TensorBoardLoggerCallback`: training, evals and predictions as TensorBoard shows them, one folder for each run.

<log_dir>/<run_key>/events.out.tfevents.0.evsys-bus      scalars ``train/<metric>``, ``eval/<name>/<metric>``; texts
"""

import operator
import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from evsys_adapters._experiment_pages import conclusion_page, hypothesis_of
from evsys_adapters._logged_values import config_of, json_of, markdown, split, table_of
from evsys_adapters._marks import Mark, Marks
from evsys_adapters._params import checked
from evsys_adapters._record_file import RecordLog
from evsys_adapters._result_fields import field, items
from evsys_adapters._run_notes import UNKNOWN, RunNotes, packed, unpacked
from evsys_adapters._runs import digest, run_context, run_folder, run_id, run_name
from evsys_adapters._tensorboard_events import EVAL, Events, needs_tensorboardx
from evsys_bus.callback import Callback
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    Prediction,
    RunResult,
    TrainingBatch,
)

FILE: Final = "events.out.tfevents.0.evsys-bus"
"""One file for each run, whatever becomes of the processes that write it."""


class TensorBoardLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `TensorBoardLoggerCallback` can be told."""

    log_dir: str | None = None
    """Each run gets a folder in it. Default: the folder ``tensorboard`` of the experiment."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 30
    """How long a row may wait in memory. Where a courier delivers it does not: a row is on disk before it counts."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Predictions in the table of one eval."""


class _TensorBoardMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, bytes]
    """Their notes."""


class TensorBoardLoggerCallback(Callback):
    """Writes what TensorBoard reads: scalars for numbers, texts for anything else, tables of predictions.

    A benchmark that was scored after training is drawn at the last step that was trained, as ``final/<name>/…``; where
    no step is known it is a text. Scalars are 32-bit floats there. A step that comes late or again is kept; when the
    training ends the file is put in order, and of an eval that was repeated the newest remains. A resumed run continues
    its file, and what is run again is void there.

    Where a courier delivers, a crash doubles no row and loses none: it is rewound to the last `mark`.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "tensorboard_logger"
    Config: ClassVar[type | None] = TensorBoardLoggerConfig
    placement: ClassVar[Literal["inline", "follow"]] = "follow"

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        flush_secs: float = 30,
        max_pred_rows: int = 100,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        given = {"log_dir": None if log_dir is None else os.fspath(log_dir), "flush_secs": flush_secs}
        self._config = checked(TensorBoardLoggerConfig, given | {"max_pred_rows": max_pred_rows})
        self._root = None if log_dir is None else Path.cwd() / log_dir
        needs_tensorboardx()
        self._clock = clock
        self._marks = Marks()
        self._runs: dict[str, _Run] = {}
        self._rewound: dict[str, RunNotes] = {}
        """Runs that were known at the mark, and are still to be heard of."""

    def on_run_start(self, ctx: LogContext) -> None:
        """Write down what the run is."""
        self._run(ctx).describe(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Void what is about to be run again."""
        run = self._run(state)
        run.begin(state.step)
        run.describe(run_context(state))

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Draw the step's metrics."""
        del batch
        self._run(state).add_step(operator.index(step_idx), metrics)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Draw the eval's metrics."""
        self._run(state).add_eval(operator.index(step_idx), str(eval_name), metrics)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Draw what the benchmark scored, and show its predictions."""
        at = field(eval_result, "step") if step is None else step
        name = str(field(eval_result, "name") or "benchmark")
        run, metrics = self._run(ctx), field(eval_result, "metrics")
        if at is None:
            head = f"final/{name}"
            run.add_final(head, metrics)
        else:
            head = f"{EVAL}{name}"
            run.add_eval(operator.index(at), name, metrics)
        if items(predictions):
            table = markdown(table_of(predictions, self._config.max_pred_rows))
            run.tell(at, f"{head}/predictions", table)
        breakdowns = field(eval_result, "breakdowns")
        if breakdowns:
            run.tell(at, f"{head}/breakdowns", _as_code(breakdowns))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Put the file in order."""
        del artifacts
        run = self._run(state)
        run.notes.course.ends()
        run.close()

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Remember how the run ended."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Write the conclusion beside every run; then forget them."""
        inside = os.path.join(ctx.output_dir, "")  # noqa: PTH118  # with the separator, which a Path drops
        for key in [each for each in self._runs if each.startswith(inside) or each == str(ctx.output_dir)]:
            run = self._runs.pop(key)
            run.tell(None, "conclusion", conclusion_page(result, run.name, run.result, run.arm))
            run.close(forget=True)
        self._rewound = {key: notes for key, notes in self._rewound.items() if not key.startswith(inside)}

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        for run in self._runs.values():
            run.log.settle()
        notes = self._rewound | {key: run.notes for key, run in self._runs.items()}
        return msgspec.to_builtins(_TensorBoardMark(self._marks.take(), packed(notes)))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _TensorBoardMark)
        self._marks.rewind(said.files)
        self._rewound = unpacked(said.runs, RunNotes)

    @cached_property
    def _events(self) -> Events:
        return Events(self._clock)

    def _run(self, handle: LoopState | LogContext) -> "_Run":
        key = run_id(handle)
        run = self._runs.get(key)
        if run is None:
            log = RecordLog(self._folder(handle, key) / FILE, self._marks, self._events, self._config.flush_secs)
            notes = self._rewound.pop(key, None) or RunNotes(top=UNKNOWN if any(log.records()) else -1)
            run = self._runs[key] = _Run(run_name(handle), log, self._events, notes)
        return run

    def _folder(self, handle: LoopState | LogContext, key: str) -> Path:
        """The run's folder: TensorBoard calls a run by its folder's path."""
        ctx = run_context(handle)
        if self._root is None:
            if ctx is None or ctx.run_key is None:
                return run_folder(handle) / "tensorboard"
            return Path(ctx.output_dir) / "tensorboard" / run_folder(handle).relative_to(ctx.output_dir)
        name, owner = run_name(handle), os.path.realpath(key.replace("\0", "\\0"))
        folder = self._root / name
        return folder if _claim(folder, owner) else self._root / f"{name}-{digest(owner)}"


class _Run:
    """One run, and the rows on their way to its file."""

    def __init__(self, name: str, log: RecordLog, events: Events, notes: RunNotes) -> None:
        self.name = name
        self.log = log
        self.notes = notes
        self.result: object = None
        self.arm: object = None
        self._events = events

    def describe(self, ctx: LogContext | None) -> None:
        """Write down configuration and hypothesis, once."""
        config = config_of(ctx)
        if self.notes.described or not config:
            return
        self.notes.described = True
        hypothesis = hypothesis_of(getattr(ctx, "config", None))
        if hypothesis:
            self.tell(None, "hypothesis", hypothesis)
        self.tell(None, "config", _as_code(config))

    def begin(self, first_step: int) -> None:
        if self.notes.starts(first_step):
            self.log.add(self._events.restart(first_step))

    def add_step(self, step: int, metrics: object) -> None:
        if self.notes.steps(step):
            self.log.add(self._events.restart(step))
        self._draw(step, "train", *split(metrics))

    def add_eval(self, step: int, name: str, metrics: object) -> None:
        numbers, texts = split(metrics)
        news = self.notes.news(name, step, {**numbers, **texts})
        for known in (numbers, texts):
            for key in known.keys() - news.keys():
                del known[key]
        self._draw(step, f"{EVAL}{name}", numbers, texts)

    def add_final(self, head: str, metrics: object) -> None:
        """A benchmark without a step: drawn at the last one, never at 0."""
        numbers, texts = split(metrics)
        if self.notes.last is None:
            numbers, texts = {}, {key: str(value) for key, value in numbers.items()} | texts
        self._draw(self.notes.last or 0, head, numbers, texts)

    def tell(self, step: int | None, tag: str, text: str) -> None:
        at = self.notes.last if step is None else step
        self.log.add(self._events.text(at or 0, tag, text))

    def close(self, *, forget: bool = False) -> None:
        if self.notes.untidy:
            tidied = self._events.tidied(self.log.records())
            self.log.add(self._events.restart(0))  # appended, for whoever is reading the file
            for each in tidied:
                self.log.add(each)
            self.notes.untidy = False
        self.log.close(forget=forget)

    def _draw(self, step: int, head: str, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if numbers:
            self.log.add(self._events.scalars(step, {f"{head}/{key}": value for key, value in numbers.items()}))
        for key, text in texts.items():
            self.log.add(self._events.text(step, f"{head}/{key}", text))


def _claim(folder: Path, owner: str) -> bool:
    """Whether the folder is this run's, now or since an earlier day; runs of other experiments may be called alike."""
    mark = folder / ".run"
    words = os.fsencode(owner)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark.exists() and mark.read_bytes():
            return mark.read_bytes() == words
        mark.write_bytes(words)
    except OSError:  # a disk that refuses this refuses rows as well, which wait
        pass
    return True


def _as_code(value: object) -> str:
    return f"```json\n{json_of(value)}\n```"
