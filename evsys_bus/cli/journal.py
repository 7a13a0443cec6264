"""``evsys-bus journal``: verifies, repairs and exports a journal."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from evsys_bus.cli.event_options import event_options, no_match_message
from evsys_bus.cli.output.screen import Screen, color_option, json_option
from evsys_bus.location import encode_json

if TYPE_CHECKING:
    from evsys_bus.cli.event_reader import EventReader

_EXIT_DAMAGED: Final = 3
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

    from evsys_bus.cli.journals import find_journal
    from evsys_bus.cli.output.formatting import pluralize
    from evsys_bus.cli.output.screen import printable
    from evsys_bus.cli.verification import stream_lines, summary, verify_with_progress

    directory = find_journal(folder).directory
    report = verify_with_progress(directory, screen)
    if as_json:
        for each in report.streams:
            row = {"type": "stream", **msgspec.to_builtins(each), "whole": each.is_intact}
            click.echo(encode_json(row))
        return 0 if report.is_intact else _EXIT_DAMAGED
    lines = [line for each in report.streams for line in stream_lines(each)]
    head = f"{directory}   {pluralize(len(report.streams), 'stream')}"
    click.echo("\n".join([printable(head), "", *map(printable, lines), "", summary(report)]))
    return 0 if report.is_intact else _EXIT_DAMAGED


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
    from evsys_bus.cli.journals import find_journal
    from evsys_bus.cli.output.formatting import format_columns, format_size, pluralize
    from evsys_bus.cli.output.screen import printable
    from evsys_bus.cli.repair import damaged_streams, repair
    from evsys_bus.cli.verification import verify_with_progress

    directory = find_journal(folder).directory
    report = verify_with_progress(directory, screen)
    done = repair(directory, damaged_streams(report), dry_run=dry_run)
    rows = [
        [
            f"{each.segment.parent.name}/{each.segment.name}",
            f"{pluralize(each.events, 'event')} kept",
            f"{format_size(each.dropped_bytes)} dropped",
            f"original: {each.quarantined.name}",
        ]
        for each in done
    ]
    action = "would be repaired; nothing was changed" if dry_run else "repaired"
    last = f"{pluralize(len(rows), 'segment')} {action}" if rows else "nothing to repair: no segment is damaged"
    click.echo("\n".join([*format_columns(rows), *([""] if rows else []), last]))
    unreadable = [
        f"{each.stream}/{' '.join(why.split())}" for each in report.streams for why in each.unreadable_segments
    ]
    for each in unreadable:
        screen.note(printable(f"not repaired: {each}"))
    return _EXIT_DAMAGED if unreadable else 0


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
    from evsys_bus.cli.event_reader import EventFilter, EventReader
    from evsys_bus.cli.export import export_csv, export_jsonl
    from evsys_bus.cli.journals import find_journal
    from evsys_bus.cli.output.formatting import pluralize
    from evsys_bus.cli.reading_progress import disk_with_progress
    from evsys_bus.cli.run_journal import find_run_key

    journal = find_journal(folder)
    named = types or (("step_end",) if kind == "csv" else ())
    outputs = _output_paths(named, out) if kind == "csv" else {}
    event_filter = EventFilter(types=frozenset(named), run=run_key or find_run_key(journal))
    readers: list[EventReader] = []
    with disk_with_progress(journal.directory, "exporting", screen, times=1 + len(outputs)) as disk:

        def new_reader() -> "EventReader":
            readers.append(EventReader(journal.directory, event_filter, disk))
            return readers[-1]

        counts = export_csv(new_reader, outputs) if outputs else {"event": export_jsonl(new_reader(), out)}
    if not any(counts.values()):
        screen.note(no_match_message(named))
    elif out is not None:
        parts = [f"{pluralize(count, 'event' if name == 'event' else f'{name} row')}" for name, count in counts.items()]
        screen.note(f"{', '.join(parts)} in {out}")
    problems = readers[0].problems()
    if problems:
        screen.note(f"{', '.join(problems)}; see: evsys-bus journal verify {journal.directory}")


def _output_paths(types: tuple[str, ...], out: Path | None) -> dict[str, Path | None]:
    """Return the output file of each type's table."""
    if len(types) == 1:
        return {types[0]: out}
    if out is None:
        raise click.UsageError("several tables do not fit on stdout; give a folder with --out, or one --type")
    if any(each != Path(each).name for each in types):
        raise click.UsageError("a type of event is one word: step_end")
    out.mkdir(parents=True, exist_ok=True)
    return {each: out / f"{each}.csv" for each in types}
