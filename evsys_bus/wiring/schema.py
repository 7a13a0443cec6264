"""Describe a callback's params: as JSON schema, as an example, and in words.

The schema has one form for msgspec, dataclasses, pydantic and plain constructors, so that errors and the command line
treat them alike. It is only a description; `evsys_bus.wiring.params` validates.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import UnionType
from typing import Any, Final, Union, cast, get_args, get_origin

import msgspec

from evsys_bus.wiring.fields import Field, fields_of, is_pydantic, signature_fields
from evsys_bus.wiring.registry import REGISTRY, Registry
from evsys_bus.wiring.spec import AdapterClass, CallbackSpec, PathPart

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


def json_schema(kind: str, *, registry: Registry = REGISTRY) -> Schema:
    """Return the JSON schema of a kind's params. It forbids unknown keys, as `build_callbacks` always does.

    Raises:
        ConfigError: The kind is unknown, or cannot be loaded.
    """
    return schema_of(registry.find(kind))


def example(kind: str, *, registry: Registry = REGISTRY) -> CallbackSpec:
    """Return a spec of a kind with the defaults of its params, and sample values for the required ones.

    Raises:
        ConfigError: The kind is unknown, or cannot be loaded.
    """
    schema = schema_of(registry.find(kind))
    parts: Schema = schema["properties"]
    wanted = [key for key, part in parts.items() if key in schema["required"] or part.get("default") is not None]
    return CallbackSpec(kind, {key: sample(parts[key], schema) for key in wanted})


def schema_of(cls: AdapterClass) -> Schema:
    """Return the schema of an adapter's params: of its Config, or from the signature of its constructor."""
    return _from_fields(cls, signature_fields(cls)) if cls.Config is None else config_schema(cls.Config)


def config_schema(config: type[Any]) -> Schema:
    """Return the schema of a Config."""
    if not is_pydantic(config):
        return _from_fields(config, fields_of(config))
    whole = _from_pydantic(config)
    top = _resolve(whole, whole)
    definitions: dict[str, Schema] = top.pop("$defs", {})
    return _closed(Schema(properties={}, required=[]) | top, definitions)


def locate(schema: Schema, path: Iterable[PathPart]) -> Schema:
    """Return the part of a schema for a path in the params; empty if it is unknown."""
    part = schema
    for step in path:
        options = [_resolve(each, schema) for each in _options(_resolve(part, schema))]
        found = (_inside(option, step) for option in options)
        part: Schema = next((each for each in found if each is not None), Schema())
    return _resolve(part, schema)


def keys_at(schema: Schema, path: Iterable[PathPart]) -> list[str]:
    """Return the keys that the schema names for a mapping at this path."""
    options = (_resolve(each, schema) for each in _options(locate(schema, path)))
    return [key for option in options for key in option.get("properties", {})]


def expected(part: Schema, whole: Schema) -> str:
    """Describe a valid value in words, with its range: ``an integer >= 1``."""
    part = _resolve(part, whole)
    if "anyOf" in part or "oneOf" in part:
        return " or ".join(dict.fromkeys(expected(each, whole) for each in _options(part)))
    if "enum" in part:
        choices = ", ".join(as_json(each) for each in part["enum"])
        return choices if len(part["enum"]) == 1 else f"one of {choices}"
    if "const" in part:
        return as_json(part["const"])
    noun = "a path" if part.get("format") == "path" else _NOUNS.get(part.get("type", ""))
    if noun is None:
        return f"a {part['title']}" if "title" in part and "type" not in part else "a fitting value"
    if part["type"] == "array" and part.get("items"):
        noun += f", each item {expected(part['items'], whole)}"
    if part["type"] == "object" and "properties" in part:
        noun += f" with {', '.join(part['properties'])}"
    ranges = [f"{sign} {part[key]}" for key, sign in _BOUNDS if key in part]
    lengths = [f"of length {sign} {part[key]}" for key, sign in _LENGTHS if key in part]
    pattern = [f"matching {as_json(part['pattern'])}"] if "pattern" in part else []
    return " ".join([noun, " and ".join(ranges), *lengths, *pattern]).replace("  ", " ").strip()


def sample(part: Schema, whole: Schema) -> object:
    """Return a value that the schema allows: its example, its default, or a placeholder."""
    part = _resolve(part, whole)
    if part.get("examples"):
        return part["examples"][0]
    if part.get("default") is not None:
        return part["default"]
    if "anyOf" in part or "oneOf" in part:
        return next((value for each in _options(part) if (value := sample(each, whole)) is not None), None)
    return part["enum"][0] if "enum" in part else part.get("const", _made_up(part, whole))


def _made_up(part: Schema, whole: Schema) -> object:
    match part.get("type"):
        case "integer" | "number":
            return _number(part, whole=part["type"] == "integer")
        case "array":
            return [sample(part.get("items", {}), whole) for _ in range(part.get("minItems", 0))]
        case "object":
            return {key: sample(part["properties"][key], whole) for key in part.get("required", ())}
        case other:
            return {"boolean": True, "null": None}.get(other or "", "...")


def as_json(value: object) -> str:
    """Format a value as it is written in a spec; for a live object, the name of its type."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return f"a {type(value).__name__}"


def _number(part: Schema, *, whole: bool) -> float:
    low: float | None = part.get("minimum", part.get("exclusiveMinimum"))
    high: float | None = part.get("maximum", part.get("exclusiveMaximum"))
    if whole:
        if low is not None:
            return low if "minimum" in part else low + 1
        return 1 if high is None or high > 1 else high if "maximum" in part else high - 1
    if low is not None and high is not None:
        return (low + high) / 2
    return low + 1.0 if low is not None else high - 1.0 if high is not None else 1.0


def _resolve(part: Schema, whole: Schema) -> Schema:
    """Follow a reference; keys beside it (such as a default) are retained."""
    while "$ref" in part:
        target: Schema = whole.get("$defs", {}).get(part["$ref"].rpartition("/")[2], {})
        part = target | {key: value for key, value in part.items() if key != "$ref"}
    return part


def _options(part: Schema) -> Sequence[Schema]:
    return part.get("anyOf") or part.get("oneOf") or [part]


def _inside(part: Schema, step: PathPart) -> Schema | None:
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
    return schema | {"additionalProperties": True} if fields is None else _closed(schema, definitions)


def _from_type(wanted: Any) -> tuple[Schema, dict[str, Schema]]:
    """Return the schema of a type, and the definitions it refers to."""
    try:
        (part,), found = msgspec.json.schema_components(
            [wanted], schema_hook=_other_type, ref_template="#/$defs/{name}"
        )
    except TypeError:
        if get_origin(wanted) not in (Union, UnionType):
            return {}, {}
        # msgspec does not support a union such as `str | Path`, but supports its members.
        members = [_from_type(each) for each in get_args(wanted)]
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


def _closed(schema: Schema, definitions: dict[str, Schema]) -> Schema:
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
