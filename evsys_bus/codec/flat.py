"""Fast path for common values: scalars of Python, numpy and torch, and small lists and dicts of them.

Any other value raises `NotFlat`. The caller then copies it with `evsys_bus.codec.plain`, which handles every kind of
value and records what it had to replace.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any, Final

from evsys_bus.codec.bounds import MAX_KEY_CHARS

SCALARS: Final = frozenset({float, int, str, bool, NoneType})
"""Exact types without contained objects; encoding their values cannot run foreign code."""
MOST_ITEMS: Final = 1_000
"""Of a container inside a row."""
MOST_KEYS: Final = 10_000
"""Of a row; a larger one is copied by `to_plain`, which limits its size."""
_DEPTH: Final = 4
"""Of nested containers; a container that contains itself exceeds it."""


class NotFlat(Exception):  # noqa: N818 - control flow, not an error
    """The value has to be copied by `to_plain` before it can be encoded."""


class TooLarge(Exception):  # noqa: N818 - control flow, not an error
    """The value is so large that the size of the whole event has to be limited."""


def flat(mapping: Any) -> dict[str, Any]:
    """Copy a mapping of text keys to scalars; scalars of numpy and torch become Python numbers.

    Raises:
        NotFlat, AttributeError: The mapping holds other values, or keys that are too long.
        TypeError, RuntimeError: It is not a mapping, or another thread changed it meanwhile.
        Exception: Raised by the code of a value.
    """
    own = shallow(mapping)
    if not are_scalars(own):
        for key, value in own.items():
            if type(value) not in SCALARS:
                own[key] = _number(value)
    return own if are_keys(own) else with_text_keys(own)


def shallow(mapping: Any) -> dict[Any, Any]:
    """Return a new dict with the same entries; raises like `flat`."""
    if len(mapping) > MOST_KEYS:
        raise NotFlat
    return {**mapping}


def are_scalars(own: dict[Any, Any]) -> bool:
    """Whether all values of a private dict are surely floats, ints or bools.

    One call of ``sum`` examines all values: if the sum is exactly a float or an int, every value is such a number.
    """
    try:
        total = sum(own.values())
    except TypeError:
        return False
    return type(total) is float or type(total) is int


def small(value: Any, depth: int = _DEPTH) -> Any:
    """Copy a scalar, or a small list, tuple or dict of scalars.

    Raises:
        NotFlat: The value is something else, or too large.
        Exception: Raised by the value's own code, or because another thread changed the value meanwhile.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind in SCALARS:
        return value
    if kind is list or kind is tuple:
        return _items(value, depth)
    if kind is not dict:
        return _number(value)
    if not depth or len(value) > MOST_ITEMS:
        raise NotFlat
    own: dict[Any, Any] = {**value}
    if not SCALARS.issuperset(map(type, own.values())):
        for key, each in own.items():
            if type(each) not in SCALARS:
                own[key] = small(each, depth - 1)
    return own if are_keys(own) else with_text_keys(own)


def _items(value: Any, depth: int) -> list[Any]:
    if not depth or len(value) > MOST_ITEMS:
        raise NotFlat
    items = [*value]
    if not SCALARS.issuperset(map(type, items)):
        for index, each in enumerate(items):
            kind = type(each)  # pyright: ignore[reportUnknownVariableType] - untyped
            if kind not in SCALARS:
                plain = numbers.get(kind)  # pyright: ignore[reportUnknownArgumentType] - untyped
                items[index] = small(each, depth - 1) if plain is None else plain(each)
    return items


# The keys of metrics repeat from step to step, so one call of issuperset usually checks a whole row.
_keys: Final[set[str]] = set()
are_keys: Final = _keys.issuperset
"""Whether all keys are known to be text of limited length; False also for keys `with_text_keys` has not seen yet."""


def with_text_keys(own: dict[Any, Any]) -> dict[str, Any]:
    """Return the dict itself if its keys are text of limited length, else a copy with such keys.

    Raises:
        NotFlat: A key is too long or not a scalar, or two keys become the same text.
    """
    if not all(type(key) is str for key in own):
        if not SCALARS.issuperset(map(type, own)):
            raise NotFlat
        size, own = len(own), {str(key): value for key, value in own.items()}
        if len(own) < size:
            raise NotFlat
    if any(len(key) > MAX_KEY_CHARS for key in own):
        raise NotFlat
    if len(_keys) > MOST_KEYS:
        _keys.clear()
    _keys.update(own)
    return own


def number_of(kind: type) -> Callable[[Any], Any] | None:
    """Return the conversion from a numpy scalar type to a Python number; None for any other type.

    ``float(x)`` takes a tenth of the time of ``x.item()``.
    """
    plain = numbers.get(kind)
    if plain is None and kind.__module__ == "numpy":
        plain = _PLAIN.get(kind.__name__.rstrip("_0123456789"))
        if plain is not None:
            numbers[kind] = plain
    return plain


_PLAIN: Final[dict[str, Callable[[Any], Any]]] = {"float": float, "int": int, "uint": int, "bool": bool}
numbers: Final[dict[type, Callable[[Any], Any]]] = {}
"""Cache of `number_of`."""


def _number(value: Any) -> Any:
    """Convert a numpy or torch scalar to a Python scalar."""
    plain = number_of(type(value))  # pyright: ignore[reportUnknownArgumentType] - untyped
    if plain is not None:
        return plain(value)
    single = value.item()
    if type(single) in SCALARS:
        return single
    raise NotFlat
