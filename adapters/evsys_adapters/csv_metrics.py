"""`CsvMetricsCallback`: the metrics of every step as a CSV file that pandas reads at any moment.

step,loss,lr
0,0.6931,0.001
1,0.5211,0.001
"""

import operator
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import msgspec

from evsys_adapters._csv_cells import cells_of
from evsys_adapters._csv_table import CsvTable
from evsys_adapters._line_file import Backlog
from evsys_adapters._marks import Course, Mark, Marks
from evsys_adapters._params import checked
from evsys_adapters._runs import digest, run_folder, run_id, run_name
from evsys_bus.callback import Callback
from evsys_bus.context import ExperimentResult, LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.diagnostics import log

_RUN: Final = "{run}"
_RUN_DIR: Final = "{run_dir}"


class CsvMetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `CsvMetricsCallback` can be told."""

    out_path: Annotated[str, msgspec.Meta(min_length=1)]
    """The file, relative to the current directory; folders are made. ``{run_dir}`` stands for the run's own folder,
    ``{run}`` for its key."""
    delimiter: Annotated[str, msgspec.Meta(pattern=r'^[^\w\s\x00-\x1f\x7f".+-]$|^[ \t]$')] = ","
    """What separates the cells: one character that no number contains."""


class _CsvMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, Course]


class CsvMetricsCallback(Callback):
    r"""Mirrors the metrics of every step to a CSV file: a column ``step``, then one per metric.

    A row is one append, whatever the length of the file. Metrics may appear later: they get columns of their own, at
    the latest when the training ends, and stand as JSON in a column ``more_metrics`` until then where making the column
    at once would cost too much. A step may have several rows, and rows may come late. Text that a spreadsheet would run
    as a formula gets an apostrophe in front.

    A resumed run continues the file: rows at or past its first step are cut before new ones come. Without
    ``on_train_start`` the first step that is seen counts as the first one. A file belongs to one run (a hidden file
    ``.<name>.run`` beside it says to which); another run that comes to it, now or on another day, gets
    ``<stem>-<run key><suffix>``, with a WARNING.

    Rows that the disk refuses wait in memory, up to 16 MiB, and are tried again with the next one. Where a courier
    delivers, a crash doubles no row and loses none: it is rewound to the last `mark`.

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

    name: ClassVar[str] = "csv_metrics"
    Config: ClassVar[type | None] = CsvMetricsConfig

    def __init__(self, out_path: str | os.PathLike[str], delimiter: str = ",") -> None:
        config = checked(CsvMetricsConfig, {"out_path": os.fspath(out_path), "delimiter": delimiter})
        self._out_path = config.out_path
        self._here = Path.cwd()  # what a relative path was relative to when it was given
        self._delimiter = config.delimiter
        self._runs: dict[str, _RunTable] = {}
        self._marks = Marks()
        self._rewound: dict[str, Course] = {}
        """Runs that were known at the mark, and are still to be heard of."""

    @property
    def waiting(self) -> int:
        """Rows that the disk has refused so far and that wait in memory."""
        return sum(run.backlog.waiting for run in self._runs.values())

    def on_train_start(self, state: LoopState) -> None:
        """Cut what is about to be run again."""
        self._run(state).begin(state.step)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Add the step's row."""
        del batch
        self._run(state).add(operator.index(step_idx), cells_of(metrics))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Close the run's file."""
        del artifacts
        run = self._run(state)
        run.course.ends()
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the runs of the experiment."""
        del result
        inside = os.path.join(ctx.output_dir, "")  # noqa: PTH118  # with the separator, which a Path drops
        for run in [each for each in self._runs if each.startswith(inside)]:
            self._runs.pop(run).close()
        self._rewound = {run: course for run, course in self._rewound.items() if not run.startswith(inside)}

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        for run in self._runs.values():
            run.backlog.settle()
        courses = self._rewound | {key: run.course for key, run in self._runs.items()}
        return msgspec.to_builtins(_CsvMark(self._marks.take(), courses))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _CsvMark)
        self._marks.rewind(said.files)
        for course in said.runs.values():
            course.rewound = True
        self._rewound = said.runs

    def _run(self, state: LoopState) -> "_RunTable":
        key = run_id(state)
        run = self._runs.get(key)
        if run is None:
            course = self._rewound.pop(key, None) or Course()
            places = list(self._places(state))
            run = self._runs[key] = _RunTable(_owner(state), places, self._delimiter, self._marks, course)
        return run

    def _places(self, state: LoopState) -> Iterator[Path]:
        """Where the run's file may lie; the first that is not another run's is taken."""
        name, text = run_name(state), self._out_path
        if _RUN_DIR in text:
            text = text.replace(_RUN_DIR, str(run_folder(state)))
        place = self._here / text.replace(_RUN, name)
        yield place
        if _RUN not in self._out_path:
            place = place.with_name(f"{place.stem}-{name}{place.suffix}")
            yield place
        yield place.with_name(f"{place.stem}-{digest(_seen_from(place, _owner(state)))}{place.suffix}")


class _RunTable:
    """The table of one run, and the rows on their way to it."""

    def __init__(self, owner: str, places: list[Path], delimiter: str, marks: Marks, course: Course) -> None:
        self.backlog = Backlog(str(places[0]))
        self.course = course
        self._owner = owner
        self._places = places
        self._delimiter = delimiter
        self._marks = marks
        self._table: CsvTable | None = None

    def begin(self, first_step: int) -> None:
        if self.course.starts(first_step):
            self._cut(first_step)

    def add(self, step: int, cells: dict[str, str]) -> None:
        if self.course.steps(step):
            self._cut(step)
        self.backlog.write(partial(self._append, step, cells), sum(map(len, cells)) + sum(map(len, cells.values())))

    def close(self) -> None:
        if self._table is not None:
            self._table.try_again()
            self.backlog.write(self._table.close, 0)
        self.backlog.flush()

    def _cut(self, first_step: int) -> None:
        self.backlog.write(lambda: self._open().cut(first_step), 0)

    def _append(self, step: int, cells: dict[str, str]) -> None:
        self._open().append(step, cells)

    def _open(self) -> CsvTable:
        """The table, at the first place that is ours or nobody's."""
        if self._table is None:
            place = next((each for each in self._places[:-1] if _claim(each, self._owner)), self._places[-1])
            if place != self._places[0]:
                log().warning(
                    "csv_metrics.second_run",
                    run=self._owner,
                    taken=str(self._places[0]),
                    file=str(place),
                    fix=f"write {_RUN_DIR} or {_RUN} into out_path to name the files yourself",
                )
            self._table = CsvTable(place, self._delimiter, self._marks)
        return self._table


def _owner(state: LoopState) -> str:
    """The run's folder, the same through whatever links it is reached."""
    return os.path.realpath(run_id(state).replace("\0", "\\0"))  # a key may hold what no path can


def _seen_from(place: Path, owner: str) -> str:
    """The owner relative to the folder of the file: the same after both were moved together."""
    return os.path.relpath(owner, os.path.realpath(place.parent))


def _claim(place: Path, owner: str) -> bool:
    """Whether the file is this run's, now or since an earlier day."""
    mark = place.with_name(f".{place.name}.run")
    place.parent.mkdir(parents=True, exist_ok=True)
    words = _seen_from(place, owner).encode(errors="surrogateescape")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        said = mark.read_bytes()
        if said:
            return said == words
    mark.write_bytes(words)  # also where a full disk or a kill came between touch and write
    return True
