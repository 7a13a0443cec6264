"""`CsvMetricsCallback`: the metrics of every step as a CSV file that pandas can read at any time.

step,loss,lr
0,0.6931,0.001
1,0.5211,0.001
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    first_step_of,
    is_repeated_start,
    is_run_of,
    rank_of_event,
    ranked_key,
    run_folder,
    run_id,
    run_name,
    step_of,
)
from evsys_adapters.common.params import check_local_path, validate_params
from evsys_adapters.output_files.csv_table import CsvTable, cells_of, row_key
from evsys_adapters.output_files.output_lease import (
    OutputCandidates,
    OutputLease,
    has_courier,
    owner_of,
    relative_run_path,
)
from evsys_adapters.output_files.output_positions import (
    OutputRuns,
    Position,
    TrackedOutput,
    assign,
    position_file_of,
    skip_matching_if_empty,
)
from evsys_adapters.output_files.step_tracker import RowMatcher, StepTracker
from evsys_bus.callback import Callback
from evsys_bus.context import ContentItem, ExperimentResult, LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.diagnostics import log
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import Backlog
from evsys_bus.location import local_path, short_digest
from evsys_bus.savepoints import Mark, Savepoints

_RUN: Final = "{run}"
_RUN_DIR: Final = "{run_dir}"
_RANK: Final = "{rank}"


class CsvMetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `CsvMetricsCallback`."""

    out_path: Annotated[str, msgspec.Meta(min_length=1)]
    """The file; relative to the current directory when the callback is constructed. Folders are created.
    ``{run_dir}`` is replaced by the run's own folder, ``{run}`` by its key, ``{rank}`` by the rank of the process."""
    delimiter: Annotated[str, msgspec.Meta(pattern=r'^[^\w\s\x00-\x1f\x7f".+-]$|^[ \t]$')] = ","
    """The delimiter of cells: one character that no number contains."""

    def __post_init__(self) -> None:
        check_local_path(self.out_path, "out_path", (_RUN_DIR, _RUN, _RANK), absolute_placeholder=_RUN_DIR)


class _CsvMark(msgspec.Struct, frozen=True, rename={"trackers": "runs"}):
    files: Mark
    trackers: dict[str, StepTracker]
    positions: dict[str, Position] = {}


