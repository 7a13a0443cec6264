"""``evsys-bus tail``: shows the events of a live or finished journal."""

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option, width_of
from evsys_bus.cli.selecting import event_options, metric_option, since_option, unmatched

if TYPE_CHECKING:
    from evsys_bus.cli.event_lines import EventLines
    from evsys_bus.cli.event_reader import EventReader
    from evsys_bus.events import Envelope

_LAST: Final = 20
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
    from evsys_bus.cli.event_lines import EventLines
    from evsys_bus.cli.event_reader import EventReader, Wanted
    from evsys_bus.cli.journals import found

    journal = found(folder)
    if folder is None:
        screen.note(str(journal.directory))
    wanted = Wanted(types=frozenset(types), run=run_key or journal.run, metric=metric, since=since)
    reader = EventReader(journal.directory, wanted, learnt=True)
    shown = _Shown(None if as_json else EventLines(metric=metric, columns=width_of(sys.stdout)))
    if count is None and since is not None:
        reader.seek(since)
        shown.add(reader.poll())
    else:
        latest = reader.latest(_LAST if count is None else count)
        if shown.lines is not None:
            shown.lines.expect(latest)
        shown.add(latest)
    if follow:
        _follow(reader, shown)
    if not shown.events and count != 0:
        screen.note(unmatched(types))
    troubles = reader.troubles()
    if troubles:
        screen.note(f"{', '.join(troubles)}; see: evsys-bus journal verify {journal.directory}")


class _Shown:
    """Prints events to stdout."""

    def __init__(self, lines: "EventLines | None") -> None:
        self.events = 0
        self.lines = lines
        """None for JSON."""

    def add(self, envelopes: "Iterable[Envelope]") -> None:
        """Print these events."""
        from evsys_bus.codec import to_json

        for envelope in envelopes:
            self.events += 1
            click.echo(to_json(envelope) if self.lines is None else self.lines.line(envelope))


def _follow(reader: "EventReader", shown: _Shown) -> None:
    """Print new events until Ctrl-C, even without a live writer: a resumed run uses the same journal."""
    while True:
        shown.add(reader.poll())
        time.sleep(_POLL_SECONDS)
