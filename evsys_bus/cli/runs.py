"""``evsys-bus runs``: lists the runs below folders, by their journals, with a filter and chosen columns.

A list of many long runs is read at the beginnings and ends of their journals; best values need all events.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import click

from evsys_bus.cli.output.formatting import format_size, pluralize
from evsys_bus.cli.output.run_tables import Column, best_column, run_csv, run_json, run_table
from evsys_bus.cli.output.screen import Screen, color_option, printable, printable_name, terminal_width, wrap
from evsys_bus.cli.records import RUNS
from evsys_bus.codec import json_line
from evsys_bus.disk import OsDisk
from evsys_bus.errors import closest_word
from evsys_bus.filters import Filter, parse_filter
from evsys_bus.journal import layout
from evsys_bus.reading import JOURNAL, JournalLocation, RecordedRun, find_journals, locate_journal, read_journal
from evsys_bus.reading.fields import BEST, RUN_FIELDS, RunFields, differing_keys, main_metrics, metric_names

_WHOLE_BYTES: Final = 128 << 20
"""Journals that are larger together are not read as a whole, unless that is requested."""
_MAX_CONFIG_COLUMNS: Final = 8
_MAX_NAMED: Final = 5
_MAX_KNOWN: Final = 10
_STATES: Final = ("running", "completed", "failed", "cancelled", "killed")

Format = Literal["table", "csv", "json"]


def _parse_filter_option(ctx: click.Context, param: click.Parameter, text: str | None) -> Filter:
    try:
        return parse_filter(text or "")
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _compile_metric(ctx: click.Context, param: click.Parameter, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise click.BadParameter(f"{text!r} is not a regular expression: {error}", ctx, param) from None


@click.command("runs")
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--filter",
    "run_filter",
    metavar="TERMS",
    callback=_parse_filter_option,
    help="Only runs that match all terms: text, /regex/, arm:baseline, state:failed, lr>1e-4, age<2h, -term.",
)
@click.option(
    "--sort", metavar="[-]COLUMN", default="-started", show_default=True, help="Sort; with - the largest first."
)
@click.option("--columns", metavar="A,B", help="Only these columns: fields, config keys, metrics, 'best loss'.")
@click.option("--metric", metavar="REGEX", callback=_compile_metric, help="Show the metrics whose names match.")
@click.option(
    "--best/--no-best",
    default=None,
    help="Show best values, which takes reading all events; by default if the journals have up to 128 MB.",
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Show only the first N.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="json: one object per line, with everything.",
)
@click.option("--json", "output_format", flag_value="json", help="The same as --format json.")
@color_option
@click.pass_obj
def command(  # one for each option
    screen: Screen,
    folders: tuple[Path, ...],
    run_filter: Filter,
    sort: str,
    columns: str | None,
    metric: re.Pattern[str] | None,
    best: bool | None,
    limit: int | None,
    output_format: Format,
) -> None:
    """List the runs in DIR and up to three levels below it; without it, those of ./runs, or of the current folder.

    Newest first: state, arm and seed, age and duration, steps, the config keys that differ, and the last and best
    values of the main metrics: that of the experiment's success and the loss. On a narrow terminal the less important
    columns are left out. A damaged run is listed with its problem.

    A filter matches if all of its terms do: text is searched in names, arms, tags and notes; a name before a sign is a
    field, a config key, or the last value of a metric. Fields: run, state, arm, seed, experiment, tag, steps, age,
    duration, started.

    \b
    Examples:
      evsys-bus runs
      evsys-bus runs runs/sweep --filter 'state:completed lr>1e-4' --sort 'best loss'
      evsys-bus runs --columns run,lr,val/acc --format csv > runs.csv
    """  # noqa: D301 # click reads the backspace as: do not wrap
    if not folders:
        folders = (RUNS if RUNS.is_dir() else Path(),)
    for each in folders:
        if not each.is_dir():
            raise click.UsageError(f"there is no folder {each}{_known_folders(each)}")
    locations = [(each, location) for each in folders for location in _locate(each)]
    names = [each.strip() for each in (columns or "").split(",") if each.strip()]
    size = sum(_journal_size(location) for _, location in locations)
    if best is None:
        best = size <= _WHOLE_BYTES or any(BEST in each for each in (*names, sort, run_filter.text))
    found = [
        RunFields(run, _run_name(run, folder, with_folder=len(folders) > 1))
        for folder, location in locations
        for run in read_journal(location, whole=best)
    ]
    shown = [each for each in found if run_filter.matches(each)]
    shown = _sorted(shown, sort, found)[:limit]
    selected = _named_columns(names, found) if names else _default_columns(shown, metric, with_best=best)
    if output_format == "json":
        click.echo("".join(f"{json_line(run_json(each)).decode()}\n" for each in shown), nl=False)
        return
    if output_format == "csv":
        click.echo(run_csv(shown, selected))
        return
    width = terminal_width(sys.stdout)
    place = ", ".join(map(str, folders))
    click.echo("\n".join(wrap(printable(f"{place}   {_count_text(found, len(shown))}"), width)))
    if shown:
        lines, left_out = run_table(shown, selected, width, lambda text: screen.style_state(text, sys.stdout))
        click.echo("\n".join(["", *lines]))
        if left_out:
            screen.note(f"not shown, for lack of width: {', '.join(left_out)}   all of them: --columns, or a pipe")
    if any(not each.run.is_whole for each in shown) and not names:
        screen.note(f"best values take reading {format_size(size)}: add --best")


def _locate(folder: Path) -> list[JournalLocation]:
    """Return the journals of a folder and below it, or that of the experiment whose run it is."""
    location = locate_journal(folder)
    return [*find_journals(folder)] if location is None or location.run is None else [location]


def _journal_size(location: JournalLocation) -> int:
    disk, directory = OsDisk(), str(location.directory)
    try:
        folders = [f"{directory}/{stream}" for stream in layout.list_streams(disk, directory)]
        return sum(disk.size(f"{folder}/{name}") for folder in folders for name in layout.list_segments(disk, folder))
    except OSError:  # removed meanwhile, or unreadable, which becomes the run's problem
        return 0


def _run_name(run: RecordedRun, folder: Path, *, with_folder: bool) -> str:
    """Return the name of a run in the list: the folder that holds its journal, from this folder on, and its key."""
    own = run.directory.parent if run.directory.name == JOURNAL else run.directory
    try:
        inner = own.relative_to(folder)
    except ValueError:  # on a local disk, because the file system of the runs cannot hold a journal
        inner = Path()
    path = folder / inner if with_folder else inner
    return str(path if path.name == run.id else path / run.id)


def _known_folders(missing: Path) -> str:
    parent = missing.parent if missing.parent.is_dir() else Path()
    names = [str(each) for each in sorted(parent.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    near = closest_word(str(missing), names)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(names[:_MAX_NAMED])}" if names else ""


def _named_columns(names: Sequence[str], runs: Sequence[RunFields]) -> list[Column]:
    for name in names:
        _check_column(name, runs)
    return [Column(name) for name in names]


def _check_column(name: str, runs: Sequence[RunFields]) -> None:
    """Check that a name is a field, or a config key or a metric of some run.

    Raises:
        click.UsageError: It is none.
    """
    if not runs or name in RUN_FIELDS or any(each.field(name) is not None for each in runs):
        return
    metrics = metric_names(runs)
    known = {
        *RUN_FIELDS,
        *metrics,
        *(f"{BEST}{each}" for each in metrics),
        *(key for each in runs for key in each.config),
    }
    if name not in known:
        near = closest_word(name, known)
        hint = (
            f"did you mean {near}?" if near else f"known: {', '.join(map(printable_name, sorted(known)[:_MAX_KNOWN]))}"
        )
        raise click.UsageError(f'no run has a column "{name}"; {hint}')


def _default_columns(runs: Sequence[RunFields], metric: re.Pattern[str] | None, *, with_best: bool) -> list[Column]:
    """Return the columns that these runs have values for, in their order."""
    names = metric_names(runs)
    chosen = main_metrics(runs) if metric is None else [name for name in names if metric.search(name)]
    if metric is not None and not chosen and runs:
        near = closest_word(metric.pattern, names)
        hint = (
            f"did you mean {near}?"
            if near
            else f"known: {', '.join(map(printable_name, names[:_MAX_KNOWN])) or 'none'}"
        )
        raise click.UsageError(f'no run has a metric that matches "{metric.pattern}"; {hint}')
    keys = differing_keys(runs)
    short = Counter(key.rpartition(".")[2] for key in {key for each in runs for key in each.config})
    columns = [Column("run"), Column("state")]
    columns += [
        Column(name, priority=5) for name in ("arm", "seed") if any(each.field(name) is not None for each in runs)
    ]
    columns += [Column("age", priority=9), Column("duration", priority=8), Column("steps", priority=2)]
    for number, key in enumerate(keys[:_MAX_CONFIG_COLUMNS]):
        last = key.rpartition(".")[2]
        columns.append(Column(key, last if short[last] == 1 else key, priority=6 if number > 1 else 3))
    for number, name in enumerate(chosen):
        columns.append(Column(name, priority=min(number, 1)))
        columns += [best_column(name, 4)] if with_best else []
    return columns + [Column(name) for name in ("problems",) if any(each.run.problems for each in runs)]


def _sorted(runs: Sequence[RunFields], sort: str, known: Sequence[RunFields]) -> list[RunFields]:
    """Return the runs by a column: numbers before texts, and those without a value last in both directions."""
    is_descending, name = sort.startswith("-"), sort.removeprefix("-").strip()
    _check_column(name, known)

    def key(fields: RunFields) -> tuple[bool, float, str]:
        value = fields.field(name)
        if isinstance(value, int | float):
            return (False, value, "") if not math.isnan(value) else (True, 0.0, "")
        return True, 0.0, "" if value is None else str(value)

    has_value = [each for each in runs if each.field(name) is not None]
    return [
        *sorted(has_value, key=key, reverse=is_descending),
        *(each for each in runs if each.field(name) is None),
    ]


def _count_text(runs: Sequence[RunFields], shown: int) -> str:
    states = Counter(each.run.state for each in runs)
    parts = [f"{states[state]:,} {state}" for state in _STATES if states[state]]
    text = f"{pluralize(len(runs), 'run')}{': ' if parts else ''}{', '.join(parts)}"
    return text if shown == len(runs) else f"{text}   {shown:,} shown"
