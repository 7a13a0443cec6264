"""Values of events whose types are not trusted: steps, finite numbers, the numbers and the texts of a row."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeGuard, cast

import msgspec

from evsys_adapters.common.hook_arguments import fields
from evsys_adapters.common.logged_values import text_of
from evsys_bus.location import encode_json

_MAX_STEPS: Final = 1 << 62
MAX_NAME_CHARS: Final = 640
"""A longer name of a metric, an arm or a run is cut: it is in the rows of every page,
and an index of PostgreSQL holds about 2,700 bytes."""

UNREADABLE: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that values of unexpected types lead to."""


_MAX_DEPTH: Final = 100
_MAX_CHARS: Final = 16 << 20


def json_text(value: object) -> str:
    """Encode as JSON what came from another program: keys of other types become texts, and invalid Unicode a mark."""
    try:
        return encode_json(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return msgspec.json.encode(clean(value)).decode()


def json_fields(obj: object) -> dict[str, Any]:
    """Return the entries of a mapping or the fields of an object, as plain data that JSON can represent."""
    found = fields(obj)
    try:
        msgspec.json.encode(found)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return clean(found)
    return found


def clean(value: Any, depth: int = 0) -> Any:
    """Return a value as plain data that JSON can represent."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < _MAX_STEPS else float(value)
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name, None) for name in value.__struct_fields__}
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        return {clean(str(key)): clean(each, depth + 1) for key, each in pairs}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple):
        return [clean(each, depth + 1) for each in cast("list[object]", value)]
    return str(value)[:_MAX_CHARS].encode(errors="replace").decode()


def is_step(value: object) -> TypeGuard[int]:
    """Return whether a value can be a step."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_STEPS


def finite(value: float) -> float | None:
    """Return a number that JSON can represent, else None."""
    return float(value) if abs(value) < float("inf") else None


def numbers_below(prefix: str, metrics: object) -> dict[str, float]:
    """Return the numbers of a row by name, below a prefix."""
    numbers: dict[str, float] = {}
    add_value(prefix, fields(metrics), numbers, {})
    return numbers


def add_value(name: str, value: object, numbers: dict[str, float], texts: dict[str, str]) -> None:
    """Add a value to the numbers or to the texts; those inside a mapping by names like ``outer/inner``."""
    name = name[:MAX_NAME_CHARS]
    if isinstance(value, int | float):
        try:
            numbers[name] = float(value)
        except OverflowError:
            numbers[name] = float("inf") if value > 0 else float("-inf")
    elif isinstance(value, dict):
        for key, each in cast("dict[object, object]", value).items():
            add_value(f"{name}/{key}", each, numbers, texts)
    elif value is not None:
        texts[name] = text_of(value)


def add_names(names: list[str], more: Iterable[str]) -> None:
    """Add the names that a list does not have."""
    names += [each for each in more if each not in names]


def merge_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with changes; nested mappings are merged."""
    merged = dict(config)
    for name, value in changes.items():
        before = merged.get(name)
        is_nested = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = merge_config(cast("dict[str, Any]", before), cast("Any", value)) if is_nested else value
    return merged
