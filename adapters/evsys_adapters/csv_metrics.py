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

from evsys_adapters._csv_cells import cells_of
from evsys_adapters._csv_table import CsvTable, row_key
from evsys_adapters._output_claim import OutputClaim, OutputPlaces, has_courier, owner_of, seen_from, without_others
from evsys_adapters._output_notes import (
    FIRST,
    NotedOutput,
    OutputNotes,
    Position,
    assign,
    is_empty,
    note_of_file,
    without_newer,
)
from evsys_adapters._params import check_local_path, checked
from evsys_adapters._runs import (
    digest,
    first_step_of,
    is_carried,
    is_run_of,
    rank_of_event,
    ranked_key,
    run_folder,
    run_id,
    run_name,
    step_of,
)
from evsys_adapters._step_tracker import StepTracker
from evsys_adapters._walk import OutputWalk
from evsys_bus.callback import Callback
from evsys_bus.context import ExperimentResult, LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.diagnostics import log
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import Backlog
from evsys_bus.savepoints import Mark, Savepoints
from evsys_bus.where import local_path

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
        check_local_path(self.out_path, "out_path", (_RUN_DIR, _RUN, _RANK), whole=_RUN_DIR)


class _CsvMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, StepTracker]
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

    Rows that the disk refuses are kept in memory, up to 16 MiB, and retried with the next one. Behind a courier, a
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
        config = checked(CsvMetricsConfig, {"out_path": os.fspath(out_path), "delimiter": delimiter})
        whole = config.out_path.startswith(_RUN_DIR)
        self._out_path = config.out_path if whole else str(local_path(out_path, "out_path"))
        self._delimiter = config.delimiter
        self._runs: dict[str, _RunTable] = {}
        self._marks = Savepoints()
        self._has_mark = False
        self._notes = OutputNotes(self._marks)
        self._rewound: dict[str, tuple[StepTracker, Position]] = {}
        """Runs without an event since the mark, or whose experiment ended while rows were being matched."""
        self._left: dict[str, _RunTable] = {}
        """Runs whose experiment has ended since the last mark."""

    @property
    def waiting(self) -> int:
        """Rows that the disk has refused so far and that are kept in memory."""
        return sum(run.backlog.waiting for run in self._runs.values())

    def on_train_start(self, state: LoopState) -> None:
        """Cut the rows of steps that will be run again."""
        run, first = self._run(state), first_step_of(state)
        if run.output.has(self.event):
            return
        if is_carried(self.event):
            run.introduce()
        elif first is not None:
            run.begin(first)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Add the step's row."""
        del batch
        run = self._run(state)
        if not run.output.has(self.event):
            run.add(step_of(step_idx), cells_of(metrics))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Close the run's file."""
        del artifacts
        run = self._run(state)
        if not run.output.has(self.event):
            run.course.ends()
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Close the files of the experiment's runs, and drop their state."""
        del result
        for run in [each for each in self._runs if is_run_of(each, ctx)]:
            table = self._left[run] = self._runs.pop(run)
            table.close()
            self._rewound[run] = (table.course, table.output.position)
        self._rewound = {run: each for run, each in self._rewound.items() if each[0].walks or not is_run_of(run, ctx)}

    def close(self) -> None:
        """Write buffered rows and close the files; a later hook opens them again and continues."""
        for run in self._runs.values():
            run.close()

    def mark(self) -> Any:
        """Return the position of all files as plain data; their rows are synced to disk first.

        Raises:
            OSError: Rows could not be written because the disk refuses them, or were dropped.
        """
        written = [*self._left.values(), *self._runs.values()]
        for run in written:
            run.backlog.settle()
        files = self._notes.take((run.output, msgspec.json.encode(run.course), [run.path]) for run in written)
        self._left = {}
        known = self._rewound | {key: (run.course, run.output.position) for key, run in self._runs.items()}
        courses = {key: course for key, (course, _) in known.items()}
        return msgspec.to_builtins(_CsvMark(files, courses, {key: position for key, (_, position) in known.items()}))

    def rewind(self, mark: Any) -> None:
        """Restore the files to their state at the mark. Call it before any hook.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _CsvMark)
        files = without_others(said.files, self)
        self._marks.rewind(without_newer(files, said.positions.values(), note_of_file))
        self._has_mark = True
        for key, course in said.runs.items():
            position = said.positions.get(key) or Position(since=FIRST if course.begun else "")
            course.rewound = True
            course.unplaced = course.unplaced or (files is not said.files and not position.handled)
            self._rewound[key] = (course, position)

    def _run(self, state: LoopState) -> "_RunTable":
        rank = rank_of_event(self.event)
        key = ranked_key(run_id(state), rank)
        run = self._runs.get(key)
        if run is None:
            fix = f"write {_RUN_DIR} or {_RUN} into out_path to name the files yourself"
            places = OutputPlaces(self, owner_of(state), [*self._places(state, rank)], self._marks, fix)
            is_followed = has_courier(self)
            may_repeat = not self._has_mark and is_followed  # its cursor may be lost
            course, position = self._rewound.get(key) or (StepTracker(unplaced=may_repeat), Position())
            if key in self._left:
                course, position = self._left[key].course, self._left[key].output.position
            output = NotedOutput(self._marks, position, is_followed=is_followed)
            run = self._runs[key] = _RunTable(places, self._delimiter, self._marks, course, output)
            self._rewound.pop(key, None)
            self._left.pop(key, None)
            if rank and _RANK not in self._out_path:
                fix = f"write {_RANK} into out_path to name the files yourself"
                log().warning("csv_metrics.rank_apart", run=run_name(state), rank=rank, file=str(places.first), fix=fix)
        run.look()
        return run

    def _places(self, state: LoopState, rank: int) -> Iterator[Path]:
        """Yield candidate paths for the run's file; the first one that belongs to no other run is used."""
        name = run_name(state)
        folder = str(run_folder(state)) if _RUN_DIR in self._out_path else ""
        words = {_RUN: name, _RUN_DIR: folder, _RANK: str(rank)}
        place = Path(re.sub(r"\{(run|run_dir|rank)\}", lambda found: words[found[0]], self._out_path))
        if rank and _RANK not in self._out_path:
            place = _beside(place, f"rank{rank}")
        yield place
        if _RUN not in self._out_path:
            place = _beside(place, name)
            yield place
        yield _beside(place, digest(seen_from(place, owner_of(state))))


