"""Copy the fields of an event into built-in types, ready for an encoder.

Each field is copied on its own: common values by the fast path (`evsys_bus.codec.flat`), any other value by `to_plain`.
A field that cannot be encoded therefore does not affect the others.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from evsys_bus.codec.flat import (
    MOST_ITEMS,
    SCALARS,
    NotFlat,
    TooLarge,
    are_keys,
    numbers,
    shallow,
    small,
    with_text_keys,
)
from evsys_bus.codec.plain import Plain, plain_at
from evsys_bus.codec.redaction import CONFIGS, has_config
from evsys_bus.codec.references import COPIED, HANDLES, batch_parts, parts_of
from evsys_bus.codec.shapes import annotations_of, handle_in, is_plain
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.events import Event

Reasons: TypeAlias = dict[str, str]
"""Path within the event -> why a value was replaced."""
Copy: TypeAlias = Callable[[Any, Reasons], Plain]
"""Copies a value and records what it had to replace."""


class NeedsRedaction(Exception):  # noqa: N818 - control flow, not an error
    """The event holds a configuration, which must be searched for credentials once all of it is copied."""


HANDLE_NAMES: Final[dict[type, str]] = {LoopState: "state", LogContext: "context", TrainingBatch: "batch"}
"""The wire name of each handle class."""


def copier_of(event_type: type[Event]) -> Callable[[Event, Reasons], dict[str, Plain]] | None:
    """Return a function that copies the tag and the fields of an event of this type.

    Returns None for an event with a context or a configuration: these may hold credentials, so the whole event has to
    go through `to_plain` and redaction.
    """
    tag = event_type.hook.removeprefix("on_")
    copies: list[tuple[str, Copy]] = []
    for name, annotation in annotations_of(event_type).items():
        handle = handle_in(annotation)
        if name in CONFIGS or (handle is not None and issubclass(handle, LogContext)):
            return None
        copies.append((name, _copy_of(handle, name)))  # pyright: ignore[reportUnknownArgumentType] - untyped

    def copy(event: Event, reasons: Reasons) -> dict[str, Plain]:
        fields: dict[str, Plain] = {"type": tag}
        for name, copy_field in copies:
            fields[name] = copy_field(getattr(event, name), reasons)
        state = fields.get("state")
        if type(state) is dict and "step" not in state and "step_idx" in fields:
            state["step"] = fields["step_idx"]
        return fields

    return copy


def handles_of(event: Event) -> dict[str, str]:
    """Map the fields of an event that hold a handle to the handle's wire name.

    Where an annotation does not decide it, the value does.
    """
    found: dict[str, str] = {}
    for name, handle in _handles_in(type(event)).items():
        kind: Any = type(getattr(event, name)) if handle is None else handle  # pyright: ignore[reportUnknownVariableType] - untyped
        ours = next((each for each in HANDLES if issubclass(kind, each)), None)
        if ours is not None:
            found[name] = HANDLE_NAMES[ours]
    return found


@functools.cache
def _handles_in(event_type: type[Event]) -> dict[str, type | None]:
    """Map fields that hold or may hold a handle to its class; None where only the value can tell."""
    found = {
        name: (handle_in(each), is_plain(each) and each not in {Any, object})
        for name, each in annotations_of(event_type).items()
    }
    return {name: handle for name, (handle, plain) in found.items() if handle is not None or not plain}


def copy_handle(handle: object, kind: type, name: str, reasons: Reasons) -> Plain:
    """Copy the parts of a handle that are encoded."""
    if handle is None:
        return None
    if type(handle) is TrainingBatch and is_bare(handle):
        return {}
    parts = (
        batch_parts(handle, (reasons, name))
        if type(handle) is TrainingBatch
        else parts_of(handle, kind, (reasons, name))
    )
    for key, value in parts.items():
        if type(value) not in SCALARS and key not in COPIED:
            parts[key] = copy_row(value, reasons, name, key)
    return parts


def is_bare(batch: TrainingBatch) -> bool:
    """Whether a batch has nothing to encode."""
    return batch.loss_fn is batch.loss_fn_config is None and not batch.metrics


def copy_row(value: Any, reasons: Reasons, *trail: str) -> Plain:
    """Copy a value that is usually a dict of scalars."""
    try:
        if type(value) is dict and len(value) <= MOST_ITEMS:  # pyright: ignore[reportUnknownArgumentType] - untyped
            own: dict[Any, Any] = {**value}
            if SCALARS.issuperset(map(type, own.values())) and are_keys(own):
                return own
        return _copy_row(value, reasons, trail)
    except (KeyboardInterrupt, SystemExit, NeedsRedaction, TooLarge):
        raise
    except BaseException:  # no mapping, keys that are not text, or the value's own code raised
        return copy_value(value, reasons, *trail)


def _copy_row(value: Any, reasons: Reasons, trail: tuple[str, ...]) -> dict[str, Plain]:
    own = shallow(value)
    for key, each in own.items():
        kind = type(each)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind in SCALARS:
            continue
        plain = numbers.get(kind)  # pyright: ignore[reportUnknownArgumentType] - untyped
        if plain is not None:
            own[key] = plain(each)
            continue
        if type(key) not in SCALARS:
            raise NotFlat
        if key in CONFIGS:
            raise NeedsRedaction
        own[key] = copy_value(each, reasons, *trail, str(key))
    return own if are_keys(own) else with_text_keys(own)


def copy_value(value: Any, reasons: Reasons, *trail: str) -> Plain:
    """Copy any value."""
    try:
        plain = small(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not a common value, or its own code raised; `to_plain` handles both
        plain = plain_at(value, trail, reasons)
    if type(plain) not in SCALARS and has_config(plain):
        raise NeedsRedaction
    return plain


def _copy_of(handle: type | None, name: str) -> Copy:
    if handle is not None:
        return lambda value, reasons: copy_handle(value, handle, name, reasons)
    return lambda value, reasons: copy_field(value, reasons, name)


def copy_field(value: Any, reasons: Reasons, name: str) -> Plain:
    """Copy the value of a field; the value may be of any type, whatever the annotation says."""
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
