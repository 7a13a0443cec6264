"""``evsys-bus sync``: delivers what is pending."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.delivery_progress import deliveries_shown, progress_option, timeout_option
from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option, printable

if TYPE_CHECKING:
    from evsys_bus.cli.deliveries import Outcome
    from evsys_bus.cli.progress import ProgressMode
    from evsys_bus.cli.syncing import Work
    from evsys_bus.errors import EvsysBusError


@click.command("sync")
@click.argument("folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Only to this one; repeatable.")
@click.option("--all", "everywhere", is_flag=True, help="Every journal below ./runs.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
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
    """Deliver what is pending in the journal of RUN; without it, in the newest one below ./runs that has anything.

    Exits with 4 where something stays pending because a destination refuses or is away, with 3 where another process
    delivers already.
    """
    from evsys_bus.cli.deliveries import outcome_json, outcome_lines, trouble_of
    from evsys_bus.cli.syncing import deliver, work_in
    from evsys_bus.cli.telling import INTERRUPTED

    if everywhere and folder is not None:
        raise click.UsageError("--all means every journal below ./runs; leave RUN or --all out")
    works = [work_in(each, adapters) for each in _journals(folder, adapters, everywhere=everywhere)]
    outcomes: list[Outcome] = []
    errors: list[EvsysBusError] = [error for work in works for error in work.busy]
    for work in works:
        if folder is None and not as_json:
            screen.note(str(work.directory))
        errors += _homeless(work)
        _say_moved(work, screen)
        if dry_run:
            click.echo("\n".join(_planned(work, as_json=as_json)), nl=bool(work.posted))
            continue
        with deliveries_shown(progress, screen) as tell:
            done, interrupted = deliver(work, timeout_seconds, tell)
        if done:
            click.echo("\n".join(outcome_json(done) if as_json else map(printable, outcome_lines(done))))
        outcomes += done
        if interrupted:
            screen.note("interrupted; the rest stays pending, and goes out with the same command")
            return INTERRUPTED
    for each in outcomes:
        if each.dead:
            screen.note(
                f"{each.adapter}: {each.dead:,} refused for good; they are, with the reason, in {each.dead_letters}"
            )
    errors += [error for each in outcomes if (error := trouble_of(each)) is not None]
    if not works or not (outcomes or errors or dry_run):
        screen.note("nothing is pending")
    return _told(errors, screen)


def _journals(folder: Path | None, adapters: tuple[str, ...], *, everywhere: bool) -> list[Path]:
    from evsys_bus.cli.journals import found, newest_first
    from evsys_bus.cli.syncing import pending_in
    from evsys_bus.errors import did_you_mean

    if folder is not None:
        from evsys_bus.delivery.accounts import accounts

        directory = found(folder).directory
        known = [each.name for each in accounts(directory)]
        for name in adapters:
            if name not in known:
                raise click.UsageError(
                    f"{directory} has no adapter {name}; {did_you_mean(name, known) or 'it has none'}"
                )
        return [directory]
    pending = (each for each in newest_first() if pending_in(each, adapters))
    return list(pending) if everywhere else [each for each in [next(pending, None)] if each is not None]


def _planned(work: "Work", *, as_json: bool) -> list[str]:
    import msgspec

    from evsys_bus.cli.tables import columns, counted

    rows = [(each, account.pending) for each, account in work.posted if each.recipe is not None]
    if as_json:
        return [
            msgspec.json.encode(
                {"type": "pending", "journal": str(work.directory), "adapter": each.name, "pending": pending}
            ).decode()
            for each, pending in rows
        ]
    return columns([[printable(each.name), f"{counted(pending, 'event')} to send"] for each, pending in rows])


def _homeless(work: "Work") -> "list[EvsysBusError]":
    from evsys_bus.cli.deliveries import unbuildable
    from evsys_bus.cli.tables import counted

    why = "it was given as a live object, or cannot be imported elsewhere: no recipe for it is beside the journal"
    fix = "resume that program; or push the run through an adapter of a kind: evsys-bus replay RUN --to KIND"
    return [
        unbuildable(
            f"{counted(each.pending, 'event')} for {each.name} can be delivered by its own program only",
            why,
            fix,
        )
        for each in work.homeless
    ]


def _say_moved(work: "Work", screen: Screen) -> None:
    for each, _ in work.posted:
        if each.folder and not Path(each.folder).is_dir():
            screen.note(
                f"{each.name} was followed from {each.folder}, which is gone: relative paths are meant from here"
            )


def _told(errors: "list[EvsysBusError]", screen: Screen) -> int:
    if not errors:
        return 0
    from evsys_bus.cli.telling import tell

    return tell(ExceptionGroup("some of it stays pending", errors), screen)
