"""The plain case, recognised fast: a dict of scalars under text keys, as a row of metrics nearly always is."""

from types import NoneType
from typing import Any, Final

from evsys_bus.codec.bounds import MAX_KEY_CHARS, MAX_TEXT_CHARS

SCALARS: Final = frozenset({float, int, str, bool, NoneType})
"""The exact types that hold nothing else, so that encoding them can run no code."""


class NotFlat(Exception):  # noqa: N818 - no failure: the word for "this one needs the thorough way"
    """A value that may only be encoded after `to_plain` has copied it."""


def flat(mapping: Any) -> dict[str, Any]:
    """A copy of a mapping that holds scalars under text keys; scalars of numpy and torch are made plain.

    Any: what it is, and what it holds, is found out here.

    Raises:
        NotFlat, AttributeError: It holds something else.
        TypeError, RuntimeError: It is no mapping, or another thread changed it meanwhile.
        Exception: What the values' own code raises.
    """
    own: dict[Any, Any] = {**mapping}
    for key, value in own.items():
        if type(value) is float and type(key) is str:
            continue
        if type(key) is not str:
            raise NotFlat
        if type(value) not in SCALARS:
            own[key] = _number(value)
    return own


def _number(value: Any) -> Any:
    """The scalar in a scalar of numpy or torch. Any: known by having an ``item``."""
    if issubclass(type(value), float):
        return float.__float__(value)
    single = value.item()
    if type(single) in SCALARS:
        return single
    raise NotFlat


def fits(size: int, *flats: dict[str, Any]) -> bool:
    """Whether flat dicts that were encoded in ``size`` bytes, and texts beside them, keep the bounds. Any: scalars."""
    return size <= MAX_KEY_CHARS or (
        size <= MAX_TEXT_CHARS and all(max(map(len, own), default=0) <= MAX_KEY_CHARS for own in flats)
    )
