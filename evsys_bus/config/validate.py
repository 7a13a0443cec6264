"""Validate params against a Config: the values to construct with, or an error for each invalid key.

Validation is strict: neither "1" nor True is an int; an int is a valid float. Unknown keys are invalid at any depth,
even if the Config allows them. Values are converted by msgspec's rules, and also to types that it does not support:
paths, live objects, and unions such as ``str | Path``, whose members are tried in the order in which they are written.
An error names the path, what was expected, what was given, and an example.
"""

import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal, cast

import msgspec

from evsys_bus.codec.redact import is_secret_key
from evsys_bus.config.params_schema import (
    Field,
    Schema,
    adapter_schema,
    as_json,
    config_fields,
    describe,
    is_config,
    is_pydantic,
    keys_at,
    locate,
    sample_value,
    signature_fields,
)
from evsys_bus.config.spec import AdapterClass, PathPart, display_path
from evsys_bus.errors import ConfigError, Location, UnknownParamError, WrongParamError, closest_word, did_you_mean
from evsys_bus.sink import Sink

Params = Mapping[str, Any]

_PATH_SUFFIX: Final = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_PATH_PART: Final = re.compile(r"\.(?P<key>[^.\[]+)|\[(?:(?P<index>\d+)|\.\.\.)\]")
_FIELD: Final = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<key>.*)`")


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
        return Issue("unknown" if field["problem"] == "contains unknown" else "missing", (*path, field["key"]))
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


class _ByConstructor(_OneOf):
    """Placeholder for a Struct or dataclass with a field that msgspec does not support: ``_ByConstructor[Config]``."""


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


_MAX_VALUE_CHARS: Final = 60
"""Length of a value in an error message."""

_PathOf = Callable[[Sequence[PathPart]], str]


class ErrorContext(msgspec.Struct, frozen=True):
    """The owner of the params, for error messages."""

    label: str
    """``callback "print_progress"``."""
    schema: Schema
    help: str
    """Where all params are documented; the end of every fix."""
    noun: str = "param"


def callback_context(kind: str, cls: AdapterClass) -> ErrorContext:
    """Return the error context of a callback or a sink."""
    noun = "sink" if issubclass(cls, Sink) else "callback"
    return ErrorContext(f'{noun} "{kind}"', adapter_schema(cls), f"all params: evsys-bus adapters {kind}")


def param_errors(
    context: ErrorContext,
    params: Mapping[str, Any],
    issues: Iterable[Issue],
    path_of: Callable[[Sequence[PathPart]], str],
) -> list[ConfigError]:
    """Return one error per issue, in order.

    A missing key is not reported if an unknown key is a misspelling of it.

    Args:
        context: The owner of the params.
        params: The given params.
        issues: The issues found in them.
        path_of: Maps a path within the params to a JSON path.
    """
    issues = list(issues)
    misspelled = {
        (*each.path[:-1], near)
        for each in issues
        if each.kind == "unknown"
        for near in [closest_word(str(each.path[-1]), keys_at(context.schema, each.path[:-1]))]
        if near is not None
    }
    builders = {"unknown": _unknown_error, "missing": _missing_error, "wrong": _invalid_error}
    return [
        builders[each.kind](context, each, params, path_of)
        for each in issues
        if not (each.kind == "missing" and each.path in misspelled)
    ]


def _unknown_error(context: ErrorContext, issue: Issue, _params: Mapping[str, Any], path_of: _PathOf) -> ConfigError:
    *outer, key = issue.path
    known = keys_at(context.schema, outer)
    near = closest_word(str(key), known)
    hint = did_you_mean(str(key), known) if known or outer else f"it takes no {context.noun}s"
    usage = "" if near is None else _usage_hint((*outer, near), context.schema)
    parts = [hint or "leave it out", usage, context.help]
    owner = f'"{display_path(outer)}" of {context.label}' if outer else context.label
    what = f'{owner} has no {"key" if outer else context.noun} "{key}"'
    return UnknownParamError(what, where=Location(path_of(issue.path)), fix=_join_hints(*parts))


def _missing_error(context: ErrorContext, issue: Issue, params: Mapping[str, Any], path_of: _PathOf) -> ConfigError:
    part = locate(context.schema, issue.path)
    what = f'{context.label} needs "{display_path(issue.path)}": {describe(part, context.schema)}'
    *outer, key = issue.path
    given = _value_at(params, outer)
    siblings = [str(each) for each in cast("Mapping[Any, Any]", given)] if isinstance(given, Mapping) else []
    unknown_keys = set(siblings).difference(keys_at(context.schema, outer))
    near = closest_word(str(key), unknown_keys)
    hint = f'rename "{near}" to "{key}"' if near is not None else f"add {_example_line(issue.path, context.schema)}"
    return WrongParamError(what, where=Location(path_of(outer)), fix=_join_hints(hint, context.help))


def _invalid_error(context: ErrorContext, issue: Issue, params: Mapping[str, Any], path_of: _PathOf) -> ConfigError:
    where = Location(path_of(issue.path))
    if not issue.path:
        what = f"the {context.noun}s of {context.label} do not fit together"
        return WrongParamError(what, where=where, why=issue.why, fix=_join_hints("see why", context.help))
    part = locate(context.schema, issue.path)
    given = _value_at(params, issue.path)
    head = f'"{display_path(issue.path)}" of {context.label}'
    if issue.why is not None and _is_free_text(part) and isinstance(given, str) and given:
        what = f"{head} cannot be {_format_value(given, issue)}"  # the type is right; the reason explains the rest
    else:
        what = f"{head} must be {describe(part, context.schema)}, not {_format_value(given, issue)}"
    choices = [each for each in part.get("enum", ()) if isinstance(each, str)]
    hint = did_you_mean(given, choices) if choices and isinstance(given, str) else ""
    fix = _join_hints(hint, f"for example {_example_line(issue.path, context.schema)}", context.help)
    return WrongParamError(what, where=where, why=issue.why, fix=fix)


def _is_free_text(part: Schema) -> bool:
    return not part.keys() & {"enum", "pattern"} and "string" in str([part.get("type"), part.get("anyOf")])


def _join_hints(*parts: str) -> str:
    return "   ".join(each for each in parts if each)


def _usage_hint(path: Iterable[PathPart], schema: Schema) -> str:
    path = tuple(path)
    return f"({describe(locate(schema, path), schema)}; for example {_example_line(path, schema)})"


def _example_line(path: Sequence[PathPart], schema: Schema) -> str:
    """Return a line of a spec that is valid at this path; for an item of a list, only the value."""
    value = as_json(sample_value(locate(schema, path), schema))
    return value if isinstance(path[-1], int) else f"{path[-1]}: {value}"


def _value_at(params: Any, path: Iterable[PathPart]) -> Any:
    """Return the value at a path; if the path does not exist, the last value on it."""
    for step in path:
        try:
            params = params[step]
        except (LookupError, TypeError):
            break
    return params


def _format_value(value: object, issue: Issue) -> str:
    """Format a value, cut to a limit; hidden if a key on its path names a credential."""
    if any(is_secret_key(part) for part in issue.path):
        return f"this {type(value).__name__} (hidden)"
    text = as_json(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."
