"""Recorded runs for people and programs: a table with a row for each run, and a comparison with a column for each."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import msgspec

from evsys_bus.cli.output.formatting import (
    GAP,
    NO_VALUE,
    format_age,
    format_columns,
    format_duration,
    format_number,
    format_short_time,
    format_table,
    format_time,
    pluralize,
    summarize_error,
)
from evsys_bus.cli.output.screen import cell_width, printable, printable_name, wrap
from evsys_bus.codec import to_builtins
from evsys_bus.reading.fields import BEST, RUN_FIELDS, RunFields, differing_keys, is_goal, metric_names

_NARROW_GAP: Final = "  "
_MAX_VALUE_CELLS: Final = 40
"""A longer value of a config, and any longer text of a comparison, is cut."""

StyleState = Callable[[str], str]
"""Colours the state of a run."""


class Column:
    """A column of the table of runs.

    Args:
        name: What `RunFields.field` gets.
        head: What is shown above it.
        priority: Columns of a higher number are left out first where the terminal is narrow; those with 0 never.
    """

    def __init__(self, name: str, head: str | None = None, priority: int = 0) -> None:
        self.name: Final = name
        self.head: Final = printable_name(name if head is None else head)
        self.priority: Final = priority

    def cell(self, fields: RunFields) -> str:
        """Return the value of a run as text for people."""
        return format_field(fields, self.name)


def format_field(fields: RunFields, name: str) -> str:  # noqa: PLR0911 # one for each kind of field
    """Return the value of a field as text for people."""
    value = fields.field(name)
    if value is None or value in ([], ""):
        return NO_VALUE
    match name:
        case "age" if isinstance(value, int | float):
            return format_age(value)
        case "duration" if isinstance(value, int | float):
            return format_duration(value)
        case "started" if isinstance(value, int | float):
            return format_time(value)
        case "error" if isinstance(value, str):
            return summarize_error(value)
        case "problems":
            return "; ".join(map(printable, fields.run.problems))
        case _:
            return format_value(value, is_setting=name not in RUN_FIELDS and fields.config_key(name) is not None)


def format_value(value: object, *, is_setting: bool = False) -> str:
    """Return a value as text on one line; ``is_setting``: with all of its digits, as ``0.0003``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if isinstance(value, bool) else NO_VALUE
    if isinstance(value, int):
        return str(value) if is_setting else f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if is_setting else format_number(value)
    text = value if isinstance(value, str) else _list_text(value)
    text = printable_name(text)
    return _cut(text) if is_setting else text


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CELLS else f"{text[: _MAX_VALUE_CELLS - 3]}..."


def run_table(
    runs: Sequence[RunFields], columns: Sequence[Column], width: int | None, style_state: StyleState
) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and the heads of the columns that were left out because it is too narrow."""
    cells = {column.name: [column.head, *(_cell(column, each, style_state) for each in runs)] for column in columns}
    shown = [*columns]
    left_out: list[str] = []
    while width is not None and _table_width([cells[each.name] for each in shown]) > width:
        last = max(shown, key=lambda column: column.priority)
        if not last.priority:
            break
        shown.remove(last)
        left_out.insert(0, last.head)
    rows = [list(row) for row in zip(*(cells[each.name] for each in shown), strict=True)]
    return format_table(rows, width), left_out


def _cell(column: Column, fields: RunFields, style_state: StyleState) -> str:
    text = column.cell(fields)
    return style_state(text) if column.name == "state" else text


def _table_width(columns: Iterable[Sequence[str]]) -> int:
    widths = [max(map(cell_width, column)) for column in columns]
    return sum(widths) + len(_NARROW_GAP) * (len(widths) - 1)


def run_csv(runs: Sequence[RunFields], columns: Sequence[Column]) -> str:
    """Return the table as CSV, with numbers in full."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([printable_name(column.name) for column in columns])
    for each in runs:
        writer.writerow([_csv_value(each.field(column.name)) for column in columns])
    return target.getvalue().rstrip("\n")


