"""The wire twin of each event type, made once: a Struct with the same fields, handles replaced by references.

A twin holds nothing that anybody else holds: scalars, and copies of flat dicts. So the encoder, which must not see a
container change under it, cannot. Events that promise more than that (a config, predictions) have no twin, and go the
thorough way.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import msgspec

from evsys_bus.codec.flat import SCALARS, NotFlat, are_keys, flat
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
    for index, (name, annotation) in enumerate(annotations_of(event_type).items()):
        form = _form(annotation)
        if form is None:
            return _no_twin
        fields.append((name, form[0]))
        parts.append(_PARTS.get(form[1], _PART).format(a=f"a{index}", name=name, make=form[1].__name__))
    twin = msgspec.defstruct(f"{event_type.__name__}Twin", fields, tag=event_type.hook.removeprefix("on_"), gc=False)
    space: dict[str, Any] = {each.__name__: each for each in (state_ref, batch_ref, flat, scalar)}
    space |= {"twin": twin, "SCALARS": SCALARS, "are_keys": are_keys}
    # Written out, as dataclasses write their constructors: a loop over the fields would take twice as long.
    arguments = ", ".join(f"a{index}" for index in range(len(parts)))
    source = f"def make(event):{''.join(parts)}\n    return twin({arguments})\n"
    exec(source, space)  # noqa: S102 - made of our names and identifiers
    return space["make"]


_PART: Final = "\n    {a} = {make}(event.{name})"
_SCALAR: Final = """
    {a} = event.{name}
    if type({a}) not in SCALARS:
        {a} = scalar({a})"""
_FLAT: Final = """
    {a} = {{**event.{name}}}
    try:
        total = sum({a}.values())
    except TypeError:
        total = None
    if type(total) is not float or not are_keys({a}):
        {a} = flat({a})"""
"""What `flat` begins with, without the call: a row of metrics is nearly always all floats, under known keys."""


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


_PARTS: Final[dict[object, str]] = {scalar: _SCALAR, flat: _FLAT}
"""What is written out for a field; any other is made by a call."""


def _no_twin(_: object) -> msgspec.Struct:
    raise NotFlat
