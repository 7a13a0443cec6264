"""``evsys-bus sync``: delivers pending events."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from evsys_bus.cli.options import progress_option, timeout_option
from evsys_bus.cli.output.delivery_progress import show_deliveries
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable
from evsys_bus.location import encode_json

if TYPE_CHECKING:
    from evsys_bus.cli.output.deliveries import DeliveryOutcome
    from evsys_bus.cli.output.progress import ProgressMode
    from evsys_bus.cli.sync_delivery import PendingWork
    from evsys_bus.errors import EvsysBusError
    from evsys_bus.tasks import DeliveryStatus


@click.command("sync")
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Only to this one; repeatable.")
@click.option("--all", "everywhere", is_flag=True, help="Every journal below ./runs.")
@click.option("--dry-run", is_flag=True, help="Show what would be delivered, and deliver nothing.")
@timeout_option
@progress_option
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path | None,
    adapters: tuple[str, ...],
    everywhere: bool,
    dry_run: bool,
    timeout_seconds: float,
    progress: "ProgressMode",
    as_json: bool,
) -> int:
    """Deliver the pending events of RUN; without RUN, of the newest journal below ./runs that has any.

    Owed events, which were delivered but not confirmed by the destination, are confirmed too. If the couriers of a
    program that has ended still deliver, the command waits for them, and takes over if they are stuck. Exits with 4 if
    events stay pending or owed because a destination rejects them or is unavailable, with 3 if another process keeps
    delivering, such as a program that still runs. What a program records meanwhile need not be delivered.
    """
    from evsys_bus.cli.output.deliveries import outcome_json, outcome_lines, undelivered_error
    from evsys_bus.cli.output.errors import INTERRUPTED
    from evsys_bus.cli.sync_delivery import deliver, find_work

    if everywhere and folder is not None:
        raise click.UsageError("--all means every journal below ./runs; leave RUN or --all out")
    works = [find_work(each, adapters) for each in _journals(folder, adapters, everywhere=everywhere)]
    outcomes: list[DeliveryOutcome] = []
    errors: list[EvsysBusError] = []
    overtaken: list[DeliveryOutcome] = []
    for work in works:
        if folder is None and not as_json:
            screen.note(str(work.directory))
        errors += [*_program_only_errors(work), *_unreadable_errors(work)]
        _report_moved(work, screen)
        if dry_run:
            click.echo("\n".join(_plan_lines(work, as_json=as_json)), nl=bool(work.deliverable))
            continue
        known = _report_known_problems(work, screen)
        with show_deliveries(progress, screen, known) as view:
            result = deliver(work, timeout_seconds, view.update, view.note)
        if result.outcomes:
            lines = outcome_json(result.outcomes) if as_json else map(printable, outcome_lines(result.outcomes))
            click.echo("\n".join(lines))
        outcomes += result.outcomes
        passed = [each for each in result.outcomes if each.adapter in result.overtaken]
        overtaken += [each for each in passed if each.after.pending and each.after.error is None]
        errors += result.busy
        if result.interrupted:
            screen.note("interrupted; the rest stays pending: run the same command again")
            return INTERRUPTED
    _report_failures(outcomes, screen)
    for each in overtaken:
        screen.note(f"{each.adapter}: a program records more, which goes on; all that was there is delivered")
    errors += [error for each in outcomes if each not in overtaken and (error := undelivered_error(each)) is not None]
    if not works or not (outcomes or errors or dry_run):
        screen.note("nothing is pending")
    return _report_errors(errors, screen)


def _journals(folder: Path | None, adapters: tuple[str, ...], *, everywhere: bool) -> list[Path]:
    from evsys_bus.cli.journals import find_journal, list_journals_newest_first
    from evsys_bus.cli.sync_delivery import unfinished_deliveries
    from evsys_bus.errors import did_you_mean

    if folder is not None:
        from evsys_bus.delivery.progress import read_progress

        directory = find_journal(folder).directory
        known = [each.name for each in read_progress(directory)]
        for name in adapters:
            if name not in known:
                raise click.UsageError(
                    f"{directory} has no adapter {name}; {did_you_mean(name, known) or 'it has none'}"
                )
        return [directory]
    pending = (each for each in list_journals_newest_first() if unfinished_deliveries(each, adapters))
    return list(pending) if everywhere else [each for each in [next(pending, None)] if each is not None]


def _plan_lines(work: "PendingWork", *, as_json: bool) -> list[str]:
    from evsys_bus.cli.output.formatting import format_columns, pluralize

    rows = [status for _, status in work.deliverable]
    if as_json:
        facts = [
            {"type": "pending", "journal": str(work.directory), "adapter": each.name, "pending": each.pending}
            | {"owed": each.owed}
            for each in rows
        ]
        return [encode_json(each).decode() for each in facts]
    has_unconfirmed = any(each.owed for each in rows)
    return format_columns(
        [
            [
                printable(each.name),
                f"{pluralize(each.pending, 'event')} to send",
                *([f"{each.owed:,} to be confirmed"] if has_unconfirmed else []),
            ]
            for each in rows
        ]
    )


def _program_only_errors(work: "PendingWork") -> "list[EvsysBusError]":
    from evsys_bus.cli.output.deliveries import broken_adapter_error
    from evsys_bus.cli.output.formatting import pluralize

    why = "it is a live object, or cannot be imported elsewhere: the journal has no description to rebuild it from"
    fix = "resume that program; or deliver the run to an adapter of a kind: evsys-bus replay RUN --to KIND"
    return [
        broken_adapter_error(
            f"{pluralize(each.pending, 'event')} for {each.name} can only be delivered by its own program",
            why,
            fix,
        )
        for each in work.program_only
    ]


def _unreadable_errors(work: "PendingWork") -> "list[EvsysBusError]":
    from evsys_bus.cli.output.deliveries import unreadable_status_error

    return [unreadable_status_error(work.directory, each) for each in work.unreadable]


def _report_moved(work: "PendingWork", screen: Screen) -> None:
    for each, _ in work.deliverable:
        if each.working_directory and not Path(each.working_directory).is_dir():
            screen.note(
                f"{each.name} was set up in {each.working_directory}, which is gone: "
                "relative paths are resolved from here"
            )


def _report_known_problems(work: "PendingWork", screen: Screen) -> "list[DeliveryStatus]":
    """Report the last known errors before the delivery starts, because they may still apply."""
    from evsys_bus.cli.output.deliveries import problem_lines

    known = [each for each in [*(status for _, status in work.deliverable), *work.busy] if each.error is not None]
    for each in known:
        alone = msgspec.structs.replace(each, hook_failures=0, task_failures=0, dead=0)
        screen.note(printable("\n".join(problem_lines(alone, work.directory))))
    return known


def _report_failures(outcomes: "list[DeliveryOutcome]", screen: Screen) -> None:
    from evsys_bus.cli.output.deliveries import problem_lines

    for each in outcomes:
        if each.dead:
            screen.note(f"{each.adapter}: {each.dead:,} rejected; events and reasons are in {each.dead_letters}")
        if each.after.hook_failures or each.after.task_failures:
            failures = msgspec.structs.replace(each.after, owed=0, error=None, dead=0)
            screen.note(printable("\n".join(problem_lines(failures, each.journal))))


def _report_errors(errors: "list[EvsysBusError]", screen: Screen) -> int:
    if not errors:
        return 0
    from evsys_bus.cli.output.errors import report

    return report(ExceptionGroup("some events stay pending", errors), screen)
