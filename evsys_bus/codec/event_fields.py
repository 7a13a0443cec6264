"""Copy the fields of an event into built-in types, ready for an encoder.

Each field is copied on its own: common values by the fast path (`evsys_bus.codec.scalars`), any other value by
`to_builtins`. A field that cannot be encoded therefore does not affect the others.
"""

import functools
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, TypeAlias

from evsys_bus.codec.normalize import Builtins, to_builtins_at
from evsys_bus.codec.redact import CONFIG_KEYS, REASON
from evsys_bus.codec.scalars import (
    MAX_ITEMS,
    SCALARS,
    NeedsNormalizing,
    TooLarge,
    are_known_keys,
    copy_small,
    number_converters,
    shallow_copy,
    with_text_keys,
)
from evsys_bus.codec.wire_types import (
    ALREADY_COPIED,
    HANDLES,
    batch_wire_parts,
    field_annotations,
    handle_class,
    has_config,
    is_builtin,
    wire_parts,
)
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.diagnostics import log
from evsys_bus.events import Event, event_tag

Reasons: TypeAlias = dict[str, str]
"""Path within the event -> why a value was replaced."""
CopyValue: TypeAlias = Callable[[Any, Reasons], Builtins]
"""Copies a value and records what it had to replace."""


_logged_paths: Final[set[tuple[str, str]]] = set()
_MAX_LOGGED_PATHS: Final = 1_000


def log_replaced(event_type: str, reasons: Reasons) -> None:
    """Log which values of an event were replaced, each path once in a process; credentials are not worth a line."""
    if len(_logged_paths) >= _MAX_LOGGED_PATHS:
        return
    found = {path: why for path, why in reasons.items() if why != REASON and (event_type, path) not in _logged_paths}
    if found:
        _logged_paths.update((event_type, path) for path in found)
        shown = "; ".join(f"{path}: {why}" for path, why in islice(found.items(), _MAX_SHOWN_PATHS))
        log().warning("event.values_replaced", type=event_type, count=len(found), values=shown)


_MAX_SHOWN_PATHS: Final = 5


class NeedsRedaction(Exception):  # noqa: N818 - control flow, not an error
    """The event holds a configuration, which must be searched for credentials once all of it is copied."""


HANDLE_NAMES: Final[dict[type, str]] = {LoopState: "state", LogContext: "context", TrainingBatch: "batch"}
"""The wire name of each handle class."""


def event_copier(event_type: type[Event]) -> Callable[[Event, Reasons], dict[str, Builtins]] | None:
    """Return a function that copies the tag and the fields of an event of this type.

    Returns None for an event with a context or a configuration: these may hold credentials, so the whole event has to
    go through `to_builtins` and redaction.
    """
    tag = event_tag(event_type)
    copies: list[tuple[str, CopyValue]] = []
    for name, annotation in field_annotations(event_type).items():
        handle = handle_class(annotation)
        if name in CONFIG_KEYS or (handle is not None and issubclass(handle, LogContext)):
            return None
        copies.append((name, _field_copier(handle, name)))  # pyright: ignore[reportUnknownArgumentType] - untyped

    def copy(event: Event, reasons: Reasons) -> dict[str, Builtins]:
        fields: dict[str, Builtins] = {"type": tag}
        for name, copy_field in copies:
            fields[name] = copy_field(getattr(event, name), reasons)
        state = fields.get("state")
        if type(state) is dict and "step" not in state and "step_idx" in fields:
            state["step"] = fields["step_idx"]
        return fields

    return copy


def handle_kinds(event: Event) -> dict[str, str]:
    """Map the fields of an event that hold a handle to the handle's wire name.

    Where an annotation does not decide it, the value does.
    """
    found: dict[str, str] = {}
    for name, handle in _handle_fields(type(event)).items():
        kind: Any = type(getattr(event, name)) if handle is None else handle  # pyright: ignore[reportUnknownVariableType] - untyped
        handle_type = next((candidate for candidate in HANDLES if issubclass(kind, candidate)), None)
        if handle_type is not None:
            found[name] = HANDLE_NAMES[handle_type]
    return found


@functools.cache
def _handle_fields(event_type: type[Event]) -> dict[str, type | None]:
    """Map fields that hold or may hold a handle to its class; None where it depends on the value."""
    found = {
        name: (handle_class(annotation), is_builtin(annotation) and annotation not in {Any, object})
        for name, annotation in field_annotations(event_type).items()
    }
    return {name: handle for name, (handle, plain) in found.items() if handle is not None or not plain}


def copy_handle(handle: object, kind: type, name: str, reasons: Reasons) -> Builtins:
    """Copy the parts of a handle that are encoded."""
    if handle is None:
        return None
    if type(handle) is TrainingBatch and handle.loss_fn is handle.loss_fn_config is None and not handle.metrics:
        return {}
    fields = (
        batch_wire_parts(handle, (reasons, name))
        if type(handle) is TrainingBatch
        else wire_parts(handle, kind, (reasons, name))
    )
    for key, value in fields.items():
        if type(value) not in SCALARS and key not in ALREADY_COPIED:
            fields[key] = copy_row(value, reasons, name, key)
    return fields


def copy_row(value: Any, reasons: Reasons, *trail: str) -> Builtins:
    """Copy a value that is usually a dict of scalars."""
    try:
        if type(value) is dict and len(value) <= MAX_ITEMS:  # pyright: ignore[reportUnknownArgumentType] - untyped
            copied: dict[Any, Any] = {**value}
            if SCALARS.issuperset(map(type, copied.values())) and are_known_keys(copied):
                return copied
        return _copy_row(value, reasons, trail)
    except (KeyboardInterrupt, SystemExit, NeedsRedaction, TooLarge):
        raise
    except BaseException:  # no mapping, keys that are not text, or the value's own code raised
        return copy_value(value, reasons, *trail)


def _copy_row(value: Any, reasons: Reasons, trail: tuple[str, ...]) -> dict[str, Builtins]:
    copied = shallow_copy(value)
    for key, item in copied.items():
        kind = type(item)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind in SCALARS:
            continue
        to_number = number_converters.get(kind)  # pyright: ignore[reportUnknownArgumentType] - untyped
        if to_number is not None:
            copied[key] = to_number(item)
            continue
        if type(key) not in SCALARS:
            raise NeedsNormalizing
        if key in CONFIG_KEYS:
            raise NeedsRedaction
        copied[key] = copy_value(item, reasons, *trail, str(key))
    return copied if are_known_keys(copied) else with_text_keys(copied)


def copy_value(value: Any, reasons: Reasons, *trail: str) -> Builtins:
    """Copy any value."""
    try:
        plain = copy_small(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not a common value, or its own code raised; `to_builtins` handles both
        plain = to_builtins_at(value, trail, reasons)
    if type(plain) not in SCALARS and has_config(plain):
        raise NeedsRedaction
    return plain


def _field_copier(handle: type | None, name: str) -> CopyValue:
    if handle is not None:
        return lambda value, reasons: copy_handle(value, handle, name, reasons)
    return lambda value, reasons: copy_field(value, reasons, name)


def copy_field(value: Any, reasons: Reasons, name: str) -> Builtins:
    """Copy the value of a field; the value may be of any type, whatever its annotation."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind in SCALARS:
        return value
    if issubclass(kind, dict):
        return copy_row(value, reasons, name)
    handle = next((each for each in HANDLES if issubclass(kind, each)), None)
    if handle is None:
        return copy_value(value, reasons, name)
    if handle is LogContext:
        raise NeedsRedaction
    return copy_handle(value, handle, name, reasons)
