"""`RunLogs`: the log files of one run, and how rows replace earlier ones.

    <run>/logs/training/metrics.jsonl                        one row per step, in order of arrival
    <run>/logs/validation/metrics.jsonl, rollouts.jsonl      one row per (benchmark, step), and its predictions
    <run>/logs/test/metrics.jsonl, rollouts.jsonl            the same, for benchmarks that are not tagged ``val``
    <run>/logs/hypothesis.md, conclusion.md                  what was expected, what came out
    <run>/logs/.run                                          the owner, see `evsys_adapters._output_claim`

Callers choose the content of rows, except for the keys ``step`` and ``benchmark``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from evsys_adapters._output_claim import OutputClaim, OutputPlaces
from evsys_adapters._output_notes import NotedOutput, assign, is_empty, note_of_folder
from evsys_adapters._step_tracker import StepTracker
from evsys_adapters._walk import OutputWalk
from evsys_bus.codec import json_line, to_plain
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import AppendFile, Backlog
from evsys_bus.savepoints import Savepoints

Split = Literal["validation", "test"]
Row = Mapping[str, Any]


class RowKey(msgspec.Struct, frozen=True):
    """The key of an eval's row and of its predictions."""

    step: int | None = None
    """0-based; None after training."""
    benchmark: str | None = None
    """None in training rows."""


_decode_held: Final = msgspec.msgpack.Decoder(
    tuple[RowKey, dict[str, Any], list[dict[str, Any]] | None, Split | None]
).decode
_decode_key: Final = msgspec.json.Decoder(RowKey).decode


