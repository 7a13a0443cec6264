"""Error messages for invalid params: the path, what was expected, what was given, and an example."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.redaction import looks_secret
from evsys_bus.errors import ConfigError, UnknownParamError, Where, WrongParamError, did_you_mean
from evsys_bus.sink import Sink
from evsys_bus.wiring.params import Finding
from evsys_bus.wiring.schema import Schema, as_json, expected, keys_at, locate, sample, schema_of
from evsys_bus.wiring.spec import AdapterClass, PathPart, join

_SHOWN: Final = 60
"""Length of a value in an error message."""

_Place = Callable[[Sequence[PathPart]], str]


class Subject(msgspec.Struct, frozen=True):
    """The owner of the params, for error messages."""

    label: str
    """``callback "print_progress"``."""
    schema: Schema
    help: str
    """Where all params are documented; the end of every fix."""
    noun: str = "param"


def callback_subject(kind: str, cls: AdapterClass) -> Subject:
    """Return the error context of a callback or a sink."""
    noun = "sink" if issubclass(cls, Sink) else "callback"
    return Subject(f'{noun} "{kind}"', schema_of(cls), f"all params: evsys-bus adapters {kind}")


def param_errors(
    subject: Subject,
    params: Mapping[str, Any],
    findings: Iterable[Finding],
    place: Callable[[Sequence[PathPart]], str],
) -> list[ConfigError]:
    """Return one error per issue, in order.

    A missing key is not reported if an unknown key is a misspelling of it.

    Args:
        subject: The owner of the params.
        params: The given params.
        findings: The issues found in them.
        place: Maps a path within the params to a JSON path.
    """
    findings = list(findings)
    slips = {
        (*each.path[:-1], near)
        for each in findings
        if each.trouble == "unknown"
        for near in difflib.get_close_matches(str(each.path[-1]), keys_at(subject.schema, each.path[:-1]), n=1)
    }
    reports = {"unknown": _unknown, "missing": _missing, "wrong": _wrong}
    return [
        reports[each.trouble](subject, each, params, place)
        for each in findings
        if not (each.trouble == "missing" and each.path in slips)
    ]


def _unknown(subject: Subject, finding: Finding, _params: Mapping[str, Any], place: _Place) -> ConfigError:
    *outer, key = finding.path
    known = keys_at(subject.schema, outer)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = did_you_mean(str(key), known) if known or outer else f"it takes no {subject.noun}s"
    parts = [hint or "leave it out", *(_usage((*outer, each), subject.schema) for each in near), subject.help]
    owner = f'"{_dotted(outer)}" of {subject.label}' if outer else subject.label
    what = f'{owner} has no {"key" if outer else subject.noun} "{key}"'
    return UnknownParamError(what, where=Where(place(finding.path)), fix=_sentence(*parts))


def _missing(subject: Subject, finding: Finding, params: Mapping[str, Any], place: _Place) -> ConfigError:
    part = locate(subject.schema, finding.path)
    what = f'{subject.label} needs "{_dotted(finding.path)}": {expected(part, subject.schema)}'
    *outer, key = finding.path
    given = _given(params, outer)
    beside = [str(each) for each in cast("Mapping[Any, Any]", given)] if isinstance(given, Mapping) else []
    strays = set(beside).difference(keys_at(subject.schema, outer))
    near = difflib.get_close_matches(str(key), strays, n=1)
    hint = f'rename "{near[0]}" to "{key}"' if near else f"add {_line(finding.path, subject.schema)}"
    return WrongParamError(what, where=Where(place(outer)), fix=_sentence(hint, subject.help))


def _wrong(subject: Subject, finding: Finding, params: Mapping[str, Any], place: _Place) -> ConfigError:
    where = Where(place(finding.path))
    if not finding.path:
        what = f"the {subject.noun}s of {subject.label} do not fit together"
        return WrongParamError(what, where=where, why=finding.why, fix=_sentence("see why", subject.help))
    part = locate(subject.schema, finding.path)
    given = _given(params, finding.path)
    head = f'"{_dotted(finding.path)}" of {subject.label}'
    if finding.why is not None and _is_free_text(part) and isinstance(given, str) and given:
        what = f"{head} cannot be {_shown(given, finding)}"  # the type is right; the reason explains the rest
    else:
        what = f"{head} must be {expected(part, subject.schema)}, not {_shown(given, finding)}"
    choices = [each for each in part.get("enum", ()) if isinstance(each, str)]
    hint = did_you_mean(given, choices) if choices and isinstance(given, str) else ""
    fix = _sentence(hint, f"for example {_line(finding.path, subject.schema)}", subject.help)
    return WrongParamError(what, where=where, why=finding.why, fix=fix)


def _is_free_text(part: Schema) -> bool:
    return not part.keys() & {"enum", "pattern"} and "string" in str([part.get("type"), part.get("anyOf")])


def _sentence(*parts: str) -> str:
    return "   ".join(each for each in parts if each)


def _usage(path: Iterable[PathPart], schema: Schema) -> str:
    path = tuple(path)
    return f"({expected(locate(schema, path), schema)}; for example {_line(path, schema)})"


def _line(path: Sequence[PathPart], schema: Schema) -> str:
    """Return a line of a spec that is valid at this path; for an item of a list, only the value."""
    value = as_json(sample(locate(schema, path), schema))
    return value if isinstance(path[-1], int) else f"{path[-1]}: {value}"


def _dotted(path: Iterable[PathPart]) -> str:
    return join("$", *path).removeprefix("$").removeprefix(".")


def _given(params: Any, path: Iterable[PathPart]) -> Any:
    """Return the value at a path; if the path does not exist, the last value on it."""
    for step in path:
        try:
            params = params[step]
        except (LookupError, TypeError):
            break
    return params


def _shown(value: object, finding: Finding) -> str:
    """Format a value, cut to a limit; hidden if a key on its path names a credential."""
    if any(looks_secret(part) for part in finding.path):
        return f"this {type(value).__name__} (hidden)"
    text = as_json(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
