"""The keys of a Config and their JSON schema, as an example and in words.

A Config is a msgspec Struct, a dataclass or a pydantic model; without one, the signature of the constructor counts. The
schema has one form for all of these, so that errors and the command line treat them alike. It is only a description;
`evsys_bus.config.validate` validates. pydantic is never imported for a Config that is not a pydantic model.
"""

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import UnionType
from typing import Any, Final, Union, cast, get_args, get_origin

import msgspec

from evsys_bus.config.spec import AdapterClass, PathPart


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


Schema = dict[str, Any]
"""A JSON schema, or a part of one."""

_BOUNDS: Final = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
_LENGTHS: Final = (("minLength", ">="), ("maxLength", "<="), ("minItems", ">="), ("maxItems", "<="))
_NOUNS: Final = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}


def adapter_schema(cls: AdapterClass) -> Schema:
    """Return the schema of an adapter's params: of its Config, or from the signature of its constructor."""
    return _from_fields(cls, signature_fields(cls)) if cls.Config is None else config_schema(cls.Config)


def config_schema(config: type[Any]) -> Schema:
    """Return the schema of a Config."""
    if not is_pydantic(config):
        return _from_fields(config, config_fields(config))
    root = _from_pydantic(config)
    top = _resolve(root, root)
    definitions: dict[str, Schema] = top.pop("$defs", {})
    return _forbid_unknown_keys(Schema(properties={}, required=[]) | top, definitions)


def locate(schema: Schema, path: Iterable[PathPart]) -> Schema:
    """Return the part of a schema for a path in the params; empty if it is unknown."""
    part = schema
    for step in path:
        options = [_resolve(each, schema) for each in _options(_resolve(part, schema))]
        found = (_child_schema(option, step) for option in options)
        part: Schema = next((each for each in found if each is not None), Schema())
    return _resolve(part, schema)


def keys_at(schema: Schema, path: Iterable[PathPart]) -> list[str]:
    """Return the keys that the schema names for a mapping at this path."""
    options = (_resolve(each, schema) for each in _options(locate(schema, path)))
    return [key for option in options for key in option.get("properties", {})]


def describe(part: Schema, root: Schema) -> str:
    """Describe a valid value in words, with its range: ``an integer >= 1``."""
    part = _resolve(part, root)
    if "anyOf" in part or "oneOf" in part:
        return " or ".join(dict.fromkeys(describe(each, root) for each in _options(part)))
    if "enum" in part:
        choices = ", ".join(as_json(each) for each in part["enum"])
        return choices if len(part["enum"]) == 1 else f"one of {choices}"
    if "const" in part:
        return as_json(part["const"])
    noun = "a path" if part.get("format") == "path" else _NOUNS.get(part.get("type", ""))
    if noun is None:
        return f"a {part['title']}" if "title" in part and "type" not in part else "a fitting value"
    if part["type"] == "array" and part.get("items"):
        noun += f", each item {describe(part['items'], root)}"
    if part["type"] == "object" and "properties" in part:
        noun += f" with {', '.join(part['properties'])}"
    ranges = [f"{sign} {part[key]}" for key, sign in _BOUNDS if key in part]
    lengths = " and ".join(f"{sign} {part[key]}" for key, sign in _LENGTHS if key in part)
    pattern = [f'matching "{part["pattern"]}"'] if "pattern" in part else []
    return (
        " ".join([noun, " and ".join(ranges), *([f"of length {lengths}"] if lengths else []), *pattern])
        .replace("  ", " ")
        .strip()
    )


def sample_value(part: Schema, root: Schema) -> object:
    """Return a value that the schema allows: its example, its default, or a placeholder."""
    part = _resolve(part, root)
    if part.get("examples"):
        return part["examples"][0]
    if part.get("default") is not None:
        return part["default"]
    if "anyOf" in part or "oneOf" in part:
        return next((value for each in _options(part) if (value := sample_value(each, root)) is not None), None)
    return part["enum"][0] if "enum" in part else part.get("const", _placeholder_value(part, root))


def _placeholder_value(part: Schema, root: Schema) -> object:
    match part.get("type"):
        case "integer" | "number":
            return _sample_number(part, is_integer=part["type"] == "integer")
        case "array":
            return [sample_value(part.get("items", {}), root) for _ in range(part.get("minItems", 0))]
        case "object":
            return {key: sample_value(part["properties"][key], root) for key in part.get("required", ())}
        case other:
            return {"boolean": True, "null": None}.get(other or "", "...")


