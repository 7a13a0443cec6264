"""Params against a Config: the values to construct with, or findings about each key that does not fit.

Strict: "1" is no int and True is no int, an int is a float. Unknown keys are findings whatever the Config says, at any
depth. What the findings are called in an error is not known here.
"""

import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

import msgspec

from evsys_bus.wiring.convert import convert, stray
from evsys_bus.wiring.fields import Field, fields_of, is_config, is_pydantic, signature_fields
from evsys_bus.wiring.spec import AdapterClass, PathPart

# Any, throughout: params are whatever a user wrote, and a built Config whatever its author made of them.
Params = Mapping[str, Any]

_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_PART: Final = re.compile(r"\.(?P<key>[^.\[]+)|\[(?:(?P<index>\d+)|\.\.\.)\]")
_FIELD: Final = re.compile(r"Object (?P<trouble>contains unknown|missing required) field `(?P<key>.*)`")


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong with the params."""

    trouble: Literal["unknown", "missing", "wrong"]
    path: tuple[PathPart, ...]
    """Within the params; the last part is the key."""
    why: str | None = None
    """In the validator's words."""


def check_params(cls: AdapterClass, params: Params) -> tuple[dict[str, Any], list[Finding]]:
    """The keyword arguments for ``cls``, as its Config converted them, and only those that were given; or findings."""
    config = cls.Config
    if config is not None:
        built, findings = check_config(config, params)
        if findings:
            return {}, findings
        fields = fields_of(config)
        attributes = [attribute for key in params if (attribute := fields[key].attribute) is not None]
        return {attribute: getattr(built, attribute) for attribute in attributes}, []
    fields = signature_fields(cls)
    if fields is None:
        return dict(params), []
    known = {key: value for key, value in params.items() if key in fields}
    return known, [*_unknown(fields, params), *_missing(fields, known)]


def check_config(config: type[Any], params: Params) -> tuple[Any, list[Finding]]:
    """The built Config, or findings and whatever could be built."""
    fields = fields_of(config)
    findings = _unknown(fields, params)
    known = {key: value for key, value in params.items() if key in fields}
    built, wrong = _by_pydantic(config, known) if is_pydantic(config) else _by_msgspec(config, fields, known)
    findings += wrong or [Finding("unknown", path) for path in stray(known, built)]
    return built, findings


def _unknown(fields: dict[str, Field], params: Params) -> list[Finding]:
    return [Finding("unknown", (key,)) for key in params if key not in fields]


def _missing(fields: dict[str, Field], params: Params) -> list[Finding]:
    return [Finding("missing", (key,)) for key, field in fields.items() if field.required and key not in params]


def _by_msgspec(config: type[Any], fields: dict[str, Field], params: Params) -> tuple[Any, list[Finding]]:
    """Each key by itself first, because msgspec stops at the first error; then the whole, for ``__post_init__``."""
    findings = _missing(fields, params)
    for key, value in params.items():
        findings += _wrong(fields[key].type, value, (key,))
    if findings:
        return None, findings
    try:
        return convert(params, config), []
    except msgspec.ValidationError as error:
        return None, [_finding(str(error), ())]


def _wrong(wanted: Any, value: object, at: tuple[PathPart, ...]) -> list[Finding]:
    """What is wrong with a value: all of it, where its type is a plain Config or a list or mapping of something."""
    try:
        convert(value, wanted)
    except msgspec.ValidationError as error:
        return _within(wanted, value, at) or [_finding(str(error), at)]
    return []


def _within(wanted: Any, value: object, at: tuple[PathPart, ...]) -> list[Finding]:
    options = [each for each in typing.get_args(wanted) if each is not type(None)]
    if typing.get_origin(wanted) in {typing.Union, types.UnionType} and len(options) == 1:
        wanted = options[0]
    inner = typing.get_args(wanted)
    if isinstance(value, list) and typing.get_origin(wanted) is list:
        items = enumerate(cast("list[object]", value))
        return [each for index, item in items for each in _wrong(inner[0], item, (*at, index))]
    if not isinstance(value, Mapping):
        return []
    value = cast("Mapping[Any, Any]", value)
    if typing.get_origin(wanted) is dict:
        return [each for key, item in value.items() for each in _wrong(inner[1], item, (*at, str(key)))]
    if not (isinstance(wanted, type) and is_config(wanted)) or is_pydantic(wanted):
        return []
    fields = fields_of(wanted)
    findings = [*_unknown(fields, value), *_missing(fields, value)]
    known = [(key, item) for key, item in value.items() if key in fields]
    findings = [Finding(each.trouble, (*at, *each.path)) for each in findings]
    return findings + [each for key, item in known for each in _wrong(fields[key].type, item, (*at, str(key)))]


def _finding(text: str, at: tuple[PathPart, ...]) -> Finding:
    """Read msgspec's one-line error: what, and where within the value."""
    place = _PLACE.search(text)
    if place is not None:
        at += tuple(
            part["key"] or (int(part["index"]) if part["index"] else "...") for part in _PART.finditer(place["path"])
        )
        text = text[: place.start()]
    field = _FIELD.fullmatch(text)
    if field is not None:
        return Finding("unknown" if field["trouble"] == "contains unknown" else "missing", (*at, field["key"]))
    return Finding("wrong", at, text)


def _by_pydantic(config: type[Any], params: Params) -> tuple[Any, list[Finding]]:
    """Strict as Python first, so that live objects stay what they are; then strict as JSON, which is what YAML gives.

    Only the second takes text for a path or an enum, and a list for a tuple.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import PydanticSerializationError, to_json

    adapter: TypeAdapter[Any] = TypeAdapter(config)
    try:
        return adapter.validate_python(params, strict=True), []
    except ValidationError as error:
        problem = error
    try:
        return adapter.validate_json(to_json(params, inf_nan_mode="constants"), strict=True), []
    except PydanticSerializationError:
        pass  # a live object among them: the first verdict stands
    except ValidationError as error:
        problem = error
    troubles: dict[str, Literal["unknown", "missing"]] = {"extra_forbidden": "unknown", "missing": "missing"}
    return None, [
        Finding(troubles.get(each["type"], "wrong"), each["loc"], each["msg"])
        for each in problem.errors(include_url=False)
    ]