class CsvMetricsCallback(Callback):
    r"""Writes the metrics of every step to a CSV file: a column ``step``, then one per metric.

    A row is one append, whatever the length of the file. Metrics may appear later: they get their own columns by the
    end of the training at the latest, and are stored as JSON in a column ``more_metrics`` until then if adding a column
    at once would be too expensive. A step may have several rows, and rows may come late. Text that a spreadsheet would
    run as a formula gets a leading apostrophe.

    A resumed run continues the file: rows from its first step on are cut before new ones are added. Without
    ``on_train_start`` the first step that is logged counts as the first one. A file belongs to one run (recorded in a
    hidden file ``.<name>.run`` beside it), and while it is written to one process. Another run with the same path, now
    or later, gets ``<stem>-<run key><suffix>``; another process that trains the same run at the same time,
    ``<stem>-2<suffix>``; a rank above 0, ``<stem>-rank<rank><suffix>``, unless ``out_path`` has ``{rank}``. A WARNING
    names the file in these cases. If two adapters of one run have the same path, the second one writes
    ``<stem>-2<suffix>``, also in later processes. An adapter with a new name continues the file of one that is no
    longer subscribed.

    Rows that the disk refuses wait in memory, up to 16 MiB, and are retried with the next one. Behind a courier, a
    crash neither duplicates nor loses a row: the file is rewound to the last `mark`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     table = CsvMetricsCallback(Path(folder) / "metrics.csv")
        ...     state = LoopState(step=0, num_steps=1, output_dir=folder)
        ...     table.on_step_end(state, 0, TrainingBatch(), {"loss": 0.5})
        ...     table.on_train_end(state, LoopArtifacts())
        ...     (Path(folder) / "metrics.csv").read_text()
        'step,loss\n0,0.5\n'
    """

    marks_inline: ClassVar[bool] = False
    name: ClassVar[str] = "csv_metrics"
    Config: ClassVar[type | None] = CsvMetricsConfig
    ranks = "rank0"

    def __init__(self, out_path: str | os.PathLike[str], delimiter: str = ",") -> None:
        config = validate_params(CsvMetricsConfig, {"out_path": os.fspath(out_path), "delimiter": delimiter})
        starts_with_run_dir = config.out_path.startswith(_RUN_DIR)
        self._out_path = config.out_path if starts_with_run_dir else str(local_path(out_path, "out_path"))
        self._delimiter = config.delimiter
        self._runs: OutputRuns[_RunTable, StepTracker] = OutputRuns(position_file_of, lambda tracker: tracker)
        self._omitted_kinds: set[str] = set()

    @property
    def waiting(self) -> int:
        """Rows that the disk has refused so far and that are in memory."""
        return sum(run.backlog.pending for run in self._runs.open.values())

    def on_train_start(self, state: LoopState) -> None:
        """Cut the rows of steps that will be run again."""
        run, first = self._run(state), first_step_of(state)
        if run.output.has(self.event):
            return
        if is_repeated_start(self.event):
            run.resume()
        elif first is not None:
            run.begin(first)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Add the step's row."""
        del batch
        run = self._run(state)
        if not run.output.has(self.event):
            run.add(step_of(step_idx), cells_of(metrics))

    def on_content(self, state: LoopState, step_idx: int | None, item: ContentItem) -> None:
        """Log once per kind that the file does not show it; another adapter may."""
        del step_idx
        kind = str(field(item, "kind"))
        if kind not in self._omitted_kinds:
            self._omitted_kinds.add(kind)
            why = "the file has numbers and texts of steps only"
            where = field(item, "path") or "the journal"
            fix = "add the adapter local_logger, which lists it, or one that shows it"
            log().info("csv_metrics.content_omitted", kind=kind, run=run_name(state), where=where, why=why, fix=fix)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Close the run's file."""
        del artifacts
        run = self._run(state)
        if not run.output.has(self.event):
            run.state.rewound = False
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Close the files of the experiment's runs, and drop their state."""
        del result
        runs = self._runs
        for key in [each for each in runs.open if is_run_of(each, ctx)]:
            table = runs.ended[key] = runs.open.pop(key)
            table.close()
            runs.rewound[key] = (table.state, table.output.position)
        # Those whose rows are being matched with existing ones stay known.
        runs.rewound = {
            key: each for key, each in runs.rewound.items() if each[0].is_matching or not is_run_of(key, ctx)
        }

    def close(self) -> None:
        """Write buffered rows and close the files; a later hook opens them again and continues.

        Raises:
            OSError: Inline, the disk has refused rows, which are lost; in a courier they stay pending.
        """
        for run in self._runs.open.values():
            run.close()
        self._runs.check_written(self)

    def mark(self) -> Any:
        """Return the position of all files as plain data; their rows are synced to disk first.

        Raises:
            OSError: Rows could not be written because the disk refuses them, or were dropped.
        """
        return msgspec.to_builtins(_CsvMark(*self._runs.take_mark(msgspec.json.encode)))

    def rewind(self, mark: Any) -> None:
        """Restore the files to their state at the mark. Call it before any hook.

        Raises:
            OSError: A file cannot be cut.
        """
        saved = msgspec.convert(mark, _CsvMark)
        self._runs.rewind(self, saved.files, saved.trackers, saved.positions)

    def _run(self, state: LoopState) -> "_RunTable":
        rank = rank_of_event(self.event)
        key = ranked_key(run_id(state), rank)
        run = self._runs.open.get(key)
        if run is None:
            fix = f"write {_RUN_DIR} or {_RUN} into out_path to name the files yourself"
            savepoints, paths = self._runs.savepoints, [*self._candidate_paths(state, rank)]
            candidates = OutputCandidates(self, owner_of(state), paths, savepoints, fix)
            tracker, position = self._runs.known_state(key)
            if tracker is None:
                tracker = StepTracker(position_unknown=self._runs.may_repeat(self))
            output = TrackedOutput(savepoints, position, behind_courier=has_courier(self))
            run = self._runs.add(key, _RunTable(candidates, self._delimiter, savepoints, tracker, output))
            if rank and _RANK not in self._out_path:
                fix = f"write {_RANK} into out_path to name the files yourself"
                log().warning(
                    "csv_metrics.rank_apart", run=run_name(state), rank=rank, file=str(candidates.first), fix=fix
                )
        run.prepare()
        return run

    def _candidate_paths(self, state: LoopState, rank: int) -> Iterator[Path]:
        """Yield candidate paths for the run's file; the first one that belongs to no other run is used."""
        name = run_name(state)
        folder = str(run_folder(state)) if _RUN_DIR in self._out_path else ""
        values = {_RUN: name, _RUN_DIR: folder, _RANK: str(rank)}
        path = Path(re.sub(r"\{(run|run_dir|rank)\}", lambda found: values[found[0]], self._out_path))
        if rank and _RANK not in self._out_path:
            path = _with_suffix(path, f"rank{rank}")
        yield path
        if _RUN not in self._out_path:
            path = _with_suffix(path, name)
            yield path
        yield _with_suffix(path, short_digest(relative_run_path(path, owner_of(state))))


