"""Errors of runs, as pages show them: the end of a long traceback, or the one line that names the error."""

from collections.abc import Iterable
from typing import Any, Final

MAX_TEXT: Final = 20_000
"""Characters of a text on the page of its run."""
_MAX_LINE: Final = 300
MAX_LISTED: Final = 4_000
"""Characters of an error on the page of an experiment, which is sent again with each change."""
_MAX_ERRORS: Final = 24
"""That are more than one line on the page of an experiment."""
_TRACEBACK: Final = "Traceback"
_LEFT_OUT: Final = "Traceback (most recent call last):\n  …\n"


def shorten(text: str, size: int = MAX_TEXT) -> str:
    """Return the end of a long traceback below its first line, the beginning of another long text."""
    if len(text) <= size or not text.startswith(_TRACEBACK):
        return text[:size]
    return _LEFT_OUT + text[-size:]


def last_line(text: str | None) -> str | None:
    """Return of a traceback the line that names the error, of another text the first one."""
    if not text:
        return None
    lines = shorten(text).strip().splitlines() or [""]
    return (lines[-1] if text.startswith(_TRACEBACK) else lines[0])[:_MAX_LINE]


def shorten_errors(rows: Iterable[dict[str, Any]]) -> None:
    """Shorten the ``error`` of each row; of one that an earlier row has, only the line that names it stays."""
    known: set[str] = set()
    for row in rows:
        line = last_line(row["error"])
        if line is None or line in known or len(known) >= _MAX_ERRORS:
            row["error"] = line
        else:
            known.add(line)
            row["error"] = shorten(row["error"], MAX_LISTED)
