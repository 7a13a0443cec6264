"""Column names and cell values of a CSV file: always one line, and never a formula.

A text that begins with one of ``= + - @`` or a tab runs as a formula when the file is opened in a spreadsheet; it gets
a leading apostrophe, which spreadsheets hide. Numbers are written unchanged.
"""

import functools
from typing import Final, cast

import msgspec

from evsys_adapters._runs import digest
from evsys_bus.codec import to_builtins

STEP_COLUMN: Final = "step"
"""The first column."""
MORE_COLUMN: Final = "more_metrics"
"""The last column, if present: a JSON object of metrics that have no column of their own."""

_MAX_CELL: Final = 8_192
"""Characters per cell; spreadsheets accept 32,767 and Python's csv module 131,072."""
_MAX_COLUMN: Final = 256
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""The last four are the full-width forms, which some spreadsheets treat alike."""
_CONTROLS: Final = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(10, 32), 127)}
"""Control characters that would end the line or confuse a reader, as escapes: a line break becomes ``\\n``."""


def cells_of(metrics: object) -> dict[str, str]:
    """Return the columns and cells of one row of metrics, copied by value; empty if ``metrics`` is not a mapping."""
    plain = cast("dict[object, object]", metrics).copy() if type(metrics) is dict else to_builtins(metrics)[0]
    if not isinstance(plain, dict):
        return {}
    entries = cast("dict[object, object]", plain).items()
    return {_column(name if type(name) is str else _key(name)): _cell(value) for name, value in entries}


def _cell(value: object) -> str:
    """Format a value: ``nan`` and ``inf`` for those floats, empty for None, JSON for lists and mappings."""
    kind: type = type(value)
    if kind is float:
        return repr(value)
    plain = to_builtins(value)[0]  # also catches types that only pretend to be numbers
    if plain is None:
        return ""
    if isinstance(plain, bool | int | float):
        return repr(plain)
    if isinstance(plain, bytes):
        plain = plain.decode(errors="backslashreplace")
    return _text(plain if isinstance(plain, str) else msgspec.json.encode(plain).decode(), _MAX_CELL)


@functools.lru_cache(maxsize=4_096)
def _column(name: str) -> str:
    """Return the column for a metric: long names are cut and get a digest, reserved ones the prefix ``metrics.``."""
    if len(name) > _MAX_COLUMN:
        name = f"{name[:_MAX_COLUMN]}…{digest(name)}"
    return f"metrics.{name}" if name in {"", STEP_COLUMN, MORE_COLUMN} else _text(name, 2 * _MAX_COLUMN)


def _key(name: object) -> str:
    return next(iter(to_builtins({name: None})[0]))


def _text(text: str, limit: int) -> str:
    if text.startswith(_FORMULA) and not _is_number(text):
        text = f"'{text}"
    text = text.translate(_CONTROLS).encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
