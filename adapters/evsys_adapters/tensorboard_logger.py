"""`TensorBoardLoggerCallback`: training, evals and predictions in TensorBoard's format, one folder per run.

<log_dir>/<run_key>/events.out.tfevents.<n>.evsys-bus      scalars ``train/<metric>``, ``eval/<name>/<metric>``; texts;
                                                           ``<kind>/<name>`` of content; hyperparameters

n counts how often the file was sorted. When a row comes late, TensorBoard's fast loader drops the run's points at later
steps. So a file with late rows is sorted while the run continues, at most one hundredth of the time, and gets a new
name: a running loader takes the first point of a new file for a restart, and reads the whole file in place of what it
has.
"""

import asyncio
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, cast

import msgspec

from evsys_adapters.common.hook_arguments import (
    experiment_folder,
    field,
    output_dir_of,
    ranked_folder,
    run_context,
    run_folder,
    run_key,
    run_name,
)
from evsys_adapters.common.logged_content import Content
from evsys_adapters.common.logged_values import (
    TRAIN,
    Table,
    config_of,
    json_of,
    markdown,
    prefixed,
    split_numbers,
    stable_key,
    text_of,
    values_of,
)
from evsys_adapters.common.params import check_local_path, require_package, validate_params
from evsys_adapters.output_files.experiment_pages import conclusion_page, hypothesis_of
from evsys_adapters.output_files.output_lease import OutputCandidates, OutputLease, is_of_run, owner_of
from evsys_adapters.output_files.output_positions import TrackedOutput, position_file_in
from evsys_adapters.output_files.record_file import RecordLog
from evsys_adapters.output_files.run_logger import UNKNOWN_STEP, LoggedRun, LoggedRunState, RunLogger
from evsys_adapters.output_files.tensorboard_events import Events
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopState, RunResult
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import EvsysBusError, RetryLaterError
from evsys_bus.location import local_path, short_digest
from evsys_bus.savepoints import Savepoints, hidden_name, names_with_versions

_NAME: Final = re.compile(r"events\.out\.tfevents\.(\d+)\.evsys-bus")
FILE: Final = "events.out.tfevents.0.evsys-bus"
"""The event file of a run, continued by every process that logs it; a file that was sorted has another number."""
_MIN_REORDER_SECONDS: Final = 1.0
_MAX_HPARAMS: Final = 100
_MAX_HPARAM_LETTERS: Final = 500
_MAX_MEDIA_BYTES: Final = 16 << 20
"""TensorBoard reads whole event files into memory."""
_SHOWN_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "audio/wav"})
_REORDER_TIME_SHARE: Final = 100
"""At most one part in this many of the time is spent on sorting files."""


