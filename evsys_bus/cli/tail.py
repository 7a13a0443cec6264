"""``evsys-bus tail``: shows the events of a live or finished journal."""

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from evsys_bus.cli.event_options import event_options, metric_option, no_match_message, since_option
from evsys_bus.cli.output.screen import Screen, color_option, json_option, terminal_width

if TYPE_CHECKING:
    from evsys_bus.cli.event_lines import EventFormatter
    from evsys_bus.cli.event_reader import EventReader
    from evsys_bus.events import Envelope

_DEFAULT_COUNT: Final = 20
_POLL_SECONDS: Final = 0.2


@click.command("tail")
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(min=0), help="Number of events; default: 20, or all with --since.")
@click.option("-f", "--follow", is_flag=True, help="Keep showing new events, until Ctrl-C.")
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

    One line each: time, run, type, step, metrics. Events of several processes are merged by time; facts that couriers
    have added, such as the URL of a run at W&B, are included.
    """
    from evsys_bus.cli.event_lines import EventFormatter
    from evsys_bus.cli.event_reader import EventFilter, EventReader
    from evsys_bus.cli.journals import find_journal

    journal = find_journal(folder)
    if folder is None:
        screen.note(str(journal.directory))
    event_filter = EventFilter(types=frozenset(types), run=run_key or journal.run, metric=metric, since=since)
    reader = EventReader(journal.directory, event_filter, include_annotations=True)
    printer = _EventPrinter(None if as_json else EventFormatter(metric=metric, columns=terminal_width(sys.stdout)))
    if count is None and since is not None:
        reader.seek(since)
        printer.print_events(reader.poll())
    else:
        latest = reader.latest(_DEFAULT_COUNT if count is None else count)
        if printer.formatter is not None:
            printer.formatter.widen_for(latest)
        printer.print_events(latest)
    if follow:
        _follow(reader, printer)
    if not printer.printed and count != 0:
        screen.note(no_match_message(types))
    problems = reader.problems()
    if problems:
        screen.note(f"{', '.join(problems)}; see: evsys-bus journal verify {journal.directory}")


class _EventPrinter:
    """Prints events to stdout."""

    def __init__(self, formatter: "EventFormatter | None") -> None:
        self.printed = 0
        self.formatter = formatter
        """None for JSON."""

    def print_events(self, envelopes: "Iterable[Envelope]") -> None:
        """Print these events."""
        from evsys_bus.codec import to_json

        for envelope in envelopes:
            self.printed += 1
            click.echo(to_json(envelope) if self.formatter is None else self.formatter.format_event(envelope))


def _follow(reader: "EventReader", printer: _EventPrinter) -> None:
    """Print new events until Ctrl-C, even without a live writer: a resumed run uses the same journal."""
    while True:
        printer.print_events(reader.poll())
        time.sleep(_POLL_SECONDS)
