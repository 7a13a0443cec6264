"""The keys of a Config: a msgspec Struct, a dataclass, a pydantic model, or the signature of a constructor.

pydantic is never imported here: a Config that is a pydantic model has already imported it.
"""

import dataclasses
import inspect
import typing
from typing import Any

import msgspec


class Field(msgspec.Struct, frozen=True):
    """One key of a Config."""

    attribute: str | None
    """The attribute of the built Config, and the constructor's argument; None for the tag of a Struct."""
    required: bool = False
    type: Any = Any
    """The annotation; always Any for pydantic models and constructors."""
    default: Any = msgspec.UNSET
    """The default; UNSET if there is none, or a factory."""


def is_pydantic(cls: type) -> bool:
    """Whether a class is a pydantic model or a pydantic dataclass."""
    return hasattr(cls, "__pydantic_validator__")


def is_config(cls: type) -> bool:
    """Whether params can be validated against a class."""
    return is_pydantic(cls) or hasattr(cls, "__struct_config__") or hasattr(cls, "__dataclass_fields__")


def config_fields(config: type[Any]) -> dict[str, Field]:
    """Return the keys that a Config accepts, in order."""
    if is_pydantic(config):
        return _pydantic_fields(config)
    if issubclass(config, msgspec.Struct):
        tag = config.__struct_config__.tag_field
        fields = {tag: Field(None)} if tag else {}
        for each in msgspec.structs.fields(config):
            default = msgspec.UNSET if each.default is msgspec.NODEFAULT else each.default
            fields[each.encode_name] = Field(each.name, each.required, each.type, default)
        return fields
    hints = typing.get_type_hints(config, include_extras=True)
    return {each.name: _dataclass_field(each, hints[each.name]) for each in dataclasses.fields(config) if each.init}


def signature_fields(cls: type) -> dict[str, Field] | None:
    """Return the keyword arguments of a constructor; None if it accepts any (``**kwargs``) or has no signature."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        each.name: Field(each.name, required=True)
        if each.default is each.empty
        else Field(each.name, default=each.default)
        for each in parameters
        if each.kind in by_name
    }


def _dataclass_field(field: dataclasses.Field[Any], hint: Any) -> Field:
    default = msgspec.UNSET if field.default is dataclasses.MISSING else field.default
    required = default is msgspec.UNSET and field.default_factory is dataclasses.MISSING
    return Field(field.name, required, hint, default)


def _pydantic_fields(config: Any) -> dict[str, Field]:
    settings: Any = getattr(config, "model_config", None) or getattr(config, "__pydantic_config__", None) or {}
    by_name = settings.get("populate_by_name") or settings.get("validate_by_name")
    infos = getattr(config, "__pydantic_fields__", None) or config.model_fields
    fields: dict[str, Field] = {}
    for name, info in infos.items():
        if getattr(info, "init", None) is False:
            continue
        alias = info.validation_alias
        choices = getattr(alias, "choices", [alias])
        keys = [getattr(choice, "path", [choice])[0] for choice in choices]
        for key in [name] if alias is None else [*keys, name] if by_name else keys:
            fields[key] = Field(name, info.is_required())
    return fields
