"""``evsys-bus status``: shows the streams of a journal, their writers, and the progress of each adapter."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from evsys_bus.cli.events import StreamState, read_stream_states
from evsys_bus.cli.journal import summary, verify_with_progress
from evsys_bus.cli.options import optional_run_argument
from evsys_bus.cli.output.deliveries import adapter_lines, adapter_rows
from evsys_bus.cli.output.formatting import NO_VALUE, format_age, format_range, format_size, format_table, pluralize
from evsys_bus.cli.output.screen import Screen, color_option, is_terminal, json_option, printable, terminal_width
from evsys_bus.cli.output.transfers import Transfer, format_transfer
from evsys_bus.cli.records import find_journal
from evsys_bus.cli.uploads import read_active_uploads
from evsys_bus.delivery.progress import read_progress
from evsys_bus.journal import JournalReport
from evsys_bus.location import encode_json
from evsys_bus.tasks import DeliveryStatus

_WATCH_SECONDS: Final = 1.0
_AGES: Final = re.compile(r"[\d:]+(?: s)? ago|\"at\":[\d.]+")
"""What changes although nothing happens."""


@click.command("status")
@optional_run_argument
@click.option("--verify", "thoroughly", is_flag=True, help="Read the whole journal; report damaged and missing events.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C; in a pipe, when it changes.")
@json_option
@color_option
@click.pass_obj
def command(screen: Screen, folder: Path | None, thoroughly: bool, watch: bool, as_json: bool) -> None:
    """Show the streams of RUN and its adapters; without RUN, of the newest journal below ./runs.

    A stream is live while a process writes it, closed if its last writer closed it, dead if that was killed.
    """
    if watch and thoroughly:
        raise click.UsageError("--verify reads the whole journal, once; leave --watch or --verify out")
    directory = find_journal(folder).directory
    report = verify_with_progress(directory, screen) if thoroughly else None
    format_status = _json_lines if as_json else _lines

    def read() -> str:
        states, adapters = read_stream_states(directory), read_progress(directory)
        return "\n".join(format_status(directory, states, adapters, read_active_uploads(directory), report))

    if not watch:
        click.echo(read())
        return
    with suppress(KeyboardInterrupt):
        _watch(read, in_place=is_terminal(sys.stdout) and not as_json)


def _watch(read: Callable[[], str], *, in_place: bool) -> None:
    """Show the text again and again, until KeyboardInterrupt."""
    if in_place:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="ellipsis") as live:
            while True:
                live.update(Text.from_ansi(read()), refresh=True)
                time.sleep(_WATCH_SECONDS)
    previous = ""
    while True:
        text = read()
        if _AGES.sub("", text) != previous:
            previous = _AGES.sub("", text)
            click.echo(text)
        time.sleep(_WATCH_SECONDS)


def _lines(
    directory: Path,
    states: list[StreamState],
    adapters: list[DeliveryStatus],
    uploads: list[Transfer],
    report: JournalReport | None,
) -> list[str]:
    width = terminal_width(sys.stdout)
    rows = [["stream", "state", "writer", "events", "segments", "size", "last event"]]
    for each in states:
        numbers = NO_VALUE if each.first is None or each.last is None else format_range(each.first, each.last)
        age = NO_VALUE if each.last_time is None else format_age(time.time() - each.last_time)
        writer = NO_VALUE if each.owner is None else f"{each.owner.pid}@{each.owner.host} since {each.owner.since}"
        rows.append(
            [each.stream, each.state, printable(writer), numbers, f"{each.segments:,}", format_size(each.bytes), age]
        )
    total = sum(each.bytes for each in states)
    lines = [f"{directory}   {pluralize(len(states), 'stream')}   {format_size(total)}", "", *format_table(rows, width)]
    if report is not None:
        lines += ["", summary(report)]
    if adapters:
        lines += ["", *adapter_lines(directory, adapters, width)]
    if uploads:
        lines.append("")
    for each in uploads:
        lines.append(f"uploading   {printable(each.name)}  {'  '.join(format_transfer(each, time.time()))}")
    return lines


def _json_lines(
    directory: Path,
    states: list[StreamState],
    adapters: list[DeliveryStatus],
    uploads: list[Transfer],
    report: JournalReport | None,
) -> list[str]:
    checked = {} if report is None else {each.stream: each for each in report.streams}
    rows: list[dict[str, Any]]
    rows = [{"type": "stream", **msgspec.to_builtins(each), "verified": checked.get(each.stream)} for each in states]
    rows += adapter_rows(directory, adapters)
    rows += [{"type": "upload", **msgspec.to_builtins(each)} for each in uploads]
    return [encode_json(row).decode() for row in rows]
