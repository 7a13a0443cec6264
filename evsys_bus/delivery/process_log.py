"""`process.log`: what a courier process logs and prints, one JSON object per line; the bus reads it.

The interpreter itself and C libraries may write plain lines in between. A file that has grown to `MOST_BYTES` is
renamed to ``process.log.1``, and a new one is started.
"""

import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from evsys_bus.codec import json_line
from evsys_bus.diagnostics import LOGGER_NAME, RECORD_FIELDS, current_adapter
from evsys_bus.disk import NOT_A_FILE, open_regular
from evsys_bus.files import DAMAGE

LOG_NAME: Final = "process.log"
"""Name of the log file, in the directory of the couriers' files."""
MOST_BYTES: Final = 4 << 20
"""Maximum size of one file; at most one older file is kept."""
MOST_PENDING_CHARS: Final = 8192
"""How many characters may be printed without a line end before they are written."""
_BETWEEN_CHECKS: Final = 1 << 16
_MOST_LINE_BYTES: Final = 1 << 20
_STDERR: Final = 2


class Line(msgspec.Struct, frozen=True):
    """One line of the log."""

    time: str = ""
    """ISO 8601, UTC."""
    level: str = ""
    """Level name as in `logging`; empty for printed text."""
    logger: str = ""
    event: str = ""
    """The event name in a line of evsys-bus's own logger; empty for others."""
    message: str = ""
    adapter: str | None = None
    """The adapter whose courier logged or printed it, if known."""
    facts: dict[str, Any] = {}
    """Additional fields of the log record."""
    traceback: str | None = None
    print: str | None = None
    """Printed text, including line ends."""
    stream: Literal["stdout", "stderr", ""] = ""
    """Where the text was printed."""
    pid: int = 0


# -- writing, in the courier process ----------------------------------------------------------------------------------


def log_to_file(path: str) -> None:
    """Write everything that this process logs and prints as JSON lines to its stderr, which is the file at ``path``.

    All loggers log at INFO.
    """
    faulthandler.enable(file=_STDERR)
    file = _File(path)
    root = logging.getLogger()
    root.addHandler(_Handler(file))
    root.setLevel(logging.INFO)
    logging.getLogger(LOGGER_NAME).setLevel(logging.INFO)
    sys.stdout = _Printed(file, "stdout")
    sys.stderr = _Printed(file, "stderr")


def flush_log() -> None:
    """Write text that was printed without a line end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Printed):
            stream.flush_all()


class _File:
    """The file that stdout and stderr write to; limited in size."""

    def __init__(self, path: str) -> None:
        self._path: Final = path
        self._lock: Final = threading.Lock()
        self._unchecked = 0

    def write(self, **line: Any) -> None:
        """Append one line with a single write. A line that cannot be written is lost: nowhere is left to log it."""
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line, "pid": os.getpid()}
        data = json_line(row) + b"\n"
        with self._lock:
            self._unchecked += len(data)
            if self._unchecked >= _BETWEEN_CHECKS:
                self._unchecked = 0
                with contextlib.suppress(OSError):
                    self._rotate()
            with contextlib.suppress(OSError):
                os.write(_STDERR, data)

    def _rotate(self) -> None:
        """Switch to a new file if this one is too large; another process may have created it."""
        here = os.fstat(_STDERR)
        if here.st_size < MOST_BYTES:
            return
        try:
            there = os.stat(self._path)  # noqa: PTH116  # journal paths are strings
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                set_aside(self._path)
        except FileNotFoundError:
            pass
        file = open_log(self._path)
        os.dup2(file, 1)
        os.dup2(file, _STDERR)
        os.close(file)


def open_log(path: str) -> int:
    """Open the log for appending, readable by its owner only.

    Raises:
        OSError: The log cannot be opened.
    """
    try:
        return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno not in NOT_A_FILE:
            raise
        set_aside(path)
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def set_aside(path: str) -> None:
    """Rename the log to ``<path>.1``, replacing the older one."""
    os.replace(path, f"{path}.1")  # noqa: PTH105  # journal paths are strings


class _Handler(logging.Handler):
    """Writes log records to the file."""

    def __init__(self, file: _File) -> None:
        super().__init__()
        self._file: Final = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record with its additional fields."""
        try:
            found = {key: value for key, value in vars(record).items() if key not in RECORD_FIELDS}
            own = record.name == LOGGER_NAME
            event = found.pop("event", "") if own else ""
            adapter = found.pop("adapter", None) if own else None
            told = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else record.exc_text
            if record.stack_info:
                told = f"{told or ''}{record.stack_info}"
            self._file.write(
                level=record.levelname,
                logger=record.name,
                event=event,
                message=record.getMessage(),
                adapter=adapter or current_adapter.get(),
                facts=found,
                traceback=told,
            )
        except Exception:  # formatting a logged value may raise anything; handled as in the standard library
            self.handleError(record)


