"""Reporting errors on stderr, and their exit codes.

Errors of evsys-bus are shown as message, reason and fix; others, raised by training code, with their traceback.
"""

import sys
import traceback
from collections.abc import Iterator
from typing import Final, cast

import click

from evsys_bus.cli.screen import Screen, printable
from evsys_bus.errors import (
    ConfigError,
    ConfigErrors,
    CourierBusyError,
    DeliveryError,
    DocumentError,
    EvsysBusError,
    HookError,
    JournalError,
    TrainingError,
)

OK: Final = 0
RAISED: Final = 1
USAGE: Final = 2
ENVIRONMENT: Final = 3
REMOTE: Final = 4
PENDING: Final = 5
INTERRUPTED: Final = 130


def report(error: BaseException, screen: Screen) -> int:
    """Report an error on stderr, and return the exit code."""
    errors = sorted(_own_errors(error), key=_sort_key)
    if errors:
        screen.note("\n\n".join(_colorize(each, screen) for each in errors))
        if len(errors) > 1:
            screen.note(f"\n{len(errors)} errors")
        return max(_exit_code(each) for each in errors)
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename is not None else ""
        screen.note(f"{_head('error', screen)}: {printable(f'{error.strerror or error}{place}')}")
        return ENVIRONMENT
    screen.note(printable("".join(traceback.format_exception(error)).rstrip()))
    return RAISED


def _own_errors(error: BaseException) -> Iterator[EvsysBusError]:
    """Yield the evsys-bus errors of an exception or a group; nothing if a group has others, which need a traceback."""
    if isinstance(error, ConfigErrors):
        yield from error.errors
    elif isinstance(error, EvsysBusError):
        yield error
    elif isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        parts = [list(_own_errors(each)) for each in group.exceptions]
        if all(parts):
            yield from (each for part in parts for each in part)


def _sort_key(error: EvsysBusError) -> tuple[str, int, int]:
    """Return the sort key by position in the file; errors without a line keep their order."""
    where = error.where
    return ("", 0, 0) if where is None else (where.file or "", where.line or 0, where.column or 0)


def _exit_code(error: EvsysBusError) -> int:
    if isinstance(error, JournalError | CourierBusyError):
        return ENVIRONMENT
    if isinstance(error, DeliveryError):
        return REMOTE
    if isinstance(error.__cause__, OSError | ImportError) and not isinstance(error, DocumentError):
        return ENVIRONMENT
    return USAGE if isinstance(error, ConfigError | HookError | TrainingError) else RAISED


def _colorize(error: EvsysBusError, screen: Screen) -> str:
    text = printable(str(error))
    if not screen.uses_color(sys.stderr):
        return text
    return "\n".join(map(_colorize_line, text.split("\n")))


def _colorize_line(line: str) -> str:
    start, mark, rest = line.partition(" ")
    if line.startswith("error["):
        head, _, what = line.partition(": ")
        return f"{click.style(head, fg='red', bold=True)}: {click.style(what, bold=True)}"
    if line.startswith(("fix:", "why:")):
        return f"{click.style(start, fg='green' if start == 'fix:' else 'yellow', bold=True)}{mark}{rest}"
    if line.strip().startswith("-->"):
        before, arrow, place = line.partition("-->")
        return f"{before}{click.style(arrow, fg='blue')}{place}"
    gutter, bar, under = line.partition("|")
    if bar and under.strip(" ^") == "" and not gutter.strip():
        return f"{gutter}{click.style(bar, fg='blue')}{click.style(under, fg='red', bold=True)}"
    return line


def _head(text: str, screen: Screen) -> str:
    return screen.style(text, sys.stderr, fg="red", bold=True)
