"""Export of a journal's events as JSON Lines and CSV."""

import csv
import io
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import msgspec

from evsys_bus.cli.event_facts import metrics_of, step_of, type_of
from evsys_bus.cli.event_reader import EventReader
from evsys_bus.codec import to_json
from evsys_bus.events import Envelope, Eval, StepEnd
from evsys_bus.files import write_into_place

_COMMON_COLUMNS: Final = ("time", "stream", "seq", "run", "rank")
_TYPE_COLUMNS: Final = {"step_end": ("step",), "eval": ("step", "eval")}
_FORMULA_PREFIXES: Final = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Prefixes that spreadsheets treat as a formula; the last four are full-width forms."""


@contextmanager
def open_output(path: Path | None) -> Generator[BinaryIO]:
    """Open stdout, or a file that appears under its name only when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        return
    with write_into_place(path, make_folder=False) as file:
        yield file


def export_jsonl(reader: EventReader, out: Path | None) -> int:
    """Write one JSON object per event, and return the number of events."""
    count = 0
    with open_output(out) as file:
        for envelope in reader.poll():
            file.write(to_json(envelope) + b"\n")
            count += 1
    return count


def export_csv(new_reader: Callable[[], EventReader], outputs: dict[str, Path | None]) -> dict[str, int]:
    """Write a table per event type, with a column for each metric or field, and return the number of rows of each.

    The journal is read twice: for the columns, and for the rows. Events appended in between are left out.

    Args:
        new_reader: Returns a reader at the beginning.
        outputs: The output file of each type; types that do not occur get a table without rows.
    """
    reader = new_reader()
    tables: dict[str, dict[str, None]] = {
        kind: dict.fromkeys((*_COMMON_COLUMNS, *_TYPE_COLUMNS.get(kind, ()))) for kind in outputs
    }
    for envelope in reader.poll():
        columns = tables.get(type_of(envelope.event))
        if columns is not None:
            columns.update(dict.fromkeys(_cells(envelope)))
    last_sequences = reader.last_sequences()
    counts = dict.fromkeys(outputs, 0)
    for kind, out in outputs.items():
        rows = (
            _cells(envelope)
            for envelope in new_reader().poll()
            if type_of(envelope.event) == kind and envelope.seq <= last_sequences.get(envelope.stream, 0)
        )
        with open_output(out) as file:
            counts[kind] = _write_table(file, list(tables[kind]), rows)
    return counts


def _write_table(file: BinaryIO, columns: list[str], rows: Iterable[dict[str, Any]]) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=False)
    try:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_escape_text, columns))
        count = 0
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])
            count += 1
        text.flush()
        return count
    finally:
        text.detach()  # the caller closes the file


def _cells(envelope: Envelope) -> dict[str, Any]:
    """Return a row as a dict by column."""
    event = envelope.event
    row: dict[str, Any] = {
        "time": envelope.time,
        "stream": envelope.stream,
        "seq": envelope.seq,
        "run": envelope.run,
        "rank": envelope.rank,
    }
    if isinstance(event, StepEnd):
        row["step"] = step_of(event)
        fields = metrics_of(event)
    elif isinstance(event, Eval):
        row["step"] = step_of(event)
        row["eval"] = event.eval_name
        fields = _entries(event.metrics)
    else:
        fields = _flatten_event(envelope)
    for name, value in fields.items():
        row[f"metrics.{name}" if name in row else name] = value
    return row


def _flatten_event(envelope: Envelope) -> dict[str, Any]:
    """Return the fields of any event, nested ones under dotted names."""
    row = msgspec.json.decode(to_json(envelope))
    leaves: dict[str, Any] = {}
    _collect_leaves(row["event"], "", leaves)
    leaves.pop("type", None)
    return leaves | row.get("nonfinite", {})


def _collect_leaves(value: object, path: str, leaves: dict[str, Any]) -> None:
    entries = _entries(value)
    if not isinstance(value, dict):
        leaves[path] = value
    for name, each in entries.items():
        _collect_leaves(each, f"{path}.{name}" if path else name, leaves)


def _entries(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _cell(value: object) -> object:
    """Return numbers unchanged, and anything else as text, lists as JSON."""
    if value is None or type(value) in {int, float}:
        return value
    return _escape_text(value if isinstance(value, str) else msgspec.json.encode(value).decode())


def _escape_text(text: str) -> str:
    """Escape formulas and line breaks."""
    text = text.replace("\r", "\\r").replace("\n", "\\n").replace("\x00", "\\x00")
    return f"'{text}" if text.startswith(_FORMULA_PREFIXES) else text
