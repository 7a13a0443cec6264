"""``evsys-bus logs``: shows what a run has left to read: tracebacks of failed runs, and the log of its couriers.

Logs are text that was never validated, so each file is read from its end, up to a limit, and control characters are
escaped.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import click
import msgspec

from evsys_bus.cli.options import adapters_option, count_option, follow_option, optional_run_argument
from evsys_bus.cli.output.formatting import GAP, format_short_time
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable, terminal_width, wrap
from evsys_bus.cli.records import find_journal
from evsys_bus.cli.show import find_folder, find_newest
from evsys_bus.codec import json_line
from evsys_bus.delivery.process_log import LOG_NAME, MAX_LOG_BYTES, LogLine, LogReader
from evsys_bus.disk import open_regular
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import layout
from evsys_bus.run_files import ERROR_FILE, OUTPUT_FILE

_DEFAULT_COUNT: Final = 100
_MAX_FILE_BYTES: Final = MAX_LOG_BYTES
_MAX_LINES: Final = 400
"""Lines of one entry; a longer one is cut in the middle."""
_POLL_SECONDS: Final = 0.5
_LEVELS: Final = {"WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_COURIERS: Final = "couriers"
"""The source of log lines that belong to no adapter."""


class LogEntry(msgspec.Struct, frozen=True):
    """One entry: a log line, or the traceback or the output of a run."""

    time: float
    level: str
    """In lower case; ``output`` for text that was printed, or written by the interpreter or a C library."""
    source: str
    """The adapter, ``couriers``, or the key of the run that failed."""
    message: str
    traceback: str | None = None
    run: str | None = None
    """The run that the entry belongs to, if known."""
    is_problem: bool = True
    """Whether it is shown without ``--all``."""


@click.command("logs")
@optional_run_argument
@count_option(f"Number of entries; default: {_DEFAULT_COUNT}.")
@follow_option
@click.option("--all", "everything", is_flag=True, help="Also below WARNING, and what programs and adapters printed.")
@adapters_option("Only of this adapter")
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path | None,
    count: int | None,
    follow: bool,
    everything: bool,
    adapters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what RUN has left to read, newest last: tracebacks of failed runs, and warnings of its couriers.

    RUN is a run, an experiment, which includes all of its runs, or a journal; without it, the newest below ./runs. One
    entry each: local time, level, adapter or run, message; tracebacks are indented below.

    \b
    Examples:
      evsys-bus logs runs/sweep
      evsys-bus logs runs/sweep/low-s0
      evsys-bus logs -f --all --adapter wandb_logger
    """  # noqa: D301 # click reads the backspace as: do not wrap
    logs = RunLogs(folder)
    if folder is None:
        screen.note(str(logs.folder))
    entry_filter = _EntryFilter(everything, frozenset(adapters), logs.run)
    formatter = _EntryFormatter(screen, terminal_width(sys.stdout))
    format_entry = _format_json if as_json else formatter.format_entry
    entries = [each for each in logs.read() if entry_filter.matches(each)]
    shown = entries[max(0, len(entries) - (_DEFAULT_COUNT if count is None else count)) :]
    if len(shown) < len(entries):
        screen.note(f"({len(entries) - len(shown):,} before these; more: -n {len(entries)})")
    formatter.widen_for(shown)
    for each in shown:
        click.echo(format_entry(each))
    for path, skipped in logs.skipped.items():
        screen.note(f"(only the end of {path} was read; {skipped:,} bytes before are not shown)")
    if not entries and not follow:
        screen.note(_nothing_message(everything, adapters, {each.source for each in logs.read()}))
    while follow:  # until Ctrl-C
        for each in filter(entry_filter.matches, logs.poll()):
            click.echo(format_entry(each))
        time.sleep(_POLL_SECONDS)


