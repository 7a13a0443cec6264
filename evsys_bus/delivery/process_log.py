"""`process.log`: what a courier process logs and prints, one JSON object a line; written there, and read by the bus.

Lines of the interpreter itself and of libraries in C, which know nothing of this, may stand between. A file that has
grown to `MOST_BYTES` becomes ``process.log.1``, and a new one begins.
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
"""Of the log, beside the couriers' files."""
MOST_BYTES: Final = 4 << 20
"""Of one file; there is an earlier one beside it at most."""
MOST_PENDING_CHARS: Final = 8192
"""What may be printed without the end of a line before it is written down."""
_BETWEEN_CHECKS: Final = 1 << 16
_MOST_LINE_BYTES: Final = 1 << 20
_STDERR: Final = 2


class Line(msgspec.Struct, frozen=True):
    """One line."""

    time: str = ""
    """ISO 8601, UTC."""
    level: str = ""
    """As `logging` calls it; empty for what was printed."""
    logger: str = ""
    event: str = ""
    """The constant phrase of a line of our own logger; empty for others."""
    message: str = ""
    adapter: str | None = None
    """The adapter whose courier logged or printed it, where that is known."""
    facts: dict[str, Any] = {}
    """What was logged beside the message. Any: plain values."""
    traceback: str | None = None
    print: str | None = None
    """What was printed, line ends included."""
    stream: Literal["stdout", "stderr", ""] = ""
    """Where it was printed to."""
    pid: int = 0


# -- writing, in the courier process ----------------------------------------------------------------------------------


def log_to_file(path: str) -> None:
    """Have this process log and print into its stderr, which is the file at the path, as lines of JSON.

    Loggers of other names are logged at INFO, as ours are.
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
    """Write down what was printed without the end of a line."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Printed):
            stream.flush_all()


class _File:
    """The file behind stdout and stderr; kept below a size."""

    def __init__(self, path: str) -> None:
        self._path: Final = path
        self._lock: Final = threading.Lock()
        self._unchecked = 0

    def write(self, **line: Any) -> None:
        """Append one line in one piece. Any: as `Line`. What the disk refuses is lost: there is nowhere to say so."""
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
        """Go on in a new file if this one is too large, or if another process has begun one."""
        here = os.fstat(_STDERR)
        if here.st_size < MOST_BYTES:
            return
        try:
            there = os.stat(self._path)  # noqa: PTH116  # as text, as all of a journal
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                set_aside(self._path)
        except FileNotFoundError:
            pass
        file = open_log(self._path)
        os.dup2(file, 1)
        os.dup2(file, _STDERR)
        os.close(file)


def open_log(path: str) -> int:
    """Open the log to append to it, for its owner alone.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno not in NOT_A_FILE:
            raise
        set_aside(path)
    return open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def set_aside(path: str) -> None:
    """Make it the earlier file, in the place of the one that there is."""
    os.replace(path, f"{path}.1")  # noqa: PTH105  # as text, as all of a journal


class _Handler(logging.Handler):
    """Writes log records down."""

    def __init__(self, file: _File) -> None:
        super().__init__()
        self._file: Final = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write it down, with what was logged beside it."""
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
        except Exception:  # what a stranger's values raise; as the handlers of the standard library have it
            self.handleError(record)


class _Printed(io.TextIOBase):
    """What stands in the place of stdout or stderr; each adapter's unfinished line is kept apart."""

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
        """For what prints bytes: they stand in the file as they are."""
        under = sys.__stdout__ if self._stream == "stdout" else sys.__stderr__
        assert under is not None
        return under.buffer  # pyright: ignore[reportReturnType] # typeshed has it as a BinaryIO

    def fileno(self) -> int:
        """For processes that an adapter starts: what they print stands in the file as it is."""
        return 1 if self._stream == "stdout" else _STDERR

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """It is not."""
        return False

    def write(self, text: str) -> int:
        """Write down all that ends a line."""
        adapter = current_adapter.get()
        with self._lock:
            whole = self._unfinished.pop(adapter, "") + text
            end = len(whole) if len(whole) > MOST_PENDING_CHARS else whole.rfind("\n") + 1
            if whole[end:]:
                self._unfinished[adapter] = whole[end:]
            self._put(adapter, whole[:end])
        return len(text)

    def flush(self) -> None:
        """Write down the line that this adapter has begun."""
        adapter = current_adapter.get()
        with self._lock:
            self._put(adapter, self._unfinished.pop(adapter, ""))

    def flush_all(self) -> None:
        """Write down every line that was begun."""
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
    """Reads what is added to the log, from its end now on.

    Args:
        path: The log; it need not be there yet.
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
        """The lines that are new; what is no JSON is passed over.

        Args:
            most_bytes: How much to read; None for all that is there.
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
                    with contextlib.suppress(*DAMAGE):  # of a library's own, or cut
                        yield _read(line)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _read(self, most: int) -> bytes:
        """What follows in this file, or in the one that was begun after it. One system call where there is nothing."""
        try:
            now = os.stat(self._path)  # noqa: PTH116  # as text; a Path of it would cost as much as the call
        except OSError:
            now = None  # it was set aside, and no other has begun
        same = now is not None and self._inode == (now.st_dev, now.st_ino)
        if now is not None and same:
            if now.st_size == self._at:
                return b""
            if now.st_size < self._at:
                self._at, self._rest = 0, b""  # somebody emptied it
        data = b"" if self._file is None else os.pread(self._file, most, self._at)
        if not data and not same and now is not None:
            self.close()
            self._open()
            data = b"" if self._file is None else os.pread(self._file, most, 0)
        self._at += len(data)
        return data

    def _open(self) -> None:
        self._at, self._rest, self._inode = 0, b"", None
        with contextlib.suppress(OSError):  # it is not there yet
            self._file = open_regular(self._path, os.O_RDONLY)
            found = os.fstat(self._file)
            self._inode = (found.st_dev, found.st_ino)


_read: Final = msgspec.json.Decoder(Line).decode
