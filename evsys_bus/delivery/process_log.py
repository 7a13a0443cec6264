"""`process.log`: what a courier process logs and prints, one JSON object per line; the bus reads it.

The interpreter itself and C libraries may write plain lines in between. A file that has grown to `MAX_LOG_BYTES` is
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
from evsys_bus.codec.redact import Redaction
from evsys_bus.diagnostics import LOGGER_NAME, RECORD_FIELDS, current_adapter
from evsys_bus.disk import NOT_A_FILE_ERRNOS, open_regular
from evsys_bus.files import DECODE_ERRORS

LOG_NAME: Final = "process.log"
"""Name of the log file, in the directory of the couriers' files."""
MAX_LOG_BYTES: Final = 4 << 20
"""Maximum size of one file; at most one older file remains."""
MAX_PENDING_CHARS: Final = 8192
"""How many characters may be printed without a line end before they are written."""
_BYTES_PER_SIZE_CHECK: Final = 1 << 16
_MAX_LINE_BYTES: Final = 1 << 20
_STDERR_FD: Final = 2


class LogLine(msgspec.Struct, frozen=True):
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
    faulthandler.enable(file=_STDERR_FD)
    file = _LogFile(path)
    root = logging.getLogger()
    root.addHandler(_Handler(file))
    root.setLevel(logging.INFO)
    logging.getLogger(LOGGER_NAME).setLevel(logging.INFO)
    sys.stdout = _PrintCapture(file, "stdout")
    sys.stderr = _PrintCapture(file, "stderr")


def flush_log() -> None:
    """Write text that was printed without a line end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _PrintCapture):
            stream.flush_all()


class _LogFile:
    """The file that stdout and stderr write to; limited in size."""

    def __init__(self, path: str) -> None:
        self._path: Final = path
        self._lock: Final = threading.Lock()
        self._bytes_since_check = 0

    def write(self, **line: Any) -> None:
        """Append one line with a single write. A line that cannot be written is lost: nowhere is left to log it."""
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line, "pid": os.getpid()}
        data = json_line(row, Redaction()) + b"\n"
        with self._lock:
            self._bytes_since_check += len(data)
            if self._bytes_since_check >= _BYTES_PER_SIZE_CHECK:
                self._bytes_since_check = 0
                with contextlib.suppress(OSError):
                    self._rotate()
            with contextlib.suppress(OSError):
                os.write(_STDERR_FD, data)

    def _rotate(self) -> None:
        """Switch to a new file if this one is too large; another process may have created it."""
        current = os.fstat(_STDERR_FD)
        if current.st_size < MAX_LOG_BYTES:
            return
        try:
            at_path = os.stat(self._path)  # noqa: PTH116  # journal paths are strings
            if (at_path.st_dev, at_path.st_ino) == (current.st_dev, current.st_ino):
                rotate_log(self._path)
        except FileNotFoundError:
            pass
        file = open_log(self._path)
        os.dup2(file, 1)
        os.dup2(file, _STDERR_FD)
        os.close(file)


def open_log(path: str) -> int:
    """Open the log for appending, readable by its owner only.

    Raises:
        OSError: The log cannot be opened.
    """
    try:
        return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno not in NOT_A_FILE_ERRNOS:
            raise
        rotate_log(path)
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def rotate_log(path: str) -> None:
    """Rename the log to ``<path>.1``, replacing the older one."""
    os.replace(path, f"{path}.1")  # noqa: PTH105  # journal paths are strings


class _Handler(logging.Handler):
    """Writes log records to the file."""

    def __init__(self, file: _LogFile) -> None:
        super().__init__()
        self._file: Final = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record with its additional fields."""
        try:
            extra = {key: value for key, value in vars(record).items() if key not in RECORD_FIELDS}
            is_own = record.name == LOGGER_NAME
            event = extra.pop("event", "") if is_own else ""
            adapter = extra.pop("adapter", None) if is_own else None
            traceback_text = (
                "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else record.exc_text
            )
            if record.stack_info:
                traceback_text = f"{traceback_text or ''}{record.stack_info}"
            self._file.write(
                level=record.levelname,
                logger=record.name,
                event=event,
                message=record.getMessage(),
                adapter=adapter or current_adapter.get(),
                facts=extra,
                traceback=traceback_text,
            )
        except Exception:  # formatting a logged value may raise anything; handled as in the standard library
            self.handleError(record)


