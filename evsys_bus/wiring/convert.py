"""Strict conversion of a value to a type, by msgspec's rules and for types that msgspec does not support.

Unsupported types are paths, live objects, and unions such as ``str | Path``; the members of such a union are tried in
the order in which they are written.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, cast

import msgspec

from evsys_bus.wiring.fields import fields_of, is_config, is_pydantic
from evsys_bus.wiring.spec import PathPart


def convert(value: object, wanted: Any) -> Any:
    """Convert a value to the type ``wanted``.

    Raises:
        msgspec.ValidationError: The value does not fit the type.
        TypeError: ``wanted`` is not a supported type.
    """
    try:
        return msgspec.convert(value, wanted, dec_hook=_convert_other)
    except TypeError:
        return msgspec.convert(value, _accepted(wanted), dec_hook=_convert_other)


def stray(given: Any, built: Any) -> list[tuple[PathPart, ...]]:
    """Return the paths of input keys that the built value has no field for; lenient classes drop or collect them."""
    if getattr(built, "__pydantic_root_model__", False):
        return stray(given, built.root)
    if isinstance(given, Mapping):
        given = cast("Mapping[Any, Any]", given)
        cls = cast("type[Any]", type(built))
        if is_config(cls):
            fields = fields_of(cls)
            strays: list[tuple[PathPart, ...]] = [(str(key),) for key in given if key not in fields]
            inner = [(key, value, fields[key].attribute) for key, value in given.items() if key in fields]
            pairs = [(key, value, getattr(built, name)) for key, value, name in inner if name is not None]
        elif isinstance(built, Mapping):
            built = cast("Mapping[Any, Any]", built)
            # A TypedDict drops unknown keys; any other mapping has all keys, in order, perhaps converted.
            lost = len(given) != len(built)
            strays = [(str(key),) for key in given if lost and key not in built]
            kept = [(key, value) for key, value in given.items() if not lost or key in built]
            pairs = [(key, value, each) for (key, value), each in zip(kept, built.values(), strict=False)]
        else:
            return []
        return strays + [(str(key), *path) for key, value, part in pairs for path in stray(value, part)]
    if isinstance(given, Sequence) and isinstance(built, Sequence) and not isinstance(given, str | bytes):
        both = zip(cast("Sequence[Any]", given), cast("Sequence[Any]", built), strict=False)
        return [(index, *path) for index, (value, part) in enumerate(both) for path in stray(value, part)]
    return []


class _AnyInstance(type):
    """Accepts any instance: msgspec checks the result of a hook against the placeholder, which has no instances."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class _OneOf(metaclass=_AnyInstance):
    """Placeholder for a union that msgspec does not support: ``_OneOf[str, Path]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


class _Made(metaclass=_AnyInstance):
    """Placeholder for a Struct or dataclass with a field that msgspec does not support: ``_Made[Config]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


def _accepted(wanted: Any) -> Any:
    """Return the type for msgspec, with placeholders for what msgspec does not support."""
    try:
        msgspec.msgpack.Decoder(wanted)
    except TypeError:
        origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
        if origin in {typing.Union, types.UnionType}:
            return _OneOf[tuple(map(_accepted, inner))]
        if origin is Annotated and typing.get_origin(inner[0]) in {typing.Union, types.UnionType}:
            members = typing.get_args(inner[0])
            return _OneOf[tuple(_accepted(Annotated[member, *inner[1:]]) for member in members)]
        if origin is not None and origin is not Annotated:
            return origin[tuple(each if each is ... else _accepted(each) for each in inner)]
        if isinstance(wanted, type) and is_config(wanted) and not is_pydantic(wanted):
            return _Made[wanted]
        raise
    return wanted


def _convert_other(wanted: Any, value: object) -> object:
    """Convert to a type that msgspec does not support; msgspec turns TypeError and ValueError to ValidationError."""
    cls = typing.get_origin(wanted) or wanted
    if cls is _OneOf:
        return _one_of(typing.get_args(wanted), value)
    if cls is _Made:
        return _made(typing.get_args(wanted)[0], value)
    if isinstance(value, cls):
        return value
    if isinstance(value, str) and issubclass(cls, PurePath):
        return cls(value)
    raise TypeError(f"Expected `{cls.__name__}`, got `{type(value).__name__}`")


def _one_of(members: tuple[Any, ...], value: object) -> object:
    """Convert to the first member that accepts the value with all its keys, else to the first that accepts it."""
    fitting: list[object] = []
    for member in members:
        try:
            made = convert(value, member)
        except msgspec.ValidationError:
            continue
        if not stray(value, made):
            return made
        fitting.append(made)
    if fitting:
        return fitting[0]
    raise TypeError(f"Expected `{' | '.join(map(_name, members))}`, got `{type(value).__name__}`")


def _made(config: type[Any], value: object) -> object:
    if isinstance(value, config):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected `object`, got `{type(value).__name__}`")
    value = cast("Mapping[str, Any]", value)
    tag_field = config.__struct_config__.tag_field if issubclass(config, msgspec.Struct) else None
    if tag_field is not None and tag_field in value:
        convert(value[tag_field], typing.Literal[config.__struct_config__.tag])
    fields = fields_of(config)
    for key, each in fields.items():
        if each.required and key not in value:
            raise ValueError(f"Object missing required field `{key}`")
    given = [(each.attribute, value[key], each.type) for key, each in fields.items() if key in value]
    return config(**{name: convert(part, wanted) for name, part, wanted in given if name is not None})


def _name(wanted: Any) -> str:
    if wanted is types.NoneType:
        return "null"
    if typing.get_origin(wanted) is _OneOf:
        return " | ".join(map(_name, typing.get_args(wanted)))
    return getattr(wanted, "__name__", str(wanted))