def _nothing_message(everything: bool, adapters: tuple[str, ...], sources: set[str]) -> str:
    from evsys_bus.errors import did_you_mean

    unknown = [each for each in adapters if each not in sources]
    if unknown:
        hint = did_you_mean(unknown[0], sources - {_COURIERS})
        return f'nothing is logged for adapter "{unknown[0]}"{f"; {hint}" if hint else ""}'
    return "nothing is logged" if everything else "no run failed, and no courier logged a warning; the rest: --all"


class RunLogs:
    """The logs of a run, an experiment or a journal.

    Args:
        requested: The folder or name that the user gave; None for the newest.

    Raises:
        click.UsageError: There is none.
    """

    def __init__(self, requested: Path | None) -> None:
        self.folder: Final = find_newest() if requested is None else find_folder(requested)
        self.run: str | None = None
        """The key of the requested run, if it is one of an experiment."""
        self.skipped: dict[Path, int] = {}
        """How many bytes at the beginning of each file were not read."""
        journal: Path | None = None
        with suppress(click.UsageError):
            location = find_journal(self.folder)
            journal, self.run = location.directory, location.run
        self._log = None if journal is None else journal / layout.COURIERS / LOG_NAME
        is_journal = journal is not None and journal.absolute() == self.folder.absolute()
        self._experiment = self.folder.absolute().parent if is_journal else self.folder
        if journal is None and not self._files(ERROR_FILE) and not self._files(OUTPUT_FILE):
            raise click.UsageError(f"{self.folder} holds neither a journal nor the error of a run")
        self._reader = None if self._log is None else LogReader(str(self._log))
        self._error_times = dict(self._files(ERROR_FILE))
        self._read_lines: list[LogEntry] = []

    def read(self) -> list[LogEntry]:
        """Return the entries of all files, oldest first."""
        entries: list[LogEntry] = []
        for path in () if self._log is None else (self._log.with_name(f"{LOG_NAME}.1"), self._log):
            entries += self._read_log(path)
        self._read_lines = entries[-_DEFAULT_COUNT:]
        entries += [_error_entry(path, mtime, self._read_end(path)) for path, mtime in self._files(ERROR_FILE)]
        entries += [_output_entry(path, mtime, self._read_end(path)) for path, mtime in self._files(OUTPUT_FILE)]
        return sorted(entries, key=lambda entry: entry.time)

    def poll(self) -> Iterator[LogEntry]:
        """Yield the entries that were added since."""
        if self._reader is not None:
            for line in self._reader.read(_MAX_FILE_BYTES):
                entry = _line_entry(line, 0.0)
                if entry not in self._read_lines:  # logged between opening the file and reading it
                    yield entry
            self._read_lines = []
        for path, mtime in self._files(ERROR_FILE):
            if self._error_times.get(path) != mtime:
                self._error_times[path] = mtime
                yield _error_entry(path, mtime, self._read_end(path))

    def _files(self, name: str) -> list[tuple[Path, float]]:
        """Return the files of this name of the run, or of all runs of the experiment, and when they were written."""
        found: list[tuple[Path, float]] = []
        for pattern in (name,) if self.run is not None else (name, f"*/{name}"):
            for path in sorted(self._experiment.glob(pattern)):
                with suppress(OSError):  # the run has started again, and succeeded
                    found.append((path, path.stat().st_mtime))
        return found

    def _read_log(self, path: Path) -> list[LogEntry]:
        entries: list[LogEntry] = []
        at = 0.0
        plain: list[str] = []

        def flush_plain() -> None:
            if plain:
                entries.append(LogEntry(at, "output", _COURIERS, plain[0], "\n".join(plain[1:]) or None))
                plain.clear()

        for line in self._read_end(path).split("\n"):
            decoded: LogLine | None = None
            if line.startswith("{"):
                with suppress(*DECODE_ERRORS):
                    decoded = msgspec.json.decode(line.encode(errors="replace"), type=LogLine)
            if decoded is None:
                plain += [line] if line.strip() else []
                continue
            flush_plain()
            entries.append(_line_entry(decoded, at))
            at = entries[-1].time
        with suppress(OSError):
            at = at or path.stat().st_mtime
        flush_plain()
        return entries

    def _read_end(self, path: Path) -> str:
        """Return the end of the file, from the beginning of a line; empty if it cannot be read."""
        try:
            file = open_regular(str(path), os.O_RDONLY)
        except OSError:
            return ""
        try:
            start = max(0, os.fstat(file).st_size - _MAX_FILE_BYTES)
            data = os.pread(file, _MAX_FILE_BYTES, start)
        except OSError:
            return ""
        finally:
            os.close(file)
        if start:
            cut = data.find(b"\n") + 1
            self.skipped[path] = start + cut
            data = data[cut:]
        return data.decode(errors="replace")