class EventFiles:
    """The event files in a run's folder, as they were when the run was opened: one, except after a crash.

    Args:
        folder: The run's folder.
        savepoints: The callback's savepoints; what a crashed process wrote after its last mark is undone first.
    """

    def __init__(self, folder: Path, savepoints: Savepoints) -> None:
        self._folder = folder
        known = self.names_in(folder)
        for name in known:
            savepoints.recover(os.path.abspath(folder / name))  # noqa: PTH100  # savepoints use this form
            (folder / f"{hidden_name(name)}.new").unlink(missing_ok=True)
        self._number = max(known.values(), default=0)
        full = [name for name in known if _size(folder / name)]
        self.newest = folder / max(full, key=known.__getitem__, default=FILE)
        """The file to be continued."""
        self.empty = [folder / name for name in known if name not in full and name != self.newest.name]
        """Sorted files that were undone; a loader may have read them, and reads no name twice."""

    @staticmethod
    def names_in(folder: Path) -> dict[str, int]:
        """Return the names of existing event files, and of those with an earlier version, with their numbers."""
        try:
            names = {each.name for each in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            names = set[str]()
        found = map(_NAME.fullmatch, names | names_with_versions(folder))
        return {each[0]: int(each[1]) for each in found if each is not None}

    def next_name(self) -> Path:
        """Return a path that no file here has had."""
        self._number += 1
        return self._folder / f"events.out.tfevents.{self._number:010}.evsys-bus"

    def clean(self) -> None:
        """Remove the empty files whose names are no longer used."""
        for path in self.empty:
            if not _size(path):
                path.unlink(missing_ok=True)
        self.empty = []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class TensorBoardRunState(LoggedRunState, omit_defaults=True):
    """State of one run."""

    hparams: dict[str, bool | float | str] = msgspec.field(default_factory=dict[str, bool | float | str])
    """The configuration, flattened."""
    has_hparams: bool = False
    """Whether they were written: TensorBoard reads only the first ones of a run."""
    config_updates: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """All changes of the configuration so far."""
    metric_tags: list[str] = msgspec.field(default_factory=list[str])
    """The tags of the last training row."""


class TensorBoardRun(LoggedRun[TensorBoardRunState]):
    """One run; its name is that of its folder."""

    def __init__(
        self,
        name: str,
        files: EventFiles,
        log: RecordLog,
        events: Events,
        state: TensorBoardRunState,
        output: TrackedOutput,
        lock: AbstractContextManager[object],
        schedule_reorder: Callable[[], object],
        max_table_rows: int,
    ) -> None:
        super().__init__(log, state, output, lock)
        self.name = name
        self.lease: OutputLease | None = None
        """Lease of its folder; None once it was released."""
        self.result: object = None
        self.arm: object = None
        self._files = files
        self._events = events
        self._faults = FaultLog()
        self._schedule_reorder = schedule_reorder
        self._max_table_rows = max_table_rows
        self._reorder_due = 0.0
        state.needs_reorder = state.needs_reorder or bool(files.empty)

    def add_text(self, step: int | None, tag: str, text: str) -> None:
        """Log a text; one without a step is logged at the last step."""
        with self.lock:
            at_step = self.state.last_step if step is None else step
            self._events.event_time = self.event_time
            self._add(self._events.text(at_step or 0, tag, text))

    def add_alert(self, title: str, text: str, level: str) -> None:
        """See `LoggedRun.add_alert`; a text, whose tag is the title."""
        self.add_text(None, f"alert/{title}", f"**{level}** {text or title}")

    def add_config(self, changed: Mapping[str, Any], ctx: object) -> None:
        """See `LoggedRun.add_config`; a text, and hyperparameters unless there was a training row."""
        del ctx
        if changed:
            values = values_of(changed)
            self.set_hparams(values)
            self.state.config_updates |= values
            self.add_text(None, "config update", _as_code(self.state.config_updates))

    def set_hparams(self, config: Mapping[str, Any]) -> None:
        """Add hyperparameters, which are written before the first training row."""
        if not self.state.has_hparams:
            known = {**self.state.hparams, **dict(_flat(config))}
            self.state.hparams = dict(itertools.islice(known.items(), _MAX_HPARAMS))

    def end(self, *, failed: bool) -> None:
        """Log the end of the run, and which metrics the table of hyperparameters shows."""
        with self.lock:
            self._write_hparams()
            if self.state.hparams:
                step = self.state.last_step or 0
                self._events.event_time = self.event_time
                self._add(self._events.experiment(step, self.state.hparams, self.state.metric_tags))
                self._add(self._events.session_end(step, failed=failed))

    def _write_hparams(self) -> None:
        if self.state.hparams and not self.state.has_hparams:
            self._events.event_time = self.event_time
            self._add(self._events.session_start(self.state.last_step or 0, self.state.hparams))
            self.state.has_hparams = True

    def close(self, *, forget: bool = False) -> None:
        """See `LoggedRun.close`; sorts the file whenever that was done last."""
        with self.lock:
            super().close(forget=forget)
            self._faults.flush()

    def reorder_when_due(self) -> float | None:
        """Sort the file if that is due; returns the seconds until it is, None if the file is in order."""
        with self.lock:
            if not self.state.needs_reorder:
                return None
            wait = self._reorder_due - time.monotonic()
            if wait <= 0:
                self._reorder()
                wait = self._reorder_due - time.monotonic()
            return max(wait, 0.0) if self.state.needs_reorder else None

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        numbers, texts = split_numbers(values)
        tags = _tags(stream, values)
        if stream == TRAIN:
            self._write_hparams()
            self.state.metric_tags = [tags[key] for key in itertools.islice(numbers, _MAX_HPARAMS)]
        if numbers:
            self._events.event_time = self.event_time
            self._add(self._events.scalars(step, {tags[key]: value for key, value in numbers.items()}))
        for key, text in texts.items():
            self.add_text(step, tags[key], text)
        if self.reorder_when_due() is not None:
            self._schedule_reorder()

    def _add(self, payload: bytes) -> None:
        if not (self.state.tracker.position_unknown and self._is_repeated(stable_key(payload))):
            self.log.add(payload)

    def _existing_rows(self) -> tuple[set[int], float]:
        newest = 0.0
        found: dict[int, int] = {}
        for payload in self.log.records():
            newest = max(newest, self._events.time_of(payload))
            step, is_restart = self._events.step_of(payload)
            if is_restart:  # readers do not see what it voids
                found = {key: each for key, each in found.items() if each < step}
            else:
                found[stable_key(payload)] = step
        return set(found), newest

    def _drop_rows(self, keys: AbstractSet[int]) -> None:
        dropped = frozenset(keys)
        self.log.rewrite(lambda payloads: (each for each in payloads if stable_key(each) not in dropped))

    def _has_row(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        numbers, texts = split_numbers(values)
        tags = _tags(stream, values)
        self._events.event_time = self.event_time
        if numbers:
            payload = self._events.scalars(step, {tags[key]: value for key, value in numbers.items()})
        elif texts:
            payload = next(self._events.text(step, tags[key], text) for key, text in texts.items())
        else:
            return False
        return payload in self.log.records()

    def _write_final_scores(self, head: str, values: Mapping[str, Any]) -> None:
        """Log them at the last step, never at 0."""
        if self.state.last_step is None:
            values = {key: text_of(value) for key, value in values.items()}
        self._write(head, self.state.last_step or 0, values)

    def _write_attachment(self, step: int | None, head: str, kind: str, content: Table | object) -> None:
        self.add_text(step, f"{head}/{kind}", markdown(content) if isinstance(content, Table) else _as_code(content))

    def _write_content(self, step: int, content: Content) -> None:
        """Log a content; what TensorBoard does not show, as one line of text with the file's path."""
        self._events.event_time = self.event_time
        payload = self._encode_content(step, content)
        if self.state.tracker.pending_start is not None:
            self._resolve_pending_start(is_logged=payload in self.log.records())
        self._add(payload)
        if self.reorder_when_due() is not None:
            self._schedule_reorder()

    def _encode_content(self, step: int, content: Content) -> bytes:
        tag, events, payload, why = f"{content.kind}/{content.name}", self._events, None, None
        data = content.read(_MAX_MEDIA_BYTES) if content.media_type in _SHOWN_TYPES else None
        if content.kind == "text" and (text := content.text()) is not None:
            return events.text(step, tag, text)
        if content.kind == "table":
            shown = markdown(content.table(self._max_table_rows))
            return events.text(step, tag, f"{shown}\n\n{content.line()}")
        if content.kind == "histogram":
            edges, counts = content.data.get("edges", []), content.data.get("counts", [])
            return events.histogram(step, tag, edges, counts)
        if data is not None:
            is_audio = content.media_type == "audio/wav"
            payload = events.audio(step, tag, data) if is_audio else events.image(step, tag, data)
        elif content.media_type in _SHOWN_TYPES:
            why = f"its file is missing, or larger than {_MAX_MEDIA_BYTES >> 20} MiB"
        elif content.kind != "artifact":
            why = f"TensorBoard does not show {content.media_type or content.kind}"
        return events.text(step, tag, content.line(why)) if payload is None else payload

    def _void_from(self, first_step: int) -> None:
        self._events.event_time = self.event_time
        for _ in range(2):  # the slower loader takes the first of a run for its start, which voids nothing
            self.log.add(self._events.restart(first_step))
        self.state.has_hparams = False

    def _reorder(self) -> None:
        """Sort the file; if the disk refuses that, it is tried again later."""
        start = time.monotonic()
        try:
            self.log.move(self._files.next_name(), self._events.sorted_frames)
            self._files.clean()
            self.state.needs_reorder = False
        except OSError as error:
            self._faults.warn("rows.out_of_order", "refused", file=str(self.log.path), why=str(error))
        now = time.monotonic()
        self._reorder_due = now + max(_MIN_REORDER_SECONDS, (now - start) * _REORDER_TIME_SHARE)


def _tags(stream: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the tag of each key; two keys of a row never share one."""
    tags = {key: prefixed(stream, key) for key in keys}
    taken = {tag: key for key, tag in tags.items() if tag == key}
    return {key: tag if taken.get(tag, key) == key else f"{stream}/{stream}/{key}" for key, tag in tags.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Yield the values of nested configurations; the names of the levels are joined by ``/``."""
    for key, value in config.items():
        nested = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if nested:
            yield from _flat(nested, f"{prefix}{key}/")
        elif value is not None:
            plain = (
                value if isinstance(value, bool | int | float) else text_of(cast("object", value))[:_MAX_HPARAM_LETTERS]
            )
            yield f"{prefix}{key}", float(plain) if type(plain) is int else plain


def _as_code(value: object) -> str:
    return f"```json\n{json_of(value)}\n```"


class TensorBoardLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `TensorBoardLoggerCallback`."""

    log_dir: str | None = None
    """Parent of the runs' folders, a local path. Default: the folder ``tensorboard`` of the experiment."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 30
    """How long a row may stay in memory. Behind a courier, rows are synced before they count as delivered."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Maximum number of predictions in the table of one eval."""
    max_table_rows: Annotated[int, msgspec.Meta(ge=0)] = 1000
    """Maximum number of rows shown of a table; its file has all."""

    def __post_init__(self) -> None:
        """Reject URLs and placeholders; none are replaced."""
        if self.log_dir is not None:
            check_local_path(self.log_dir, "log_dir")


class TensorBoardLoggerCallback(RunLogger[TensorBoardRun, TensorBoardRunState]):
    """Logs runs in TensorBoard's format: scalars for numbers, texts for anything else, tables of predictions.

    Content is logged as ``<kind>/<name>``: texts, tables (as Markdown), histograms, PNG, JPEG and GIF images, and WAV
    sounds. What TensorBoard does not show (video, HTML, other formats, artifacts) is one line of text with the file's
    path.
    The configuration is shown as hyperparameters, as it is before the first training row.

    A benchmark that was scored after training is logged at the last trained step, as ``final/<name>/…``; if no step is
    known, as a text. Scalars are 32-bit floats. Wall times are those of the events, whenever they are delivered. A
    training metric whose key contains a ``/`` has that key as its tag.

    Rows of late or repeated steps are retained; of a repeated eval only the newest one is. TensorBoard's fast loader,
    the default on Linux and macOS with x86 processors, drops the points before a late row. So a file with late rows is
    sorted while the run continues, and gets a new name, which that loader then reads. The other loader
    (``--load_fast=false``) does not need this: started later, it shows every point; already running, it stays with the
    old name and shows the rest after a restart, or with TensorFlow installed shows each point twice.

    A resumed run continues its file; steps that are run again are void there. Ranks above 0 are separate runs, in a
    subfolder ``rank<rank>``. If two adapters log one run, the second one's folder is ``<run>-2``, also in later
    processes; a WARNING names it. An adapter with a new name continues in the folder of one that is no longer
    subscribed.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "tensorboard_logger"
    Config: ClassVar[type | None] = TensorBoardLoggerConfig

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        flush_secs: float = 30,
        max_pred_rows: int = 100,
        max_table_rows: int = 1000,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        params = {"log_dir": None if log_dir is None else os.fspath(log_dir), "flush_secs": flush_secs}
        self._root = None if log_dir is None else local_path(log_dir, "log_dir")
        params |= {"max_pred_rows": max_pred_rows, "max_table_rows": max_table_rows}
        self._config = validate_params(TensorBoardLoggerConfig, params)
        require_package(self.name, "tensorboardX", "tensorboard")
        self._clock = clock
        self._lock = threading.RLock()
        self._reorder_scheduled = False
        super().__init__(TensorBoardRunState, self._config.max_pred_rows, position_file_in)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Log the end of the run, and remember how it ended."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        failed = bool(field(run_result, "error") or field(arm, "error"))
        self._once(run, lambda: run.end(failed=failed))
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Log the conclusion in every run, also in those that ended before this process was started."""
        root = output_dir_of(ctx)
        for run in self._restored_runs(ctx):
            self._run(LogContext(Path(root), run_key=os.path.relpath(run, root)))
        super().on_experiment_end(ctx, result)

    def close(self) -> None:
        """Sort every file if needed, write buffered rows, and close it; a later hook continues."""
        with self._lock:
            self._reorder_scheduled = False
            super().close()
            for run in self._runs.open.values():
                run.lease = None

    def mark(self) -> Any:
        """See `RunLogger.mark`; files with late rows are sorted first if that is due."""
        with self._lock:
            self._reorder_when_due()
            return super().mark()

    def rewind(self, mark: Any) -> None:
        """See `RunLogger.rewind`; a file that was sorted after the mark is replaced by its predecessor."""
        with self._lock:
            super().rewind(mark)
            for folder in {Path(file).parent for file in self._runs.savepoints.files}:
                EventFiles(folder, self._runs.savepoints)

    def _run(self, handle: LoopState | LogContext) -> TensorBoardRun:
        with self._lock:
            run = super()._run(handle)
            if run.lease is None or not run.lease.is_held:
                run = self._renew_lease(handle, run)
            return run

    def _renew_lease(self, handle: LoopState | LogContext, run: TensorBoardRun) -> TensorBoardRun:
        """Acquire the run's folder again after it was released; another adapter may write it by now."""
        try:
            folder, run.lease = self._candidates(handle).acquire_if_followed()
            previous = self._known_in(folder, run.output)
            if previous is not None or folder != run.log.path.parent:
                again = self._opened(run.name, folder, run.lease, previous or run.state, run.output)
                again.result, again.arm, again.event_time = run.result, run.arm, run.event_time
                run = self._runs.open[self._key(handle)] = again
        except OSError as error:
            run.lease = None
            raise RetryLaterError(f"the folder of {run.name} cannot be claimed: {error}") from error
        return run

    def _open(
        self, handle: LoopState | LogContext, state: TensorBoardRunState | None, output: TrackedOutput
    ) -> TensorBoardRun:
        folder, lease = self._candidates(handle).acquire_if_followed()
        known = self._known_in(folder, output)
        return self._opened(run_name(handle), folder, lease, known or state, output)

    def _known_in(self, folder: Path, output: TrackedOutput) -> TensorBoardRunState | None:
        return self._known(output, folder, [folder / name for name in EventFiles.names_in(folder)])

    def _opened(
        self, name: str, folder: Path, claim: OutputLease, state: TensorBoardRunState | None, output: TrackedOutput
    ) -> TensorBoardRun:
        files, events = EventFiles(folder, self._runs.savepoints), Events(self._clock)
        log = RecordLog(files.newest, self._runs.savepoints, events, self._config.flush_secs)
        state = state or TensorBoardRunState(largest_step=UNKNOWN_STEP if any(log.records()) else -1)
        run = TensorBoardRun(
            name,
            files,
            log,
            events,
            state,
            output,
            self._lock,
            self._schedule_reorder,
            self._config.max_table_rows,
        )
        run.lease = claim
        return run

    def _train_ends(self, run: TensorBoardRun, state: LoopState) -> None:
        """See `RunLogger._train_ends`; a run without RunStart ends here."""
        super()._train_ends(run, state)
        if field(run_context(state), "run_key") is None:
            run.end(failed=field(state, "error") is not None)

    def _experiment_ends(self, run: TensorBoardRun, result: ExperimentResult) -> None:
        """Log the conclusion."""
        run.add_text(None, "conclusion", conclusion_page(result, run.name, run.result, run.arm))

    def _candidates(self, handle: LoopState | LogContext) -> OutputCandidates:
        folder = ranked_folder(self._folder(handle), self._rank())
        fix = "give each run a log_dir of its own"
        return OutputCandidates(self, owner_of(handle), [folder], self._runs.savepoints, fix, is_folder=True)

    def _schedule_reorder(self) -> None:
        """Have files with late rows sorted once that is due, even if no further row comes."""
        if self._reorder_scheduled or not self.evsys_attached:
            return
        try:
            self._reorder_scheduled = self.spawn(self._reorder_later, name="order of event files", background=True)
        except EvsysBusError:  # the bus is closing, and closes the files
            pass

    async def _reorder_later(self) -> None:
        wait: float | None = 0.0
        try:
            while wait is not None:
                await asyncio.sleep(wait)
                with self._lock:
                    wait = self._reorder_when_due()
                    self._reorder_scheduled = wait is not None
        except asyncio.CancelledError:
            self._reorder_scheduled = False
            raise

    def _reorder_when_due(self) -> float | None:
        """Sort files if that is due; returns the seconds until the next one is, None if all are in order."""
        waits = [wait for run in self._runs.open.values() if (wait := run.reorder_when_due()) is not None]
        return min(waits, default=None)

    def _describe_run(self, run: TensorBoardRun, handle: LoopState | LogContext) -> None:
        """Log configuration and hypothesis, once."""
        ctx = run_context(handle)
        config = config_of(ctx)
        if run.state.described or not config:
            return
        run.state.described = True
        hypothesis = hypothesis_of(field(ctx, "config"))
        if hypothesis:
            run.add_text(None, "hypothesis", hypothesis)
        run.set_hparams(config.get("run_config", config) if isinstance(config.get("run_config"), dict) else config)
        run.add_text(None, "config", _as_code(config))

    def _folder(self, handle: LoopState | LogContext) -> Path:
        """Return the run's folder: TensorBoard names a run by the path of its folder."""
        if self._root is None:
            own = run_folder(handle)
            if run_key(handle) is None:
                return own / "tensorboard"
            root = experiment_folder(handle)
            return root / "tensorboard" / own.relative_to(root)
        name, owner = run_name(handle), owner_of(handle)
        folder = self._root / name
        return folder if is_of_run(folder, owner) else self._root / f"{name}-{short_digest(owner)}"
