"""Custom fields of a state: those that a subclass of `LoopState` or a host's own class adds.

Custom fields are the fields that the class declares and the attributes of the instance. Scalars and small built-in
containers are encoded. Live objects, large values, credentials and configurations (by their names) are not.
"""

import functools
from collections.abc import Iterable
from enum import Enum
from keyword import iskeyword
from pathlib import PurePath
from typing import Any, Final, cast

from evsys_bus.codec.bounds import INT_MAX, INT_MIN
from evsys_bus.codec.flat import SCALARS, number_of, small
from evsys_bus.codec.redaction import CONFIGS, has_config, looks_secret
from evsys_bus.context import LoopState

_OURS: Final = frozenset(LoopState.__dataclass_fields__)
_TRAVEL: Final = frozenset({"step", "num_steps", "output_dir", "stop_requested", "stop_reason", "error", "ctx"})
_MOST_OWN_FIELDS: Final = 100
_MOST_OWN_CHARS: Final = 4096
_MOST_OWN_ITEMS: Final = 64
_OWN_DEPTH: Final = 2
CONTAINERS: Final = frozenset({list, tuple, dict, set, frozenset})


class _Absent:
    """Type of the sentinel `ABSENT`, which marks a missing attribute."""


ABSENT: Final = _Absent()


def add_own(parts: dict[str, Any], state: object) -> None:
    """Add the custom fields of a state to ``parts``, and the names of those that are not encoded."""
    of = cast("dict[str, Any]", state) if issubclass(type(state), dict) else None
    own: dict[str, Any] = {}
    live: list[str] = []
    for name in own_names(state):
        try:
            value = getattr(state, name, ABSENT) if of is None else of[name]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # raised by the state's own code
            value = ABSENT
        kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is float or kind is bool or value is None:
            own[name] = value
        elif value is not ABSENT:
            part = own_part(value, name)
            if part is ABSENT:
                live.append(name)
            else:
                own[name] = part
    if live:
        parts["live"] = live
    if own:
        parts["own"] = own


def own_names(state: object) -> tuple[str, ...]:
    """Return the names of a state's custom fields; private names are left out."""
    kind = type(state)
    try:
        instance: Any = state if issubclass(kind, dict) else getattr(state, "__dict__", None)
    except Exception:  # raised by the state's own code
        instance = None
    return _public(kind, tuple(cast("dict[Any, Any]", instance)) if isinstance(instance, dict) else ())  # pyright: ignore[reportUnknownArgumentType] - untyped


@functools.lru_cache(maxsize=1024)
def _public(kind: type, names: tuple[Any, ...]) -> tuple[str, ...]:
    barred = _OURS if issubclass(kind, LoopState) else _TRAVEL
    found = dict.fromkeys((*_declared(kind), *names))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return tuple(name for name in found if _is_public(name) and name not in barred)[:_MOST_OWN_FIELDS]


def own_part(value: Any, name: str) -> Any:
    """Copy the value of a custom field if it is a scalar or a small built-in container.

    Returns:
        `ABSENT` for a value that is not encoded: a live object, a large value, or by its name a credential or a
        configuration.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind is int:
        return value if INT_MIN <= value <= INT_MAX else ABSENT
    if kind is str:
        return value if len(value) <= _MOST_OWN_CHARS and not _is_secret(name) else ABSENT
    if kind in CONTAINERS:
        return ABSENT if len(value) > _MOST_OWN_ITEMS or name in CONFIGS else _own_container(value)
    number = number_of(kind)  # not tensors: fetching one may block on a device  # pyright: ignore[reportUnknownArgumentType] - untyped
    if number is not None:
        value = number(value)
    elif issubclass(kind, PurePath):
        value = str(value)
    elif issubclass(kind, Enum):
        value = value.value
    travels = type(value) in SCALARS and _is_small(value) and not (type(value) is str and _is_secret(name))
    return value if travels else ABSENT


def _own_container(value: Any) -> Any:
    try:
        plain = small(list(value) if type(value) in {set, frozenset} else value, _OWN_DEPTH)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it holds a live object, or another thread changed it
        return ABSENT
    return plain if _is_small(plain) and not has_config(plain) else ABSENT


_is_secret: Final = functools.lru_cache(maxsize=1024)(looks_secret)


@functools.lru_cache(maxsize=256)
def _declared(kind: Any) -> tuple[str, ...]:
    """Return the fields that a class declares: as a dataclass, attrs, msgspec or pydantic class, or in its slots."""
    names: list[Any] = [*_strings(getattr(kind, "__dataclass_fields__", ()))]
    names += [getattr(each, "name", None) for each in _strings(getattr(kind, "__attrs_attrs__", ()))]
    for place in ("__struct_fields__", "model_fields", "_fields"):
        names += _strings(getattr(kind, place, ()))
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - untyped
        names += [slots] if isinstance(slots, str) else _strings(slots)
    return tuple(dict.fromkeys(name for name in names if type(name) is str))


def _strings(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Iterable) else []  # pyright: ignore[reportUnknownArgumentType] - untyped


def _is_public(name: Any) -> bool:
    return type(name) is str and name.isidentifier() and not name.startswith("_") and not iskeyword(name)


def _is_small(plain: Any) -> bool:
    """Whether built-in data holds only small texts and containers, and no key that names a credential."""
    if type(plain) is int:
        return INT_MIN <= plain <= INT_MAX
    if type(plain) is not dict and type(plain) is not list:
        return type(plain) is not str or len(plain) <= _MOST_OWN_CHARS
    entries = cast("dict[Any, Any]", plain) if type(plain) is dict else dict(enumerate(cast("list[Any]", plain)))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return len(entries) <= _MOST_OWN_ITEMS and all(
        _is_small(value) and not (type(value) is str and type(key) is str and _is_secret(key))
        for key, value in entries.items()
    )