class _RunTable:
    """The table of one run, and the rows on their way to it."""

    def __init__(
        self, places: OutputPlaces, delimiter: str, marks: Savepoints, course: StepTracker, output: NotedOutput
    ) -> None:
        self.backlog = Backlog(str(places.first))
        self.course = course
        self.output = output
        self.path = places.first
        self._walk = OutputWalk(course)
        self._places = places
        self._delimiter = delimiter
        self._marks = marks
        self._table: CsvTable | None = None
        self._claim: OutputClaim | None = None

    def look(self) -> None:
        """Acquire the file, to find out which rows it has; raises RetryLaterError."""
        if self.output.is_followed and not self._is_claimed:
            try:
                self._open()
                self._forgo_walk()
            except OSError as error:
                raise RetryLaterError(f"{self.path} cannot be read: {error}") from error

    def introduce(self) -> None:
        if self.course.walks:
            self.backlog.write(self._walk.introduced, 0)
        elif not self.output.is_known:
            self.course.introduced()
            self._forgo_walk()

    def begin(self, first_step: int) -> None:
        if self.course.walks:
            self.backlog.write(partial(self._begin, first_step), 0)
        elif self.course.starts(first_step):
            self.backlog.write(lambda: self._open().cut(first_step), 0)

    def add(self, step: int, cells: dict[str, str]) -> None:
        action = self._walk_on if self.course.walks else self._append
        if not self.course.walks and self.course.steps(step):
            self.backlog.write(lambda: self._open().cut(step, cells), 0)
        self.backlog.write(partial(action, step, cells), sum(map(len, cells)) + sum(map(len, cells.values())))

    def close(self) -> None:
        if self._table is not None:
            self._table.try_again()
            self.backlog.write(self._close, 0)
        self.backlog.flush()

    def _begin(self, first_step: int) -> None:
        if self._walk.starts(first_step):
            self._open().cut(first_step)

    def _append(self, step: int, cells: dict[str, str]) -> None:
        self._open().append(step, cells)

    def _walk_on(self, step: int, cells: dict[str, str]) -> None:
        table = self._open()
        if not self._walk.stands(table, row_key(step, cells), step):
            table.append(step, cells)
            self._walk.appended()
        self.course.steps(step)

    def _close(self) -> None:
        """Close the file, and release it for other processes."""
        if self._table is not None:
            self._table.close()
        self._table = self._claim = None

    def _open(self) -> CsvTable:
        """Return the table, at the first candidate path that can be acquired."""
        if self._table is None or not self._is_claimed:
            self.path, claim = self._places.take()
            known = self.output.found(self.path, note_of_file(self.path))
            if known is not None:
                assign(self.course, msgspec.json.decode(known, type=StepTracker))
            self._claim = claim
            self._table = CsvTable(self.path, self._delimiter, self._marks)
            self._walk.look_again()
        return self._table

    def _forgo_walk(self) -> None:
        """Skip the matching of rows if the file is empty."""
        if self.course.unplaced and is_empty([self.path]):
            self.course.unplaced = False

    @property
    def _is_claimed(self) -> bool:
        return self._claim is not None and self._claim.is_held


def _beside(place: Path, word: str) -> Path:
    return place.with_name(f"{place.stem}-{word}{place.suffix}")
