"""`LocalLoggerCallback`: an experiment as a folder of files that people and scripts can read without tools.

<output_dir>/experiment.md                       comparison of the arms, since the first run has started
<output_dir>/<run_key>/logs/                     see `evsys_adapters.output_files.run_logs`
"""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import msgspec

from evsys_adapters.common.hook_arguments import (
    experiment_folder,
    field,
    fields,
    first_step_of,
    is_repeated_start,
    is_run_of,
    list_or_empty,
    num_steps_of,
    rank_of_event,
    ranked_folder,
    ranked_key,
    run_context,
    run_folder,
    run_id,
    step_of,
)
from evsys_adapters.common.logged_content import stored_row
from evsys_adapters.common.logged_values import redacted, redacted_page, redacted_row, values_of
from evsys_adapters.common.params import as_list, validate_params
from evsys_adapters.common.terminal import LinePrinter, alert_line, one_line, step_label
from evsys_adapters.output_files.experiment_pages import conclusion_page, experiment_page, hypothesis_of
from evsys_adapters.output_files.output_lease import OutputCandidates, has_courier, owner_of
from evsys_adapters.output_files.output_positions import (
    OutputRuns,
    Position,
    TrackedOutput,
    position_file_in,
)
from evsys_adapters.output_files.run_logs import RowKey, RunLogs, RunLogsState
from evsys_adapters.output_files.step_tracker import StepTracker
from evsys_bus.callback import Callback
from evsys_bus.codec import to_builtins
from evsys_bus.context import (
    ArmResult,
    ContentItem,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    Prediction,
    RunResult,
    TrainingBatch,
)
from evsys_bus.files import AppendFile, Backlog, list_folder
from evsys_bus.savepoints import Mark

_LOGS: Final = "logs"


class LocalLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `LocalLoggerCallback`."""

    print_every: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Print a line on stdout every this many steps; 0 for never."""
    keys: list[str] | None = None
    """Metrics to print, in this order. Default: all. The files always contain all."""
    max_rollouts: Annotated[int, msgspec.Meta(ge=0)] = 64
    """Maximum number of trajectories of one step in the file; a last row has the number of the others."""
    max_train_rows: Annotated[int, msgspec.Meta(ge=0)] = 10_000
    """Maximum number of training examples in the file; a last row has the number of the others."""


class _RunMark(
    msgspec.Struct, frozen=True, rename={"logs_state": "notes", "encoded_result": "ended", "logs_name": "logs"}
):
    folder: str
    logs_state: RunLogsState
    encoded_result: bytes | None
    """The run's result, encoded: a mark is JSON, which has no NaN."""
    logs_name: str = "logs"
    """Name of the logs folder in ``folder``."""
    position: Position = msgspec.field(default_factory=Position)


class _RunState(msgspec.Struct, frozen=True, rename={"logs_state": "notes", "encoded_result": "ended"}):
    """What the note beside the run's files has of it."""

    logs_state: RunLogsState
    encoded_result: bytes | None


class _LoggerMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, _RunMark]


