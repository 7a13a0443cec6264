"""``evsys-bus tail``: shows the events of a live or finished journal."""

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click
from rich.cells import cell_len, set_cell_size

from evsys_bus.cli.events import EventFilter, EventReader, facts_of, metrics_of, step_of, type_of
from evsys_bus.cli.options import (
    count_option,
    event_options,
    follow_option,
    metric_option,
    no_match_message,
    optional_run_argument,
    since_option,
)
from evsys_bus.cli.output.formatting import GAP, NO_VALUE, format_short_time, format_value
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable, printable_name, terminal_width
from evsys_bus.cli.records import find_journal
from evsys_bus.codec import to_json
from evsys_bus.events import Envelope

_DEFAULT_COUNT: Final = 20
_POLL_SECONDS: Final = 0.2
_SEPARATOR: Final = "  "
_NARROW_COLUMNS: Final = 100
"""On a narrower terminal, columns are closer together."""
_LAST_METRICS: Final = frozenset({"epoch", "step_seconds", "grad_norm"})
_MAX_CHARS: Final = 160


class EventFormatter:
    """Formats events as lines.

    Args:
        metric: Show the metrics whose names match; None for all.
        columns: The width of the terminal: metrics that do not fit in a line are counted. None for no limit.
    """

    def __init__(self, *, metric: re.Pattern[str] | None, columns: int | None) -> None:
        self._metric = metric
        self._columns = columns
        self._widths = [0, 0, 0]

    def widen_for(self, envelopes: Iterable[Envelope]) -> None:
        """Widen the columns for these events."""
        for envelope in envelopes:
            self._widen(_cells(envelope))

    def format_event(self, envelope: Envelope) -> str:
        """Return the line of one event."""
        cells = _cells(envelope)
        self._widen(cells)
        padded = [set_cell_size(cell, width) for cell, width in zip(cells, self._widths, strict=True)]
        gap = _SEPARATOR if self._columns is not None and self._columns < _NARROW_COLUMNS else GAP
        line = gap.join([format_short_time(envelope.time), *padded]) + gap
        facts, metrics = self._details(envelope)
        if self._columns is None:
            return f"{line}{_SEPARATOR.join([*facts, *metrics])}".rstrip()
        return self._fit(line, facts, metrics)

    def _fit(self, line: str, facts: list[str], metrics: list[str]) -> str:
        """Add what fits in the width: whole metrics, and the number of the others; a fact may be cut short."""
        assert self._columns is not None
        left = len(metrics)
        for number, text in enumerate([*facts, *metrics]):
            is_metric = number >= len(facts)
            left -= is_metric
            suffix = f"{_SEPARATOR}(+{left})" if left else ""
            longer = f"{line}{'' if number == 0 else _SEPARATOR}{text}"
            if cell_len(longer + suffix) <= self._columns:
                line = longer
            elif is_metric and number == 0 and cell_len(longer) <= self._columns:
                return longer
            elif is_metric:
                return f"{line}{'' if number == 0 else _SEPARATOR}(+{left + 1})"
            else:
                return f"{set_cell_size(longer, self._columns - 1).rstrip()}…"
        return line.rstrip()

    def _widen(self, cells: list[str]) -> None:
        self._widths = [max(width, cell_len(cell)) for width, cell in zip(self._widths, cells, strict=True)]

    def _details(self, envelope: Envelope) -> tuple[list[str], list[str]]:
        """Return the facts and the metrics, the less interesting ones last."""
        metrics = metrics_of(envelope.event)
        names = sorted(metrics, key=_LAST_METRICS.__contains__)
        if self._metric is not None:
            names = [name for name in names if self._metric.search(name)]
        facts = facts_of(envelope.event, envelope.run)
        return [_shorten(each) for each in facts], [_shorten(f"{name} {format_value(metrics[name])}") for name in names]


def _shorten(text: str) -> str:
    return printable_name(text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…")


@click.command("tail")
@optional_run_argument
@count_option(f"Number of events; default: {_DEFAULT_COUNT}, or all with --since.")
@follow_option
@event_options
@metric_option
@since_option
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path | None,
    count: int | None,
    follow: bool,
    types: tuple[str, ...],
    run_key: str | None,
    metric: re.Pattern[str] | None,
    since: float | None,
    as_json: bool,
) -> None:
    """Show the last events of RUN: a run, an experiment or a journal; without it, of the newest one below ./runs.

    One line each: local time, run, type, step, metrics; on a terminal, metrics that do not fit are counted. Events
    of several processes are merged by time; facts that couriers have added, such as the URL of a run at W&B, are
    included.

    \b
    Examples:
      evsys-bus tail -f                                   the newest run, until Ctrl-C
      evsys-bus tail runs/sweep --type eval,checkpoint
      evsys-bus tail runs/sweep --metric '^val/' --since 2h
    """  # noqa: D301 # click reads the backspace as: do not wrap
    journal = find_journal(folder)
    if folder is None:
        screen.note(str(journal.directory))
    event_filter = EventFilter(types=frozenset(types), run=run_key or journal.run, metric=metric, since=since)
    reader = EventReader(journal.directory, event_filter, include_annotations=True)
    formatter = EventFormatter(metric=metric, columns=terminal_width(sys.stdout))
    format_event = to_json if as_json else formatter.format_event
    if count is None and since is not None:
        reader.seek(since)
        events: Iterable[Envelope] = reader.poll()
    else:
        events = reader.latest(_DEFAULT_COUNT if count is None else count)
        formatter.widen_for(() if as_json else events)
    printed = 0
    for envelope in events:
        printed += 1
        click.echo(format_event(envelope))
    while follow:  # until Ctrl-C, even without a live writer: a resumed run uses the same journal
        for envelope in reader.poll():
            click.echo(format_event(envelope))
        time.sleep(_POLL_SECONDS)
    if not printed and count != 0:
        screen.note(no_match_message(types))
    reader.report_problems(screen)


def _cells(envelope: Envelope) -> list[str]:
    """Return run, type and step."""
    step = step_of(envelope.event)
    run = NO_VALUE if envelope.run is None else printable_name(envelope.run)
    run = f"{run} rank {envelope.rank}" if envelope.rank else run
    return [run, printable(type_of(envelope.event)), NO_VALUE if step is None else f"{step:,}"]
