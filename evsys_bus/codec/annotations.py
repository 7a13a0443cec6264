"""Read the annotations of event fields, as far as the codec uses them.

When an event is encoded, an annotation only chooses what is tried first, because a field may hold a value of any type.
Annotations may be classes, unions, generic aliases, or whatever a user writes.
"""

import functools
import sys
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from evsys_bus.codec.scalars import SCALARS
from evsys_bus.codec.wire_types import HANDLES

_BUILTIN_TYPES: Final = SCALARS | {bytes, Any, object}


@functools.cache
def field_annotations(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the annotation of each field; Any for one that cannot be evaluated.

    An annotation cannot be evaluated if its type is imported for type checkers only, or is local to a function. Names
    of handle classes are resolved without an import.
    """
    try:
        return {field.name: field.type for field in msgspec.structs.fields(struct)}
    except Exception:  # evaluating an annotation runs its code
        declared: dict[str, tuple[Any, type]] = {}
        for kind in reversed(struct.__mro__):
            declared |= {name: (annotation, kind) for name, annotation in vars(kind).get("__annotations__", {}).items()}
        return {name: _evaluate(*declared[name]) if name in declared else Any for name in struct.__struct_fields__}


def _evaluate(annotation: Any, kind: type) -> Any:
    """Evaluate one annotation of a class; Any if that fails."""
    holder = type(kind.__name__, (), {"__annotations__": {"it": annotation}, "__module__": kind.__module__})
    module = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    try:
        return get_type_hints(holder, {**_HANDLES_BY_NAME, **module}, dict(vars(kind)), include_extras=True)["it"]
    except Exception:  # evaluating an annotation runs its code
        return Any


_HANDLES_BY_NAME: Final = {each.__name__: each for each in HANDLES}


def handle_class(annotation: Any) -> type | None:
    """Return the handle class of an annotation such as ``LoopState`` or ``LoopState | None``; None for others."""
    kinds = [each for each in _union_members(annotation) if each is not NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], HANDLES):
        return kinds[0]
    return None


def is_scalar(annotation: Any) -> bool:
    """Whether an annotation allows only numbers, text and None."""
    return all(member in SCALARS for member in _union_members(annotation))


def is_scalar_dict(annotation: Any) -> bool:
    """Whether an annotation is a dict of scalars with text keys."""
    arguments = get_args(annotation)
    return get_origin(annotation) is dict and arguments[0] is str and is_scalar(arguments[1])


def is_builtin(annotation: Any) -> bool:
    """Whether values of an annotation are decoded unchanged, without a conversion."""
    for member in _union_members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if member in _BUILTIN_TYPES or origin is Literal or member is list or member is dict:
            continue
        if (origin is dict and arguments[0] is str and is_builtin(arguments[1])) or (
            origin is list and is_builtin(arguments[0])
        ):
            continue
        return False
    return True


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