def _line_entry(line: LogLine, default_time: float) -> LogEntry:
    """Return the entry of a log line; a line without a time gets the default."""
    try:
        at = datetime.fromisoformat(line.time).timestamp()
    except ValueError:
        at = default_time
    run = line.facts.get("run")
    source = line.adapter or _COURIERS
    if line.print is not None:
        return LogEntry(at, "output", source, line.print.rstrip("\n"), is_problem=False)
    message = line.message.removesuffix(f" adapter={line.adapter}")
    message = message.replace(f" traceback={line.facts.get('traceback')}", "")
    trace = line.traceback or line.facts.get("traceback")
    return LogEntry(
        at,
        line.level.lower(),
        source,
        message,
        trace if isinstance(trace, str) else None,
        run if isinstance(run, str) else None,
        line.level in _LEVELS,
    )


def _error_entry(path: Path, mtime: float, text: str) -> LogEntry:
    run = path.absolute().parent.name
    last = text.rstrip().rpartition("\n")[2]
    return LogEntry(mtime, "error", run, f"the run failed: {last}", text.rstrip(), run)


def _output_entry(path: Path, mtime: float, text: str) -> LogEntry:
    run = path.absolute().parent.name
    first, _, rest = text.rstrip().partition("\n")
    return LogEntry(mtime, "output", run, first, rest or None, run, is_problem=False)


class _EntryFilter(msgspec.Struct, frozen=True):
    everything: bool
    adapters: frozenset[str]
    run: str | None

    def matches(self, entry: LogEntry) -> bool:
        """Return whether the entry is shown."""
        if not (self.everything or entry.is_problem):
            return False
        if self.run is not None and entry.run not in {None, self.run}:
            return False
        return not self.adapters or entry.source in self.adapters


class _EntryFormatter:
    """Formats entries as a line each, with what is longer indented below."""

    def __init__(self, screen: Screen, columns: int | None) -> None:
        self._screen = screen
        self._columns = columns
        self._widths = (0, 0)

    def widen_for(self, entries: Iterable[LogEntry]) -> None:
        """Widen the columns for these entries."""
        for each in entries:
            level, source = self._widths
            self._widths = (max(level, len(each.level)), max(source, len(printable(each.source))))

    def format_entry(self, entry: LogEntry) -> str:
        """Return the lines of one entry."""
        self.widen_for([entry])
        level = self._screen.style_state(entry.level, sys.stdout) + " " * (self._widths[0] - len(entry.level))
        head = GAP.join([format_short_time(entry.time), level, f"{printable(entry.source):<{self._widths[1]}}", ""])
        first, *more = entry.message.splitlines() or [""]
        below = [*more, *(entry.traceback or "").splitlines()]
        if len(below) > _MAX_LINES:
            half = _MAX_LINES // 2
            below = [*below[:half], f"... {len(below) - 2 * half:,} lines are left out here ...", *below[-half:]]
        lines = wrap(f"{head}{printable(first)}", self._columns)
        for line in map(printable, below):
            lines += [f"  {line}"] if line.startswith(" ") else wrap(line, self._columns, indent="  ")
        return "\n".join(lines)


def _format_json(entry: LogEntry) -> str:
    facts = msgspec.to_builtins(entry)
    del facts["is_problem"]
    return json_line({"type": "log", **facts}).decode()
