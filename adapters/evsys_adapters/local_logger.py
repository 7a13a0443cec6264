"""`LocalLoggerCallback`: an experiment as a folder of files that people and scripts read without any tool.

<output_dir>/experiment.md                       the arms side by side, when the experiment has ended
<output_dir>/<run_key>/logs/                     see `evsys_adapters._run_logs`
"""

import operator
import os
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from evsys_adapters._experiment_pages import conclusion_page, experiment_page, hypothesis_of, number
from evsys_adapters._line_file import Backlog, LineFile
from evsys_adapters._marks import Mark, Marks
from evsys_adapters._params import checked
from evsys_adapters._result_fields import field, fields, items
from evsys_adapters._run_logs import RowKey, RunLogs, RunNotes
from evsys_adapters._runs import run_context, run_folder, run_id
from evsys_bus.callback import Callback
from evsys_bus.codec import to_plain
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
from evsys_bus.diagnostics import log


class LocalLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `LocalLoggerCallback` can be told."""

    print_every: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Print a line on stdout every so many steps; 0 for never."""
    keys: list[str] | None = None
    """Metrics to print, in this order. Default: all. The files always hold all."""


class _RunMark(msgspec.Struct, frozen=True):
    folder: str
    notes: RunNotes
    ended: bytes | None
    """How the run ended, packed: a mark travels as JSON, which has no NaN."""


class _LoggerMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, _RunMark]