class _Printed(io.TextIOBase):
    """Replaces stdout or stderr; buffers the unfinished line of each adapter separately."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, file: _File, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._file: Final = file
        self._stream: Final[Literal["stdout", "stderr"]] = stream
        self._lock: Final = threading.RLock()
        self._unfinished: dict[str | None, str] = {}

    @property
    def buffer(self) -> io.BufferedIOBase:
        """The original binary stream: bytes are written to the file unchanged."""
        under = sys.__stdout__ if self._stream == "stdout" else sys.__stderr__
        assert under is not None
        return under.buffer  # pyright: ignore[reportReturnType] # a BinaryIO in typeshed

    def fileno(self) -> int:
        """The original file descriptor: child processes write to the file unchanged."""
        return 1 if self._stream == "stdout" else _STDERR

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return False."""
        return False

    def write(self, text: str) -> int:
        """Write complete lines; buffer the rest."""
        adapter = current_adapter.get()
        with self._lock:
            whole = self._unfinished.pop(adapter, "") + text
            end = len(whole) if len(whole) > MOST_PENDING_CHARS else whole.rfind("\n") + 1
            if whole[end:]:
                self._unfinished[adapter] = whole[end:]
            self._put(adapter, whole[:end])
        return len(text)

    def flush(self) -> None:
        """Write the unfinished line of the current adapter."""
        adapter = current_adapter.get()
        with self._lock:
            self._put(adapter, self._unfinished.pop(adapter, ""))

    def flush_all(self) -> None:
        """Write the unfinished lines of all adapters."""
        with self._lock:
            for adapter, text in self._unfinished.items():
                self._put(adapter, text)
            self._unfinished.clear()

    def _put(self, adapter: str | None, text: str) -> None:
        for begin in range(0, len(text), MOST_PENDING_CHARS):
            part = text[begin : begin + MOST_PENDING_CHARS]
            self._file.write(print=part, stream=self._stream, adapter=adapter)


# -- reading, in the program ------------------------------------------------------------------------------------------


class LogReader:
    """Reads lines that are added to the log after this object was created.

    Args:
        path: The log; need not exist yet.
    """

    def __init__(self, path: str) -> None:
        self._path: Final = path
        self._file: int | None = None
        self._inode: tuple[int, int] | None = None
        self._at = 0
        self._rest = b""
        self._open()
        if self._file is not None:
            self._at = os.fstat(self._file).st_size

    def read(self, most_bytes: int | None) -> Iterator[Line]:
        """Yield new lines; skips lines that are not JSON.

        Args:
            most_bytes: How many bytes to read; None for no limit.
        """
        left = most_bytes
        while left is None or left > 0:
            data = self._read(min(left or _MOST_LINE_BYTES, _MOST_LINE_BYTES))
            if not data:
                return
            left = None if left is None else left - len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _MOST_LINE_BYTES:
                self._rest = b""
            for line in lines:
                if line.startswith(b"{"):
                    with contextlib.suppress(*DAMAGE):  # a plain line of a library, or cut off
                        yield _read(line)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _read(self, most: int) -> bytes:
        """Read on in this file, or in the one that replaced it. Makes one system call if there is nothing new."""
        try:
            now = os.stat(self._path)  # noqa: PTH116  # creating a Path would cost as much as the call
        except OSError:
            now = None  # rotated, and no new file yet
        same = now is not None and self._inode == (now.st_dev, now.st_ino)
        if now is not None and same:
            if now.st_size == self._at:
                return b""
            if now.st_size < self._at:
                self._at, self._rest = 0, b""  # the file was truncated
        data = b"" if self._file is None else os.pread(self._file, most, self._at)
        if not data and not same and now is not None:
            self.close()
            self._open()
            data = b"" if self._file is None else os.pread(self._file, most, 0)
        self._at += len(data)
        return data

    def _open(self) -> None:
        self._at, self._rest, self._inode = 0, b"", None
        with contextlib.suppress(OSError):  # it may not exist yet
            self._file = open_regular(self._path, os.O_RDONLY)
            found = os.fstat(self._file)
            self._inode = (found.st_dev, found.st_ino)


_read: Final = msgspec.json.Decoder(Line).decode
