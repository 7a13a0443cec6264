"""``output.log``: what the program prints while a run is open, and ``error.txt``: the traceback of a failed one.

`OutputCapture` replaces the method ``write`` of the objects ``sys.stdout`` and ``sys.stderr``, and not these objects:
they go on being what they were, and what holds them already, such as a handler of `logging`, is captured too.
"""

import io
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

from evsys_bus.codec.normalize import escape_surrogates
from evsys_bus.codec.redact import REDACTED, redact_text
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.files import AppendFile, open_binary
from evsys_bus.run_files import write_error_file

MAX_OUTPUT_BYTES: Final = 64 << 20
_MIN_OUTPUT_BYTES: Final = 4096
_MAX_LINE_CHARS: Final = 1 << 20
_MAX_PIECE_CHARS: Final = 1 << 14
_MAX_PIECES: Final = 256
_MAX_WAITING: Final = 100_000
"""Writes of other threads that wait while one of them writes to the file."""
_MAX_PARTIAL_LINES: Final = 1000
_MAX_KEY_LINES: Final = 400
_STOP_SECONDS: Final = 2.0
_LEFT_OUT: Final = b"[%d bytes of output are left out here]\n"
_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Colors, movements of the cursor, titles of the window."""
_KEY_BEGIN: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY")
_KEY_LINE: Final = re.compile(r"\W{0,4}[A-Za-z0-9+/=]*(?:[A-Za-z-]+: .*)?")

_Key = tuple[int, int]
"""Number of the stream, and of the thread: their lines are not mixed."""


def write_error(run_dir: Path, error: BaseException) -> Path | None:
    """Write the redacted traceback to ``<run_dir>/error.txt``. Returns its path, or None if it cannot be written."""
    return write_error_file(run_dir, error)


class OutputCapture:
    """Copies what Python code prints into a file, line by line and redacted; the streams get it as before.

    Of a progress bar, which rewrites its line, only the last state is copied. A line is in the file when ``write``
    returns, or as soon as another thread has written the lines before it; one without an end when it is ended or at
    `stop`. The file is appended to. Of a longer output than ``max_bytes`` the beginning and the end are there.

    Only the first of nested captures does anything. There is none of a stream that is not an ordinary text file, as in
    a notebook, of what programs and C libraries write, and of a forked child. It never raises into ``print``: what
    cannot be written is counted, logged once, and noted in the file when it can be.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self.path: Final = path
        self.lost_bytes = 0
        """How much could not be written."""
        self._max_bytes: Final = max(max_bytes, _MIN_OUTPUT_BYTES)
        self._quarter: Final = self._max_bytes // 4
        self._file: Final = AppendFile(path, make_folder=False, disk=OsDisk())
        self._lock = threading.Lock()
        self._waiting: deque[tuple[_Key, str]] = deque()
        self._partial_lines: dict[_Key, list[str]] = {}
        self._divided: set[_Key] = set()
        """Streams whose line was too long, so that a part of it has been written as a line."""
        self._key_lines: dict[_Key, int] = {}
        """Streams in which a private key is being printed, and how many of its lines were."""
        self._writers: list[tuple[Any, Callable[[str], int]]] = []
        self._size: int | None = None
        self._unreported_bytes = 0
        self._left_out_bytes = 0
        self._is_lost_logged = False

    @property
    def is_active(self) -> bool:
        """Whether output is being copied by this object, in this process."""
        return _active is self

    def start(self, kinds: tuple[type, ...] = (io.TextIOWrapper,)) -> bool:
        """Start copying. Returns False if another capture is active, or no stream can be captured.

        Args:
            kinds: Of which types ``sys.stdout`` and ``sys.stderr`` may be; their ``write`` must be replaceable.
        """
        global _active  # noqa: PLW0603 - one per process
        if _active is not None:
            return False
        streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
        for number, stream in enumerate(streams):
            # Only these have a ``write`` that can be replaced, and are not in use by a notebook or a test.
            if isinstance(stream, kinds) and not any(stream is each for each, _ in self._writers):
                self._replace_write(number, cast("io.TextIOWrapper", stream))
        if self._writers:
            _active = self
        return bool(self._writers)

    def stop(self) -> None:
        """Write the unfinished lines, and stop copying. What other code has replaced meanwhile stays as it is."""
        global _active  # noqa: PLW0603 - one per process
        if _active is not self:
            return
        _active = None
        for stream, writer in self._writers:
            if stream.write is writer:
                del stream.write
        self._writers.clear()
        # Not for ever: the disk may not answer, or a handler of a signal has interrupted the thread that is writing.
        if self._lock.acquire(timeout=_STOP_SECONDS):
            try:
                lines = self._take_lines()
                for key in list(self._partial_lines):
                    lines.append(self._end_line(key))
                self._write("".join(lines))
                self._file.close()
            except Exception as error:  # isolated: the output of a run is not worth the run
                self._count_lost(0, error)
            finally:
                self._lock.release()

    def _replace_write(self, number: int, stream: io.TextIOWrapper) -> None:
        original = stream.write

        def write(text: str, /) -> int:
            try:
                return original(text)
            finally:  # also if the terminal is gone
                if _active is self and type(text) is str:
                    self._add((number, threading.get_ident()), text)

        try:
            stream.write = write
        except AttributeError:  # an object without attributes of its own
            return
        self._writers.append((stream, write))

    def _add(self, key: _Key, text: str) -> None:
        """Copy a text, or leave it to the thread that is writing: maybe this one, if a handler of a signal prints."""
        if len(self._waiting) >= _MAX_WAITING:  # the disk does not answer
            self.lost_bytes += len(text)
            self._unreported_bytes += len(text)
            return
        self._waiting.append((key, text))
        if "\n" not in text and "\r" not in text and len(text) < _MAX_PIECE_CHARS and len(self._waiting) < _MAX_PIECES:
            return  # `print` writes each of its arguments by itself
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                self._write("".join(self._take_lines()))
            except Exception as error:  # isolated: the output of a run is not worth the run
                self._count_lost(len(text), error)
            finally:
                self._lock.release()

    def _take_lines(self) -> list[str]:
        """Return the lines that were ended, ready for the file."""
        lines: list[str] = []
        while self._waiting:
            key, text = self._waiting.popleft()
            *ended, rest = text.split("\n")
            if key in self._divided and (ended or rest):
                self._divided.discard(key)
                if ended and not ended[0]:
                    del ended[0]  # the end of a line that was divided
            for line in ended:
                self._partial_lines.setdefault(key, []).append(line)
                lines.append(self._end_line(key))
            if rest:
                pieces = self._partial_lines.setdefault(key, [])
                pieces.append(rest)
                if "\r" in rest or len(rest) >= _MAX_PIECE_CHARS or len(pieces) >= _MAX_PIECES:
                    line = "".join(pieces)
                    pieces[:] = [line[line.rfind("\r", 0, -1) + 1 :]]
                    if len(line) > _MAX_LINE_CHARS:
                        lines.append(self._end_line(key))
                        self._divided.add(key)
        while len(self._partial_lines) > _MAX_PARTIAL_LINES:  # of threads that have ended
            lines.append(self._end_line(next(iter(self._partial_lines))))
        return lines

    def _end_line(self, key: _Key) -> str:
        line = "".join(self._partial_lines.pop(key)).removesuffix("\r").rpartition("\r")[2]
        if "\x1b" in line:
            line = _ESCAPE.sub("", line)
        if key in self._key_lines:
            self._key_lines[key] += 1
            is_last = "-----END " in line
            if is_last or self._key_lines[key] > _MAX_KEY_LINES or not _KEY_LINE.fullmatch(line):
                del self._key_lines[key]
            if is_last or key in self._key_lines:
                return ""
        if "-----BEGIN " in line and _KEY_BEGIN.search(line) and "-----END " not in line:
            self._key_lines[key] = 0
            return f"{line[: line.index('-----BEGIN ')]}{REDACTED}\n"
        return f"{escape_surrogates(redact_text(line))}\n"

    def _write(self, text: str) -> None:
        """Append to the file."""
        data = text.encode()
        if not data:
            return
        try:
            if self._size is None:
                self._size = self._file.size()
            if len(data) > self._quarter:
                data = b"".join(self._head_and_tail(data.splitlines(keepends=True), len(data), self._quarter // 2))
            if self._unreported_bytes:
                data = b"[%d bytes of output could not be written here]\n%b" % (self._unreported_bytes, data)
            if self._size + len(data) > self._max_bytes:
                self._size = self._file.rewrite(self._head_and_tail(self._read(), self._size, self._quarter))
            self._size = self._file.append(data) + len(data)
            self._unreported_bytes = 0
        except OSError as error:
            self._size = None  # not known
            self._count_lost(len(data), error)

    def _read(self) -> Iterator[bytes]:
        with open_binary(self.path, OsDisk()) as file:
            yield from file

    def _head_and_tail(self, lines: Iterator[bytes] | list[bytes], size: int, part_bytes: int) -> Iterator[bytes]:
        """Yield the first and the last bytes of a file, in whole lines if they are not very long."""
        offset, left_out = 0, 0
        for line in lines:
            start, offset = offset, offset + len(line)
            if len(line) > 2 * part_bytes:
                mark = b"\n" + _LEFT_OUT % (len(line) - 2 * part_bytes)
                yield _whole_characters(line[:part_bytes]) + mark + _whole_characters(line[-part_bytes:])
            elif part_bytes < offset and start < size - part_bytes:
                left_out += len(line)
            else:
                if left_out:
                    self._left_out_bytes += left_out
                    yield _LEFT_OUT % self._left_out_bytes
                    left_out = 0
                yield line

    def _count_lost(self, size: int, error: Exception) -> None:
        self.lost_bytes += size
        self._unreported_bytes += size
        if not self._is_lost_logged:
            self._is_lost_logged = True
            log().warning("output.not_written", file=str(self.path), error=f"{type(error).__name__}: {error}")


def _whole_characters(data: bytes) -> bytes:
    return data.decode(errors="ignore").encode()


_active: OutputCapture | None = None
"""The capture that copies the output of this process."""


def _after_fork() -> None:
    """Leave the file to the parent, in a forked child."""
    global _active  # noqa: PLW0603 - one per process
    _active = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
