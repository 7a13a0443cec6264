"""``evsys-bus forget``: removes an adapter from a journal, so that retention no longer waits for it."""

from pathlib import Path

import click

from evsys_bus.cli.options import optional_run_argument
from evsys_bus.cli.output.formatting import pluralize
from evsys_bus.cli.output.screen import Screen, color_option, printable
from evsys_bus.cli.records import find_journal
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscriptions import forget
from evsys_bus.errors import did_you_mean


@click.command("forget")
@click.argument("name", metavar="NAME")
@optional_run_argument
@click.option("--yes", "-y", "sure", is_flag=True, help="Do not ask for confirmation.")
@color_option
@click.pass_obj
def command(screen: Screen, name: str, folder: Path | None, sure: bool) -> None:
    """Forget the adapter NAME in the journal of RUN; without RUN, in the newest one below ./runs.

    For an adapter that was removed from the config: its cursor, spec and state are deleted, a journal with `retain` no
    longer retains events for it, and `status` and `sync` no longer list it. Its dead letters stay.

    Fails while a process delivers to the adapter. If the adapter is added again later, it begins with the oldest event
    that the journal has then. To deliver pending events instead: evsys-bus sync RUN --adapter NAME.
    """
    directory = find_journal(folder).directory
    known = {each.name: each for each in read_progress(directory)}
    status = known.get(name)
    if status is None:
        near = did_you_mean(name, known)
        raise click.UsageError(printable(f'{directory} has no adapter "{name}"{near and f"; {near}"}'))
    pending = f", {pluralize(status.pending, 'event')} pending" if status.pending else ""
    question = f"Forget {name} in {directory} ({status.delivered:,} delivered{pending})?"
    if not sure:
        click.confirm(printable(question), abort=True, err=True)
    forget(str(directory), name)
    what = f"; {pluralize(status.pending, 'event')} will not be delivered to it" if status.pending else ""
    screen.note(printable(f"forgotten: {name}{what}"))
