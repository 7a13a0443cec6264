"""``evsys-bus replay``: delivers a recorded run to any adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.adapter_choice import adapter_options
from evsys_bus.cli.delivery_progress import deliveries_shown, progress_option, timeout_option
from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option, printable
from evsys_bus.cli.selecting import event_options, unmatched
from evsys_bus.where import encode_json

if TYPE_CHECKING:
    from evsys_bus.cli.chosen_events import ChosenEvents
    from evsys_bus.cli.progress import ProgressMode
    from evsys_bus.cli.replaying import Replayed


@click.command("replay")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@adapter_options
@event_options
@click.option("--from-seq", type=click.IntRange(min=1), default=1, metavar="N", help="Start at this sequence.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="X",
    help="1 is the original speed, 10 ten times as fast; default: as fast as the adapter accepts events.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be delivered, and deliver nothing.")
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
    types: tuple[str, ...],
    run_key: str | None,
    from_seq: int,
    speed: float,
    dry_run: bool,
    timeout_seconds: float,
    progress: "ProgressMode",
    as_json: bool,
) -> int:
    """Deliver the recorded events of RUN to an adapter, any number of times: no cursor is read or moved.

    If RUN is one run of an experiment, the events are those of this run and of the experiment as a whole.
    """
    from evsys_bus.cli.adapter_choice import built, chosen
    from evsys_bus.cli.chosen_events import ChosenEvents
    from evsys_bus.cli.journals import found
    from evsys_bus.cli.printed import printed_aside
    from evsys_bus.cli.replaying import replay
    from evsys_bus.cli.run_journal import run_key_of
    from evsys_bus.cli.warnings_log import warnings_shown

    journal = found(folder)
    followed = chosen(kind, sets, plugins)
    events = ChosenEvents(
        None if dry_run else built(followed),
        types=frozenset(types),
        run=run_key or run_key_of(journal),
        speed=0.0 if dry_run else speed,
    )
    with (
        printed_aside(result_is_json=as_json, progress_is_json=progress == "json"),
        deliveries_shown(progress, screen) as view,
        warnings_shown(screen, as_json=progress == "json"),
    ):
        done = replay(journal.directory, followed.name, events, from_seq - 1, timeout_seconds, view.tell)
    click.echo("\n".join(_json(done, dry_run=dry_run) if as_json else _lines(done, dry_run=dry_run)))
    if not events.sent and not events.dead:
        screen.note(unmatched(types))
    return _told(done, events, screen)


def _lines(done: "Replayed", *, dry_run: bool) -> list[str]:
    from evsys_bus.cli.tables import columns, counted

    sent = sum(done.sent.values())
    if dry_run:
        rows = [[each, f"{count:,}"] for each, count in sorted(done.sent.items())]
        return [f"{done.adapter}   {counted(sent, 'event')} to deliver", *columns(rows, indent="  ")]
    rest = [f"left {done.left:,}"] if done.left else []
    counts = [f"sent {sent:,}", f"dead {done.dead:,}", *rest, f"{done.seconds:.1f}s"]
    if done.seconds > 0:
        counts.append(f"{sent / done.seconds:,.0f}/s")
    return columns([[printable(done.adapter), counted(sent + done.dead, "event"), *counts]])


def _json(done: "Replayed", *, dry_run: bool) -> list[str]:
    import msgspec

    row = {"type": "plan" if dry_run else "replay", **msgspec.to_builtins(done)}
    return [encode_json(row).decode()]


def _told(done: "Replayed", events: "ChosenEvents", screen: Screen) -> int:
    """Report errors on stderr, and return the exit code."""
    from evsys_bus.cli.tables import counted
    from evsys_bus.cli.telling import INTERRUPTED, OK, RAISED, REMOTE, tell
    from evsys_bus.errors import RetryLaterError

    for why in events.reasons:
        screen.note(f"rejected: {printable(why)}")
    if events.hook_failures:
        screen.note(f"hooks of {done.adapter} raised {counted(events.hook_failures, 'time')}")
    if done.interrupted:
        places = list(events.last.values())
        again = f"; continue with --from-seq {places[0] + 1}" if len(places) == 1 else ""
        screen.note(f"interrupted with {counted(done.left, 'event')} left{again}")
        return INTERRUPTED
    if done.left:
        error = RetryLaterError(f"{counted(done.left, 'event')} could not be delivered to {done.adapter}")
        error.why = done.error or "it accepted no events and gave no reason"
        error.fix = "remove the cause, and run the same command again"
        return tell(error, screen)
    return REMOTE if done.dead else RAISED if events.hook_failures else OK