class _PrintCapture(io.TextIOBase):
    """Replaces stdout or stderr; buffers the unfinished line of each adapter separately."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, file: _LogFile, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._file: Final = file
        self._stream: Final[Literal["stdout", "stderr"]] = stream
        self._lock: Final = threading.RLock()
        self._partial_lines: dict[str | None, str] = {}

    @property
    def buffer(self) -> io.BufferedIOBase:
        """The original binary stream: bytes are written to the file unchanged."""
        original = sys.__stdout__ if self._stream == "stdout" else sys.__stderr__
        assert original is not None
        return original.buffer  # pyright: ignore[reportReturnType] # a BinaryIO in typeshed

    def fileno(self) -> int:
        """The original file descriptor: child processes write to the file unchanged."""
        return 1 if self._stream == "stdout" else _STDERR_FD

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
            pending = self._partial_lines.pop(adapter, "") + text
            end = len(pending) if len(pending) > MAX_PENDING_CHARS else pending.rfind("\n") + 1
            if pending[end:]:
                self._partial_lines[adapter] = pending[end:]
            self._write_parts(adapter, pending[:end])
        return len(text)

    def flush(self) -> None:
        """Write the unfinished line of the current adapter."""
        adapter = current_adapter.get()
        with self._lock:
            self._write_parts(adapter, self._partial_lines.pop(adapter, ""))

    def flush_all(self) -> None:
        """Write the unfinished lines of all adapters."""
        with self._lock:
            for adapter, text in self._partial_lines.items():
                self._write_parts(adapter, text)
            self._partial_lines.clear()

    def _write_parts(self, adapter: str | None, text: str) -> None:
        for start in range(0, len(text), MAX_PENDING_CHARS):
            part = text[start : start + MAX_PENDING_CHARS]
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
        self._offset = 0
        self._partial_line = b""
        self._open()
        if self._file is not None:
            self._offset = os.fstat(self._file).st_size

    def read(self, max_bytes: int | None) -> Iterator[LogLine]:
        """Yield new lines; skips lines that are not JSON.

        Args:
            max_bytes: How many bytes to read; None for no limit.
        """
        remaining = max_bytes
        while remaining is None or remaining > 0:
            data = self._read(min(remaining or _MAX_LINE_BYTES, _MAX_LINE_BYTES))
            if not data:
                return
            remaining = None if remaining is None else remaining - len(data)
            *lines, self._partial_line = (self._partial_line + data).split(b"\n")
            if len(self._partial_line) > _MAX_LINE_BYTES:
                self._partial_line = b""
            for line in lines:
                if line.startswith(b"{"):
                    with contextlib.suppress(*DECODE_ERRORS):  # a plain line of a library, or cut off
                        yield _decode_line(line)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _read(self, limit: int) -> bytes:
        """Read on in this file, or in the one that replaced it. Makes one system call if there is nothing new."""
        try:
            current = os.stat(self._path)  # noqa: PTH116  # creating a Path would cost as much as the call
        except OSError:
            current = None  # rotated, and no new file yet
        is_same_file = current is not None and self._inode == (current.st_dev, current.st_ino)
        if current is not None and is_same_file:
            if current.st_size == self._offset:
                return b""
            if current.st_size < self._offset:
                self._offset, self._partial_line = 0, b""  # the file was truncated
        data = b"" if self._file is None else os.pread(self._file, limit, self._offset)
        if not data and not is_same_file and current is not None:
            self.close()
            self._open()
            data = b"" if self._file is None else os.pread(self._file, limit, 0)
        self._offset += len(data)
        return data

    def _open(self) -> None:
        self._offset, self._partial_line, self._inode = 0, b"", None
        with contextlib.suppress(OSError):  # it may not exist yet
            self._file = open_regular(self._path, os.O_RDONLY)
            status = os.fstat(self._file)
            self._inode = (status.st_dev, status.st_ino)


_decode_line: Final = msgspec.json.Decoder(LogLine).decode
