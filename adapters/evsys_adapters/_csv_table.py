"""`CsvTable`: a CSV file whose rows always match its header, though columns may appear while it grows.

A row costs one append. A new column changes the header, so the file is rewritten; a large file only once it has grown
enough since the last rewrite. Until then, new metrics are stored as a JSON object in a last column ``more_metrics``,
which is created on demand; they move to columns of their own at the next rewrite or on close. So every byte is copied a
bounded number of times, and every metric is in the file after every row.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import compress, islice
from pathlib import Path
from typing import Final

import msgspec

from evsys_adapters._csv_cells import MORE, STEP
from evsys_bus.diagnostics import log
from evsys_bus.files import AppendFile
from evsys_bus.savepoints import Savepoints

MAX_COLUMNS: Final = 4_096
"""Every row pays for every column; further metrics stay in ``more_metrics``."""
CHEAP_BYTES: Final = 1 << 18
"""A file up to this size is rewritten whenever a column appears."""
MAX_COPIES: Final = 4
"""A larger file is rewritten if it is at most this many times what was appended since the last rewrite."""
_ROWS_BETWEEN_TRIES: Final = 64
"""Rows to append after a failed rewrite before the next attempt, so that a full disk is not retried with every row."""

_decode_more = msgspec.json.Decoder(dict[str, str]).decode


def row_of(step: int, cells: Mapping[str, str]) -> dict[str, str]:
    """Return the non-empty cells of a row, including its step."""
    return {name: text for name, text in {STEP: str(step), **cells}.items() if text}


def row_key(step: int, cells: Mapping[str, str]) -> int:
    """Return the key that `CsvTable.rows` yields for such a row."""
    return hash(frozenset(row_of(step, cells).items()))


class CsvTable:
    """One CSV file with one writer. A method that raises OSError leaves the file's content unchanged."""

    def __init__(
        self,
        path: Path,
        delimiter: str,
        marks: Savepoints | None = None,
        *,
        max_columns: int = MAX_COLUMNS,
        cheap_bytes: int = CHEAP_BYTES,
        max_copies: int = MAX_COPIES,
    ) -> None:
        self._file = AppendFile(path, marks)
        self._delimiter = delimiter
        self._max_columns = max_columns
        self._cheap_bytes = cheap_bytes
        self._max_copies = max_copies
        self._columns: list[str] = []
        self._known: frozenset[str] = frozenset()
        self._looked = False
        self._has_rows = False
        self._more: dict[str, None] = {}
        """Metrics that were stored in ``more_metrics`` in some row, in order of appearance."""
        self._size = 0
        self._grown = 0
        """Bytes appended since the last rewrite."""
        self._refusal: tuple[OSError, int] | None = None
        """Why the last rewrite failed, and how many rows to let pass before the next attempt."""

    def append(self, step: int, cells: Mapping[str, str]) -> None:
        """Append one row, adding the columns that it needs; ``cells`` is the result of `cells_of`."""
        self._look()
        if not self._known.issuperset(cells) or not self._has_rows:
            self._make_room(cells)
        line = self._line(self._spread({STEP: str(step), **cells}, self._columns))
        if self._has_rows:
            self._size = self._file.append(line, head=self._line(self._columns)) + len(line)
            self._grown += len(line)
        else:
            self._size = self._grown = self._file.rewrite([self._line(self._columns), line])
            self._has_rows = True

    def cut(self, first_step: int, cells: Mapping[str, str] | None = None) -> None:
        """Drop the rows from that step on; with ``cells``, keep everything before the last row equal to it."""
        self._look()
        same = None if cells is None else self._place_of(first_step, cells)

        def stays(number: int, line: bytes) -> bool:
            step = self._step(line)
            return step is None or step < first_step or (same is not None and number < same)

        if not all(stays(number, line) for number, line in enumerate(self._file.lines())):
            self._file.rewrite(line for number, line in enumerate(self._file.lines()) if stays(number, line))
        self._count()

    def rows(self) -> Iterator[tuple[int, int | None]]:
        """See `evsys_adapters._walk.WalkedFile.rows`."""
        self._look()
        for line in islice(self._file.lines(), 1, None):
            row = self._row(line)
            yield hash(frozenset(row.items())), self._step(line)

    def keep(self, stays: Callable[[int, int | None], bool]) -> int:
        """See `evsys_adapters._walk.WalkedFile.keep`."""
        self._look()
        kept = [not number or stays(number - 1, self._step(line)) for number, line in enumerate(self._file.lines())]
        if not all(kept):
            self._file.rewrite(compress(self._file.lines(), kept))
            self._count()
        return max(0, sum(kept) - 1)

    def carry_out(self, first_step: int) -> None:
        """See `evsys_adapters._walk.WalkedFile.carry_out`."""
        self.cut(first_step)

    def close(self) -> None:
        """Give every metric its own column as far as there is room, and close the file."""
        try:
            columns = self._with(())
            if columns != self._columns:
                self._rewrite(columns)
        finally:
            self._file.close()

    def try_again(self) -> None:
        """Allow the next rewrite at once, even if the disk refused the last one."""
        self._refusal = None

    def _look(self) -> None:
        """Read the existing file; a file that is not a table of steps is quarantined."""
        if self._looked:
            return
        self._file.settle()
        header = self._header()
        if header and (header[0] != STEP or MORE in header[:-1] or len(set(header)) < len(header)):
            path, aside = str(self._file.path), str(self._file.set_aside())
            log().warning("csv_metrics.file_set_aside", file=path, kept_as=aside, why="not a table of steps")
            header = []
        self._use(header)
        self._count()
        if MORE in self._known:
            for line in self._file.lines():
                self._more.update(dict.fromkeys(self._parted(line)[1]))
        self._looked = True

    def _header(self) -> list[str]:
        """Return the cells of the first line, complete or torn; empty if there is no file or it is empty."""
        line = self._file.first_line()
        return self._cells(line) or ([""] if line else [])

    def _count(self) -> None:
        self._has_rows = any(islice(self._file.lines(), 1, None))
        self._size = self._grown = self._file.size() if self._has_rows else 0

    def _make_room(self, names: Iterable[str]) -> None:
        """Add columns for new metrics, or make sure that they fit into ``more_metrics``."""
        if not self._has_rows:  # `cut` left a header without rows; it is replaced with them
            self._more = {}
            self._use([STEP])
            self._use(self._with(names))
            return
        affordable = self._size <= max(self._cheap_bytes, self._max_copies * self._grown)
        if MORE in self._known and not affordable:
            return
        columns = self._with(names)
        if MORE not in columns and (MORE in self._known or not affordable):
            columns.append(MORE)
        if columns != self._columns:
            self._rewrite(columns)

    def _with(self, names: Iterable[str]) -> list[str]:
        """Return the columns extended by the contents of ``more_metrics`` and by ``names``, up to the limit."""
        wanted = dict.fromkeys([*self._columns, *self._more, *names])
        wanted.pop(MORE, None)
        return [*islice(wanted, self._max_columns), *([MORE] if len(wanted) > self._max_columns else [])]

    def _rewrite(self, columns: list[str]) -> None:
        """Rewrite the file with more columns; ``more_metrics`` is the last of them or absent."""
        if self._refusal is not None:
            error, rows = self._refusal
            if rows:
                self._refusal = (error, rows - 1)
                raise error
        try:
            self._size = self._file.rewrite(self._widened(columns))
        except OSError as error:
            self._refusal = (error, _ROWS_BETWEEN_TRIES)
            raise
        self._use(columns)
        self._refusal = None
        self._grown = 0

    def _widened(self, columns: list[str]) -> Iterator[bytes]:
        yield self._line(columns)
        # Where more_metrics is empty, new columns before or after it are the same bytes.
        padding = self._delimiter.encode() * len(columns)
        spare = len(padding) - len(self._delimiter.encode()) * len(self._columns)
        for line in islice(self._file.lines(), 1, None):
            cells, more = self._parted(line) if MORE in self._known else ([], {})
            if more:
                yield self._line(self._spread(dict(zip(self._columns, cells, strict=False)) | more, columns))
            elif spare >= 0:
                yield line.rstrip(b"\r\n") + padding[:spare] + b"\n"
            else:
                yield line.rstrip(b"\r\n")[:spare] + b"\n"

    def _parted(self, line: bytes) -> tuple[list[str], dict[str, str]]:
        """Split a row into its cells and the contents of ``more_metrics``, which may be too long for the csv module.

        Inside a quoted cell quotes are doubled, so a delimiter, a quote and a brace always begin such a cell.
        """
        row, mark, more = line.rstrip(b"\r\n").rpartition(self._delimiter.encode() + b'"{')
        if not mark or not more.endswith(b'}"'):
            return [], {}
        with suppress(msgspec.DecodeError):
            return self._cells(row), _decode_more(b"{" + more[:-1].replace(b'""', b'"'))
        return [], {}

    def _place_of(self, step: int, cells: Mapping[str, str]) -> int | None:
        """Return the number of the last line with this step and these cells."""
        wanted = row_of(step, cells)
        same: int | None = None
        for number, line in enumerate(self._file.lines()):
            if number and self._step(line) == step and self._row(line) == wanted:
                same = number
        return same

    def _row(self, line: bytes) -> dict[str, str]:
        """Return the non-empty cells of a row by metric name."""
        cells, more = self._parted(line) if MORE in self._known else ([], {})
        row = dict(zip(self._columns, cells or self._cells(line), strict=False))
        row.pop(MORE, None)
        return {name: text for name, text in (row | more).items() if text}

    def _spread(self, row: Mapping[str, str], columns: list[str]) -> list[str]:
        """Order the cells of a row by column; metrics without a column go to ``more_metrics``."""
        known = self._known if columns is self._columns else frozenset(columns)
        if not known.issuperset(row):
            more = {name: text for name, text in row.items() if name not in known}
            row = {**row, MORE: msgspec.json.encode(more).decode()}
            self._more.update(dict.fromkeys(more))
        return [row.get(name, "") for name in columns]

    def _use(self, columns: list[str]) -> None:
        self._columns = columns
        self._known = frozenset(columns)

    def _line(self, cells: list[str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()

    def _cells(self, line: bytes) -> list[str]:
        """Parse a line; empty if a cell exceeds the csv module's limit."""
        with suppress(csv.Error):
            return next(csv.reader([line.decode(errors="replace")], delimiter=self._delimiter), list[str]())
        return []

    def _step(self, line: bytes) -> int | None:
        try:
            return int(line.partition(self._delimiter.encode())[0])
        except ValueError:
            return None