class _RunTable:
    """The table of one run, and the rows on their way to it."""

    def __init__(
        self,
        candidates: OutputCandidates,
        delimiter: str,
        savepoints: Savepoints,
        tracker: StepTracker,
        output: TrackedOutput,
    ) -> None:
        self.backlog = Backlog(str(candidates.first))
        self.state = tracker
        self.output = output
        self.path = candidates.first
        self._matcher = RowMatcher(tracker)
        self._candidates = candidates
        self._delimiter = delimiter
        self._savepoints = savepoints
        self._table: CsvTable | None = None
        self._lease: OutputLease | None = None

    def files(self) -> list[Path]:
        return [self.path]

    def settle(self) -> None:
        self.backlog.drain()

    def check_written(self) -> None:
        self.backlog.check_written()

    def prepare(self) -> None:
        """Acquire the file, to find out which rows it has; raises RetryLaterError."""
        if self.output.behind_courier and not self._has_lease:
            try:
                self._open()
                skip_matching_if_empty(self.state, [self.path])
            except OSError as error:
                raise RetryLaterError(f"{self.path} cannot be read: {error}") from error

    def resume(self) -> None:
        if self.state.is_matching:
            self.backlog.write(self._matcher.resume, 0)
        elif not self.output.is_known:
            self.state.resume()
            skip_matching_if_empty(self.state, [self.path])

    def begin(self, first_step: int) -> None:
        if self.state.is_matching:
            self.backlog.write(partial(self._begin, first_step), 0)
        elif self.state.start_training():
            self.backlog.write(lambda: self._open().cut(first_step), 0)

    def add(self, step: int, cells: dict[str, str]) -> None:
        size = sum(map(len, cells)) + sum(map(len, cells.values()))
        if self.state.is_matching:
            self.backlog.write(lambda: self._append_unless_present(step, cells), size)
            return
        if self.state.record_step():
            self.backlog.write(lambda: self._open().cut(step, cells), 0)
        self.backlog.write(lambda: self._open().append(step, cells), size)

    def close(self) -> None:
        if self._table is not None:
            self._table.retry_now()
            self.backlog.write(self._close, 0)
        self.backlog.flush()

    def _begin(self, first_step: int) -> None:
        if self._matcher.start_training(first_step):
            self._open().cut(first_step)

    def _append_unless_present(self, step: int, cells: dict[str, str]) -> None:
        table = self._open()
        if not self._matcher.is_present(table, row_key(step, cells), step):
            table.append(step, cells)
            self._matcher.count_appended()
        self.state.record_step()

    def _close(self) -> None:
        """Close the file, and release it for other processes."""
        if self._table is not None:
            self._table.close()
        self._table = self._lease = None

    def _open(self) -> CsvTable:
        """Return the table, at the first candidate path that can be acquired."""
        if self._table is None or not self._has_lease:
            self.path, lease = self._candidates.acquire()
            state = self.output.restore(self.path, position_file_of(self.path))
            if state is not None:
                assign(self.state, msgspec.json.decode(state, type=StepTracker))
            self._lease = lease
            self._table = CsvTable(self.path, self._delimiter, self._savepoints)
            self._matcher.invalidate()
        return self._table

    @property
    def _has_lease(self) -> bool:
        return self._lease is not None and self._lease.is_held


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")