def as_json(value: object) -> str:
    """Format a value as it is written in a spec; for a live object, the name of its type."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return f"a {type(value).__name__}"


def _sample_number(part: Schema, *, is_integer: bool) -> float:
    low: float | None = part.get("minimum", part.get("exclusiveMinimum"))
    high: float | None = part.get("maximum", part.get("exclusiveMaximum"))
    if is_integer:
        if low is not None:
            return low if "minimum" in part else low + 1
        return 1 if high is None or high > 1 else high if "maximum" in part else high - 1
    if low is not None and high is not None:
        return (low + high) / 2
    return low + 1.0 if low is not None else high - 1.0 if high is not None else 1.0


def _resolve(part: Schema, root: Schema) -> Schema:
    """Follow a reference; keys beside it (such as a default) are retained."""
    while "$ref" in part:
        target: Schema = root.get("$defs", {}).get(part["$ref"].rpartition("/")[2], {})
        part = target | {key: value for key, value in part.items() if key != "$ref"}
    return part


def _options(part: Schema) -> Sequence[Schema]:
    return part.get("anyOf") or part.get("oneOf") or [part]


def _child_schema(part: Schema, step: PathPart) -> Schema | None:
    if isinstance(step, int):
        items: Sequence[Schema] = part.get("prefixItems", [])
        return items[step] if step < len(items) else part.get("items") or None
    rest: object = part.get("additionalProperties")
    return part.get("properties", {}).get(step) or (cast("Schema", rest) if isinstance(rest, dict) else None)


def _other_type(cls: type) -> Schema:
    """Describe a type that JSON does not have: a path is text; any other value can only be given from Python."""
    return {"type": "string", "format": "path"} if issubclass(cls, PurePath) else {"title": cls.__name__}


def _from_fields(cls: type, fields: Mapping[str, Field] | None) -> Schema:
    """Build a schema field by field, because msgspec fails at the first default that is not JSON, such as a path."""
    known = {key: field for key, field in (fields or {}).items() if field.attribute is not None}
    definitions: dict[str, Schema] = {}
    properties: dict[str, Schema] = {}
    for key, field in known.items():
        part, found = _from_type(field.type)
        properties[key] = part | _default(field)
        definitions |= found
    required = [key for key, field in known.items() if field.required]
    schema: Schema = {"title": cls.__name__, "type": "object", "properties": properties, "required": required}
    return schema | {"additionalProperties": True} if fields is None else _forbid_unknown_keys(schema, definitions)


def _from_type(annotation: Any) -> tuple[Schema, dict[str, Schema]]:
    """Return the schema of a type, and the definitions it refers to."""
    try:
        (part,), found = msgspec.json.schema_components(
            [annotation], schema_hook=_other_type, ref_template="#/$defs/{name}"
        )
    except TypeError:
        if get_origin(annotation) not in (Union, UnionType):
            return {}, {}
        # msgspec does not support a union such as `str | Path`, but supports its members.
        members = [_from_type(each) for each in get_args(annotation)]
        if not all(part for part, _ in members):
            return {}, {}
        definitions: dict[str, Schema] = {}
        for _, each in members:
            definitions |= each
        return {"anyOf": [part for part, _ in members]}, definitions
    return part, found


def _default(field: Field) -> Schema:
    if field.default is msgspec.UNSET:
        return {}
    value = str(field.default) if isinstance(field.default, PurePath) else field.default
    try:
        return {"default": msgspec.to_builtins(value)}
    except TypeError:
        return {}  # a live object


def _forbid_unknown_keys(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    for each in (schema, *definitions.values()):
        if "properties" in each:
            each["additionalProperties"] = False
    return schema | ({"$defs": definitions} if definitions else {})


def _from_pydantic(config: type[Any]) -> Schema:
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Tolerant(GenerateJsonSchema):
        """Leaves out types that JSON does not have, where pydantic's own generator raises."""

        ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  # as pydantic declares it

        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:  # noqa: ARG002  # pydantic's
            return {}

    return TypeAdapter[Any](config).json_schema(schema_generator=Tolerant)
