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

from evsys_bus.config.config_fields import config_fields, is_config, is_pydantic
from evsys_bus.config.spec import PathPart


def convert(value: object, target: Any) -> Any:
    """Convert a value to the type ``target``.

    Raises:
        msgspec.ValidationError: The value does not fit the type.
        TypeError: ``target`` is not a supported type.
    """
    try:
        return msgspec.convert(value, target, dec_hook=_decode_hook)
    except TypeError:
        return msgspec.convert(value, _msgspec_type(target), dec_hook=_decode_hook)


def unknown_keys(given: Any, built: Any) -> list[tuple[PathPart, ...]]:
    """Return the paths of input keys that the built value has no field for; lenient classes drop or collect them."""
    if getattr(built, "__pydantic_root_model__", False):
        return unknown_keys(given, built.root)
    if isinstance(given, Mapping):
        given = cast("Mapping[Any, Any]", given)
        cls = cast("type[Any]", type(built))
        if is_config(cls):
            fields = config_fields(cls)
            unknown: list[tuple[PathPart, ...]] = [(str(key),) for key in given if key not in fields]
            known = [(key, value, fields[key].attribute) for key, value in given.items() if key in fields]
            pairs = [(key, value, getattr(built, name)) for key, value, name in known if name is not None]
        elif isinstance(built, Mapping):
            built = cast("Mapping[Any, Any]", built)
            # A TypedDict drops unknown keys; any other mapping has all keys, in order, perhaps converted.
            has_dropped_keys = len(given) != len(built)
            unknown = [(str(key),) for key in given if has_dropped_keys and key not in built]
            retained = [(key, value) for key, value in given.items() if not has_dropped_keys or key in built]
            pairs = [(key, value, each) for (key, value), each in zip(retained, built.values(), strict=False)]
        else:
            return []
        return unknown + [(str(key), *path) for key, value, part in pairs for path in unknown_keys(value, part)]
    if isinstance(given, Sequence) and isinstance(built, Sequence) and not isinstance(given, str | bytes):
        pairs_by_index = zip(cast("Sequence[Any]", given), cast("Sequence[Any]", built), strict=False)
        return [
            (index, *path) for index, (value, part) in enumerate(pairs_by_index) for path in unknown_keys(value, part)
        ]
    return []


class _AnyInstance(type):
    """Accepts any instance: msgspec checks the result of a hook against the placeholder, which has no instances."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class _OneOf(metaclass=_AnyInstance):
    """Placeholder for a union that msgspec does not support: ``_OneOf[str, Path]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


class _ByConstructor(metaclass=_AnyInstance):
    """Placeholder for a Struct or dataclass with a field that msgspec does not support: ``_Made[Config]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


def _msgspec_type(target: Any) -> Any:
    """Return the type for msgspec, with placeholders for what msgspec does not support."""
    try:
        msgspec.msgpack.Decoder(target)
    except TypeError:
        origin, inner = typing.get_origin(target), typing.get_args(target)
        if origin in {typing.Union, types.UnionType}:
            return _OneOf[tuple(map(_msgspec_type, inner))]
        if origin is Annotated and typing.get_origin(inner[0]) in {typing.Union, types.UnionType}:
            members = typing.get_args(inner[0])
            return _OneOf[tuple(_msgspec_type(Annotated[member, *inner[1:]]) for member in members)]
        if origin is not None and origin is not Annotated:
            return origin[tuple(each if each is ... else _msgspec_type(each) for each in inner)]
        if isinstance(target, type) and is_config(target) and not is_pydantic(target):
            return _ByConstructor[target]
        raise
    return target


def _decode_hook(target: Any, value: object) -> object:
    """Convert to a type that msgspec does not support; msgspec turns TypeError and ValueError to ValidationError."""
    cls = typing.get_origin(target) or target
    if cls is _OneOf:
        return _convert_union(typing.get_args(target), value)
    if cls is _ByConstructor:
        return _construct(typing.get_args(target)[0], value)
    if isinstance(value, cls):
        return value
    if isinstance(value, str) and issubclass(cls, PurePath):
        return cls(value)
    raise TypeError(f"Expected `{cls.__name__}`, got `{type(value).__name__}`")


def _convert_union(members: tuple[Any, ...], value: object) -> object:
    """Convert to the first member that accepts the value with all its keys, else to the first that accepts it."""
    candidates: list[object] = []
    for member in members:
        try:
            converted = convert(value, member)
        except msgspec.ValidationError:
            continue
        if not unknown_keys(value, converted):
            return converted
        candidates.append(converted)
    if candidates:
        return candidates[0]
    raise TypeError(f"Expected `{' | '.join(map(_type_name, members))}`, got `{type(value).__name__}`")


def _construct(config: type[Any], value: object) -> object:
    if isinstance(value, config):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected `object`, got `{type(value).__name__}`")
    value = cast("Mapping[str, Any]", value)
    tag_field = config.__struct_config__.tag_field if issubclass(config, msgspec.Struct) else None
    if tag_field is not None and tag_field in value:
        convert(value[tag_field], typing.Literal[config.__struct_config__.tag])
    fields = config_fields(config)
    for key, each in fields.items():
        if each.required and key not in value:
            raise ValueError(f"Object missing required field `{key}`")
    given = [(each.attribute, value[key], each.type) for key, each in fields.items() if key in value]
    return config(**{name: convert(part, target) for name, part, target in given if name is not None})


def _type_name(target: Any) -> str:
    if target is types.NoneType:
        return "null"
    if typing.get_origin(target) is _OneOf:
        return " | ".join(map(_type_name, typing.get_args(target)))
    return getattr(target, "__name__", str(target))
