"""Fast path for common values: scalars of Python, numpy and torch, and small lists and dicts of them; and size limits.

Any other value raises `NeedsNormalizing`. The caller then copies it with `evsys_bus.codec.normalize`, which handles
every kind of value and records what it had to replace. A value beyond the limits is cut or replaced, and the envelope
records why.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any, Final

from evsys_bus.codec.redact import redact_key

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""Of an event encoded as msgpack."""
MAX_DEPTH: Final = 32
"""Of nested containers; far below the depth at which any decoder gives up."""
MAX_KEY_CHARS: Final = 4096
"""Of a key of a mapping. A longer key is cut and gets a checksum, so keys stay distinct and the same in every row."""
MAX_TEXT_CHARS: Final = 256 * 1024
"""Of a text or bytes value."""
MAX_REASONS: Final = 100
"""Number of replaced values listed for one event; further ones are only counted."""
MAX_PATH_CHARS: Final = 256
"""Of the path of a replaced value."""
MAX_REPR_CHARS: Final = 200
"""Of the repr that replaces an object."""
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
"""The range of msgpack integers is `INT_MIN` to `INT_MAX`."""


SCALARS: Final = frozenset({float, int, str, bool, NoneType})
"""Exact types without contained objects; encoding their values cannot run foreign code."""
MAX_ITEMS: Final = 1_000
"""Of a container inside a row."""
MAX_KEYS: Final = 10_000
"""Of a row; a larger one is copied by `to_builtins`, which limits its size."""
_MAX_DEPTH: Final = 4
"""Of nested containers; a container that contains itself exceeds it."""


class NeedsNormalizing(Exception):  # noqa: N818 - control flow, not an error
    """The value has to be copied by `to_builtins` before it can be encoded."""


class TooLarge(Exception):  # noqa: N818 - control flow, not an error
    """The value is so large that the size of the whole event has to be limited."""


def scalar_dict(mapping: Any) -> dict[str, Any]:
    """Copy a mapping of text keys to scalars; scalars of numpy and torch become Python numbers.

    Raises:
        NeedsNormalizing, AttributeError: The mapping holds other values, or keys that are too long.
        TypeError, RuntimeError: It is not a mapping, or another thread changed it meanwhile.
        Exception: Raised by the code of a value.
    """
    copied = shallow_copy(mapping)
    if not are_numbers(copied):
        for key, value in copied.items():
            if type(value) not in SCALARS:
                copied[key] = _to_scalar(value)
    return copied if are_known_keys(copied) else with_text_keys(copied)


def shallow_copy(mapping: Any) -> dict[Any, Any]:
    """Return a new dict with the same entries; raises like `scalar_dict`."""
    if len(mapping) > MAX_KEYS:
        raise NeedsNormalizing
    return {**mapping}


def are_numbers(mapping: dict[Any, Any]) -> bool:
    """Whether all values of a private dict are surely floats, ints or bools.

    One call of ``sum`` examines all values: if the sum is exactly a float or an int, every value is such a number.
    """
    try:
        total = sum(mapping.values())
    except TypeError:
        return False
    return type(total) is float or type(total) is int


def copy_small(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """Copy a scalar, or a small list, tuple or dict of scalars.

    Raises:
        NeedsNormalizing: The value is something else, or too large.
        Exception: Raised by the value's own code, or because another thread changed the value meanwhile.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind in SCALARS:
        return value
    if kind is list or kind is tuple:
        return _copy_items(value, depth)
    if kind is not dict:
        return _to_scalar(value)
    if not depth or len(value) > MAX_ITEMS:
        raise NeedsNormalizing
    copied: dict[Any, Any] = {**value}
    if not SCALARS.issuperset(map(type, copied.values())):
        for key, item in copied.items():
            if type(item) not in SCALARS:
                copied[key] = copy_small(item, depth - 1)
    return copied if are_known_keys(copied) else with_text_keys(copied)


def _copy_items(value: Any, depth: int) -> list[Any]:
    if not depth or len(value) > MAX_ITEMS:
        raise NeedsNormalizing
    items = [*value]
    if not SCALARS.issuperset(map(type, items)):
        for index, item in enumerate(items):
            kind = type(item)  # pyright: ignore[reportUnknownVariableType] - untyped
            if kind not in SCALARS:
                to_number = number_converters.get(kind)  # pyright: ignore[reportUnknownArgumentType] - untyped
                items[index] = copy_small(item, depth - 1) if to_number is None else to_number(item)
    return items


# The keys of metrics repeat from step to step, so one call of issuperset usually checks a whole row.
_known_keys: Final[set[str]] = set()
are_known_keys: Final = _known_keys.issuperset
"""Whether all keys are known to be text of limited length; False also for keys `with_text_keys` has not seen yet."""


def with_text_keys(mapping: dict[Any, Any]) -> dict[str, Any]:
    """Return the dict itself if its keys are text of limited length, else a copy with such keys.

    Raises:
        NeedsNormalizing: A key is too long, not a scalar or a credential, or two keys become the same text.
    """
    if not all(type(key) is str for key in mapping):
        if not SCALARS.issuperset(map(type, mapping)):
            raise NeedsNormalizing
        size, mapping = len(mapping), {str(key): value for key, value in mapping.items()}
        if len(mapping) < size:
            raise NeedsNormalizing
    if any(len(key) > MAX_KEY_CHARS or redact_key(key) != key for key in mapping.keys() - _known_keys):
        raise NeedsNormalizing
    if len(_known_keys) > MAX_KEYS:
        _known_keys.clear()
    _known_keys.update(mapping)
    return mapping


def number_converter(kind: type) -> Callable[[Any], Any] | None:
    """Return the conversion from a numpy scalar type to a Python number; None for any other type.

    ``float(x)`` takes a tenth of the time of ``x.item()``.
    """
    converter = number_converters.get(kind)
    if converter is None and kind.__module__ == "numpy":
        converter = _CONVERTERS.get(kind.__name__.rstrip("_0123456789"))
        if converter is not None:
            number_converters[kind] = converter
    return converter


_CONVERTERS: Final[dict[str, Callable[[Any], Any]]] = {"float": float, "int": int, "uint": int, "bool": bool}
number_converters: Final[dict[type, Callable[[Any], Any]]] = {}
"""Cache of `number_converter`."""


def _to_scalar(value: Any) -> Any:
    """Convert a numpy or torch scalar to a Python scalar."""
    converter = number_converter(type(value))  # pyright: ignore[reportUnknownArgumentType] - untyped
    if converter is not None:
        return converter(value)
    scalar = value.item()
    if type(scalar) in SCALARS:
        return scalar
    raise NeedsNormalizing
