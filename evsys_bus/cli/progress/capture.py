"""What callbacks and libraries print while a table is on the screen: kept, and shown above it by the view's timer.

Written straight through, a line would tear the table; drawn anew for every line, the table would cost training time.
"""

import io
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, TextIO

MAX_LINES: Final = 2_000
"""Lines that wait for the next redraw; beyond it the oldest are dropped, and counted."""


class Captured:
    """The lines printed since they were last taken, by all threads, in order."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._dropped = 0
        self._lock = threading.Lock()

    def add(self, lines: list[str]) -> None:
        """Keep these."""
        with self._lock:
            self._dropped += max(len(self._lines) + len(lines) - MAX_LINES, 0)
            self._lines.extend(lines)

    def take(self) -> list[str]:
        """All of them; the first one says how many were dropped, if any were."""
        with self._lock:
            lines, dropped = list(self._lines), self._dropped
            self._lines.clear()
            self._dropped = 0
        return [f"({dropped:,} lines were printed too fast to show)", *lines] if dropped else lines


class Relayed(Captured):
    """Keeps none: each line goes on at once."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell = tell

    def add(self, lines: list[str]) -> None:
        """Tell them."""
        for line in lines:
            self._tell(line)


class CapturedStream(io.TextIOBase):
    """Stands in for a stream of the terminal; what asks for its size or its number still gets the terminal's.

    Each thread's lines stay whole. Once it is finished it passes on what is written by those who still hold it.
    """

    def __init__(self, stream: TextIO, captured: Captured) -> None:
        self._stream = stream
        self._captured = captured
        self._rests: dict[int, str] = {}
        """What threads have begun a line with."""
        self._finished = False
        self._lock = threading.Lock()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] # a property where typeshed has an attribute
        """The terminal's."""
        return self._stream.encoding

    def write(self, text: str, /) -> int:
        """Keep whole lines; a carriage return starts its line again, as it would on a terminal."""
        thread = threading.get_ident()
        with self._lock:
            finished = self._finished
            if not finished:
                *lines, rest = (self._rests.pop(thread, "") + text).split("\n")
                if rest:
                    self._rests[thread] = rest[max(0, rest.rfind("\r", 0, -1) + 1) :]
                if lines:
                    self._captured.add([line.removesuffix("\r").rpartition("\r")[2] for line in lines])
        if finished:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing waits here that could be shown."""
        if self._finished:
            self._stream.flush()

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """As the terminal says."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The terminal's."""
        return self._stream.fileno()

    def finish(self) -> None:
        """Keep the last lines too, though nothing ended them; what comes now is the terminal's."""
        with self._lock:
            self._finished = True
            if self._rests:
                self._captured.add(list(self._rests.values()))
            self._rests.clear()
