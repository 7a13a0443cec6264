"""``evsys-bus journal``: verifies, repairs and exports a journal."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option
from evsys_bus.cli.selecting import event_options, unmatched
from evsys_bus.where import encode_json

if TYPE_CHECKING:
    from evsys_bus.cli.event_reader import EventReader

_DAMAGED: Final = 3
_run_argument = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))


@click.group("journal")
def command() -> None:
    """Check, repair or export the journal of a run or experiment."""


@command.command("verify", short_help="check every record and sequence")
@_run_argument
@json_option
@color_option
@click.pass_obj
def verify_command(screen: Screen, folder: Path, as_json: bool) -> int:
    """Check the checksum of every record of RUN, and that no sequence is missing.

    Exits with 3 if recorded events are lost. A write that was cut short by a kill is no loss: it was never
    acknowledged. Nothing is changed.
    """
    import msgspec

    from evsys_bus.cli.journals import found
    from evsys_bus.cli.screen import printable
    from evsys_bus.cli.tables import counted
    from evsys_bus.cli.verification import stream_lines, summary, verified

    directory = found(folder).directory
    report = verified(directory, screen)
    if as_json:
        for each in report.streams:
            row = {"type": "stream", **msgspec.to_builtins(each), "whole": each.whole}
            click.echo(encode_json(row))
        return 0 if report.whole else _DAMAGED
    lines = [line for each in report.streams for line in stream_lines(each)]
    head = f"{directory}   {counted(len(report.streams), 'stream')}"
    click.echo("\n".join([printable(head), "", *map(printable, lines), "", summary(report)]))
    return 0 if report.whole else _DAMAGED


@command.command("repair", short_help="quarantine damaged segments, and rewrite them without the damage")
@_run_argument
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@color_option
@click.pass_obj
def repair_command(screen: Screen, folder: Path, dry_run: bool) -> int:
    """Quarantine the damaged segments of RUN, and rewrite them with their intact records only.

    Reading does not need a repair: damage is skipped. Lost events stay lost. Each damaged segment is kept next to the
    new one, with the suffix ".damaged". Do not follow or sync the run at the same time. Exits with 3 if a segment
    cannot be read at all.
    """
    from evsys_bus.cli.amounts import size
    from evsys_bus.cli.journals import found
    from evsys_bus.cli.repair import repair, to_repair
    from evsys_bus.cli.screen import printable
    from evsys_bus.cli.tables import columns, counted
    from evsys_bus.cli.verification import verified

    directory = found(folder).directory
    report = verified(directory, screen)
    done = repair(directory, to_repair(report), dry_run=dry_run)
    rows = [
        [
            f"{each.segment.parent.name}/{each.segment.name}",
            f"{counted(each.events, 'event')} kept",
            f"{size(each.dropped_bytes)} dropped",
            f"original: {each.aside.name}",
        ]
        for each in done
    ]
    would = "would be repaired; nothing was changed" if dry_run else "repaired"
    last = f"{counted(len(rows), 'segment')} {would}" if rows else "nothing to repair: no segment is damaged"
    click.echo("\n".join([*columns(rows), *([""] if rows else []), last]))
    unreadable = [f"{each.stream}/{' '.join(why.split())}" for each in report.streams for why in each.unreadable]
    for each in unreadable:
        screen.note(printable(f"not repaired: {each}"))
    return _DAMAGED if unreadable else 0


@command.command("export", short_help="the events as csv or jsonl")
@_run_argument
@click.option(
    "--format", "kind", type=click.Choice(["csv", "jsonl"]), required=True, help="How the events are written."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Output file; default: stdout. A folder for several tables."
)
@event_options
@color_option
@click.pass_obj
def export_command(
    screen: Screen, folder: Path, kind: str, out: Path | None, types: tuple[str, ...], run_key: str | None
) -> None:
    """Export the events of RUN, merged by time.

    jsonl: one object per event, as in `tail --json`. csv: one table per type of event, step_end if no type is given,
    with a column for each metric or field; the tables of several types are written into the folder --out.
    """
    from evsys_bus.cli.event_reader import EventReader, Wanted
    from evsys_bus.cli.export import export_csv, export_jsonl
    from evsys_bus.cli.journals import found
    from evsys_bus.cli.reading_progress import disk_with_progress
    from evsys_bus.cli.run_journal import run_key_of
    from evsys_bus.cli.tables import counted

    journal = found(folder)
    named = types or (("step_end",) if kind == "csv" else ())
    places = _tables(named, out) if kind == "csv" else {}
    wanted = Wanted(types=frozenset(named), run=run_key or run_key_of(journal))
    readers: list[EventReader] = []
    with disk_with_progress(journal.directory, "exporting", screen, times=1 + len(places)) as disk:

        def new_reader() -> "EventReader":
            readers.append(EventReader(journal.directory, wanted, disk))
            return readers[-1]

        counts = export_csv(new_reader, places) if places else {"event": export_jsonl(new_reader(), out)}
    if not any(counts.values()):
        screen.note(unmatched(named))
    elif out is not None:
        told = [f"{counted(count, 'event' if name == 'event' else f'{name} row')}" for name, count in counts.items()]
        screen.note(f"{', '.join(told)} in {out}")
    troubles = readers[0].troubles()
    if troubles:
        screen.note(f"{', '.join(troubles)}; see: evsys-bus journal verify {journal.directory}")


def _tables(types: tuple[str, ...], out: Path | None) -> dict[str, Path | None]:
    """Return the output file of each type's table."""
    if len(types) == 1:
        return {types[0]: out}
    if out is None:
        raise click.UsageError("several tables do not fit on stdout; give a folder with --out, or one --type")
    if any(each != Path(each).name for each in types):
        raise click.UsageError("a type of event is one word: step_end")
    out.mkdir(parents=True, exist_ok=True)
    return {each: out / f"{each}.csv" for each in types}
