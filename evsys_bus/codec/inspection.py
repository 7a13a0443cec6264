"""Inspect values of third-party types: their fields, a short repr, and a copy while other threads change them.

Types are recognised by their class, never through the value's ``__class__`` (which may raise or lie) and never by
importing their library.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import msgspec

from evsys_bus.codec.limits import MAX_REPR_CHARS
from evsys_bus.codec.wire_types import HANDLES, read_attributes, wire_parts

T = TypeVar("T")

_MAX_ATTEMPTS: Final = 5


def object_fields(value: Any, kind: Any) -> dict[str, Any] | None:  # noqa: PLR0911 - one line for each kind of class
    """Return the named fields of a value, one level deep; None if its class has none."""
    if issubclass(kind, HANDLES):
        return wire_parts(value, kind)
    if issubclass(kind, msgspec.Struct):
        return struct_fields(value)
    if hasattr(kind, "_asdict"):
        return value._asdict()
    if hasattr(kind, "__dataclass_fields__"):
        return read_attributes(value, kind.__dataclass_fields__)
    if hasattr(kind, "__attrs_attrs__"):
        return read_attributes(value, (each.name for each in kind.__attrs_attrs__))
    if hasattr(kind, "model_fields"):
        return dict(value)  # pydantic: iterating a model gives its fields and extras
    if issubclass(kind, SimpleNamespace) or (kind.__module__, kind.__name__) == ("argparse", "Namespace"):
        return value.__dict__.copy()
    return None


def has_fields(kind: Any) -> bool:
    """Whether values of this type have named fields."""
    return (
        issubclass(kind, (*HANDLES, msgspec.Struct, SimpleNamespace))
        or any(hasattr(kind, name) for name in ("_asdict", "__dataclass_fields__", "__attrs_attrs__", "model_fields"))
        or (kind.__module__, kind.__name__) == ("argparse", "Namespace")
    )


def struct_fields(value: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a Struct with the names and the tag that msgspec would encode."""
    config = value.__struct_config__
    fields = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
    tag = {} if config.tag is None else {cast("str", config.tag_field): config.tag}
    return tag | {encoded: getattr(value, name) for encoded, name in fields}


def snapshot(copy: Callable[[], T]) -> T:
    """Call ``copy`` and return its result, with retries when another thread changed the original meanwhile."""
    for _ in range(_MAX_ATTEMPTS - 1):
        try:
            return copy()
        except RuntimeError:
            continue
    return copy()


def short_repr(value: object) -> str:
    """Return a value's qualified name if it has one, else its repr, on one line. Never raises."""
    try:
        name = getattr(value, "__qualname__", None)
        line = f"{cast('Any', value).__module__}.{name}" if type(name) is str else repr(value)
        return escape_surrogates(line[:MAX_REPR_CHARS])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # raised by the value's own code
        return f"<{type(value).__name__}>"


def escape_surrogates(text: str) -> str:
    r"""Return the text with lone surrogates escaped (``\udc80``), so that it is valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
