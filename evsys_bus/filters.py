"""The filter language for runs, of `evsys-bus runs --filter` and the dashboard: `parse_filter` makes a `Filter` of it.

    filter    term term ...               all terms must match; an empty filter matches everything
    term      text                        the text is in the name, arm, experiment, a tag or the notes, in any case
              "two words"                 likewise; quotes also make a name or value of words with blanks or signs
              /regex/                     a regular expression finds something in one of these
              name:value                  the field has this value, in any case; * and ? match any letters
              name=value  name!=value     likewise; or has not
              name>value                  also >=, <, <=: numbers, and durations such as 90s, 10m, 2h, 1d
              -term                       the term does not match

A name is a field (``run``, ``state``, ``arm``, ``seed``, ``experiment``, ``tag``, ``steps``, ``age``, ``duration``), a
config key (``lr``, ``optimizer.lr``), or a metric, which means its last value (``loss``, ``val/acc``; ``best loss`` in
quotes). A run that does not have it matches only ``!=``.

Example:
    >>> class Run:
    ...     texts = ["ppo-7", "baseline"]
    ...     def field(self, name):
    ...         return {"lr": 3e-4, "state": "failed"}.get(name)
    >>> parse_filter("ppo lr>1e-4 state:failed").matches(Run())
    True
    >>> parse_filter("ppo -state:fail*").matches(Run())
    False
"""

import fnmatch
import math
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

_BARE: Final = re.compile(r"[^\s:=<>!\"]+")
_OPERATOR: Final = re.compile(r">=|<=|!=|[:=<>]")
_QUOTED: Final = re.compile(r'"([^"]*)"')
_REGEX: Final = re.compile(r"/((?:[^/\\]|\\.|/(?!\s|$))*)/(?=\s|$)")
_VALUE: Final = re.compile(r"[^\s\"]+")
_NUMBER: Final = re.compile(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)([smhd]?)", re.IGNORECASE)
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


class Searchable(Protocol):
    """What a filter is applied to."""

    @property
    def texts(self) -> Collection[str]:
        """The texts that words and regular expressions are searched in."""
        ...

    def field(self, name: str) -> object:
        """Return the value of a field: a number, a text, or a list of them; None if there is none of this name."""
        ...


@dataclass(frozen=True)
class _Term:
    matches: Callable[[Searchable], bool]
    is_negated: bool


@dataclass(frozen=True)
class Filter:
    """A parsed filter."""

    text: str
    terms: tuple[_Term, ...]

    def matches(self, record: Searchable) -> bool:
        """Return whether all terms match."""
        return all(term.matches(record) != term.is_negated for term in self.terms)


def parse_filter(text: str) -> Filter:
    """Parse a filter.

    Raises:
        ValueError: It does not follow the grammar; the message names the part and what to write instead.
    """
    terms: list[_Term] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        is_negated = text[position] == "-" and text[position + 1 : position + 2].strip() != ""
        matches, position = _parse_term(text, position + is_negated)
        terms.append(_Term(matches, is_negated))
    return Filter(text, tuple(terms))


def _parse_term(text: str, start: int) -> tuple[Callable[[Searchable], bool], int]:
    """Return the test of the term that starts here, and the position after it."""
    if text[start] == "/":
        found = _REGEX.match(text, start)
        if found is None:
            raise ValueError(f'{text[start:]} has no closing slash; write /regex/, or "{text[start:]}" for the text')
        try:
            pattern = re.compile(found[1])
        except re.error as error:
            raise ValueError(f"/{found[1]}/ is no regular expression: {error}") from None
        return (lambda record: any(map(pattern.search, record.texts))), found.end()
    name, position = _parse_word(text, start, _BARE)
    if name is None:
        raise ValueError(f"{text[start:]!r} begins with a sign; write a name before it, as in lr>1e-4")
    sign = _OPERATOR.match(text, position)
    if sign is None:
        if position < len(text) and not text[position].isspace():
            raise ValueError(f"{text[start:]!r} has a quote or a sign inside a word; put the whole word in quotes")
        word = name.casefold()
        return (lambda record: any(word in each.casefold() for each in record.texts)), position
    value, position = _parse_word(text, sign.end(), _VALUE)
    if value is None:
        raise ValueError(f'{name}{sign[0]} has no value; write one, or "" for an empty text')
    if sign[0] not in _COMPARISONS:
        is_equal = sign[0] != "!="
        return (lambda record: _equals(record.field(name), value) == is_equal), position
    number = parse_number(value)
    if number is None:
        raise ValueError(f"{name}{sign[0]}{value} compares with no number; write one, such as 1e-4, or 10m for a time")
    compare = _COMPARISONS[sign[0]]
    return (lambda record: any(compare(each, number) for each in _numbers(record.field(name)))), position


def _parse_word(text: str, start: int, bare: re.Pattern[str]) -> tuple[str | None, int]:
    """Return the word or the quoted text that starts here, and the position after it."""
    if text[start : start + 1] == '"':
        found = _QUOTED.match(text, start)
        if found is None:
            raise ValueError(f"{text[start:]} has no closing quote")
        return found[1], found.end()
    found = bare.match(text, start)
    return (None, start) if found is None else (found[0], found.end())


def parse_number(text: str) -> float | None:
    """Return a number, or a duration such as ``2h`` in seconds; None if the text is neither."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return {"inf": math.inf, "-inf": -math.inf}.get(text.casefold())
    return float(found[1]) * _SECONDS[found[2].lower()]


def _values(value: object) -> list[Any]:
    if value is None:
        return []
    return [*cast("Collection[Any]", value)] if isinstance(value, list | tuple) else [value]


def _numbers(value: object) -> list[float]:
    return [each for each in _values(value) if isinstance(each, int | float) and not isinstance(each, bool)]


def _equals(value: object, expected: str) -> bool:
    """Return whether the value, or one in a list, is the expected one: a number, or a text with wildcards."""
    number, pattern = parse_number(expected), re.compile(fnmatch.translate(expected.casefold()), re.DOTALL)
    return any(
        (number is not None and isinstance(each, int | float) and not isinstance(each, bool) and each == number)
        or pattern.match(str(each).casefold()) is not None
        for each in _values(value)
    )
