"""``evsys-bus replay``: delivers a recorded run to any adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.adapter_choice import adapter_options
from evsys_bus.cli.event_options import event_options, no_match_message
from evsys_bus.cli.options import progress_option, timeout_option
from evsys_bus.cli.output.delivery_progress import show_deliveries
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable
from evsys_bus.location import encode_json

if TYPE_CHECKING:
    from evsys_bus.cli.filtered_receiver import FilteredReceiver
    from evsys_bus.cli.output.progress import ProgressMode
    from evsys_bus.cli.replay_delivery import ReplayResult


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
    from evsys_bus.cli.adapter_choice import load_adapter, resolve_subscription
    from evsys_bus.cli.filtered_receiver import FilteredReceiver
    from evsys_bus.cli.journals import find_journal
    from evsys_bus.cli.output.capture import guard_stdout
    from evsys_bus.cli.output.errors import show_warnings
    from evsys_bus.cli.replay_delivery import replay
    from evsys_bus.cli.run_journal import find_run_key

    journal = find_journal(folder)
    subscription = resolve_subscription(kind, sets, plugins)
    receiver = FilteredReceiver(
        None if dry_run else load_adapter(subscription),
        types=frozenset(types),
        run=run_key or find_run_key(journal),
        speed=0.0 if dry_run else speed,
    )
    with (
        guard_stdout(result_is_json=as_json, progress_is_json=progress == "json"),
        show_deliveries(progress, screen) as view,
        show_warnings(screen, as_json=progress == "json"),
    ):
        result = replay(journal.directory, subscription.name, receiver, from_seq - 1, timeout_seconds, view.update)
    click.echo("\n".join(_json(result, dry_run=dry_run) if as_json else _lines(result, dry_run=dry_run)))
    if not receiver.sent and not receiver.dead:
        screen.note(no_match_message(types))
    return _report_problems(result, receiver, screen)


def _lines(result: "ReplayResult", *, dry_run: bool) -> list[str]:
    from evsys_bus.cli.output.formatting import format_columns, pluralize

    sent = sum(result.sent.values())
    if dry_run:
        rows = [[each, f"{count:,}"] for each, count in sorted(result.sent.items())]
        return [f"{result.adapter}   {pluralize(sent, 'event')} to deliver", *format_columns(rows, indent="  ")]
    rest = [f"left {result.left:,}"] if result.left else []
    counts = [f"sent {sent:,}", f"dead {result.dead:,}", *rest, f"{result.seconds:.1f}s"]
    if result.seconds > 0:
        counts.append(f"{sent / result.seconds:,.0f}/s")
    return format_columns([[printable(result.adapter), pluralize(sent + result.dead, "event"), *counts]])


def _json(result: "ReplayResult", *, dry_run: bool) -> list[str]:
    import msgspec

    row = {"type": "plan" if dry_run else "replay", **msgspec.to_builtins(result)}
    return [encode_json(row).decode()]


def _report_problems(result: "ReplayResult", receiver: "FilteredReceiver", screen: Screen) -> int:
    """Report errors on stderr, and return the exit code."""
    from evsys_bus.cli.output.errors import INTERRUPTED, OK, RAISED, REMOTE, report
    from evsys_bus.cli.output.formatting import pluralize
    from evsys_bus.errors import RetryLaterError

    for why in receiver.reasons:
        screen.note(f"rejected: {printable(why)}")
    if receiver.hook_failures:
        screen.note(f"hooks of {result.adapter} raised {pluralize(receiver.hook_failures, 'time')}")
    if result.interrupted:
        sequences = list(receiver.last_sequences.values())
        hint = f"; continue with --from-seq {sequences[0] + 1}" if len(sequences) == 1 else ""
        screen.note(f"interrupted with {pluralize(result.left, 'event')} left{hint}")
        return INTERRUPTED
    if result.left:
        error = RetryLaterError(f"{pluralize(result.left, 'event')} could not be delivered to {result.adapter}")
        error.why = result.error or "it accepted no events and gave no reason"
        error.fix = "remove the cause, and run the same command again"
        return report(error, screen)
    return REMOTE if result.dead else RAISED if receiver.hook_failures else OK
