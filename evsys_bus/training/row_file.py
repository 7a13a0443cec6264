"""`RowFile`: an append-only file of JSON rows, one ``os.write`` per row, that never raises into the training.

It owns the file format and the handling of failed writes; the caller defines what the rows mean.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.codec import json_line
from evsys_bus.diagnostics import log
from evsys_bus.disk import open_regular
from evsys_bus.files import DECODE_ERRORS, open_binary, replace_file

MAX_PENDING: Final = 10_000
"""Rows kept in memory while they cannot be written; beyond this the oldest are dropped and counted."""

Row = dict[str, Any]
"""One row."""

_decode = msgspec.json.Decoder(Row).decode


class RowFile:
    """An append-only file of JSON objects, one per line.

    The file is opened for every row (about 10 microseconds), so that a removed directory or a full disk is noticed, and
    writing works again as soon as the cause is gone. A row that cannot be written stays in memory and is written, in
    order, before the next one.
    """

    def __init__(self, path: Path, *, max_pending: int = MAX_PENDING) -> None:
        self.path = path
        self.lost = 0
        """Number of rows dropped because too many were pending."""
        self._pending: deque[bytes] = deque()
        self._max_pending = max_pending

    @property
    def pending(self) -> int:
        """Number of rows in memory that could not be written yet."""
        return len(self._pending)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, with values of any type (see `evsys_bus.codec.json_line`); never raises."""
        is_retry = bool(self._pending)
        if len(self._pending) >= self._max_pending:
            self._pending.popleft()
            self.lost += 1
        self._pending.append(json_line(row) + b"\n")
        self._write_pending(is_retry=is_retry)

    def flush(self) -> None:
        """Try to write the pending rows, and log a warning if rows remain or were dropped."""
        if self._pending:
            self._write_pending(is_retry=True)
        if self._pending or self.lost:
            log().warning("rows.unwritten", file=str(self.path), waiting=self.pending, lost=self.lost)

    def rows(self) -> Iterator[Row]:
        """Iterate over the rows, in order, skipping torn and damaged lines. A missing file has no rows."""
        for line in self._lines():
            row = _parse(line)
            if row is not None:
                yield row

    def retain(self, predicate: Callable[[Row], bool]) -> int:
        """Remove the rows for which ``predicate`` is false, and torn or damaged lines; return how many were removed.

        The file is replaced atomically, and not touched if there is nothing to remove.

        Raises:
            OSError: The new file could not be written; the old one is unchanged.
        """
        lines = list(self._lines())
        retained = [line for line in lines if (row := _parse(line)) is not None and predicate(row)]
        if len(retained) < len(lines):
            replace_file(self.path, b"".join(retained), mode=0o666, follow_link=True)
        return len(lines) - len(retained)

    def _lines(self) -> Iterator[bytes]:
        try:
            file = open_binary(self.path)
        except FileNotFoundError:
            return
        with file:
            yield from file

    def _write_pending(self, *, is_retry: bool) -> None:
        try:
            file = open_regular(str(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self._pending:
                    _write_line(file, self._pending[0])
                    self._pending.popleft()
            finally:
                os.close(file)
        except OSError as error:
            if not is_retry:
                log().warning("rows.waiting", file=str(self.path), error=str(error), max_waiting=self._max_pending)
        else:
            if is_retry:
                log().info("rows.written_again", file=str(self.path), lost=self.lost)


def _write_line(file: int, line: bytes) -> None:
    """Write one line with one call; on a full disk, remove a partial line so that the next one is not joined to it."""
    written = os.write(file, line)
    if written < len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(f"the disk took {written} of {len(line)} bytes")


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return _decode(line)
    except DECODE_ERRORS:
        return None
