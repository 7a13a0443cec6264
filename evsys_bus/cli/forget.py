"""``evsys-bus forget``: takes a follower off the record of a journal, so that retention waits for it no longer."""

from pathlib import Path

import click

from evsys_bus.cli.screen import Screen, color_option


@click.command("forget")
@click.argument("name", metavar="NAME")
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--yes", "-y", "sure", is_flag=True, help="Do not ask.")
@color_option
@click.pass_obj
def command(screen: Screen, name: str, folder: Path | None, sure: bool) -> None:
    """Forget the adapter NAME in the journal of RUN; without RUN, in the newest one below ./runs.

    For an adapter that was taken out of the config for good: its cursor, its spec and its state are removed, a journal
    with `retain` no longer keeps events for it, and `status` and `sync` no longer name it. Its dead letters stay.

    Refused while the adapter is delivered to. One that is followed again later begins with the oldest event that the
    journal has then. To deliver what is pending instead: evsys-bus sync RUN --adapter NAME.
    """
    from evsys_bus.cli.journals import found
    from evsys_bus.cli.screen import printable
    from evsys_bus.cli.tables import counted
    from evsys_bus.delivery.accounts import accounts
    from evsys_bus.delivery.roster import forget
    from evsys_bus.errors import did_you_mean

    directory = found(folder).directory
    known = {each.name: each for each in accounts(directory)}
    status = known.get(name)
    if status is None:
        near = did_you_mean(name, known)
        raise click.UsageError(printable(f'{directory} knows no adapter "{name}"{near and f"; {near}"}'))
    pending = f", {counted(status.pending, 'event')} pending" if status.pending else ""
    question = f"Forget {name} in {directory} ({status.delivered:,} delivered{pending})?"
    if not sure:
        click.confirm(printable(question), abort=True, err=True)
    forget(str(directory), name)
    what = f"; {counted(status.pending, 'event')} will not be delivered to it" if status.pending else ""
    screen.note(printable(f"forgotten: {name}{what}"))
