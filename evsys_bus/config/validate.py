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

from evsys_bus.config.config_fields import Field, config_fields, is_config, is_pydantic, signature_fields
from evsys_bus.config.convert import convert, unknown_keys
from evsys_bus.config.spec import AdapterClass, PathPart

Params = Mapping[str, Any]

_PATH_SUFFIX: Final = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_PATH_PART: Final = re.compile(r"\.(?P<key>[^.\[]+)|\[(?:(?P<index>\d+)|\.\.\.)\]")
_FIELD: Final = re.compile(r"Object (?P<trouble>contains unknown|missing required) field `(?P<key>.*)`")


class Issue(msgspec.Struct, frozen=True):
    """One error in the params."""

    kind: Literal["unknown", "missing", "wrong"]
    path: tuple[PathPart, ...]
    """Path within the params; the last part is the key."""
    why: str | None = None
    """The message of the validator."""


def check_params(cls: AdapterClass, params: Params) -> tuple[dict[str, Any], list[Issue]]:
    """Return the given params as keyword arguments for ``cls``, converted by its Config; or issues."""
    config = cls.Config
    if config is not None:
        built, issues = check_config(config, params)
        if issues:
            return {}, issues
        fields = config_fields(config)
        attributes = [attribute for key in params if (attribute := fields[key].attribute) is not None]
        return {attribute: getattr(built, attribute) for attribute in attributes}, []
    fields = signature_fields(cls)
    if fields is None:
        return dict(params), []
    known = {key: value for key, value in params.items() if key in fields}
    return known, [*_unknown_issues(fields, params), *_missing_issues(fields, known)]


def check_config(config: type[Any], params: Params) -> tuple[Any, list[Issue]]:
    """Return the built Config and the issues; with issues, the Config may be None."""
    fields = config_fields(config)
    issues = _unknown_issues(fields, params)
    known = {key: value for key, value in params.items() if key in fields}
    built, value_issues = (
        _validate_with_pydantic(config, known) if is_pydantic(config) else _validate_with_msgspec(config, fields, known)
    )
    issues += value_issues or [Issue("unknown", path) for path in unknown_keys(known, built)]
    return built, issues


def _unknown_issues(fields: dict[str, Field], params: Params) -> list[Issue]:
    return [Issue("unknown", (key,)) for key in params if key not in fields]


def _missing_issues(fields: dict[str, Field], params: Params) -> list[Issue]:
    return [Issue("missing", (key,)) for key, field in fields.items() if field.required and key not in params]


def _validate_with_msgspec(config: type[Any], fields: dict[str, Field], params: Params) -> tuple[Any, list[Issue]]:
    """Validate each key on its own first, because msgspec stops at the first error; then all, for ``__post_init__``."""
    issues = _missing_issues(fields, params)
    for key, value in params.items():
        issues += _value_issues(fields[key].type, value, (key,))
    if issues:
        return None, issues
    try:
        return convert(params, config), []
    except msgspec.ValidationError as error:
        return None, [_parse_issue(str(error), ())]


def _value_issues(target: Any, value: object, path: tuple[PathPart, ...]) -> list[Issue]:
    """Return the issues of a value: all of them if its type is a Config, a list or a mapping, else the first."""
    try:
        convert(value, target)
    except msgspec.ValidationError as error:
        return _nested_issues(target, value, path) or [_parse_issue(str(error), path)]
    return []


def _nested_issues(target: Any, value: object, path: tuple[PathPart, ...]) -> list[Issue]:
    options = [each for each in typing.get_args(target) if each is not type(None)]
    if typing.get_origin(target) in {typing.Union, types.UnionType} and len(options) == 1:
        target = options[0]
    inner = typing.get_args(target)
    if isinstance(value, list) and typing.get_origin(target) is list:
        items = enumerate(cast("list[object]", value))
        return [each for index, item in items for each in _value_issues(inner[0], item, (*path, index))]
    if not isinstance(value, Mapping):
        return []
    value = cast("Mapping[Any, Any]", value)
    if typing.get_origin(target) is dict:
        return [each for key, item in value.items() for each in _value_issues(inner[1], item, (*path, str(key)))]
    if not (isinstance(target, type) and is_config(target)) or is_pydantic(target):
        return []
    fields = config_fields(target)
    issues = [*_unknown_issues(fields, value), *_missing_issues(fields, value)]
    known = [(key, item) for key, item in value.items() if key in fields]
    issues = [Issue(each.kind, (*path, *each.path)) for each in issues]
    return issues + [each for key, item in known for each in _value_issues(fields[key].type, item, (*path, str(key)))]


def _parse_issue(text: str, path: tuple[PathPart, ...]) -> Issue:
    """Parse msgspec's one-line error into an issue with its path."""
    suffix = _PATH_SUFFIX.search(text)
    if suffix is not None:
        path += tuple(
            part["key"] or (int(part["index"]) if part["index"] else "...")
            for part in _PATH_PART.finditer(suffix["path"])
        )
        text = text[: suffix.start()]
    field = _FIELD.fullmatch(text)
    if field is not None:
        return Issue("unknown" if field["trouble"] == "contains unknown" else "missing", (*path, field["key"]))
    return Issue("wrong", path, text)


def _validate_with_pydantic(config: type[Any], params: Params) -> tuple[Any, list[Issue]]:
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
    kinds: dict[str, Literal["unknown", "missing"]] = {"extra_forbidden": "unknown", "missing": "missing"}
    return None, [
        Issue(kinds.get(each["type"], "wrong"), each["loc"], each["msg"]) for each in problem.errors(include_url=False)
    ]