class LocalLoggerCallback(Callback):
    """Logs training, evals, predictions, hypothesis and conclusion to files in the experiment's folder.

    Every row of an eval has the name of its benchmark. There is one row per (name, step), and one set of predictions: a
    repeated eval replaces them. A benchmark tagged ``val`` counts as validation, any other as test; an eval that is no
    benchmark counts as validation. Logs of ranks above 0 go to ``<run_key>/rank<rank>/``. A resumed run continues its
    files: rows from its first step on are cut, evals after training remain. Without ``on_train_start`` the first step
    that is logged is the first.

    If two adapters log one run, the second one's folder is ``logs-2``, also in later processes, and its page of the
    experiment ``experiment-2.md``; a WARNING names the folder. An adapter with a new name continues in the folder of
    one that is no longer subscribed.

    Behind a courier it also logs the samples of `SystemMetricsCallback`.

    Results may be of any class: missing fields are omitted. Rows that the disk refuses stay in memory, up to 16 MiB
    for each file, and retried with the next one. Behind a courier, a crash neither duplicates nor loses a row: the
    files are rewound to the last `mark`.
    """

    marks_inline: ClassVar[bool] = False
    name: ClassVar[str] = "local_logger"
    Config: ClassVar[type | None] = LocalLoggerConfig
    ranks = "rank0"

    def __init__(
        self,
        print_every: int = 1,
        keys: Sequence[str] | None = None,
        max_rollouts: int = 64,
        max_train_rows: int = 10_000,
    ) -> None:
        params = {"print_every": print_every, "keys": as_list(keys)}
        params |= {"max_rollouts": max_rollouts, "max_train_rows": max_train_rows}
        self._config = validate_params(LocalLoggerConfig, params)
        self._lines = LinePrinter("local_logger.print_closed")
        self._pages = Backlog("pages of local_logger")
        self._runs: OutputRuns[_Run, _RunState] = OutputRuns(position_file_in, lambda state: state.logs_state.tracker)
        self._experiments: set[Path] = set()
        """Folders of the experiments that have started."""

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far and that are in memory."""
        return self._pages.pending + sum(run.logs.waiting for run in self._runs.open.values())

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Note that there is an experiment, whose page is written once it has a run."""
        self._experiments.add(experiment_folder(ctx))

    def on_run_start(self, ctx: LogContext) -> None:
        """Write the hypothesis, and the page of the experiment."""
        run = self._run(ctx)
        run.context = ctx
        if not is_repeated_start(self.event):
            run.result = run.arm = None
            self._write_open_experiment(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Cut the rows of steps that will be run again."""
        run, first = self._run(state), first_step_of(state)
        if run.logs.output.has(self.event):
            return
        if is_repeated_start(self.event):
            run.logs.resume()
        elif first is not None:
            run.logs.begin(first)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, and print them if they are due."""
        del batch
        run, step = self._run(state), step_of(step_idx)
        if run.logs.output.has(self.event):
            return
        run.logs.add_step(step, _prefix_taken(metrics, "metrics", {"step"}))
        every, num_steps = self._config.print_every, num_steps_of(state)
        if every and ((step + 1) % every == 0 or step + 1 == num_steps):
            row = fields(metrics)
            keys = row if self._config.keys is None else [key for key in self._config.keys if key in row]
            names = [one_line(run.name)] if len(self._runs.open) > 1 else []
            shown = redacted_row({key: row[key] for key in keys})
            values = [f"{one_line(key)} {_format_value(value)}" for key, value in shown.items()]
            self._lines.print("  ".join([*names, step_label(step, num_steps), *values]))

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the eval's metrics."""
        key, logs = RowKey(step_of(step_idx), str(eval_name)), self._run(state).logs
        if not logs.output.has(self.event):
            logs.put_eval(key, _eval_row(key, metrics), None, None)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log the benchmark's scores and predictions."""
        logs = self._run(ctx).logs
        if logs.output.has(self.event):
            return
        at = field(eval_result, "step") if step is None else step
        key = RowKey(None if at is None else step_of(at), str(field(eval_result, "name") or "benchmark"))
        row = _eval_row(key, field(eval_result, "metrics"))
        for name in ("benchmark_id", "breakdowns", "eval_seconds", "tags"):
            value = field(eval_result, name)
            if value:
                row[name if name not in row else f"result.{name}"] = value
        head = {"benchmark": key.benchmark, "step": key.step}
        rollouts = [head | _prefix_taken(each, "prediction", head) for each in list_or_empty(predictions)]
        split = "validation" if "val" in list_or_empty(field(eval_result, "tags")) else "test"
        logs.put_eval(key, row, rollouts, split)

    def on_rollout(
        self, state: LoopState, step_idx: int, rollouts: list[Any], rollout_items: Sequence[Any] = ()
    ) -> None:
        """Log the trajectories of a step, up to ``max_rollouts``, each with its item."""
        logs, step = self._run(state).logs, step_of(step_idx)
        if logs.output.has(self.event):
            return
        given, items, limit = list_or_empty(rollouts), list_or_empty(rollout_items), self._config.max_rollouts
        rows: list[dict[str, Any]] = []
        for index, each in enumerate(given[:limit]):
            row = redacted_row(_prefix_taken(each, "rollout", {"step", "item"}))
            rows.append(row | ({"item": redacted(to_builtins(items[index])[0])} if len(items) == len(given) else {}))
        logs.add_rollouts(step, [*rows, *_omitted(len(given), limit)])

    def on_train_data(self, ctx: LogContext, rows: list[Any]) -> None:
        """Write the training examples, up to ``max_train_rows``, in place of earlier ones."""
        logs = self._run(ctx).logs
        if logs.output.has(self.event):
            return
        given, limit = list_or_empty(rows), self._config.max_train_rows
        shown = [redacted_row(_prefix_taken(each, "row", ())) for each in given[:limit]]
        logs.put_data([*shown, *_omitted(len(given), limit)])

    def on_content(self, state: LoopState, step_idx: int | None, item: ContentItem) -> None:
        """Log what was stored, and where; the file remains in the run's folder ``media``."""
        logs = self._run(state).logs
        step = None if step_idx is None else step_of(step_idx)
        if not logs.output.has(self.event):
            logs.add_content(step, stored_row(step, item))

    def on_alert(self, ctx: LogContext, title: str, text: str, level: str) -> None:
        """Log the alert, and print it unless nothing is printed."""
        logs = self._run(ctx).logs
        if logs.output.has(self.event):
            return
        row = redacted_row({"level": level, "title": title, "text": text})
        logs.add_alert({"time": self.event.time, **row})
        if self._config.print_every:
            self._lines.print(alert_line(level, row["title"], row["text"]), level=level)

    def on_system_metrics(self, ctx: LogContext, values: dict[str, float], step: int | None) -> None:
        """Log a sample of the machine; it may come before the run's start or after its end."""
        key = ranked_key(run_id(ctx), rank_of_event(self.event))
        is_open, run = key in self._runs.open, self._run(ctx)
        head = {"time": self.event.time, "step": step}
        run.logs.add_sample(self.event, head | _prefix_taken(values, "values", head))
        if not is_open:
            run.logs.flush()
            self._remove_run(key)

    def on_epoch_end(self, state: LoopState, epoch: int, metrics: dict[str, float]) -> None:
        """Log the epoch's metrics."""
        logs = self._run(state).logs
        if not logs.output.has(self.event):
            row = _prefix_taken(metrics, "metrics", {"step", "epoch"})
            logs.add_epoch(first_step_of(state) or 0, {"epoch": step_of(epoch), **row})

    def on_summary(self, ctx: LogContext, values: dict[str, Any]) -> None:
        """Remember the values for the pages."""
        logs = self._run(ctx).logs
        if not logs.output.has(self.event):
            logs.set_page_values(values_of(values), {})

    def on_config_update(self, ctx: LogContext, config: dict[str, Any]) -> None:
        """Remember the changes for the pages."""
        logs = self._run(ctx).logs
        if not logs.output.has(self.event):
            logs.set_page_values({}, values_of(config))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Close the run's files; evals after training open them again."""
        del artifacts
        logs = self._run(state).logs
        if not logs.output.has(self.event):
            logs.end_training()
        logs.flush()
        self._pages.flush()

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Remember the run's result for the conclusion."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        self._write_open_experiment(ctx)
        run.logs.flush()
        self._pages.flush()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Write the conclusion into every run's folder, and the experiment's page; then forget its runs."""
        root = experiment_folder(ctx)
        self._experiments.discard(root)
        own_runs = [self._remove_run(each) for each in list(self._runs.open) if is_run_of(each, ctx)]
        for run in own_runs:
            with suppress(OSError):
                run.logs.acquire_folder()
        known = {run.logs.folder for run in own_runs}
        others = [folder for name in list_folder(root) if (folder := root / name) not in known]
        number = max((run.logs.logs.name for run in own_runs), default=_LOGS).removeprefix(_LOGS)
        earlier = [_Run(RunLogs(logs)) for folder in others if list_folder(logs := folder / f"{_LOGS}{number}")]
        for run in [*own_runs, *earlier]:
            known = run.logs.page_values()
            page = conclusion_page(result, run.name, run.result, run.arm, known.summary, known.config)
            self._write_page(run.logs.acquire_folder, "conclusion.md", page)
            run.logs.flush()
        ended = [(run.logs.folder, run.arm) for run in own_runs if run.arm is not None]
        page = experiment_page(result, root, ended, hypothesis_of(field(ctx, "config")))
        self._write_page(lambda: root, f"experiment{number}.md", page)
        self._pages.flush()

    def close(self) -> None:
        """Write buffered rows and close the files; a later hook opens them again and continues.

        Raises:
            OSError: Inline, the disk has refused rows, which are lost; in a courier they stay pending.
        """
        for run in self._runs.open.values():
            run.logs.flush()
            run.logs.release()
        self._pages.flush()
        self._lines.flush()
        self._runs.check_written(self)
        if not has_courier(self):
            self._pages.check_written()

    def mark(self) -> Any:
        """Return the position of all files as plain data; their rows are synced to disk first.

        Raises:
            OSError: Rows could not be written because the disk refuses them, or were dropped.
        """
        self._pages.drain()
        files, states, positions = self._runs.take_mark(msgspec.json.encode)
        marks: dict[str, _RunMark] = {}
        for key, run in self._runs.open.items():
            logs, state = run.logs, states[key]
            folder, name = str(logs.folder), logs.logs.name
            marks[key] = _RunMark(folder, state.logs_state, state.encoded_result, name, positions[key])
        return msgspec.to_builtins(_LoggerMark(files, marks))

    def rewind(self, mark: Any) -> None:
        """Restore the files to their state at the mark. Call it before any hook.

        Raises:
            OSError: A file cannot be cut.
        """
        saved = msgspec.convert(mark, _LoggerMark)
        states = {key: _RunState(each.logs_state, each.encoded_result) for key, each in saved.runs.items()}
        self._runs.rewind(self, saved.files, states, {key: each.position for key, each in saved.runs.items()})
        for key, run_mark in saved.runs.items():
            folder, (state, position) = Path(run_mark.folder, run_mark.logs_name), self._runs.rewound[key]
            run = self._runs.add(key, self._new_run(folder, state.logs_state, position))
            run.restore_result(state.encoded_result)

    def _remove_run(self, key: str) -> "_Run":
        """Remove and return the run; if its rows are being matched with its files, that state is retained."""
        run = self._runs.ended[key] = self._runs.open.pop(key)
        if run.logs.state.tracker.is_matching:
            logs = RunLogs(run.logs.logs, self._runs.savepoints, run.logs.state, run.output)
            continued = self._runs.open[key] = _Run(logs)
            continued.has_config = run.has_config
        return run

    def _new_run(self, logs: Path, state: RunLogsState, position: Position | None) -> "_Run":
        savepoints = self._runs.savepoints
        return _Run(RunLogs(logs, savepoints, state, TrackedOutput(savepoints, position)))

    def _run(self, handle: object) -> "_Run":
        rank = rank_of_event(self.event)
        key = ranked_key(run_id(handle), rank)
        run = self._runs.open.get(key)
        if run is None:
            state, position = self._runs.known_state(key)
            tracker = StepTracker(position_unknown=self._runs.may_repeat(self))
            logs_state = RunLogsState(tracker=tracker) if state is None else state.logs_state
            logs = ranked_folder(run_folder(handle), rank) / _LOGS
            run = self._runs.add(key, self._new_run(logs, logs_state, position))
        run.logs.output.behind_courier = has_courier(self)
        if run.logs.candidates is None:
            folder, fix = run.logs.folder / _LOGS, "give each experiment a folder of its own"
            run.logs.candidates = OutputCandidates(
                self, owner_of(handle), [folder], self._runs.savepoints, fix, is_folder=True
            )
        encoded = run.logs.load_state()
        if encoded is not None:
            state = msgspec.json.decode(encoded, type=_RunState)
            run.logs.restore(state.logs_state)
            run.restore_result(state.encoded_result)
        if not run.has_config:
            config = field(run_context(handle), "config")
            run.has_config = config is not None
            hypothesis = hypothesis_of(config)
            if hypothesis:
                self._write_page(run.logs.acquire_folder, "hypothesis.md", f"# Hypothesis\n\n{hypothesis.strip()}\n")
        return run

    def _write_open_experiment(self, ctx: LogContext) -> None:
        """Write the page of an experiment that has started and not ended."""
        root = experiment_folder(ctx)
        if root not in self._experiments:
            return
        runs = [run for key, run in self._runs.open.items() if is_run_of(key, ctx)]
        number = max(run.logs.logs.name for run in runs).removeprefix(_LOGS)
        arms = [(run.logs.folder, run.arm or run.as_open_arm()) for run in runs]
        result = {"name": field(field(ctx, "config"), "name"), "status": "running", "arms": [arm for _, arm in arms]}
        page = experiment_page(result, root, arms, hypothesis_of(field(ctx, "config")))
        self._write_page(lambda: root, f"experiment{number}.md", page)

    def _write_page(self, acquire_folder: Callable[[], Path], name: str, page: str) -> None:
        text = redacted_page(page).encode(errors="backslashreplace")
        self._pages.write(lambda: AppendFile(acquire_folder() / name).rewrite([text]), len(text))


class _Run:
    """State of one run."""

    def __init__(self, logs: RunLogs) -> None:
        self.logs = logs
        self.name = logs.folder.name
        self.has_config = False
        self.result: RunResult | None = None
        self.arm: ArmResult | None = None
        self.context: object = None
        """The context of its RunStart; None if it had none here."""

    @property
    def output(self) -> TrackedOutput:
        return self.logs.output

    @property
    def state(self) -> _RunState:
        return _RunState(self.logs.state, self.encode_result())

    def files(self) -> list[Path]:
        return self.logs.paths()

    def settle(self) -> None:
        self.logs.settle()

    def check_written(self) -> None:
        self.logs.check_written()

    def as_open_arm(self) -> dict[str, Any]:
        """Return what the page of the experiment shows of a run that has not ended."""
        name, config = field(self.context, "group_name"), field(self.context, "run_config")
        return {
            "name": name or self.name,
            "status": "running",
            "run_config": config,
            "summary": self.logs.page_values().summary,
        }

    def encode_result(self) -> bytes | None:
        """Encode the run's result; None while it has not ended."""
        if self.result is None and self.arm is None:
            return None
        return msgspec.msgpack.encode(to_builtins([self.result, self.arm])[0])

    def restore_result(self, encoded: bytes | None) -> None:
        """Restore the result of `encode_result`; as plain data if it has another type, which the pages accept too."""
        if encoded is None:
            return
        try:
            self.result, self.arm = msgspec.msgpack.decode(encoded, type=tuple[RunResult | None, ArmResult | None])
        except msgspec.ValidationError:
            self.result, self.arm = msgspec.msgpack.decode(encoded)


def _format_value(value: object) -> str:
    """Format a metric for printing: five significant digits, empty for None."""
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else one_line(value)


def _eval_row(key: RowKey, metrics: object) -> dict[str, Any]:
    head = {"benchmark": key.benchmark, "step": key.step}
    return head | _prefix_taken(metrics, "metrics", head)


def _omitted(count: int, limit: int) -> list[dict[str, Any]]:
    """Return the row that follows the first ``limit`` of ``count`` rows; none if those are all."""
    return [{"omitted": count - limit, "total": count}] if count > limit else []


def _prefix_taken(obj: object, prefix: str, taken: Container[str]) -> dict[str, Any]:
    """Return the fields of ``obj``; those whose names are taken get the prefix ``<what>.``.

    A value without fields becomes the single field ``prefix``.
    """
    row = fields(obj)
    if not row and obj is not None and not isinstance(obj, Mapping):
        return {prefix: obj}
    return {f"{prefix}.{name}" if name in taken else name: value for name, value in row.items()}
