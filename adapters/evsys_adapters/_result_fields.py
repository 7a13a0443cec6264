"""Tolerant access to results and handles: ours, those of other versions, a host's own objects, plain dicts, or None."""

from collections.abc import Mapping
from typing import Any, cast

from evsys_bus.codec import to_builtins


def field(obj: object, name: str, default: object = None) -> Any:
    """Return an attribute of an object or an entry of a mapping; the default if it is missing or reading it raises."""
    try:
        if isinstance(obj, Mapping):
            return cast("Mapping[str, Any]", obj).get(name, default)
        return getattr(obj, name, default)
    except Exception:  # a property or __getattr__ of the host
        return default


def fields(obj: object) -> dict[str, Any]:
    """Return all entries of a mapping or fields of an object as a new dict; empty if it has none."""
    if isinstance(obj, Mapping):
        return dict(cast("Mapping[str, Any]", obj))
    plain, _ = to_builtins(vars(obj) if hasattr(obj, "__dict__") else obj)
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {}


def items(obj: object) -> list[Any]:
    """Return the items of a list, a tuple or a set as a new list; empty for anything else."""
    return list(cast("list[Any]", obj)) if isinstance(obj, list | tuple | set | frozenset) else []