def _csv_value(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    return printable_name(value if isinstance(value, str) else _list_text(value))


def run_json(fields: RunFields) -> dict[str, Any]:
    """Return everything that the list knows of a run, for JSON."""
    run = fields.run
    return {
        "type": "run",
        "run": fields.name,
        "id": run.id,
        "state": run.state,
        "experiment": run.experiment,
        "arm": run.arm,
        "seed": run.seed,
        "group": run.group,
        "tags": run.tags,
        "notes": run.notes,
        "started": None if run.started is None else run.started.isoformat(),
        "ended": None if run.ended is None else run.ended.isoformat(),
        "duration": run.seconds,
        "steps": fields.field("steps"),
        "num_steps": run.num_steps,
        "config": run.config,
        "metrics": {
            name: {"last": run.last(name), "best": run.best(name), "best_step": run.best_step(name)}
            for name in metric_names([fields])
        },
        "checkpoints": len(run.checkpoints),
        "error": run.error,
        "problems": run.problems,
        "folder": str(run.folder),
        "journal": str(run.directory),
    }


def comparison_lines(
    runs: Sequence[RunFields], metrics: Sequence[str], width: int | None, style_state: StyleState
) -> list[str]:
    """Return a comparison: facts, differing config keys and metrics, with a column for each run.

    Numbers of metrics have the difference from the first run beside them.
    """
    names = _unique_names(runs)
    facts = ("state", "error", "experiment", "arm", "seed", "tags", "notes", "started", "duration", "steps", "problems")
    rows = [["run", *names]]
    for name in facts:
        cells = [_cut(format_field(each, name)) for each in runs]
        if name == "started":
            cells = [
                NO_VALUE if each.run.started is None else format_short_time(each.run.started.timestamp())
                for each in runs
            ]
        if any(cell != NO_VALUE for cell in cells):
            rows.append([name, *(map(style_state, cells) if name == "state" else cells)])
    blocks = [rows]
    differing = differing_keys(runs)
    if differing:
        blocks.append(
            [
                ["config", *names],
                *([printable_name(key), *(_config_cell(each, key) for each in runs)] for key in differing),
            ]
        )
    last_rows = [[printable_name(name), *_with_differences([each.run.last(name) for each in runs])] for name in metrics]
    if last_rows:
        blocks.append([["last", *names], *last_rows])
    goals = [name for name in metrics if is_goal(name)]
    best_rows = [[printable_name(name), *_best_cells(runs, name)] for name in goals]
    best_rows = [row for row in best_rows if any(cell != NO_VALUE for cell in row[1:])]
    if best_rows:
        blocks.append([["best, at step", *names], *best_rows])
    lines = _side_by_side(blocks, width)
    same = len({key for each in runs for key in each.config}) - len(differing)
    if same:
        lines += ["", f"{pluralize(same, 'config key')} {'is' if same == 1 else 'are'} the same"]
    return lines


def comparison_json(runs: Sequence[RunFields]) -> dict[str, Any]:
    """Return the differing config keys, with their values in the order of the runs, for JSON."""
    keys = differing_keys(runs)
    config = {key: [to_builtins(each.config.get(key))[0] for each in runs] for key in keys}
    return {"type": "difference", "runs": [each.name for each in runs], "config": config}


def _unique_names(runs: Sequence[RunFields]) -> list[str]:
    """Return the ids of the runs, or their longer names if ids are the same."""
    ids = [each.run.id for each in runs]
    return [printable_name(name) for name in (ids if len({*ids}) == len(ids) else [each.name for each in runs])]


def _config_cell(fields: RunFields, key: str) -> str:
    return format_value(fields.config[key], is_setting=True) if key in fields.config else NO_VALUE


def _with_differences(values: Sequence[float | None]) -> list[str]:
    first = values[0]
    cells: list[str] = []
    for number, value in enumerate(values):
        text = NO_VALUE if value is None else format_number(value)
        if number and value is not None and first is not None and math.isfinite(value - first):
            text += f" ({'+' if value >= first else ''}{format_number(value - first)})"
        cells.append(text)
    return cells


def _best_cells(runs: Sequence[RunFields], name: str) -> list[str]:
    texts = _with_differences([each.run.best(name) for each in runs])
    steps = [each.run.best_step(name) for each in runs]
    return [text if step is None else f"{text} at {step:,}" for text, step in zip(texts, steps, strict=True)]


def _side_by_side(blocks: Sequence[Sequence[Sequence[str]]], width: int | None) -> list[str]:
    """Return the blocks below each other, with the same columns; one fact below the other if they are too wide."""
    rows = [row for block in blocks for row in block]
    for gap in (GAP, _NARROW_GAP):
        lines = format_columns(rows, gap=gap)
        if width is None or all(cell_width(line) <= width for line in lines):
            ends = {sum(map(len, blocks[: number + 1])) for number in range(len(blocks) - 1)}
            return [part for at, line in enumerate(lines) for part in (["", line] if at in ends else [line])]
    stacked: list[str] = []
    for block in blocks:
        (head, *names), *facts = block
        stacked += ["", head] if stacked else [head]
        for name, *cells in facts if head != "run" else [["", *names], *facts]:
            pairs = [[f"  {run}", cell] for run, cell in zip(names, cells, strict=True)]
            stacked += [f" {name}"] if name else []
            stacked += [
                part
                for line in format_columns(pairs if name else [[f"  {run}", ""] for run in names])
                for part in wrap(line, width)
            ]
    return stacked


def _list_text(value: object) -> str:
    """Return texts with commas between them, and anything else as JSON."""
    plain, _ = to_builtins(value)
    items = cast("list[object]", plain) if isinstance(plain, list) else []
    texts = [each for each in items if isinstance(each, str)]
    return (
        ",".join(texts) if isinstance(plain, list) and len(texts) == len(items) else msgspec.json.encode(plain).decode()
    )


def best_column(metric: str, priority: int = 0) -> Column:
    """Return the column of a metric's best value."""
    return Column(f"{BEST}{metric}", priority=priority)
