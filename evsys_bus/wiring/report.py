"""Findings about params as errors that people can act on: the place, what was expected, what was given, an example."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from evsys_bus.callback import Callback
from evsys_bus.errors import ConfigError, UnknownParamError, Where, WrongParamError, did_you_mean
from evsys_bus.wiring.params import Finding
from evsys_bus.wiring.schema import Schema, as_json, expected, keys_at, locate, sample, schema_of
from evsys_bus.wiring.spec import PathPart, join

_SECRET_ENDINGS: Final = frozenset(
    {"auth", "credential", "credentials", "key", "passwd", "password", "secret", "token"}
)
_SHOWN: Final = 60
"""Characters of a given value that an error repeats."""


def param_errors(
    kind: str, cls: type[Callback], params: Mapping[str, Any], findings: Iterable[Finding], path: str
) -> list[ConfigError]:
    """One error per finding, in order. Any: the params are whatever a user wrote.

    A required key is not reported as missing where an unknown one nearly is it: that is one slip, not two.
    """
    findings = list(findings)
    schema = schema_of(cls)
    slips = {
        (*each.path[:-1], near)
        for each in findings
        if each.trouble == "unknown"
        for near in difflib.get_close_matches(str(each.path[-1]), keys_at(schema, each.path[:-1]), n=1)
    }
    reports = {"unknown": _unknown, "missing": _missing, "wrong": _wrong}
    return [
        reports[each.trouble](kind, each, schema, params, path)
        for each in findings
        if not (each.trouble == "missing" and each.path in slips)
    ]


def _unknown(kind: str, finding: Finding, schema: Schema, _params: Mapping[str, Any], path: str) -> ConfigError:
    *outer, key = finding.path
    known = keys_at(schema, outer)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = did_you_mean(str(key), known) if known or outer else "it takes no params"
    parts = [hint or "leave it out", *(_usage((*outer, each), schema) for each in near), _all(kind)]
    subject = f'"{_dotted(outer)}" of callback "{kind}"' if outer else f'callback "{kind}"'
    what = f'{subject} has no {"key" if outer else "param"} "{key}"'
    return UnknownParamError(what, where=Where(join(path, *finding.path)), fix="   ".join(parts))


def _missing(kind: str, finding: Finding, schema: Schema, params: Mapping[str, Any], path: str) -> ConfigError:
    part = locate(schema, finding.path)
    what = f'callback "{kind}" needs "{_dotted(finding.path)}": {expected(part, schema)}'
    *outer, key = finding.path
    given = _given(params, outer)
    beside = [str(each) for each in cast("Mapping[Any, Any]", given)] if isinstance(given, Mapping) else []
    strays = set(beside).difference(keys_at(schema, outer))
    near = difflib.get_close_matches(str(key), strays, n=1)
    hint = f'rename "{near[0]}" to "{key}"' if near else f"add {_line(finding.path, schema)}"
    return WrongParamError(what, where=Where(join(path, *outer)), fix=f"{hint}   {_all(kind)}")


def _wrong(kind: str, finding: Finding, schema: Schema, params: Mapping[str, Any], path: str) -> ConfigError:
    where = Where(join(path, *finding.path))
    if not finding.path:
        what = f'the params of callback "{kind}" do not fit together'
        return WrongParamError(what, where=where, why=finding.why, fix=f"see why   {_all(kind)}")
    part = locate(schema, finding.path)
    given = _given(params, finding.path)
    what = (
        f'"{_dotted(finding.path)}" of callback "{kind}" must be {expected(part, schema)}, not {_shown(given, finding)}'
    )
    choices = [each for each in part.get("enum", ()) if isinstance(each, str)]
    hint = f"{did_you_mean(given, choices)}   " if choices and isinstance(given, str) else ""
    fix = f"{hint}for example {_line(finding.path, schema)}   {_all(kind)}"
    return WrongParamError(what, where=where, why=finding.why, fix=fix)


def _usage(path: Iterable[PathPart], schema: Schema) -> str:
    path = tuple(path)
    return f"({expected(locate(schema, path), schema)}; for example {_line(path, schema)})"


def _line(path: Sequence[PathPart], schema: Schema) -> str:
    """A line of a spec that fits at this place; within a list it is the value alone."""
    value = as_json(sample(locate(schema, path), schema))
    return value if isinstance(path[-1], int) else f"{path[-1]}: {value}"


def _all(kind: str) -> str:
    return f"all params: evsys-bus adapters {kind}"


def _dotted(path: Iterable[PathPart]) -> str:
    return join("$", *path).removeprefix("$").removeprefix(".")


def _given(params: Any, path: Iterable[PathPart]) -> Any:
    """Any: the params are whatever a user wrote. Where the way cannot be followed, the last value on it."""
    for step in path:
        try:
            params = params[step]
        except (LookupError, TypeError):
            break
    return params


def _shown(value: object, finding: Finding) -> str:
    """The value, bounded; hidden where a key on the way to it looks like a credential's."""
    if any(str(part).lower().rpartition("_")[2] in _SECRET_ENDINGS for part in finding.path):
        return f"this {type(value).__name__} (hidden)"
    text = as_json(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
