"""Prints WARNING and higher log records of all loggers to stderr while a command runs.

The first record of a kind has its traceback, repeats are one line: a hook that fails every step must not hide the rest.
"""

import logging
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import evsys_bus
from evsys_bus.cli.screen import Screen, printable
from evsys_bus.codec import json_line

_KINDS: Final = ("adapter", "courier", "callback", "hook", "evaluator", "file", "task", "run")
_TRACEBACK_HEAD: Final = "Traceback (most recent call last):"
_MAX_KINDS: Final = 1000
_PACKAGE_DIR: Final = Path(evsys_bus.__file__).parent


class _WarningHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, which is redirected while a table is shown."""

    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen
        self._as_json = as_json
        self._shown_kinds: set[tuple[object, ...]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        try:
            message, trace = self._parts(record)
            sys.stderr.write(
                self._json(record, message, trace) if self._as_json else self._text(record, message, trace)
            )
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # stderr is closed or full

    def _parts(self, record: logging.LogRecord) -> tuple[str, str]:
        """Return the message and the traceback, which is the record's own or part of a courier's log line."""
        message = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        trace = getattr(record, "traceback", None)
        if error is not None:
            repeated = self._is_repeated(record, type(error))
            lines = traceback.format_exception_only(error) if repeated else _outside_traceback(error).format()
            return message, "".join(lines).rstrip()
        if isinstance(trace, str):
            message = message.replace(f" traceback={trace}", "").rstrip()
        else:
            message, head, below = message.partition(f"\n{_TRACEBACK_HEAD}")
            trace = f"{head}{below}"
        trace = trace.strip("\n")
        if trace and self._is_repeated(record, trace.rpartition("\n")[2].partition(":")[0]):
            trace = trace.rpartition("\n")[2]
        return message, trace

    def _is_repeated(self, record: logging.LogRecord, error: object) -> bool:
        """Return whether a record of this kind was shown with its traceback before."""
        phrase = record.getMessage().partition(" ")[0]
        kind = (record.name, phrase, error, *(getattr(record, each, None) for each in _KINDS))
        repeated = kind in self._shown_kinds
        if len(self._shown_kinds) < _MAX_KINDS:
            self._shown_kinds.add(kind)
        return repeated

    def _text(self, record: logging.LogRecord, message: str, trace: str) -> str:
        level = record.levelname.lower()
        head = self._screen.style(f"{level}:", sys.stderr, fg="yellow" if level == "warning" else "red", bold=True)
        first, *more = message.splitlines() or [""]
        below = "".join(f"\n  {line}" for line in [*more, *trace.splitlines()])
        return f"{head} {printable(first + below)}\n"

    def _json(self, record: logging.LogRecord, message: str, trace: str) -> str:
        facts: dict[str, Any] = {"event": "log", "level": record.levelname.lower(), "message": message}
        return json_line(facts | ({"traceback": trace} if trace else {})).decode() + "\n"


def _outside_traceback(error: BaseException) -> traceback.TracebackException:
    """Return the traceback without frames of evsys-bus, unless there are no others."""
    trace = traceback.TracebackException.from_exception(error)
    foreign = [frame for frame in trace.stack if not Path(frame.filename).is_relative_to(_PACKAGE_DIR)]
    if foreign:
        trace.stack = traceback.StackSummary.from_list(foreign)
    return trace


@contextmanager
def show_warnings(screen: Screen, *, as_json: bool = False) -> Generator[None]:
    """Print WARNING and higher log records to stderr within the block."""
    lines = _WarningHandler(screen, as_json=as_json)
    root = logging.getLogger()
    root.addHandler(lines)
    try:
        yield
    finally:
        root.removeHandler(lines)
