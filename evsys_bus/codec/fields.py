"""The fields of an event as plain data, copied: what an encoder may be given.

Each field is copied by itself, the usual values fast (`evsys_bus.codec.flat`) and any other by `to_plain`, so one that
is odd costs only itself.
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
"""Copies a value. Any: as it is found."""


class NeedsRedaction(Exception):  # noqa: N818 - no failure, as `NotFlat`
    """There is a configuration in an event, to be searched for credentials when all of it was copied."""


HANDLE_NAMES: Final[dict[type, str]] = {LoopState: "state", LogContext: "context", TrainingBatch: "batch"}
"""How the handles are called on the wire."""


def copier_of(event_type: type[Event]) -> Callable[[Event, Reasons], dict[str, Plain]] | None:
    """The function that copies the fields of an event, its tag first; None where only `to_plain` may copy all of it.

    That is where it has a context or a configuration: there may be credentials in those.
    """
    tag = event_type.hook.removeprefix("on_")
    copies: list[tuple[str, Copy]] = []
    for name, annotation in annotations_of(event_type).items():
        handle = handle_in(annotation)
        if name in CONFIGS or (handle is not None and issubclass(handle, LogContext)):
            return None
        copies.append((name, _copy_of(handle, name)))  # pyright: ignore[reportUnknownArgumentType] - as found

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
    """Which fields of an event are handles, and of which kind; by the values where the annotation leaves it open."""
    found: dict[str, str] = {}
    for name, handle in _handles_in(type(event)).items():
        kind: Any = type(getattr(event, name)) if handle is None else handle  # pyright: ignore[reportUnknownVariableType] - as found
        ours = next((each for each in HANDLES if issubclass(kind, each)), None)
        if ours is not None:
            found[name] = HANDLE_NAMES[ours]
    return found


@functools.cache
def _handles_in(event_type: type[Event]) -> dict[str, type | None]:
    """The fields that are handles, and of which class; None where that is open."""
    found = {
        name: (handle_in(each), is_plain(each) and each not in {Any, object})
        for name, each in annotations_of(event_type).items()
    }
    return {name: handle for name, (handle, plain) in found.items() if handle is not None or not plain}


def copy_handle(handle: object, kind: type, name: str, reasons: Reasons) -> Plain:
    """The parts of a handle that travel, copied."""
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
    """Whether nothing of a batch travels."""
    return batch.loss_fn is batch.loss_fn_config is None and not batch.metrics


def copy_row(value: Any, reasons: Reasons, *trail: str) -> Plain:
    """A copy of what usually is a dict of scalars. Any: that is found out."""
    try:
        if type(value) is dict and len(value) <= MOST_ITEMS:  # pyright: ignore[reportUnknownArgumentType] - as found
            own: dict[Any, Any] = {**value}
            if SCALARS.issuperset(map(type, own.values())) and are_keys(own):
                return own
        return _copy_row(value, reasons, trail)
    except (KeyboardInterrupt, SystemExit, NeedsRedaction, TooLarge):
        raise
    except BaseException:  # no mapping, or one with odd keys; or its own code ran, and may raise what it likes
        return copy_value(value, reasons, *trail)


def _copy_row(value: Any, reasons: Reasons, trail: tuple[str, ...]) -> dict[str, Plain]:
    own = shallow(value)
    for key, each in own.items():
        kind = type(each)  # pyright: ignore[reportUnknownVariableType] - as found
        if kind in SCALARS:
            continue
        plain = numbers.get(kind)  # pyright: ignore[reportUnknownArgumentType] - as found
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
    """A copy of any value. Any: what it is, is found out here."""
    try:
        plain = small(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not usual, or its own code ran: `to_plain` tells what it is
        plain = plain_at(value, trail, reasons)
    if type(plain) not in SCALARS and has_config(plain):
        raise NeedsRedaction
    return plain


def _copy_of(handle: type | None, name: str) -> Copy:
    if handle is not None:
        return lambda value, reasons: copy_handle(value, handle, name, reasons)
    return lambda value, reasons: copy_field(value, reasons, name)


def copy_field(value: Any, reasons: Reasons, name: str) -> Plain:
    """A copy of the value of a field. Any: it is of any type, whatever the annotation says."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
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
