"""Redirection of what callbacks and libraries print: above a live table, or away from a JSON result on stdout.

Printed directly, a line would corrupt the table; redrawing the table for every line would cost training time.
"""

import io
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Final, TextIO

from evsys_bus.codec import json_line
from evsys_bus.run_files import OUTPUT_FILE

MAX_LINES: Final = 2_000
"""Limit of lines until the next redraw; beyond it the oldest are dropped and counted."""


class LineBuffer:
    """Buffers the printed lines of all threads, in order, until they are taken."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._dropped = 0
        self._lock = threading.Lock()

    def add(self, lines: list[str]) -> None:
        """Append lines."""
        with self._lock:
            self._dropped += max(len(self._lines) + len(lines) - MAX_LINES, 0)
            self._lines.extend(lines)

    def drain(self) -> list[str]:
        """Return and remove all lines; the first line counts the dropped ones, if any were."""
        with self._lock:
            lines, dropped = list(self._lines), self._dropped
            self._lines.clear()
            self._dropped = 0
        return [f"({dropped:,} lines were printed too fast to show)", *lines] if dropped else lines


class CapturedStream(io.TextIOBase):
    """Replaces a terminal stream and captures its lines; size and file descriptor are still the terminal's.

    Lines of different threads are not mixed. After `finish`, writes go to the terminal.

    Args:
        stream: The terminal stream.
        on_lines: Called with captured lines, by the thread that printed them.
    """

    def __init__(self, stream: TextIO, on_lines: Callable[[list[str]], object]) -> None:
        self._stream = stream
        self._on_lines = on_lines
        self._partial_lines: dict[int, str] = {}
        """The incomplete last line of each thread."""
        self._finished = False
        self._lock = threading.Lock()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] # a property where typeshed has an attribute
        """The encoding of the terminal."""
        return self._stream.encoding

    def write(self, text: str, /) -> int:
        """Capture complete lines; a carriage return restarts the line, as on a terminal."""
        thread = threading.get_ident()
        with self._lock:
            finished = self._finished
            if not finished:
                *lines, partial = (self._partial_lines.pop(thread, "") + text).split("\n")
                if partial:
                    self._partial_lines[thread] = partial[max(0, partial.rfind("\r", 0, -1) + 1) :]
                if lines:
                    self._on_lines([line.removesuffix("\r").rpartition("\r")[2] for line in lines])
        if finished:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the terminal after `finish`; before it there is nothing to flush."""
        if self._finished:
            self._stream.flush()

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the captured stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the terminal."""
        return self._stream.fileno()

    def finish(self) -> None:
        """Capture incomplete last lines; later writes go to the terminal."""
        with self._lock:
            self._finished = True
            if self._partial_lines:
                self._on_lines(list(self._partial_lines.values()))
            self._partial_lines.clear()


@contextmanager
def guard_stdout(*, result_is_json: bool, progress_is_json: bool) -> Generator[None]:
    """Redirect stdout to stderr within the block if the result is JSON."""
    if not result_is_json:
        yield
        return
    if not progress_is_json:
        with redirect_stdout(sys.stderr):
            yield
        return
    stream = CapturedStream(sys.stderr, partial(_write_json_lines, sys.stderr.write))
    try:
        with redirect_stdout(stream):
            yield
    finally:
        stream.finish()


def _write_json_lines(write: Callable[[str], int], lines: list[str]) -> None:
    for line in lines:
        write(json_line({"event": "printed", "text": line}).decode() + "\n")
        sys.stderr.flush()


@contextmanager
def keep_output(run_dir: Path) -> Generator[None]:
    """Copy what Python code prints within the block into ``output.log``, but not the view of the progress."""
    from evsys_bus.front.output import OutputCapture  # only where something runs

    capture = OutputCapture(run_dir / OUTPUT_FILE)
    capture.start((io.TextIOWrapper, CapturedStream))
    try:
        yield
    finally:
        capture.stop()
