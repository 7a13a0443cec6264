"""A value as a type says, strictly: msgspec's rules, and what msgspec has no rule for.

That is paths, live objects, and unions such as ``str | Path``, for which msgspec refuses the whole type: their members
are tried in the order in which they are written. What is right or wrong with params as a whole is not known here.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, cast

import msgspec

from evsys_bus.wiring.fields import fields_of, is_config, is_pydantic
from evsys_bus.wiring.spec import PathPart

# Any, throughout: the types are whatever was annotated, and the values what a user wrote or an author's class made.


def convert(value: object, wanted: Any) -> Any:
    """The value as ``wanted``.

    Raises:
        msgspec.ValidationError: It does not fit.
        TypeError: ``wanted`` is no type that can be converted to.
    """
    try:
        return msgspec.convert(value, wanted, dec_hook=_convert_other)
    except TypeError:
        return msgspec.convert(value, _accepted(wanted), dec_hook=_convert_other)


def stray(given: Any, built: Any) -> list[tuple[PathPart, ...]]:
    """Where keys were given that the built value has no place for: a lenient class drops or collects them."""
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
            # A TypedDict loses keys; any other mapping keeps them, in order, perhaps converted.
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
    """msgspec checks that what a hook made is an instance of what was wanted; a stand-in has none of its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class _OneOf(metaclass=_AnyInstance):
    """Stands for a union that msgspec refuses: ``_OneOf[str, Path]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


class _Made(metaclass=_AnyInstance):
    """Stands for a Struct or a dataclass with a field that msgspec refuses: ``_Made[Config]``."""

    def __class_getitem__(cls, inner: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, inner)


def _accepted(wanted: Any) -> Any:
    """The same type for msgspec, with stand-ins for what it refuses."""
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
    """What msgspec leaves to us. It makes a ValidationError of a TypeError or ValueError, and adds the place."""
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
    """The first member that takes the value and has a place for its every key; else the first that takes it."""
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
