"""`RecordLog`: a file of binary records in another tool's format that survives full disks, kills and resumes.

It owns the bytes and when they are written; a `RecordFormat` defines the encoding of records. Rows are buffered until
there are enough of them, the oldest is due, or they are requested; then they are written at once.
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


class RecordFormat(Protocol):
    """The encoding of records in a file."""

    def header(self) -> bytes:
        """Return the bytes at the start of the file."""
        ...

    def frame(self, payload: bytes, offset: int) -> bytes:
        """Encode a record for this offset in the file."""
        ...

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Yield every complete record after the header with its end offset; a torn record ends the iteration."""
        ...


class RecordLog:
    """The records of one file. Only `settle`, `records` and `move` raise OSError: refused writes are retried.

    Args:
        path: The file; created with the first record.
        savepoints: The callback's savepoints; after a crash its files are rewound to the last mark.
        record_format: The encoding of records.
        flush_seconds: How long a record may stay in memory.
    """

    def __init__(self, path: Path, savepoints: Savepoints, record_format: RecordFormat, flush_seconds: float) -> None:
        self._file: Final = _RecordFile(path, savepoints, record_format)
        self._format: Final = record_format
        self._flush_seconds: Final = flush_seconds
        self._backlog: Final = Backlog(str(path))
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._flush_due = 0.0

    @property
    def path(self) -> Path:
        """The current file; `move` changes it."""
        return self._file.path

    def add(self, payload: bytes) -> None:
        """Add a record."""
        now = time.monotonic()
        if not self._buffer:
            self._flush_due = now + self._flush_seconds
        self._buffer.append(payload)
        self._buffered_bytes += len(payload)
        if self._buffered_bytes >= _MAX_BUFFERED_BYTES or now >= self._flush_due:
            self.flush()

    def flush(self) -> None:
        """Write the buffered records to the file."""
        if self._buffer:
            payloads, size = self._buffer, self._buffered_bytes
            self._buffer, self._buffered_bytes = [], 0
            self._backlog.write(partial(self._append, payloads), size)

    def settle(self) -> None:
        """Write all records to the file; raises OSError if the disk refuses, or if rows were dropped."""
        self.flush()
        self._backlog.drain()

    def check_written(self) -> None:
        """Raises OSError if a record is not in the file."""
        self._backlog.check_written()

    def close(self, *, forget_file: bool = False) -> None:
        """Write buffered records and close the file until the next one; ``forget_file`` removes it from marks."""
        self.flush()
        self._backlog.flush()
        if forget_file:
            self._file.close()
        else:
            self._file.pause()

    def records(self) -> Iterator[bytes]:
        """Yield every record in the file; nothing if there is no file."""
        self.flush()
        self._file.recover()
        try:
            file = self._file.open()
        except FileNotFoundError:
            return
        with file:
            yield from (payload for payload, _ in self._format.scan(file))

    def rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """Replace all records atomically by the result of ``change``."""
        self.flush()
        self._backlog.write(lambda: self._file.rewrite(self._frames(change(self.records()), 0)), 0)

    def move(self, path: Path, change: Callable[[BinaryIO], Iterable[bytes]]) -> None:
        """Rename the file and replace its content by the result of ``change``; each step is atomic.

        At any moment exactly one file exists, with every record. Does nothing if there is no file.

        Raises:
            OSError: The disk refuses it, or has refused rows, which stay buffered. The file may have the new content
                under the old name.
        """
        self.settle()
        if self._file.exists():
            self._file.move(path, change)

    def _append(self, payloads: list[bytes]) -> None:
        self._file.append(b"".join(self._frames(payloads, self._file.size())))

    def _frames(self, payloads: Iterable[bytes], offset: int) -> Iterator[bytes]:
        if not offset:
            header = self._format.header()
            offset = len(header)
            yield header
        for payload in payloads:
            frame = self._format.frame(payload, offset)
            offset += len(frame)
            yield frame


class _RecordFile(AppendFile):
    """An `AppendFile` whose lines are records."""

    def __init__(self, path: Path, savepoints: Savepoints, record_format: RecordFormat) -> None:
        super().__init__(path, savepoints)
        self._format = record_format

    def open(self) -> BinaryIO:
        return open_binary(self.path, self._disk)

    def exists(self) -> bool:
        try:
            self._disk.size(str(self.path))
        except FileNotFoundError:
            return False
        return True

    def move(self, path: Path, change: Callable[[BinaryIO], Iterable[bytes]]) -> None:
        self._open()
        self._close_file()
        with self.open() as old:
            self._replace(str(self.path), change(old))
        key = os.path.abspath(path)  # noqa: PTH100  # savepoints use this form
        self._savepoints.before_replace(key)
        try:
            self._disk.rename(str(self.path), str(path))
        except OSError:
            self._savepoints.after_close(key)
            raise
        self._savepoints.after_replace(key)
        self._savepoints.after_close(self._key)
        self.path, self._key = path, key

    def pause(self) -> None:
        self._close_file()

    def size(self) -> int:
        return self._disk.length(self._open())

    def _repair_after_power_cut(self) -> None:
        """Records contain zeros, and a checksum each: `_truncate_torn_end` finds those that a power cut tore."""

    def _truncate_torn_end(self, fd: int) -> None:
        size = self._disk.length(fd)
        if not size:
            return
        with self.open() as file:
            whole = len(self._format.header())
            for _, whole in self._format.scan(file):  # noqa: B007 # only the last one matters
                pass
        if whole != size:
            self._disk.truncate(fd, 0 if whole > size else whole)
