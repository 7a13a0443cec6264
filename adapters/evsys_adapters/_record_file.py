"""`RecordLog`: a file of binary records in another tool's format that survives full disks, kills and resumes.

It owns the bytes and when they are written; a `Format` defines the encoding of records. Rows are buffered until there
are enough of them, the oldest is due, or they are requested; then they are written at once.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from evsys_bus.files import AppendFile, Backlog, open_binary
from evsys_bus.savepoints import Savepoints

_MAX_BUFFERED_BYTES: Final = 1 << 16


class Format(Protocol):
    """The encoding of records in a file."""

    def head(self) -> bytes:
        """Return the bytes at the start of the file."""
        ...

    def frame(self, payload: bytes, at: int) -> bytes:
        """Encode a record for this offset in the file."""
        ...

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Yield every complete record after the header with its end offset; a torn record ends the iteration."""
        ...


class RecordLog:
    """The records of one file. Only `settle`, `records` and `move` raise OSError: refused writes are kept for a retry.

    Args:
        path: The file; created with the first record.
        marks: The callback's savepoints; after a crash its files are rewound to the last mark.
        form: The encoding of records.
        flush_seconds: How long a record may stay in memory.
    """

    def __init__(self, path: Path, marks: Savepoints, form: Format, flush_seconds: float) -> None:
        self._file: Final = _RecordFile(path, marks, form)
        self._form: Final = form
        self._flush_seconds: Final = flush_seconds
        self._backlog: Final = Backlog(str(path))
        self._buffer: list[bytes] = []
        self._bytes = 0
        self._due = 0.0

    @property
    def path(self) -> Path:
        """The current file; `move` changes it."""
        return self._file.path

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
        """Write the buffered records to the file."""
        if self._buffer:
            payloads, size = self._buffer, self._bytes
            self._buffer, self._bytes = [], 0
            self._backlog.write(partial(self._append, payloads), size)

    def settle(self) -> None:
        """Write all records to the file; raises OSError if the disk refuses, or if rows were dropped."""
        self.flush()
        self._backlog.settle()

    def close(self, *, forget: bool = False) -> None:
        """Write buffered records, and close the file until the next one; with ``forget``, marks no longer name it."""
        self.flush()
        self._backlog.flush()
        if forget:
            self._file.close()
        else:
            self._file.pause()

    def records(self) -> Iterator[bytes]:
        """Yield every record in the file; nothing if there is no file."""
        self.flush()
        self._file.settle()
        try:
            file = self._file.open()
        except FileNotFoundError:
            return
        with file:
            yield from (payload for payload, _ in self._form.scan(file))

    def rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """Replace all records atomically by the result of ``change``."""
        self.flush()
        self._backlog.write(lambda: self._file.rewrite(self._framed(change(self.records()), 0)), 0)

    def move(self, path: Path, change: Callable[[BinaryIO], Iterable[bytes]]) -> None:
        """Rename the file and replace its content by the result of ``change``; each step is atomic.

        At any moment exactly one file exists, with every record. Does nothing if there is no file.

        Raises:
            OSError: The disk refuses it, or has refused rows, which stay buffered. The file may have the new content
                under the old name.
        """
        self.settle()
        if self._file.is_there():
            self._file.move(path, change)

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


class _RecordFile(AppendFile):
    """An `AppendFile` whose lines are records."""

    def __init__(self, path: Path, marks: Savepoints, form: Format) -> None:
        super().__init__(path, marks)
        self._form = form

    def open(self) -> BinaryIO:
        return open_binary(self.path, self._disk)

    def is_there(self) -> bool:
        try:
            self._disk.size(str(self.path))
        except FileNotFoundError:
            return False
        return True

    def move(self, path: Path, change: Callable[[BinaryIO], Iterable[bytes]]) -> None:
        self._open()
        self._shut()
        with self.open() as old:
            self._replace(str(self.path), change(old))
        key = os.path.abspath(path)  # noqa: PTH100  # savepoints use this form
        self._marks.replacing(key)
        try:
            self._disk.rename(str(self.path), str(path))
        except OSError:
            self._marks.closed(key)
            raise
        self._marks.replaced(key)
        self._marks.closed(self._key)
        self.path, self._key = path, key

    def pause(self) -> None:
        self._shut()

    def size(self) -> int:
        return self._disk.length(self._open())

    def _drop_torn(self) -> None:
        """Records contain zeros, and a checksum each: `_cut_torn` finds those that a power cut tore."""

    def _cut_torn(self, fd: int) -> None:
        size = self._disk.length(fd)
        if not size:
            return
        with self.open() as file:
            whole = len(self._form.head())
            for _, whole in self._form.scan(file):  # noqa: B007 # only the last one matters
                pass
        if whole != size:
            self._disk.truncate(fd, 0 if whole > size else whole)
