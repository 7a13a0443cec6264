"""What the annotation of an event's field promises, as far as the codec acts on it.

A promise is not trusted when an event is written (people put anything anywhere); it only chooses the way that is tried
first. All annotations are Any here: they may be classes, unions, generic aliases, or whatever a user writes.
"""

import functools
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import msgspec

from evsys_bus.codec.flat import SCALARS
from evsys_bus.codec.references import HANDLES

_PLAIN: Final = SCALARS | {bytes, Any, object}


@functools.cache
def annotations_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The annotation of each field; Any for all where they cannot be evaluated (a name that is local to a function)."""
    try:
        return {field.name: field.type for field in msgspec.structs.fields(struct)}
    except NameError:
        return dict.fromkeys(struct.__struct_fields__, Any)


def handle_in(annotation: Any) -> type | None:
    """The handle class of ``LoopState``, ``LoopState | None`` and their like; None for other annotations."""
    kinds = [each for each in _members(annotation) if each is not NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], HANDLES):
        return kinds[0]
    return None


def is_scalar(annotation: Any) -> bool:
    """Numbers, text, None, and unions of them."""
    return all(each in SCALARS for each in _members(annotation))


def is_flat(annotation: Any) -> bool:
    """A dict of scalars under text keys."""
    arguments = get_args(annotation)
    return get_origin(annotation) is dict and arguments[0] is str and is_scalar(arguments[1])


def is_plain(annotation: Any) -> bool:
    """What reads back from the wire as it was, so that nothing needs converting."""
    for each in _members(annotation):
        origin, arguments = get_origin(each), get_args(each)
        if each in _PLAIN or origin is Literal or each is list or each is dict:
            continue
        if (origin is dict and arguments[0] is str and is_plain(arguments[1])) or (
            origin is list and is_plain(arguments[0])
        ):
            continue
        return False
    return True


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
