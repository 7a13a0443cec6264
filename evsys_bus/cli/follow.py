"""``evsys-bus follow``: delivers a live run to an adapter in this process."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.adapter_choice import adapter_options
from evsys_bus.cli.options import progress_option, timeout_option
from evsys_bus.cli.output.delivery_progress import show_deliveries
from evsys_bus.cli.output.screen import Screen, color_option, json_option

if TYPE_CHECKING:
    from evsys_bus.cli.output.progress import ProgressMode


@click.command("follow")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@adapter_options
@click.option("--name", help="Store a cursor under this name; the next call continues there.")
@click.option("--from-start", is_flag=True, help="With --name: start again at the first event.")
@timeout_option
@progress_option
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path,
    kind: str,
    sets: tuple[str, ...],
    plugins: tuple[str, ...],
    name: str | None,
    from_start: bool,
    timeout_seconds: float,
    progress: "ProgressMode",
    as_json: bool,
) -> int:
    """Deliver the events of RUN to an adapter until the run ends, or until Ctrl-C.

    Delivery begins at the first event, and leaves nothing in the journal. With --name the adapter has a cursor like
    those of the run: it continues where it stopped the last time, and `status` and `sync` include it. If the run has
    ended already, its events are delivered and the command ends.
    """
    from evsys_bus.cli.adapter_choice import resolve_subscription
    from evsys_bus.cli.follow_delivery import OneOffDelivery, ResumableDelivery, check_same_adapter
    from evsys_bus.cli.journals import find_journal
    from evsys_bus.cli.output.capture import guard_stdout
    from evsys_bus.cli.output.deliveries import outcome_json, outcome_lines, sync_command, undelivered_error
    from evsys_bus.cli.output.errors import INTERRUPTED, report, show_warnings

    journal = find_journal(folder)
    subscription = resolve_subscription(kind, sets, plugins, name)
    if name is not None:
        check_same_adapter(journal.directory, subscription)
    if journal.run is not None:
        screen.note(f"{journal.run} shares its journal: all events of {journal.directory} are delivered")
    with (
        guard_stdout(result_is_json=as_json, progress_is_json=progress == "json"),
        show_deliveries(progress, screen) as view,
        show_warnings(screen, as_json=progress == "json"),
    ):
        if name is None:
            delivery: ResumableDelivery | OneOffDelivery = OneOffDelivery(journal.directory, subscription)
        else:
            delivery = ResumableDelivery(journal.directory, subscription, from_start=from_start)
        outcome, interrupted = delivery.run(timeout_seconds, view.update)
    click.echo("\n".join(outcome_json([outcome]) if as_json else outcome_lines([outcome])))
    if outcome.dead:
        location = "" if outcome.dead_letters is None else f"; events and reasons are in {outcome.dead_letters}"
        screen.note(f"{outcome.dead:,} rejected{location}")
    if interrupted:
        advice = "the same command starts again at the first event; with --name it would continue where it stopped"
        if name is not None:
            advice = f"the same command continues where it stopped, and so does: {sync_command(journal.directory)}"
        screen.note(f"interrupted; {advice}")
        return INTERRUPTED
    error = undelivered_error(outcome)
    if error is not None and name is None:
        error.fix = f"{outcome.after.fix or 'remove the cause'}   then run the same command again"
    return 0 if error is None else report(error, screen)
