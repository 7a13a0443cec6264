"""Errors and warnings on stderr, and exit codes.

Errors of evsys-bus are shown as message, reason and fix; others, raised by training code, with their traceback.
The first log record of a kind has its traceback, repeats are one line: a hook that fails every step must not hide the
rest.
"""

import logging
import re
import sys
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import click

import evsys_bus
from evsys_bus.cli.output.screen import Screen, printable, terminal_width, wrap
from evsys_bus.codec import json_line
from evsys_bus.codec.redact import redact_text
from evsys_bus.diagnostics import LOGGER_NAME
from evsys_bus.errors import (
    ConfigError,
    ConfigErrors,
    CourierBusyError,
    DashboardError,
    DeliveryError,
    DocumentError,
    EvsysBusError,
    HookError,
    JournalError,
    TrainingError,
    UntrustedFileError,
)
from evsys_bus.tasks.adoption import HOOK_FILENAME_PREFIX

OK: Final = 0
RAISED: Final = 1
USAGE: Final = 2
ENVIRONMENT: Final = 3
REMOTE: Final = 4
PENDING: Final = 5
INTERRUPTED: Final = 130
_KINDS: Final = ("adapter", "courier", "callback", "hook", "evaluator", "file", "task", "run")
_TRACEBACK_HEAD: Final = "Traceback (most recent call last):"
_MAX_KINDS: Final = 1000
_HINT: Final = re.compile(r"; (?=did you mean|known: )")
_MARKS: Final = re.compile(r"[ ~^]+")
"""A line of a traceback that marks a part of the line above."""
_PACKAGE_DIR: Final = Path(evsys_bus.__file__).parent


def report(error: BaseException, screen: Screen) -> int:
    """Report an error on stderr, and return the exit code."""
    errors = sorted(_own_errors(error), key=_sort_key)
    if errors:
        text = printable(redact_text("\n\n".join(map(str, errors))))
        if screen.uses_color(sys.stderr):
            text = "\n".join(map(_colorize_line, text.split("\n")))
        screen.note(text)
        if len(errors) > 1:
            screen.note(f"\n{len(errors)} errors")
        return max(_exit_code(each) for each in errors)
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename is not None else ""
        head = screen.style("error", sys.stderr, fg="red", bold=True)
        screen.note(f"{head}: {printable(redact_text(f'{error.strerror or error}{place}'))}")
        return ENVIRONMENT
    screen.note(printable(redact_text("".join(traceback.format_exception(error)).rstrip())))
    return RAISED


def report_usage(error: click.ClickException, screen: Screen) -> int:
    """Report an error of the command line on stderr, with its fix, and return the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()  # the help itself
        return error.exit_code
    what, _, hint = _HINT.sub("\n", error.message).partition("\n")
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        hint = f"did you mean {' or '.join(error.possibilities)}?"
    elif not hint:
        what = error.format_message()
    what = what.rstrip(".")
    what = what if what[:2].isupper() else f"{what[:1].lower()}{what[1:]}"
    context = error.ctx if isinstance(error, click.UsageError) else None
    fixes = [hint] if hint else []
    if context is not None:
        usage = context.command.get_usage(context).partition(": ")[2]
        fixes += [usage] if isinstance(error, click.MissingParameter) else []
        noun = "commands" if isinstance(context.command, click.Group) else "options"
        fixes.append(f"all {noun}: {context.command_path} --help")
    head = screen.style("error", sys.stderr, fg="red", bold=True)
    text = "".join(
        f"\n{screen.style('fix:', sys.stderr, fg='green', bold=True)} {fix}" for fix in ["   ".join(fixes)] if fix
    )
    screen.note(f"{head}: {printable(redact_text(what))}{text}")
    return error.exit_code


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
    if isinstance(error, JournalError | CourierBusyError | DashboardError | UntrustedFileError):
        return ENVIRONMENT
    if isinstance(error, DeliveryError):
        return REMOTE
    if isinstance(error.__cause__, OSError | ImportError) and not isinstance(error, DocumentError):
        return ENVIRONMENT
    return USAGE if isinstance(error, ConfigError | HookError | TrainingError) else RAISED


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


class _WarningHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, which is redirected while a table is shown."""

    def __init__(self, screen: Screen, level: int, *, as_json: bool) -> None:
        super().__init__(level)
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
        if record.exc_text:  # in place of the exception, which shows a credential
            trace = record.exc_text
        elif isinstance(trace, str):
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
        width = terminal_width(sys.stderr)
        lines = wrap(f"{head} {printable(first)}", width)
        for line in map(printable, [*more, *trace.splitlines()]):
            if width is not None and len(line) + 2 > width and _MARKS.fullmatch(line):
                continue  # the terminal would wrap them, away from what they mark
            lines += [f"  {line}"] if line.startswith(" ") else wrap(line, width, indent="  ")
        return "".join(f"{line}\n" for line in lines)

    def _json(self, record: logging.LogRecord, message: str, trace: str) -> str:
        facts: dict[str, Any] = {"event": "log", "level": record.levelname.lower(), "message": message}
        return json_line(facts | ({"traceback": trace} if trace else {})).decode() + "\n"


def _outside_traceback(error: BaseException) -> traceback.TracebackException:
    """Return the traceback without frames of evsys-bus, unless there are no others."""
    trace = traceback.TracebackException.from_exception(error)
    foreign = [
        frame
        for frame in trace.stack
        if not frame.filename.startswith(HOOK_FILENAME_PREFIX) and not Path(frame.filename).is_relative_to(_PACKAGE_DIR)
    ]
    if foreign:
        trace.stack = traceback.StackSummary.from_list(foreign)
    return trace


@contextmanager
def show_warnings(screen: Screen, *, as_json: bool = False, level: int = logging.WARNING) -> Generator[None]:
    """Print log records of this level and higher to stderr within the block."""
    lines = _WarningHandler(screen, level, as_json=as_json)
    root, own = logging.getLogger(), logging.getLogger(LOGGER_NAME)
    levels = [(each, each.level) for each in (root, own)] if level < logging.WARNING else []
    for each, _ in levels:
        each.setLevel(level)
    root.addHandler(lines)
    try:
        yield
    finally:
        root.removeHandler(lines)
        for each, before in levels:
            each.setLevel(before)
