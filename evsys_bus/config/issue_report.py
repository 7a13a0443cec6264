"""Error messages for invalid params: the path, what was expected, what was given, and an example."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.redact import is_secret_key
from evsys_bus.config.schema import Schema, adapter_schema, as_json, describe, keys_at, locate, sample_value
from evsys_bus.config.spec import AdapterClass, PathPart, join_path
from evsys_bus.config.validate import Issue
from evsys_bus.errors import ConfigError, Location, UnknownParamError, WrongParamError, did_you_mean
from evsys_bus.sink import Sink

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
        for near in difflib.get_close_matches(str(each.path[-1]), keys_at(context.schema, each.path[:-1]), n=1)
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
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = did_you_mean(str(key), known) if known or outer else f"it takes no {context.noun}s"
    parts = [hint or "leave it out", *(_usage_hint((*outer, each), context.schema) for each in near), context.help]
    owner = f'"{_format_path(outer)}" of {context.label}' if outer else context.label
    what = f'{owner} has no {"key" if outer else context.noun} "{key}"'
    return UnknownParamError(what, where=Location(path_of(issue.path)), fix=_join_hints(*parts))


def _missing_error(context: ErrorContext, issue: Issue, params: Mapping[str, Any], path_of: _PathOf) -> ConfigError:
    part = locate(context.schema, issue.path)
    what = f'{context.label} needs "{_format_path(issue.path)}": {describe(part, context.schema)}'
    *outer, key = issue.path
    given = _value_at(params, outer)
    siblings = [str(each) for each in cast("Mapping[Any, Any]", given)] if isinstance(given, Mapping) else []
    unknown_keys = set(siblings).difference(keys_at(context.schema, outer))
    near = difflib.get_close_matches(str(key), unknown_keys, n=1)
    hint = f'rename "{near[0]}" to "{key}"' if near else f"add {_example_line(issue.path, context.schema)}"
    return WrongParamError(what, where=Location(path_of(outer)), fix=_join_hints(hint, context.help))


def _invalid_error(context: ErrorContext, issue: Issue, params: Mapping[str, Any], path_of: _PathOf) -> ConfigError:
    where = Location(path_of(issue.path))
    if not issue.path:
        what = f"the {context.noun}s of {context.label} do not fit together"
        return WrongParamError(what, where=where, why=issue.why, fix=_join_hints("see why", context.help))
    part = locate(context.schema, issue.path)
    given = _value_at(params, issue.path)
    head = f'"{_format_path(issue.path)}" of {context.label}'
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


def _format_path(path: Iterable[PathPart]) -> str:
    return join_path("$", *path).removeprefix("$").removeprefix(".")


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
