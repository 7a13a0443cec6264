"""Rows of text in columns for results on stdout: without boxes and colours, so that ``cut`` can read them.

On a terminal that is too narrow they are laid out differently, so that no word is broken.
"""

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Final

GAP: Final = "   "
_INNER: Final = "  "
_LEAST_ROOM: Final = 20
"""Text is not wrapped into fewer columns than this."""


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Return one line per row; every column but the last is as wide as its widest cell."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)] if rows else []
    lines: list[str] = []
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + GAP.join(cells)).rstrip())
    return lines


def table(rows: Sequence[Sequence[str]], width: int | None = None, *, indent: str = "") -> list[str]:
    """Return `columns` with a head row; if the width is too small, return each row as ``head cell`` pairs."""
    lines = columns(rows, indent=indent)
    if width is None or all(_width(line) <= width for line in lines) or not rows:
        return lines
    heads, *rest = rows
    stacked: list[str] = []
    for row in rest:
        pairs = [f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True) if cell]
        stacked += [f"{indent}{heads[0]} {row[0]}", *_packed(pairs, width, indent + _INNER)]
    return stacked


def facts(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return `columns` of names and texts; long texts are wrapped in their column."""
    room = 0 if width is None or not rows else width - max(_width(name) for name, _ in rows) - len(GAP)
    if room < _LEAST_ROOM:
        return columns(rows)
    return columns([[name if at == 0 else "", line] for name, text in rows for at, line in _numbered(text, room)])


def wrapped(text: str, width: int | None = None, *, indent: str = "") -> list[str]:
    """Return the text wrapped to the width, with further lines indented.

    A command stays in one line, because a line that the terminal wraps can be copied as one.
    """
    if width is None or _width(text) + len(indent) <= width or "evsys-bus " in text or width < _LEAST_ROOM:
        return [f"{indent}{text}"]
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + _INNER,
        break_long_words=False,
        break_on_hyphens=False,
    )


def counted(count: int, thing: str) -> str:
    """Return ``1 arm`` or ``5 arms``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _numbered(text: str, room: int) -> list[tuple[int, str]]:
    lines = wrapped(text, room)
    return list(enumerate([lines[0], *(line.removeprefix(_INNER) for line in lines[1:])]))


def _packed(pairs: Sequence[str], width: int, indent: str) -> list[str]:
    """Put as many pairs on each line as fit, at least one."""
    lines: list[str] = []
    for pair in pairs:
        longer = f"{lines[-1]}{GAP}{pair}" if lines else ""
        if lines and _width(longer) <= width:
            lines[-1] = longer
        else:
            lines += wrapped(pair, width, indent=indent)
    return lines


def _width(text: str) -> int:
    """Return the width in cells of a terminal."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
