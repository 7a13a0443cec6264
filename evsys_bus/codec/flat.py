"""The plain case, recognised fast: a dict of scalars under text keys, as a row of metrics nearly always is."""

from types import NoneType
from typing import Any, Final

from evsys_bus.codec.bounds import MAX_KEY_CHARS

SCALARS: Final = frozenset({float, int, str, bool, NoneType})
"""The exact types that hold nothing else, so that encoding them can run no code."""


class NotFlat(Exception):  # noqa: N818 - no failure: the word for "this one needs the thorough way"
    """A value that may only be encoded after `to_plain` has copied it."""


def flat(mapping: Any) -> dict[str, Any]:
    """A copy of a mapping that holds scalars under text keys of bounded length; numpy's and torch's are made plain.

    Any: what it is, and what it holds, is found out here.

    Raises:
        NotFlat, AttributeError: It holds something else.
        TypeError, RuntimeError: It is no mapping, or another thread changed it meanwhile.
        Exception: What the values' own code raises.
    """
    own: dict[Any, Any] = {**mapping}
    try:
        # One call looks at all values: where every one is a float, an int or a bool, their sum is a float or an int,
        # and nothing that holds something else can be among them.
        total = sum(own.values())
    except TypeError:
        total = None
    if type(total) is not float and type(total) is not int:
        for key, value in own.items():
            if type(value) not in SCALARS:
                own[key] = _number(value)
    if not are_keys(own):
        _learn(own)
    return own


# The keys of metrics are the same step after step: a set that knows them looks at all of a row in one call.
_keys: Final[set[str]] = set()
are_keys: Final = _keys.issuperset
_MOST_KEYS: Final = 10_000


def _learn(own: dict[Any, Any]) -> None:
    if not all(type(key) is str and len(key) <= MAX_KEY_CHARS for key in own):
        raise NotFlat
    if len(_keys) > _MOST_KEYS:
        _keys.clear()
    _keys.update(own)


def _number(value: Any) -> Any:
    """The scalar in a scalar of numpy or torch. Any: known by having an ``item``."""
    if issubclass(type(value), float):
        return float.__float__(value)
    single = value.item()
    if type(single) in SCALARS:
        return single
    raise NotFlat
