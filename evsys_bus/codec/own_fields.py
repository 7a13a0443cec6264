"""The own fields of a state: what a subclass of `LoopState`, or a host's own class, has besides what is ours.

They are the fields that a class declares, and the attributes of the instance. Scalars and small plain data travel;
live objects do not, nor what is large, or by its name a credential or a configuration.
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
    """Stands for an attribute that is not there."""


ABSENT: Final = _Absent()


def add_own(parts: dict[str, Any], state: object) -> None:
    """Add the own fields of a state, and the names of those that do not travel."""
    of = cast("dict[str, Any]", state) if issubclass(type(state), dict) else None
    own: dict[str, Any] = {}
    live: list[str] = []
    for name in own_names(state):
        try:
            value = getattr(state, name, ABSENT) if of is None else of[name]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # its own code ran, and may raise what it likes
            value = ABSENT
        kind = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
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
    """The names of a state's own fields, which are public and none of ours."""
    kind = type(state)
    try:
        instance: Any = state if issubclass(kind, dict) else getattr(state, "__dict__", None)
    except Exception:  # its own code ran
        instance = None
    return _public(kind, tuple(cast("dict[Any, Any]", instance)) if isinstance(instance, dict) else ())  # pyright: ignore[reportUnknownArgumentType] - as found


@functools.lru_cache(maxsize=1024)
def _public(kind: type, names: tuple[Any, ...]) -> tuple[str, ...]:
    barred = _OURS if issubclass(kind, LoopState) else _TRAVEL
    found = dict.fromkeys((*_declared(kind), *names))  # pyright: ignore[reportUnknownArgumentType] - as found
    return tuple(name for name in found if _is_public(name) and name not in barred)[:_MOST_OWN_FIELDS]


def own_part(value: Any, name: str) -> Any:
    """A copy of an own field that is a scalar or small plain data. Any: what it is, is found out here.

    Returns:
        `ABSENT` for what does not travel: it is live or large, or, by its name, a credential or a configuration.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
    if kind is int:
        return value if INT_MIN <= value <= INT_MAX else ABSENT
    if kind is str:
        return value if len(value) <= _MOST_OWN_CHARS and not _is_secret(name) else ABSENT
    if kind in CONTAINERS:
        return ABSENT if len(value) > _MOST_OWN_ITEMS or name in CONFIGS else _own_container(value)
    number = number_of(kind)  # no tensor: it may have to be fetched from far away  # pyright: ignore[reportUnknownArgumentType] - as found
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
    except BaseException:  # something in it is not plain, or another thread changed it
        return ABSENT
    return plain if _is_small(plain) and not has_config(plain) else ABSENT


_is_secret: Final = functools.lru_cache(maxsize=1024)(looks_secret)


@functools.lru_cache(maxsize=256)
def _declared(kind: Any) -> tuple[str, ...]:
    """The names of the fields that a class declares: of a dataclass, attrs, msgspec, pydantic, or in its slots."""
    names: list[Any] = [*_strings(getattr(kind, "__dataclass_fields__", ()))]
    names += [getattr(each, "name", None) for each in _strings(getattr(kind, "__attrs_attrs__", ()))]
    for place in ("__struct_fields__", "model_fields", "_fields"):
        names += _strings(getattr(kind, place, ()))
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - as found
        names += [slots] if isinstance(slots, str) else _strings(slots)
    return tuple(dict.fromkeys(name for name in names if type(name) is str))


def _strings(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Iterable) else []  # pyright: ignore[reportUnknownArgumentType] - as found


def _is_public(name: Any) -> bool:
    return type(name) is str and name.isidentifier() and not name.startswith("_") and not iskeyword(name)


def _is_small(plain: Any) -> bool:
    """Whether plain data holds only small texts and containers, and nothing that by its name is a credential."""
    if type(plain) is int:
        return INT_MIN <= plain <= INT_MAX
    if type(plain) is not dict and type(plain) is not list:
        return type(plain) is not str or len(plain) <= _MOST_OWN_CHARS
    entries = cast("dict[Any, Any]", plain) if type(plain) is dict else dict(enumerate(cast("list[Any]", plain)))  # pyright: ignore[reportUnknownArgumentType] - as found
    return len(entries) <= _MOST_OWN_ITEMS and all(
        _is_small(value) and not (type(value) is str and type(key) is str and _is_secret(key))
        for key, value in entries.items()
    )
