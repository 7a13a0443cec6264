"""Printing lines to stdout: works with any stream, and escapes control characters."""

import errno
import os
import sys
from typing import Final, TextIO

from evsys_adapters.common.logged_values import cut_text
from evsys_bus.diagnostics import FaultLog, log

_CLOSED_STREAM_ERRORS: Final = frozenset(
    {errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN}
)
"""Errors of a stream that is closed for good; others, such as a full disk, may be temporary."""

_MAX_TEXT: Final = 40
"""Maximum number of characters of a name or a value."""
_MAX_ALERT: Final = 500
_COLORS: Final = {"info": "36", "warning": "33", "error": "31"}
"""Codes of the colours of alerts: cyan, yellow, red."""


class LinePrinter:
    """Prints lines; when the stream is closed for good, logs that once and stops printing.

    Args:
        closed_event: The log event for a closed stream.
        stream: Where to print. Default: ``sys.stdout`` at the time of the call.
    """

    def __init__(self, closed_event: str, stream: TextIO | None = None) -> None:
        self._closed_event = closed_event
        self._stream = stream
        self._closed: TextIO | None = None
        self._faults = FaultLog()

    def print(self, line: str, *, level: str | None = None) -> None:
        """Print one line; characters that are not printable, or not in the stream's encoding, are escaped.

        With the level of an alert, a terminal shows the line in its colour unless ``NO_COLOR`` is set.
        """
        stream = sys.stdout if self._stream is None else self._stream
        if stream is None or stream is self._closed:  # pyright: ignore[reportUnnecessaryComparison] # pythonw has none
            return
        try:
            text = printable(line)
            if level in _COLORS and stream.isatty() and not os.environ.get("NO_COLOR"):
                text = f"\x1b[{_COLORS[level]}m{text}\x1b[0m"
            _write(stream, f"{text}\n")
        except (OSError, ValueError) as error:  # ValueError: a closed file
            if isinstance(error, OSError) and error.errno not in _CLOSED_STREAM_ERRORS:
                self._faults.warn("print.failed", error.errno, error=error)
                return
            self._closed = stream
            log().warning(self._closed_event, error=str(error))

    def flush(self) -> None:
        """Log the number of failures that were not logged individually."""
        self._faults.flush()


def step_label(step: int, num_steps: int | None) -> str:
    """Return ``step 12/300``, or ``step 12`` if the number of steps is unknown; ``step`` is 0-based."""
    return f"step {step + 1}" if num_steps is None else f"step {step + 1}/{num_steps}"


def alert_line(level: object, title: object, text: object) -> str:
    """Return an alert as one line; a text may be long."""
    words = " ".join(f"{title}  {text}".split("\n")).strip()
    return f"{str(level).upper()}  {cut_text(words, _MAX_ALERT)}"


def one_line(value: object) -> str:
    """Return any value as one line of bounded text."""
    try:
        text = " ".join(str(value).split())
    except Exception:  # a foreign __str__
        return f"<{type(value).__name__}>"
    return cut_text(text, _MAX_TEXT)


def printable(text: str) -> str:
    """Escape everything in the text that is not printable."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _write(stream: TextIO, line: str) -> None:
    """Write in one call, so that lines of several threads do not mix."""
    try:
        stream.write(line)
    except UnicodeEncodeError as error:
        try:
            line = line.encode(error.encoding, "backslashreplace").decode(error.encoding)
        except (LookupError, UnicodeError):  # not an encoding of Python
            line = line.encode("ascii", "backslashreplace").decode()
        stream.write(line)
    stream.flush()
