"""Conversion of metrics and predictions for loggers: plain values, numbers and texts, bounded tables."""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple, cast

from evsys_adapters.common.hook_arguments import field, fields, list_or_empty
from evsys_bus.codec import to_builtins
from evsys_bus.codec.redact import current_redaction, redact, redact_text
from evsys_bus.context import DetachedLogContext

TRAIN: Final = "train"
EVAL: Final = "eval/"
"""Prefix of the stream names of evals."""
_MAX_CELL: Final = 2_000
_COLUMNS: Final = ("task_id", "instruction", "expected", "output", "reward", "metadata")
"""Preferred order of prediction columns; other columns follow."""


class Table(NamedTuple):
    """A table of predictions, or of a run's content."""

    columns: list[str]
    rows: list[list[Any]]
    total: int
    """Number of rows before the limit."""
    unit: str = "predictions"

    @property
    def caption(self) -> str:
        """How many of the rows are shown."""
        return f"{len(self.rows)} of {self.total} {self.unit}"


def prefixed(stream: str, key: str) -> str:
    """Return the qualified name of a metric: ``train/loss``, ``eval/held out/accuracy``.

    A key that already has the prefix stays as it is; so does a training key with a ``/``, whose prefix the program or a
    framework chose.
    """
    if key.startswith(f"{stream}/") or (stream == TRAIN and "/" in key):
        return key
    return f"{stream}/{key}"


def values_of(metrics: object) -> dict[str, Any]:
    """Convert metrics to plain data."""
    plain, _ = to_builtins(cast("object", metrics) if isinstance(metrics, Mapping) else fields(metrics))
    return redacted(plain) if isinstance(plain, dict) else {}


def redacted(plain: Any) -> Any:
    """Redact built-in data in place as the bus of this process does, and return it."""
    redaction = current_redaction()
    if redaction is not None:
        redact(plain, redaction)
    return plain


def redacted_page(page: str) -> str:
    """Return a page without credentials."""
    return page if current_redaction() is None else redact_text(page)


def redacted_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a row for printing, without credentials in its keys and texts."""
    shown = {
        str(key): to_builtins(cast("object", value))[0] if isinstance(value, Mapping | list | tuple) else value
        for key, value in row.items()
    }
    return redacted(shown)


def split_numbers(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Split plain values into numbers, including NaN and infinities, and everything else as texts."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            numbers[name] = float(value)
        else:
            texts[name] = text_of(value)
    return numbers, texts


def cut_text(text: str, max_chars: int) -> str:
    """Return the text, with an ellipsis at its end if it is longer than allowed."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def text_of(value: object) -> str:
    """Return a string unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json_of(value)


def json_of(value: object) -> str:
    """Encode plain data as JSON, with NaN and infinities as Python and W&B write them."""
    return json.dumps(value, default=str, ensure_ascii=False)


def stable_key(data: bytes) -> int:
    """Return a hash of the data that is the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def config_of(ctx: object) -> dict[str, Any]:
    """Return the configurations of a context with credentials redacted, as they are if they come from a journal."""
    configs = {name: field(ctx, name) for name in ("config", "run_config")}
    plain, _ = to_builtins({name: value for name, value in configs.items() if value is not None})
    if not isinstance(ctx, DetachedLogContext):  # a journal holds what the program's bus redacts and reveals
        redacted(plain)
    return plain


def table_of(predictions: object, cap: int) -> Table:
    """Build a table of the first ``cap`` predictions."""
    given = list_or_empty(predictions)
    shown = [values_of(each) or {"prediction": to_builtins(each)[0]} for each in given[:cap]]
    names: Iterable[str] = dict.fromkeys(name for each in shown for name in each)
    columns = [name for name in _COLUMNS if name in names] + [name for name in names if name not in _COLUMNS]
    return Table(columns, [[each.get(name) for name in columns] for each in shown], len(given))


def markdown(table: Table) -> str:
    """Render the table as Markdown, followed by its caption."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    drawn = "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)
    return f"{drawn}\n\n{table.caption}" if table.columns else table.caption


def _cell(value: object) -> str:
    text = "" if value is None else " ".join(text_of(value).split())
    text = text.replace("\\", "\\\\").replace("|", "\\|")
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"
