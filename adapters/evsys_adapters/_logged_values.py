"""What loggers make of metrics and predictions: plain values, numbers apart from texts, bounded tables."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, cast

from evsys_adapters._result_fields import field, fields, items
from evsys_bus.codec import to_plain
from evsys_bus.codec.redaction import redact_configs

TRAIN: Final = "train"
EVAL: Final = "eval/"
"""What the names of streams of evals begin with."""
_MAX_CELL: Final = 2_000
_COLUMNS: Final = ("task_id", "instruction", "expected", "output", "reward", "metadata")
"""Of predictions, in this order; others behind them."""


class Table(NamedTuple):
    """Predictions as they are shown."""

    columns: list[str]
    rows: list[list[Any]]
    """Any: plain values of every type."""
    total: int
    """How many there were, before the cap."""

    @property
    def caption(self) -> str:
        """How many of them are shown."""
        return f"{len(self.rows)} of {self.total} predictions"


def prefixed(stream: str, key: str) -> str:
    """The name of a metric among those of all streams: ``train/loss``, ``eval/held out/accuracy``.

    A key that begins so already stays as it is; so does one of the training that has a ``/``, which is the prefix that
    its program, or a framework, chose.
    """
    if key.startswith(f"{stream}/") or (stream == TRAIN and "/" in key):
        return key
    return f"{stream}/{key}"


def values_of(metrics: object) -> dict[str, Any]:
    """Metrics as plain data. Any: values of every type."""
    plain, _ = to_plain(cast("object", metrics) if isinstance(metrics, Mapping) else fields(metrics))
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {}


def split(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers among plain values (hence Any), NaN and infinities too, and the others as texts."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            numbers[name] = float(value)
        else:
            texts[name] = text_of(value)
    return numbers, texts


def text_of(value: object) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json_of(value)


def json_of(value: object) -> str:
    """Plain data as JSON, with NaN and infinities as Python and W&B write them."""
    return json.dumps(value, default=str, ensure_ascii=False)


def config_of(ctx: object) -> dict[str, Any]:
    """The configurations of a context, without what looks like a credential. Any: plain data."""
    given = {name: field(ctx, name) for name in ("config", "run_config")}
    plain, _ = to_plain({name: value for name, value in given.items() if value is not None})
    redact_configs(plain)
    return plain


def table_of(predictions: object, cap: int) -> Table:
    """The first predictions, as many as the cap allows."""
    given = items(predictions)
    shown = [values_of(each) or {"prediction": to_plain(each)[0]} for each in given[:cap]]
    names: Iterable[str] = dict.fromkeys(name for each in shown for name in each)
    columns = [name for name in _COLUMNS if name in names] + [name for name in names if name not in _COLUMNS]
    return Table(columns, [[each.get(name) for name in columns] for each in shown], len(given))


def markdown(table: Table) -> str:
    """The table, with what it leaves out stated below."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    drawn = "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)
    return f"{drawn}\n\n{table.caption}" if table.columns else table.caption


def _cell(value: object) -> str:
    text = "" if value is None else " ".join(text_of(value).split())
    text = text.replace("\\", "\\\\").replace("|", "\\|")
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"
