"""`RunLogs`: the log files of one run, and the rules by which their rows are kept.

    <run>/logs/training/metrics.jsonl                        one row per step, as it came
    <run>/logs/validation/metrics.jsonl, rollouts.jsonl      one row per (benchmark, step), and its predictions
    <run>/logs/test/metrics.jsonl, rollouts.jsonl            the same, for benchmarks that are not tagged ``val``
    <run>/logs/hypothesis.md, conclusion.md                  what was expected, what came out

What is in a row is its callers' business, but for the keys ``step`` and ``benchmark``.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from evsys_adapters._line_file import Backlog, LineFile
from evsys_adapters._marks import Course, Marks
from evsys_bus.codec import json_line

Split = Literal["validation", "test"]
Row = Mapping[str, Any]
"""Any: values are what people put into metrics and predictions."""


class RowKey(msgspec.Struct, frozen=True):
    """What names an eval, and so its row and its predictions."""

    step: int | None = None
    """0-based; None after training."""
    benchmark: str | None = None
    """None in training rows."""


_decode_key: Final = msgspec.json.Decoder(RowKey).decode


def _key_of(line: bytes) -> RowKey | None:
    """The key of a row; None for a line that is no row of ours, which stays as it is."""
    try:
        return _decode_key(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class StepRows:
    """A file of rows that belong to steps. No method raises OSError: what the disk refuses waits in memory."""

    def __init__(self, path: Path, marks: Marks) -> None:
        self._file = LineFile(path, marks)
        self._backlog = Backlog(str(path))

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return self._backlog.waiting

    def add(self, row: Row) -> None:
        """Add one row."""
        line = json_line(row) + b"\n"
        self._backlog.write(partial(self._file.append, line), len(line))

    def cut(self, first_step: int, *, but: frozenset[RowKey] = frozenset()) -> None:
        """Drop the rows of that step and of later ones, ``but`` those of the given evals."""
        self._backlog.write(partial(self._cut, first_step, but), 0)

    def settle(self) -> None:
        """Try to write what waits; raises OSError if the disk still refuses, or if rows were given up."""
        self._backlog.settle()

    def flush(self) -> None:
        """Try to write what waits, and close the file until the next row."""
        self._backlog.flush()
        self._file.close()

    def _cut(self, first_step: int, but: frozenset[RowKey]) -> None:
        def stays(line: bytes) -> bool:
            key = _key_of(line)
            return key is None or key.step is None or key.step < first_step or key in but

        self._file.keep(stays)


class EvalRows(StepRows):
    """A file with one block of rows per eval; a repeated eval replaces its block."""

    def __init__(self, path: Path, marks: Marks) -> None:
        super().__init__(path, marks)
        self._known: set[RowKey] | None = None
        """The evals in the file; None until it was read."""
        self._last: tuple[RowKey, int] | None = None
        """The last eval in the file and where its block begins, if we wrote it."""

    def put(self, key: RowKey, rows: Iterable[Row]) -> None:
        """Put the rows of an eval where its earlier ones were; no rows remove those."""
        block = b"".join(json_line(row) + b"\n" for row in rows)
        self._backlog.write(partial(self._put, key, block), len(block))

    def holds(self, benchmark: str) -> bool:
        """Whether there are rows of the benchmark from within the training."""
        try:
            return any(key.benchmark == benchmark and key.step is not None for key in self._keys())
        except OSError:
            return False

    def _keys(self) -> set[RowKey]:
        if self._known is None:
            self._known = {key for line in self._file.lines() if (key := _key_of(line)) is not None}
        return self._known

    def _put(self, key: RowKey, block: bytes) -> None:
        known = self._keys()
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

    def _cut(self, first_step: int, but: frozenset[RowKey]) -> None:
        super()._cut(first_step, but)
        self._known = self._last = None


class RunNotes(msgspec.Struct, omit_defaults=True):
    """What the rules need to know of a run besides what is in its files."""

    course: Course = msgspec.field(default_factory=Course)
    splits: dict[str, Split] = {}
    """Where the evals of each name went that came from within the training."""
    fresh: list[RowKey] = []
    """Evals that came before the first step was known."""


class RunLogs:
    """The log files of one run; nothing is touched before the first row."""

    def __init__(self, folder: Path, marks: Marks | None = None, notes: RunNotes | None = None) -> None:
        self.folder = folder
        self.notes = RunNotes() if notes is None else notes
        logs = folder / "logs"
        marks = marks or Marks()
        self._training = StepRows(logs / "training" / "metrics.jsonl", marks)
        self._evals: dict[Split, EvalRows] = {
            "validation": EvalRows(logs / "validation" / "metrics.jsonl", marks),
            "test": EvalRows(logs / "test" / "metrics.jsonl", marks),
        }
        self._rollouts: dict[Split, EvalRows] = {
            "validation": EvalRows(logs / "validation" / "rollouts.jsonl", marks),
            "test": EvalRows(logs / "test" / "rollouts.jsonl", marks),
        }

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return sum(each.waiting for each in self._files())

    def begin(self, first_step: int) -> None:
        """Drop what was logged of that step and later ones: it is run again."""
        if self.notes.course.starts(first_step):
            self.notes.fresh = []
            for each in self._files():
                each.cut(first_step)

    def add_step(self, step: int, row: Row) -> None:
        """Add a training row; where nobody said `begin`, the first step says it, but evals that came before it stay."""
        if self.notes.course.steps(step):
            for each in self._files():
                each.cut(step, but=frozenset(self.notes.fresh))
        self._training.add({"step": step, **row})

    def put_eval(self, key: RowKey, row: Row, rollouts: Iterable[Row] | None, split: Split | None) -> None:
        """Put the row of an eval, and its predictions.

        ``rollouts`` and ``split`` are None where only the metrics are known: the predictions stay, and the row goes
        where those of its name went before, or else to validation.
        """
        if not self.notes.course.begun:
            self.notes.fresh.append(key)
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

    def settle(self) -> None:
        """Try to write what waits; raises OSError if the disk still refuses, or if rows were given up."""
        for each in self._files():
            each.settle()

    def flush(self) -> None:
        """Try to write what waits, and close the files until the next row."""
        for each in self._files():
            each.flush()

    def _files(self) -> list[StepRows]:
        return [self._training, *self._evals.values(), *self._rollouts.values()]
