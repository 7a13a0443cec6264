"""Validate params against a Config: returns the values to construct with, or an issue for each invalid key.

Validation is strict: neither "1" nor True is an int; an int is a valid float. Unknown keys are invalid at any depth,
even if the Config allows them.
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

Params = Mapping[str, Any]

_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_PART: Final = re.compile(r"\.(?P<key>[^.\[]+)|\[(?:(?P<index>\d+)|\.\.\.)\]")
_FIELD: Final = re.compile(r"Object (?P<trouble>contains unknown|missing required) field `(?P<key>.*)`")


class Finding(msgspec.Struct, frozen=True):
    """One error in the params."""

    trouble: Literal["unknown", "missing", "wrong"]
    path: tuple[PathPart, ...]
    """Path within the params; the last part is the key."""
    why: str | None = None
    """The message of the validator."""


def check_params(cls: AdapterClass, params: Params) -> tuple[dict[str, Any], list[Finding]]:
    """Return the given params as keyword arguments for ``cls``, converted by its Config; or issues."""
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
    """Return the built Config and the issues; with issues, the Config may be None."""
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
    """Validate each key on its own first, because msgspec stops at the first error; then all, for ``__post_init__``."""
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
    """Return the issues of a value: all of them if its type is a Config, a list or a mapping, else the first."""
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
    """Parse msgspec's one-line error into an issue with its path."""
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
    """Validate strictly in Python mode first, which accepts live objects; then strictly in JSON mode, as YAML needs.

    Only JSON mode accepts text for a path or an enum, and a list for a tuple.
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
        pass  # a live object among them: report the errors of Python mode
    except ValidationError as error:
        problem = error
    troubles: dict[str, Literal["unknown", "missing"]] = {"extra_forbidden": "unknown", "missing": "missing"}
    return None, [
        Finding(troubles.get(each["type"], "wrong"), each["loc"], each["msg"])
        for each in problem.errors(include_url=False)
    ]
