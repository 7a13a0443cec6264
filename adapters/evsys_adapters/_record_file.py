"""`RecordLog`: a file of binary records that survives full disks, kills and resumes, in a format that others read.

Owns the bytes and when they are written; a `Format` says what a record looks like, and what is in it is its users'
business. Rows wait in memory until they are many, old, or asked for; then they go in one write.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from evsys_adapters._line_file import Backlog, LineFile
from evsys_adapters._marks import Marks

_MAX_BUFFERED_BYTES: Final = 1 << 16


class Format(Protocol):
    """How records stand in a file."""

    def head(self) -> bytes:
        """What the file begins with."""
        ...

    def frame(self, payload: bytes, at: int) -> bytes:
        """A record as it stands at this place in the file."""
        ...

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Every whole record, the head left out, and where it ends; a torn one ends the file."""
        ...


class RecordLog:
    """The records of one file. No method but `settle` and `records` raises OSError: what is refused waits in memory.

    Args:
        path: The file; nothing is touched before the first record.
        marks: Of the callback; its files go back to the last mark after a crash.
        form: How records look.
        flush_seconds: How long a record may wait in memory.
    """

    def __init__(self, path: Path, marks: Marks, form: Format, flush_seconds: float) -> None:
        self.path: Final = path
        self._file: Final = _RecordFile(path, marks, form)
        self._form: Final = form
        self._flush_seconds: Final = flush_seconds
        self._backlog: Final = Backlog(str(path))
        self._buffer: list[bytes] = []
        self._bytes = 0
        self._due = 0.0

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return self._backlog.waiting

    def add(self, payload: bytes) -> None:
        """Add a record."""
        now = time.monotonic()
        if not self._buffer:
            self._due = now + self._flush_seconds
        self._buffer.append(payload)
        self._bytes += len(payload)
        if self._bytes >= _MAX_BUFFERED_BYTES or now >= self._due:
            self.flush()

    def flush(self) -> None:
        """Hand what waits in memory to the system."""
        if self._buffer:
            payloads, size = self._buffer, self._bytes
            self._buffer, self._bytes = [], 0
            self._backlog.write(partial(self._append, payloads), size)

    def settle(self) -> None:
        """Have everything with the system, for a mark; raises OSError if the disk refuses, or if rows were given up."""
        self.flush()
        self._backlog.settle()

    def close(self, *, forget: bool = False) -> None:
        """Write what waits, and close the file until the next record; marks go on naming it, unless to be forgotten."""
        self.flush()
        self._backlog.flush()
        if forget:
            self._file.close()
        else:
            self._file.pause()

    def records(self) -> Iterator[bytes]:
        """Every record in the file; none if there is none."""
        self.flush()
        self._file.settle()
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            yield from (payload for payload, _ in self._form.scan(file))

    def rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """Replace all records by what ``change`` makes of them, in one move."""
        self.flush()
        self._backlog.write(lambda: self._file.rewrite(self._framed(change(self.records()), 0)), 0)

    def _append(self, payloads: list[bytes]) -> None:
        self._file.append(b"".join(self._framed(payloads, self._file.size())))

    def _framed(self, payloads: Iterable[bytes], at: int) -> Iterator[bytes]:
        if not at:
            head = self._form.head()
            at = len(head)
            yield head
        for payload in payloads:
            frame = self._form.frame(payload, at)
            at += len(frame)
            yield frame


class _RecordFile(LineFile):
    """A `LineFile` whose lines are records."""

    def __init__(self, path: Path, marks: Marks, form: Format) -> None:
        super().__init__(path, marks)
        self._form = form

    def pause(self) -> None:
        self._shut()

    def size(self) -> int:
        return os.fstat(self._open()).st_size

    def _cut_torn(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        if not size:
            return
        with self.path.open("rb") as file:
            whole = len(self._form.head())
            for _, whole in self._form.scan(file):  # noqa: B007 # the last one is asked for
                pass
        if whole != size:
            os.ftruncate(fd, 0 if whole > size else whole)
