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

from evsys_bus.codec.limits import INT_MAX, INT_MIN
from evsys_bus.codec.redact import CONFIG_KEYS, has_config, is_secret_key
from evsys_bus.codec.scalars import SCALARS, copy_small, number_converter
from evsys_bus.context import LoopState

_LOOP_STATE_FIELDS: Final = frozenset(LoopState.__dataclass_fields__)
_WIRE_FIELDS: Final = frozenset({"step", "num_steps", "output_dir", "stop_requested", "stop_reason", "error", "ctx"})
_MAX_CUSTOM_FIELDS: Final = 100
_MAX_CUSTOM_CHARS: Final = 4096
_MAX_CUSTOM_ITEMS: Final = 64
_MAX_CUSTOM_DEPTH: Final = 2
CONTAINERS: Final = frozenset({list, tuple, dict, set, frozenset})


class _Absent:
    """Type of the sentinel `ABSENT`, which marks a missing attribute."""


ABSENT: Final = _Absent()


def add_custom_fields(parts: dict[str, Any], state: object) -> None:
    """Add the custom fields of a state to ``parts``, and the names of those that are not encoded."""
    entries = cast("dict[str, Any]", state) if issubclass(type(state), dict) else None
    custom: dict[str, Any] = {}
    live_names: list[str] = []
    for name in custom_field_names(state):
        try:
            value = getattr(state, name, ABSENT) if entries is None else entries[name]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # raised by the state's own code
            value = ABSENT
        kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is float or kind is bool or value is None:
            custom[name] = value
        elif value is not ABSENT:
            encoded = custom_field_value(value, name)
            if encoded is ABSENT:
                live_names.append(name)
            else:
                custom[name] = encoded
    if live_names:
        parts["live"] = live_names
    if custom:
        parts["own"] = custom


def custom_field_names(state: object) -> tuple[str, ...]:
    """Return the names of a state's custom fields; private names are left out."""
    kind = type(state)
    try:
        instance: Any = state if issubclass(kind, dict) else getattr(state, "__dict__", None)
    except Exception:  # raised by the state's own code
        instance = None
    return _public_names(kind, tuple(cast("dict[Any, Any]", instance)) if isinstance(instance, dict) else ())  # pyright: ignore[reportUnknownArgumentType] - untyped


@functools.lru_cache(maxsize=1024)
def _public_names(kind: type, names: tuple[Any, ...]) -> tuple[str, ...]:
    excluded = _LOOP_STATE_FIELDS if issubclass(kind, LoopState) else _WIRE_FIELDS
    found = dict.fromkeys((*_declared_names(kind), *names))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return tuple(name for name in found if _is_public(name) and name not in excluded)[:_MAX_CUSTOM_FIELDS]


def custom_field_value(value: Any, name: str) -> Any:
    """Copy the value of a custom field if it is a scalar or a small built-in container.

    Returns:
        `ABSENT` for a value that is not encoded: a live object, a large value, or by its name a credential or a
        configuration.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind is int:
        return value if INT_MIN <= value <= INT_MAX else ABSENT
    if kind is str:
        return value if len(value) <= _MAX_CUSTOM_CHARS and not _is_secret(name) else ABSENT
    if kind in CONTAINERS:
        return ABSENT if len(value) > _MAX_CUSTOM_ITEMS or name in CONFIG_KEYS else _container_value(value)
    number = number_converter(kind)  # not tensors: fetching one may block on a device  # pyright: ignore[reportUnknownArgumentType] - untyped
    if number is not None:
        value = number(value)
    elif issubclass(kind, PurePath):
        value = str(value)
    elif issubclass(kind, Enum):
        value = value.value
    is_encodable = type(value) in SCALARS and _is_small(value) and not (type(value) is str and _is_secret(name))
    return value if is_encodable else ABSENT


def _container_value(value: Any) -> Any:
    try:
        plain = copy_small(list(value) if type(value) in {set, frozenset} else value, _MAX_CUSTOM_DEPTH)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it holds a live object, or another thread changed it
        return ABSENT
    return plain if _is_small(plain) and not has_config(plain) else ABSENT


_is_secret: Final = functools.lru_cache(maxsize=1024)(is_secret_key)


@functools.lru_cache(maxsize=256)
def _declared_names(kind: Any) -> tuple[str, ...]:
    """Return the fields that a class declares: as a dataclass, attrs, msgspec or pydantic class, or in its slots."""
    names: list[Any] = [*_as_list(getattr(kind, "__dataclass_fields__", ()))]
    names += [getattr(each, "name", None) for each in _as_list(getattr(kind, "__attrs_attrs__", ()))]
    for attribute in ("__struct_fields__", "model_fields", "_fields"):
        names += _as_list(getattr(kind, attribute, ()))
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - untyped
        names += [slots] if isinstance(slots, str) else _as_list(slots)
    return tuple(dict.fromkeys(name for name in names if type(name) is str))


def _as_list(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Iterable) else []  # pyright: ignore[reportUnknownArgumentType] - untyped


def _is_public(name: Any) -> bool:
    return type(name) is str and name.isidentifier() and not name.startswith("_") and not iskeyword(name)


def _is_small(plain: Any) -> bool:
    """Whether built-in data holds only small texts and containers, and no key that names a credential."""
    if type(plain) is int:
        return INT_MIN <= plain <= INT_MAX
    if type(plain) is not dict and type(plain) is not list:
        return type(plain) is not str or len(plain) <= _MAX_CUSTOM_CHARS
    entries = cast("dict[Any, Any]", plain) if type(plain) is dict else dict(enumerate(cast("list[Any]", plain)))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return len(entries) <= _MAX_CUSTOM_ITEMS and all(
        _is_small(value) and not (type(value) is str and type(key) is str and _is_secret(key))
        for key, value in entries.items()
    )
