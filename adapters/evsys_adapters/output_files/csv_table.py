"""`CsvTable`: a CSV file whose rows always match its header, though columns may appear while it grows.

A row costs one append. A new column changes the header, so the file is rewritten; a large file only once it has grown
enough since the last rewrite. Until then, new metrics are stored as a JSON object in a last column ``more_metrics``,
which is created on demand; they move to columns of their own at the next rewrite or on close. So every byte is copied a
bounded number of times, and every metric is in the file after every row.

A cell is always one line and never a formula: a text that begins with one of ``= + - @`` or a tab would run as one when
the file is opened in a spreadsheet, so it gets a leading apostrophe, which spreadsheets hide. Numbers are unchanged.
"""

import csv
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters.common.logged_values import cut_text, redacted
from evsys_adapters.output_files.step_tracker import keep_lines
from evsys_bus.codec import to_builtins
from evsys_bus.codec.redact import redact_key
from evsys_bus.diagnostics import log
from evsys_bus.files import AppendFile
from evsys_bus.location import short_digest
from evsys_bus.savepoints import Savepoints

STEP_COLUMN: Final = "step"
"""The first column."""
MORE_COLUMN: Final = "more_metrics"
"""The last column, if present: a JSON object of metrics that have no column of their own."""

_MAX_CELL: Final = 8_192
"""Characters per cell; spreadsheets accept 32,767 and Python's csv module 131,072."""
_MAX_COLUMN: Final = 256
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""The last four are the full-width forms, which some spreadsheets treat alike."""
_CONTROLS: Final = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(10, 32), 127)}
"""Control characters that would end the line or confuse a reader, as escapes: a line break becomes ``\\n``."""


_NUMBERS: Final = frozenset({float, int, bool})


def cells_of(metrics: object) -> dict[str, str]:
    """Return the columns and cells of one row of metrics, copied by value; empty if ``metrics`` is not a mapping."""
    plain: Any = cast("dict[object, object]", metrics).copy() if type(metrics) is dict else metrics
    if type(plain) is not dict or not _NUMBERS.issuperset(map(type, cast("dict[object, object]", plain).values())):
        plain = redacted(to_builtins(cast("object", plain))[0])
    if not isinstance(plain, dict):
        return {}
    entries = cast("dict[object, object]", plain).items()
    return {
        _column(redact_key(name) if type(name) is str else next(iter(to_builtins({name: None})[0]))): _cell(value)
        for name, value in entries
    }


def _cell(value: object) -> str:
    """Format a value: ``nan`` and ``inf`` for those floats, empty for None, JSON for lists and mappings."""
    kind: type = type(value)
    if kind is float:
        return repr(value)
    plain = to_builtins(value)[0]  # also catches types that only pretend to be numbers
    if plain is None:
        return ""
    if isinstance(plain, bool | int | float):
        return repr(plain)
    if isinstance(plain, bytes):
        plain = plain.decode(errors="backslashreplace")
    return _text(plain if isinstance(plain, str) else msgspec.json.encode(plain).decode(), _MAX_CELL)


@functools.lru_cache(maxsize=4_096)
def _column(name: str) -> str:
    """Return the column for a metric: long names are cut and get a digest, reserved ones the prefix ``metrics.``."""
    if len(name) > _MAX_COLUMN:
        name = f"{name[:_MAX_COLUMN]}…{short_digest(name)}"
    return f"metrics.{name}" if name in {"", STEP_COLUMN, MORE_COLUMN} else _text(name, 2 * _MAX_COLUMN)


def _text(text: str, limit: int) -> str:
    if text.startswith(_FORMULA) and not _is_number(text):
        text = f"'{text}"
    text = text.translate(_CONTROLS).encode(errors="backslashreplace").decode()
    return cut_text(text, limit)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
    return {name: text for name, text in {STEP_COLUMN: str(step), **cells}.items() if text}


def row_key(step: int, cells: Mapping[str, str]) -> int:
    """Return the key that `CsvTable.rows` yields for such a row."""
    return hash(frozenset(row_of(step, cells).items()))


class CsvTable:
    """One CSV file with one writer. A method that raises OSError leaves the file's content unchanged."""

    def __init__(
        self,
        path: Path,
        delimiter: str,
        savepoints: Savepoints | None = None,
        *,
        max_columns: int = MAX_COLUMNS,
        cheap_bytes: int = CHEAP_BYTES,
        max_copies: int = MAX_COPIES,
    ) -> None:
        self._file = AppendFile(path, savepoints)
        self._delimiter = delimiter
        self._max_columns = max_columns
        self._cheap_bytes = cheap_bytes
        self._max_copies = max_copies
        self._columns: list[str] = []
        self._known: frozenset[str] = frozenset()
        self._is_loaded = False
        self._has_rows = False
        self._extra_names: dict[str, None] = {}
        """Metrics that were stored in ``more_metrics`` in some row, in order of appearance."""
        self._size = 0
        self._appended_bytes = 0
        """Bytes appended since the last rewrite."""
        self._rewrite_error: tuple[OSError, int] | None = None
        """Why the last rewrite failed, and how many rows to let pass before the next attempt."""

    def append(self, step: int, cells: Mapping[str, str]) -> None:
        """Append one row, adding the columns that it needs; ``cells`` is the result of `cells_of`."""
        self._load()
        if not self._known.issuperset(cells) or not self._has_rows:
            self._make_room(cells)
        line = self._encode_line(self._order_cells({STEP_COLUMN: str(step), **cells}, self._columns))
        if self._has_rows:
            self._size = self._file.append(line, header=self._encode_line(self._columns)) + len(line)
            self._appended_bytes += len(line)
        else:
            self._size = self._appended_bytes = self._file.rewrite([self._encode_line(self._columns), line])
            self._has_rows = True

    def cut(self, first_step: int, cells: Mapping[str, str] | None = None) -> None:
        """Drop the rows from that step on; with ``cells``, keep everything before the last row equal to it."""
        self._load()
        last_match = None if cells is None else self._line_number_of(first_step, cells)

        def should_keep(number: int, line: bytes) -> bool:
            step = self._step_of(line)
            return step is None or step < first_step or (last_match is not None and number < last_match)

        keep_lines(self._file, should_keep)
        self._measure()

    def rows(self) -> Iterator[tuple[int, int | None]]:
        """See `evsys_adapters.output_files.step_tracker.RowFile.rows`."""
        self._load()
        for line in islice(self._file.lines(), 1, None):
            row = self._parse_row(line)
            yield hash(frozenset(row.items())), self._step_of(line)

    def keep_rows(self, should_keep: Callable[[int, int | None], bool]) -> int:
        """See `evsys_adapters.output_files.step_tracker.RowFile.keep_rows`."""
        self._load()
        retained = keep_lines(
            self._file, lambda number, line: not number or should_keep(number - 1, self._step_of(line))
        )
        if not all(retained):
            self._measure()
        return max(0, sum(retained) - 1)

    def drop_from_step(self, first_step: int) -> None:
        """See `evsys_adapters.output_files.step_tracker.RowFile.drop_from_step`."""
        self.cut(first_step)

    def close(self) -> None:
        """Give every metric its own column as far as there is room, and close the file."""
        try:
            columns = self._columns_with(())
            if columns != self._columns:
                self._rewrite(columns)
        finally:
            self._file.close()

    def retry_now(self) -> None:
        """Allow the next rewrite at once, even if the disk refused the last one."""
        self._rewrite_error = None

    def _load(self) -> None:
        """Read the existing file; a file that is not a table of steps is quarantined."""
        if self._is_loaded:
            return
        self._file.recover()
        first_line = self._file.first_line()  # complete or torn; empty also if there is no file
        header = self._decode_line(first_line) or ([""] if first_line else [])
        if header and (header[0] != STEP_COLUMN or MORE_COLUMN in header[:-1] or len(set(header)) < len(header)):
            path, quarantined = str(self._file.path), str(self._file.quarantine())
            log().warning("csv_metrics.file_set_aside", file=path, kept_as=quarantined, why="not a table of steps")
            header = []
        self._remember_columns(header)
        self._measure()
        if MORE_COLUMN in self._known:
            for line in self._file.lines():
                self._extra_names.update(dict.fromkeys(self._split_extra(line)[1]))
        self._is_loaded = True

    def _measure(self) -> None:
        self._has_rows = any(islice(self._file.lines(), 1, None))
        self._size = self._appended_bytes = self._file.size() if self._has_rows else 0

    def _make_room(self, names: Iterable[str]) -> None:
        """Add columns for new metrics, or make sure that they fit into ``more_metrics``."""
        if not self._has_rows:  # `cut` left a header without rows; it is replaced with them
            self._extra_names = {}
            self._remember_columns([STEP_COLUMN])
            self._remember_columns(self._columns_with(names))
            return
        affordable = self._size <= max(self._cheap_bytes, self._max_copies * self._appended_bytes)
        if MORE_COLUMN in self._known and not affordable:
            return
        columns = self._columns_with(names)
        if MORE_COLUMN not in columns and (MORE_COLUMN in self._known or not affordable):
            columns.append(MORE_COLUMN)
        if columns != self._columns:
            self._rewrite(columns)

    def _columns_with(self, names: Iterable[str]) -> list[str]:
        """Return the columns extended by the contents of ``more_metrics`` and by ``names``, up to the limit."""
        requested = dict.fromkeys([*self._columns, *self._extra_names, *names])
        requested.pop(MORE_COLUMN, None)
        return [*islice(requested, self._max_columns), *([MORE_COLUMN] if len(requested) > self._max_columns else [])]

    def _rewrite(self, columns: list[str]) -> None:
        """Rewrite the file with more columns; ``more_metrics`` is the last of them or absent."""
        if self._rewrite_error is not None:
            error, rows = self._rewrite_error
            if rows:
                self._rewrite_error = (error, rows - 1)
                raise error
        try:
            self._size = self._file.rewrite(self._widened_lines(columns))
        except OSError as error:
            self._rewrite_error = (error, _ROWS_BETWEEN_TRIES)
            raise
        self._remember_columns(columns)
        self._rewrite_error = None
        self._appended_bytes = 0

    def _widened_lines(self, columns: list[str]) -> Iterator[bytes]:
        yield self._encode_line(columns)
        # Where more_metrics is empty, new columns before or after it are the same bytes.
        padding = self._delimiter.encode() * len(columns)
        spare = len(padding) - len(self._delimiter.encode()) * len(self._columns)
        for line in islice(self._file.lines(), 1, None):
            cells, more = self._split_extra(line) if MORE_COLUMN in self._known else ([], {})
            if more:
                yield self._encode_line(
                    self._order_cells(dict(zip(self._columns, cells, strict=False)) | more, columns)
                )
            elif spare >= 0:
                yield line.rstrip(b"\r\n") + padding[:spare] + b"\n"
            else:
                yield line.rstrip(b"\r\n")[:spare] + b"\n"

    def _split_extra(self, line: bytes) -> tuple[list[str], dict[str, str]]:
        """Split a row into its cells and the contents of ``more_metrics``, which may be too long for the csv module.

        Inside a quoted cell quotes are doubled, so a delimiter, a quote and a brace always begin such a cell.
        """
        row, separator, more = line.rstrip(b"\r\n").rpartition(self._delimiter.encode() + b'"{')
        if not separator or not more.endswith(b'}"'):
            return [], {}
        with suppress(msgspec.DecodeError):
            return self._decode_line(row), _decode_more(b"{" + more[:-1].replace(b'""', b'"'))
        return [], {}

    def _line_number_of(self, step: int, cells: Mapping[str, str]) -> int | None:
        """Return the number of the last line with this step and these cells."""
        expected = row_of(step, cells)
        last_match: int | None = None
        for number, line in enumerate(self._file.lines()):
            if number and self._step_of(line) == step and self._parse_row(line) == expected:
                last_match = number
        return last_match

    def _parse_row(self, line: bytes) -> dict[str, str]:
        """Return the non-empty cells of a row by metric name."""
        cells, more = self._split_extra(line) if MORE_COLUMN in self._known else ([], {})
        row = dict(zip(self._columns, cells or self._decode_line(line), strict=False))
        row.pop(MORE_COLUMN, None)
        return {name: text for name, text in (row | more).items() if text}

    def _order_cells(self, row: Mapping[str, str], columns: list[str]) -> list[str]:
        """Order the cells of a row by column; metrics without a column go to ``more_metrics``."""
        known = self._known if columns is self._columns else frozenset(columns)
        if not known.issuperset(row):
            more = {name: text for name, text in row.items() if name not in known}
            row = {**row, MORE_COLUMN: msgspec.json.encode(more).decode()}
            self._extra_names.update(dict.fromkeys(more))
        return [row.get(name, "") for name in columns]

    def _remember_columns(self, columns: list[str]) -> None:
        self._columns = columns
        self._known = frozenset(columns)

    def _encode_line(self, cells: list[str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()

    def _decode_line(self, line: bytes) -> list[str]:
        """Parse a line; empty if a cell exceeds the csv module's limit."""
        with suppress(csv.Error):
            return next(csv.reader([line.decode(errors="replace")], delimiter=self._delimiter), list[str]())
        return []

    def _step_of(self, line: bytes) -> int | None:
        try:
            return int(line.partition(self._delimiter.encode())[0])
        except ValueError:
            return None
