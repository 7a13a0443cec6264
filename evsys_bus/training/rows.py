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
from evsys_bus.files import DAMAGE, open_binary, replace_file

MAX_WAITING: Final = 10_000
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

    def __init__(self, path: Path, *, max_waiting: int = MAX_WAITING) -> None:
        self.path = path
        self.lost = 0
        """Number of rows dropped because too many were pending."""
        self._waiting: deque[bytes] = deque()
        self._max_waiting = max_waiting

    @property
    def waiting(self) -> int:
        """Number of rows in memory that could not be written yet."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, with values of any type (see `evsys_bus.codec.json_line`); never raises."""
        troubled = bool(self._waiting)
        if len(self._waiting) >= self._max_waiting:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(json_line(row) + b"\n")
        self._write_waiting(troubled=troubled)

    def flush(self) -> None:
        """Try to write the pending rows, and log a warning if rows remain or were dropped."""
        if self._waiting:
            self._write_waiting(troubled=True)
        if self._waiting or self.lost:
            log().warning("rows.unwritten", file=str(self.path), waiting=self.waiting, lost=self.lost)

    def rows(self) -> Iterator[Row]:
        """Iterate over the rows, in order, skipping torn and damaged lines. A missing file has no rows."""
        for line in self._lines():
            row = _parsed(line)
            if row is not None:
                yield row

    def keep(self, wanted: Callable[[Row], bool]) -> int:
        """Remove the rows for which ``wanted`` is false, and torn or damaged lines; return how many were removed.

        The file is replaced atomically, and not touched if there is nothing to remove.

        Raises:
            OSError: The new file could not be written; the old one is unchanged.
        """
        lines = list(self._lines())
        kept = [line for line in lines if (row := _parsed(line)) is not None and wanted(row)]
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(kept), mode=0o666, follow_link=True)
        return len(lines) - len(kept)

    def _lines(self) -> Iterator[bytes]:
        try:
            file = open_binary(self.path)
        except FileNotFoundError:
            return
        with file:
            yield from file

    def _write_waiting(self, *, troubled: bool) -> None:
        try:
            file = open_regular(str(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self._waiting:
                    _write_whole(file, self._waiting[0])
                    self._waiting.popleft()
            finally:
                os.close(file)
        except OSError as error:
            if not troubled:
                log().warning("rows.waiting", file=str(self.path), error=str(error), max_waiting=self._max_waiting)
        else:
            if troubled:
                log().info("rows.written_again", file=str(self.path), lost=self.lost)


def _write_whole(file: int, line: bytes) -> None:
    """Write one line with one call; on a full disk, remove a partial line so that the next one is not joined to it."""
    written = os.write(file, line)
    if written < len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(f"the disk took {written} of {len(line)} bytes")


def _parsed(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return _decode(line)
    except DAMAGE:
        return None
