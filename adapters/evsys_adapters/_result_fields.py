"""Reading results and handles: ours, an older or newer version's, a host's own, a plain dict, or nothing at all."""

from collections.abc import Mapping
from typing import Any, cast

from evsys_bus.codec import to_plain


def field(thing: object, name: str, default: object = None) -> Any:
    """A field of an object or an entry of a mapping; the default where it has none, or where looking it up raises.

    Any: it is whatever the thing holds.
    """
    try:
        if isinstance(thing, Mapping):
            return cast("Mapping[str, Any]", thing).get(name, default)
        return getattr(thing, name, default)
    except Exception:  # a property or a __getattr__ of a host's
        return default


def fields(thing: object) -> dict[str, Any]:
    """Every entry of a mapping or field of an object, in a dict of its own; empty for what has none.

    Any: values of every type, as they are where ``thing`` is a mapping, else as plain data.
    """
    if isinstance(thing, Mapping):
        return dict(cast("Mapping[str, Any]", thing))
    plain, _ = to_plain(vars(thing) if hasattr(thing, "__dict__") else thing)
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {}


def items(thing: object) -> list[Any]:
    """The items of a list, a tuple or a set, in a list of its own; empty for what is none. Any: items of every type."""
    return list(cast("list[Any]", thing)) if isinstance(thing, list | tuple | set | frozenset) else []