def _key_of(line: bytes) -> RowKey | None:
    """Return the key of a row; None for a foreign line, which is left alone."""
    try:
        return _decode_key(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class StepRows:
    """A file of rows that belong to steps. Only `settle` raises OSError: refused writes are kept in memory for a retry.

    Args:
        place: Returns the folder ``logs``; called for each row, may raise OSError.
        path: Path of the file if the first candidate folder is used.
        marks: The callback's savepoints.
    """

    def __init__(self, place: Callable[[], Path], path: Path, marks: Savepoints) -> None:
        self._place = place
        self.name = Path(path.parent.name, path.name)
        self._marks = marks
        self._open_file: AppendFile | None = None
        self._backlog = Backlog(str(path))

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return self._backlog.waiting

    def add(self, row: Row) -> None:
        """Add one row."""
        line = json_line(row) + b"\n"
        self._backlog.write(lambda: self._file.append(line), len(line))

    def cut(self, first_step: int, *, but: frozenset[RowKey] = frozenset(), row: Row | None = None) -> None:
        """Drop the rows from that step on, except for the evals in ``but``.

        With ``row``, everything before the last row equal to it is kept.
        """
        like = None if row is None else json_line(row) + b"\n"
        self._backlog.write(partial(self._cut, first_step, but, like), 0)

    def settle(self) -> None:
        """Retry refused writes; raises OSError if the disk still refuses, or if rows were dropped."""
        self._backlog.settle()

    def flush(self) -> None:
        """Retry refused writes, and close the file until the next row."""
        self._backlog.flush()
        if self._open_file is not None:
            self._open_file.close()

    @property
    def _file(self) -> AppendFile:
        """The open file; raises OSError if its folder cannot be determined now."""
        path = self._place() / self.name
        if self._open_file is None or self._open_file.path != path:
            self._open_file = AppendFile(path, self._marks)
            self.forget()
        return self._open_file

    def forget(self) -> None:
        """Forget what is known of the file's content, because another file is used now."""

    def _cut(self, first_step: int, but: frozenset[RowKey], like: bytes | None) -> None:
        kept = 0
        if like is not None:
            kept = max((number for number, line in enumerate(self._file.lines()) if line == like), default=0)

        def stays(number: int, line: bytes) -> bool:
            key = _key_of(line)
            return number < kept or key is None or key.step is None or key.step < first_step or key in but

        if not all(stays(number, line) for number, line in enumerate(self._file.lines())):
            self._file.rewrite(line for number, line in enumerate(self._file.lines()) if stays(number, line))


class TrainingRows(StepRows):
    """A file of training rows, which may be delivered again over existing ones."""

    def __init__(self, place: Callable[[], Path], path: Path, marks: Savepoints, course: StepTracker) -> None:
        super().__init__(place, path, marks)
        self._walk = OutputWalk(course)
        self._course = course

    def introduced(self, then: Callable[[], object]) -> None:
        """The training's start event is repeated."""
        self._backlog.write(lambda: (self._walk.introduced(), then()), 0)

    def starts(self, first_step: int, then: Callable[[bool], object]) -> None:
        """Training starts at this step. ``then`` receives whether to cut now; if not, the next row decides."""
        self._backlog.write(lambda: then(self._walk.starts(first_step)), 0)

    def walk(self, step: int, row: Row, cut: Callable[[int], object], found: Callable[[], object]) -> None:
        """Append a row unless it is in the file.

        Calls ``cut`` if a pending start has to be applied, and ``found`` if it was before. They must not raise OSError.
        """
        line = json_line(row) + b"\n"
        self._backlog.write(partial(self._walk_on, step, line, cut, found), len(line))

    def rows(self) -> Iterator[tuple[int, int | None]]:
        """See `evsys_adapters._walk.WalkedFile.rows`."""
        for line in self._file.lines():
            key = _key_of(line)
            yield hash(line), None if key is None else key.step

    def keep(self, stays: Callable[[int, int | None], bool]) -> int:
        """See `evsys_adapters._walk.WalkedFile.keep`."""
        kept = [stays(number, step) for number, (_, step) in enumerate(self.rows())]
        if not all(kept):
            self._file.rewrite(compress(self._file.lines(), kept))
        return sum(kept)

    def flush(self) -> None:
        """Retry refused writes, and close the file until the next row."""
        super().flush()
        self._walk.look_again()

    def forget(self) -> None:
        """See `StepRows.forget`."""
        self._walk.look_again()

    def carry_out(self, first_step: int) -> None:
        """See `evsys_adapters._walk.WalkedFile.carry_out`."""
        self._cut(first_step, frozenset(), None)

    def _walk_on(self, step: int, line: bytes, cut: Callable[[int], object], found: Callable[[], object]) -> None:
        first = self._course.pending
        stands = self._walk.stands(self, hash(line), step)
        if first is not None and not stands and not self._walk.is_on:
            cut(first)
        elif stands:
            found()
        if not stands:
            self._file.append(line)
            self._walk.appended()
        self._course.steps(step)


class EvalRows(StepRows):
    """A file with one block of rows per eval; a repeated eval replaces its block."""

    def __init__(self, place: Callable[[], Path], path: Path, marks: Savepoints) -> None:
        super().__init__(place, path, marks)
        self._known: set[RowKey] | None = None
        """Keys of the evals in the file; None until it was read."""
        self._last: tuple[RowKey, int] | None = None
        """The last eval in the file and the offset of its block, if this object wrote it."""

    def put(self, key: RowKey, rows: Iterable[Row], *, again: bool = False) -> None:
        """Write the rows of an eval in place of its earlier ones; an empty ``rows`` removes them.

        ``again``: earlier rows, if any, are kept unchanged.
        """
        block = b"".join(json_line(row) + b"\n" for row in rows)
        self._backlog.write(partial(self._put, key, block, again), len(block))

    def holds(self, benchmark: str) -> bool:
        """Whether the file has rows of this benchmark from during the training."""
        try:
            return any(key.benchmark == benchmark and key.step is not None for key in self._keys())
        except OSError:
            return False

    def forget(self) -> None:
        """See `StepRows.forget`."""
        self._known = self._last = None

    def has(self, key: RowKey) -> bool:
        """Whether the file has rows of this eval."""
        try:
            return key in self._keys()
        except OSError:
            return False

    def _keys(self) -> set[RowKey]:
        file = self._file
        if self._known is None:
            self._known = {key for line in file.lines() if (key := _key_of(line)) is not None}
        return self._known

    def _put(self, key: RowKey, block: bytes, again: bool) -> None:
        known = self._keys()
        if again and key in known:
            return
        if key not in known:
            if block:
                self._last = (key, self._file.append(block))
                known.add(key)
        elif self._last is not None and self._last[0] == key and block:
            self._file.replace_tail(self._last[1], block)
        else:
            others = (line for line in self._file.lines() if _key_of(line) != key)
            size = self._file.rewrite(chain(others, [block]))
            self._last = (key, size - len(block)) if block else None
            if not block:
                known.discard(key)

    def _cut(self, first_step: int, but: frozenset[RowKey], like: bytes | None) -> None:
        super()._cut(first_step, but, like)
        self._known = self._last = None


class RunNotes(msgspec.Struct, omit_defaults=True):
    """State of a run that is not in its files."""

    course: StepTracker = msgspec.field(default_factory=StepTracker)
    splits: dict[str, Split] = {}
    """The split of each eval name that occurred during training."""
    fresh: list[RowKey] = []
    """Evals from before the first known step, or from a replay that were not in the file."""
    doubtful: list[RowKey] = []
    """Evals of a replay from before the last start."""
    held: list[bytes] = []
    """Evals after a pending start, encoded; the next training row decides whether the start was applied."""


class RunLogs:
    """The log files of one run; nothing is created before the first row.

    Args:
        logs: The folder ``logs`` of the run.
        marks: The callback's savepoints.
        notes: State of the run that is not in its files.
        output: Which events the files already contain.
    """

    def __init__(
        self,
        logs: Path,
        marks: Savepoints | None = None,
        notes: RunNotes | None = None,
        output: NotedOutput | None = None,
    ) -> None:
        self.logs = logs
        self.output = NotedOutput(marks or Savepoints(), is_followed=False) if output is None else output
        self.places: OutputPlaces | None = None
        """Candidate folders and their owner; None while the run is known from a mark only."""
        self.notes = RunNotes() if notes is None else notes
        self._claim: OutputClaim | None = None
        self._known: bytes | None = None
        marks = marks or Savepoints()
        self._training = TrainingRows(self.place, logs / "training" / "metrics.jsonl", marks, self.notes.course)
        self._evals: dict[Split, EvalRows] = {
            "validation": EvalRows(self.place, logs / "validation" / "metrics.jsonl", marks),
            "test": EvalRows(self.place, logs / "test" / "metrics.jsonl", marks),
        }
        self._rollouts: dict[Split, EvalRows] = {
            "validation": EvalRows(self.place, logs / "validation" / "rollouts.jsonl", marks),
            "test": EvalRows(self.place, logs / "test" / "rollouts.jsonl", marks),
        }

    def place(self) -> Path:
        """Return the folder, acquired for this adapter.

        Raises:
            OSError: The disk refuses it.
        """
        if self.places is not None and not self._is_claimed:
            self.logs, claim = self.places.take_followed()
            self._known = self.output.found(self.logs, note_of_folder(self.logs))
            self._claim = claim
        return self.logs

    def look(self) -> bytes | None:
        """Acquire the folder, to find out which rows exist; returns the state stored beside it where that is newer.

        Raises:
            RetryLaterError: The disk refuses it.
        """
        if self.output.is_followed and not self._is_claimed:
            try:
                self.place()
                self._forgo_walk()
            except OSError as error:
                raise RetryLaterError(f"{self.logs} cannot be read: {error}") from error
        known, self._known = self._known, None
        return known

    def know(self, notes: RunNotes) -> None:
        """Replace the state of the run by this one."""
        assign(self.notes.course, notes.course)
        notes.course = self.notes.course
        assign(self.notes, notes)
        for each in self._files():
            each.forget()

    def paths(self) -> list[Path]:
        """The current paths of the files."""
        return [self.logs / each.name for each in self._files()]

    def _forgo_walk(self) -> None:
        """Skip the matching of rows if the files are empty."""
        if self.notes.course.unplaced and is_empty(self.paths()):
            self.notes.course.unplaced = False

    @property
    def _is_claimed(self) -> bool:
        return self._claim is not None and self._claim.is_held

    def give_up(self) -> None:
        """Release the folder for other adapters; the next row acquires it again."""
        self._claim = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.logs.parent

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return sum(each.waiting for each in self._files())

    def introduced(self) -> None:
        """The run's start event is repeated: rows that follow may be in the files."""
        if self.notes.course.walks:
            self._training.introduced(self._doubt)
        elif not self.output.is_known:
            self.notes.course.introduced()
            self._forgo_walk()

    def begin(self, first_step: int) -> None:
        """Drop the rows from that step on: it is run again."""

        def then(cuts: bool) -> None:
            self._doubt()
            if cuts:
                self._cut(first_step)

        if self.notes.course.walks:
            self._training.starts(first_step, then)
        elif self.notes.course.starts(first_step):
            self._cut(first_step)

    def add_step(self, step: int, row: Row) -> None:
        """Add a training row. Without `begin`, the first step acts as the start, but earlier evals are kept."""
        row = {"step": step, **row}
        if self.notes.course.walks:
            self._training.walk(step, row, self._carry_out, self._found)
            return
        if self.notes.course.steps(step):
            self._training.cut(step, row=row)
            for each in self._files()[1:]:
                each.cut(step, but=frozenset(self.notes.fresh))
        self._training.add(row)

    def ends(self) -> None:
        self.notes.course.ends()
        self._release(again=False)

    def put_eval(self, key: RowKey, row: Row, rollouts: Iterable[Row] | None, split: Split | None) -> None:
        """Write the row of an eval, and its predictions.

        ``rollouts`` and ``split`` are None if only the metrics are known: predictions are kept, and the row goes to the
        split of earlier evals with that name, or else to validation.
        """
        course = self.notes.course
        if course.pending is not None and key.step is not None:
            held = [key, row, None if rollouts is None else [*rollouts], split]
            self.notes.held.append(msgspec.msgpack.encode(to_plain(held)[0]))
        else:
            self._put_eval(key, row, rollouts, split, again=course.walks)

    def _put_eval(
        self, key: RowKey, row: Row, rollouts: Iterable[Row] | None, split: Split | None, *, again: bool
    ) -> None:
        notes = self.notes
        if again and key not in notes.fresh and key not in notes.doubtful:
            if any(each.has(key) for each in self._evals.values()):
                return
            notes.fresh.append(key)
        elif not notes.course.begun:
            notes.fresh.append(key)
        name = str(key.benchmark)
        before = self.notes.splits.get(name) or ("test" if self._evals["test"].holds(name) else "validation")
        split = split or before
        if key.step is not None:
            self.notes.splits[name] = split
        if split != before:
            self._evals[before].put(key, ())
            self._rollouts[before].put(key, ())
        if rollouts is not None:
            self._rollouts[split].put(key, rollouts)
        self._evals[split].put(key, [row])

    def _cut(self, first_step: int) -> None:
        self.notes.fresh = []
        for each in self._files():
            each.cut(first_step)

    def _doubt(self) -> None:
        """A start arrived during a replay: evals written before it may be void."""
        if self.notes.course.walks:
            self.notes.doubtful += self.notes.fresh
            self.notes.fresh = []

    def _carry_out(self, first_step: int) -> None:
        """Apply a pending start to the eval files; the training rows were cut already."""
        for each in self._files()[1:]:
            each.cut(first_step)
        self._release(again=False)
        self.notes.fresh, self.notes.doubtful = [], []

    def _found(self) -> None:
        """A training row is in the file, so the last start was applied before: evals new since are void."""
        doubtful, self.notes.doubtful = self.notes.doubtful, []
        for key in doubtful:
            for each in (*self._evals.values(), *self._rollouts.values()):
                each.put(key, ())
        self._release(again=True)
        if not self.notes.course.walks:
            self.notes.fresh = []

    def _release(self, *, again: bool) -> None:
        """Write the deferred evals."""
        held, self.notes.held = self.notes.held, []
        for each in held:
            key, row, rollouts, split = _decode_held(each)
            self._put_eval(key, row, rollouts, split, again=again)

    def settle(self) -> None:
        """Retry refused writes; raises OSError if the disk still refuses, or if rows were dropped."""
        for each in self._files():
            each.settle()

    def flush(self) -> None:
        """Retry refused writes, and close the files until the next row."""
        for each in self._files():
            each.flush()

    def _files(self) -> list[StepRows]:
        return [self._training, *self._evals.values(), *self._rollouts.values()]