class LocalLoggerCallback(Callback):
    """Logs training, evals, predictions, hypothesis and conclusion to files under the experiment's folder.

    Every row of an eval carries the name of its benchmark. There is one row per (name, step), and one set of
    predictions: a repeat replaces them. A benchmark tagged ``val`` goes to validation, any other to test; an eval that
    is no benchmark goes to validation. A resumed run continues its files: what they hold of its first step and later
    ones is cut, evals after training are kept. Without ``on_train_start`` the first step that is seen is the first.

    Results may be ours or anybody's: fields that they lack are left out. Rows that the disk refuses wait in memory, up
    to 16 MiB for each file, and are tried again with the next one. Where a courier delivers, a crash doubles no row and
    loses none: it is rewound to the last `mark`.
    """

    name: ClassVar[str] = "local_logger"
    Config: ClassVar[type | None] = LocalLoggerConfig

    def __init__(self, print_every: int = 1, keys: Sequence[str] | None = None) -> None:
        given = {"print_every": print_every, "keys": None if keys is None else list(keys)}
        self._config = checked(LocalLoggerConfig, given)
        self._closed = False
        self._runs: dict[str, _Run] = {}
        self._pages = Backlog("pages of local_logger")
        self._marks = Marks()

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far and that wait in memory."""
        return self._pages.waiting + sum(run.logs.waiting for run in self._runs.values())

    def on_run_start(self, ctx: LogContext) -> None:
        """Write down the hypothesis."""
        self._run(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Cut what is about to be run again."""
        self._run(state).logs.begin(state.step)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, and print them if they are due."""
        del batch
        run, step = self._run(state), operator.index(step_idx)
        run.logs.add_step(step, _apart(metrics, "metrics", {"step"}))
        every = self._config.print_every
        if every and not self._closed and ((step + 1) % every == 0 or step + 1 == state.num_steps):
            self._print(run, f"step {step + 1}/{state.num_steps}", fields(metrics))

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the eval's metrics."""
        key = RowKey(operator.index(step_idx), str(eval_name))
        self._run(state).logs.put_eval(key, _eval_row(key, metrics), None, None)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log what the benchmark scored, and its predictions."""
        at = field(eval_result, "step") if step is None else step
        key = RowKey(None if at is None else operator.index(at), str(field(eval_result, "name") or "benchmark"))
        row = _eval_row(key, field(eval_result, "metrics"))
        for name in ("benchmark_id", "breakdowns", "eval_seconds", "tags"):
            value = field(eval_result, name)
            if value:
                row[name if name not in row else f"result.{name}"] = value
        head = _head(key)
        rollouts = [head | _apart(each, "prediction", head) for each in items(predictions)]
        split = "validation" if "val" in items(field(eval_result, "tags")) else "test"
        self._run(ctx).logs.put_eval(key, row, rollouts, split)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Close the run's files; evals after training open them again."""
        del artifacts
        logs = self._run(state).logs
        logs.notes.course.ends()
        logs.flush()
        self._pages.flush()

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Remember how the run ended, for the conclusion."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        run.logs.flush()
        self._pages.flush()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Write the conclusion into every run's folder, and the experiment's page; then forget its runs."""
        root = Path(ctx.output_dir)
        inside = os.path.join(root, "")  # noqa: PTH118  # with the separator, which a Path drops
        mine = [self._runs.pop(each) for each in list(self._runs) if each.startswith(inside) or each == str(root)]
        known = {run.logs.folder for run in mine}
        earlier = [_Run(RunLogs(each.parent)) for each in sorted(root.glob("*/logs")) if each.parent not in known]
        for run in [*mine, *earlier]:
            page = conclusion_page(result, run.name, run.result, run.arm)
            self._write_page(run.logs.folder / "logs" / "conclusion.md", page)
            run.logs.flush()
        ended = [(run.logs.folder, run.arm) for run in mine if run.arm is not None]
        self._write_page(root / "experiment.md", experiment_page(result, root, ended, hypothesis_of(ctx.config)))
        self._pages.flush()

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        self._pages.settle()
        for run in self._runs.values():
            run.logs.settle()
        runs = {key: _RunMark(str(run.logs.folder), run.logs.notes, run.ended()) for key, run in self._runs.items()}
        return msgspec.to_builtins(_LoggerMark(self._marks.take(), runs))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _LoggerMark)
        self._marks.rewind(said.files)
        for key, of_run in said.runs.items():
            run = self._runs[key] = _Run(RunLogs(Path(of_run.folder), self._marks, of_run.notes))
            run.logs.notes.course.rewound = True
            if of_run.ended is not None:
                run.has_ended(of_run.ended)

    def _run(self, handle: LoopState | LogContext) -> "_Run":
        key = run_id(handle)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(RunLogs(run_folder(handle), self._marks))
        if not run.has_config:
            config = getattr(run_context(handle), "config", None)
            run.has_config = config is not None
            hypothesis = hypothesis_of(config)
            if hypothesis:
                self._write_page(run.logs.folder / "logs" / "hypothesis.md", f"# Hypothesis\n\n{hypothesis.strip()}\n")
        return run

    def _write_page(self, path: Path, page: str) -> None:
        text = page.encode(errors="backslashreplace")
        self._pages.write(partial(LineFile(path).rewrite, [text]), len(text))

    def _print(self, run: "_Run", head: str, metrics: dict[str, Any]) -> None:
        """One line. Any: metrics of every type."""
        keys = metrics if self._config.keys is None else [key for key in self._config.keys if key in metrics]
        names = [run.name] if len(self._runs) > 1 else []
        line = "  ".join([*names, head, *(f"{key} {number(metrics[key])}" for key in keys)])
        try:
            print(line, flush=True)  # noqa: T201  # print_every asks for it
        except (OSError, ValueError) as error:  # a pipe whose reader left, a closed file
            self._closed = True
            log().warning("local_logger.print_closed", error=str(error))


class _Run:
    """What is known of one run."""

    def __init__(self, logs: RunLogs) -> None:
        self.logs = logs
        self.name = logs.folder.name
        self.has_config = False
        self.result: RunResult | None = None
        self.arm: ArmResult | None = None

    def ended(self) -> bytes | None:
        """How it ended; None while it has not."""
        if self.result is None and self.arm is None:
            return None
        return msgspec.msgpack.encode(to_plain([self.result, self.arm])[0])

    def has_ended(self, packed: bytes) -> None:
        """What `ended` said; as plain data where it was not ours, which the pages read as well."""
        try:
            self.result, self.arm = msgspec.msgpack.decode(packed, type=tuple[RunResult | None, ArmResult | None])
        except msgspec.ValidationError:
            self.result, self.arm = msgspec.msgpack.decode(packed)


def _head(key: RowKey) -> dict[str, Any]:
    """What every row of an eval begins with. Any: rows hold values of every type."""
    return {"benchmark": key.benchmark, "step": key.step}


def _eval_row(key: RowKey, metrics: object) -> dict[str, Any]:
    head = _head(key)
    return head | _apart(metrics, "metrics", head)


def _apart(thing: object, what: str, taken: Container[str]) -> dict[str, Any]:
    """The fields of ``thing``; those whose names are taken are called ``<what>.<name>``.

    A thing that has no fields is the one field ``what``. Any: values of every type.
    """
    row = fields(thing)
    if not row and thing is not None and not isinstance(thing, Mapping):
        return {what: thing}
    return {f"{what}.{name}" if name in taken else name: value for name, value in row.items()}
