"""The wire twin of each event type, made once: a Struct with the same fields, handles replaced by references.

A twin holds nothing that anybody else holds: scalars, and copies of flat dicts. So the encoder, which must not see a
container change under it, cannot. Events that promise more than that (a config, predictions) have no twin, and go the
thorough way.
"""

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from evsys_bus.codec.flat import SCALARS, NotFlat, flat
from evsys_bus.codec.references import BatchRef, StateRef, batch_ref, state_ref
from evsys_bus.codec.shapes import annotations_of, handle_in, is_flat, is_scalar
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.events import Event, UnknownEvent


@functools.cache
def twin_maker(event_type: type[Event] | type[UnknownEvent]) -> Callable[[Event | UnknownEvent], msgspec.Struct]:
    """The function that makes the twin of an event of this type; it raises `NotFlat`, or anything, where it cannot."""
    if not issubclass(event_type, Event):
        return _no_twin
    fields: list[tuple[str, Any]] = []  # Any: annotations
    parts: list[str] = []
    for name, annotation in annotations_of(event_type).items():
        form = _form(annotation)
        if form is None:
            return _no_twin
        fields.append((name, form[0]))
        part = f"{form[1].__name__}(event.{name})"
        parts.append(part if form[1] is not scalar else f"event.{name} if type(event.{name}) in SCALARS else {part}")
    twin = msgspec.defstruct(f"{event_type.__name__}Twin", fields, tag=event_type.hook.removeprefix("on_"), gc=False)
    names = {each.__name__: each for each in (state_ref, batch_ref, flat, scalar)} | {"twin": twin, "SCALARS": SCALARS}
    # Written out, as dataclasses write their constructors: a loop over the fields would take twice as long.
    return eval(f"lambda event: twin({', '.join(parts)})", names)  # noqa: S307 - made of our names and identifiers


def scalar(value: Any) -> Any:
    """The value, if it holds nothing else. Any: that is what is found out.

    Raises:
        NotFlat: It may.
    """
    if type(value) in SCALARS:
        return value
    raise NotFlat


def _form(annotation: Any) -> tuple[Any, Callable[..., object]] | None:
    """How a field stands in the twin and what makes it; None for what a twin cannot hold. Any: annotations."""
    handle = handle_in(annotation)
    if handle is not None and issubclass(handle, LoopState):
        return StateRef, state_ref
    if handle is not None and issubclass(handle, TrainingBatch):
        return BatchRef, batch_ref
    if is_scalar(annotation):
        return annotation, scalar
    return (dict[str, Any], flat) if is_flat(annotation) else None


def _no_twin(_: object) -> msgspec.Struct:
    raise NotFlat
