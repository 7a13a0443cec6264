"""Lines of text on stdout, for callbacks that print: any stdout takes them, and no name in them moves the cursor."""

import errno
import sys
from typing import Final, TextIO

from evsys_bus.diagnostics import FaultLog, log

_GONE: Final = frozenset({errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN})
"""What a stream that nobody reads any longer raises; anything else, as a full disk, may pass."""

_MAX_TEXT: Final = 40
"""Characters of a name or a value."""


class LinePrinter:
    """Prints lines; a stream that is closed for good is said once and written to no more.

    Args:
        closed_event: What the log calls that.
        stream: Where to print. Default: ``sys.stdout`` at the moment of the call.
    """

    def __init__(self, closed_event: str, stream: TextIO | None = None) -> None:
        self._closed_event = closed_event
        self._stream = stream
        self._closed: TextIO | None = None
        self._faults = FaultLog()

    def print(self, line: str) -> None:
        """Print one line. What cannot be shown, or the stream's encoding cannot take, stands as an escape."""
        stream = sys.stdout if self._stream is None else self._stream
        if stream is None or stream is self._closed:  # pyright: ignore[reportUnnecessaryComparison] # pythonw has none
            return
        try:
            _write(stream, f"{printable(line)}\n")
        except (OSError, ValueError) as error:  # ValueError: a closed file
            if isinstance(error, OSError) and error.errno not in _GONE:
                self._faults.warn("print.failed", error.errno, error=error)
                return
            self._closed = stream
            log().warning(self._closed_event, error=str(error))

    def flush(self) -> None:
        """Log how many lines failed that were not logged one by one."""
        self._faults.flush()


def step_head(step: int, num_steps: int | None) -> str:
    """``step 12/300``, or ``step 12`` where nobody knows how many there are to be; ``step`` is 0-based."""
    return f"step {step + 1}" if num_steps is None else f"step {step + 1}/{num_steps}"


def one_line(value: object) -> str:
    """Anything as one line of bounded text."""
    try:
        text = " ".join(str(value).split())
    except Exception:  # a stranger's __str__
        return f"<{type(value).__name__}>"
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def printable(text: str) -> str:
    """The text with everything that a terminal would act on, or not show, written out as an escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _write(stream: TextIO, line: str) -> None:
    """In one call, so that lines of several threads do not mix."""
    try:
        stream.write(line)
    except UnicodeEncodeError as error:
        try:
            line = line.encode(error.encoding, "backslashreplace").decode(error.encoding)
        except (LookupError, UnicodeError):  # no encoding of Python's
            line = line.encode("ascii", "backslashreplace").decode()
        stream.write(line)
    stream.flush()
