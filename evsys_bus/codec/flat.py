"""The usual values, copied fast: scalars of Python, numpy and torch, and small lists and dicts of them.

What is not usual raises `NotFlat` here, and is copied by `evsys_bus.codec.plain`, which knows every kind of value and
says what it had to replace.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any, Final

from evsys_bus.codec.bounds import MAX_KEY_CHARS

SCALARS: Final = frozenset({float, int, str, bool, NoneType})
"""The exact types that hold nothing else, so that encoding them can run no code."""
MOST_ITEMS: Final = 1_000
"""Of a container inside a row."""
MOST_KEYS: Final = 10_000
"""Of a row: more are copied with an eye on the room that they take."""
_DEPTH: Final = 4
"""Containers inside containers; what contains itself is deeper."""


class NotFlat(Exception):  # noqa: N818 - no failure: the word for "this one needs the thorough way"
    """A value that may only be encoded after `to_plain` has copied it."""


class TooLarge(Exception):  # noqa: N818 - no failure: the word for "this one needs bounds for the whole event"
    """A value that takes a good part of an event's room."""


def flat(mapping: Any) -> dict[str, Any]:
    """A copy of a mapping that holds scalars under text keys of bounded length; numpy's and torch's are made plain.

    Any: what it is, and what it holds, is found out here.

    Raises:
        NotFlat, AttributeError: It holds something else.
        TypeError, RuntimeError: It is no mapping, or another thread changed it meanwhile.
        Exception: What the values' own code raises.
    """
    own = shallow(mapping)
    if not are_scalars(own):
        for key, value in own.items():
            if type(value) not in SCALARS:
                own[key] = _number(value)
    return own if are_keys(own) else with_text_keys(own)


def shallow(mapping: Any) -> dict[Any, Any]:
    """A dict of the same entries, which nobody else holds. Raises as `flat`. Any: that is found out."""
    if len(mapping) > MOST_KEYS:
        raise NotFlat
    return {**mapping}


def are_scalars(own: dict[Any, Any]) -> bool:
    """Whether a dict that nobody else holds has only floats, ints and bools as values; False where that is unclear.

    One call looks at all values: where every one is such a number, their sum is a float or an int, and nothing that
    holds something else can be among them.
    """
    try:
        total = sum(own.values())
    except TypeError:
        return False
    return type(total) is float or type(total) is int


def small(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of a scalar, or of a small list, tuple or dict of such. Any: what it is, is found out here.

    Raises:
        NotFlat: It is something else, or larger.
        Exception: What the value's own code raises, or what comes of a thread that changes it meanwhile.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
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
            kind = type(each)  # pyright: ignore[reportUnknownVariableType] - as found
            if kind not in SCALARS:
                plain = numbers.get(kind)  # pyright: ignore[reportUnknownArgumentType] - as found
                items[index] = small(each, depth - 1) if plain is None else plain(each)
    return items


# The keys of metrics are the same step after step: a set that knows them looks at all of a row in one call.
_keys: Final[set[str]] = set()
are_keys: Final = _keys.issuperset
"""Whether all of them are texts of bounded length; False also for those that `with_text_keys` has not seen."""


def with_text_keys(own: dict[Any, Any]) -> dict[str, Any]:
    """The dict itself where its keys are texts of bounded length, or a copy of it with such keys.

    Raises:
        NotFlat: There is more to be done, as where two keys become the same text.
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
    """What makes a plain number of one of numpy's, which hold nothing else; None for any other type.

    ``float(x)`` takes a tenth of the time of ``x.item()``. Any: a number of that type.
    """
    plain = numbers.get(kind)
    if plain is None and kind.__module__ == "numpy":
        plain = _PLAIN.get(kind.__name__.rstrip("_0123456789"))
        if plain is not None:
            numbers[kind] = plain
    return plain


_PLAIN: Final[dict[str, Callable[[Any], Any]]] = {"float": float, "int": int, "uint": int, "bool": bool}
numbers: Final[dict[type, Callable[[Any], Any]]] = {}
"""Those that `number_of` has found."""


def _number(value: Any) -> Any:
    """The scalar in a scalar of numpy or torch. Any: known by having an ``item``."""
    plain = number_of(type(value))  # pyright: ignore[reportUnknownArgumentType] - as found
    if plain is not None:
        return plain(value)
    single = value.item()
    if type(single) in SCALARS:
        return single
    raise NotFlat
