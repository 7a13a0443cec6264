"""Rows of text in columns for results on stdout: without boxes and colours, so that ``cut`` can read them.

On a terminal that is too narrow they are laid out differently, so that no word is broken.
"""

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Final

GAP: Final = "   "
_INNER: Final = "  "
_MIN_WRAP_COLUMNS: Final = 20
"""Text is not wrapped into fewer columns than this."""


def format_columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Return one line per row; every column but the last is as wide as its widest cell."""
    widths = [max(map(_cell_width, column)) for column in zip(*rows, strict=True)] if rows else []
    lines: list[str] = []
    for row in rows:
        cells = [cell + " " * (width - _cell_width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + GAP.join(cells)).rstrip())
    return lines


def format_table(rows: Sequence[Sequence[str]], width: int | None = None, *, indent: str = "") -> list[str]:
    """Return `format_columns` with a head row; if the width is too small, return each row as ``head cell`` pairs."""
    lines = format_columns(rows, indent=indent)
    if width is None or all(_cell_width(line) <= width for line in lines) or not rows:
        return lines
    heads, *rest = rows
    stacked: list[str] = []
    for row in rest:
        pairs = [f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True) if cell]
        stacked += [f"{indent}{heads[0]} {row[0]}", *_pack(pairs, width, indent + _INNER)]
    return stacked


def format_facts(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return `format_columns` of names and texts; long texts are wrapped in their column."""
    available = 0 if width is None or not rows else width - max(_cell_width(name) for name, _ in rows) - len(GAP)
    if available < _MIN_WRAP_COLUMNS:
        return format_columns(rows)
    return format_columns(
        [[name if at == 0 else "", line] for name, text in rows for at, line in _wrap_numbered(text, available)]
    )


def wrap(text: str, width: int | None = None, *, indent: str = "") -> list[str]:
    """Return the text wrapped to the width, with further lines indented.

    A command stays in one line, because a line that the terminal wraps can be copied as one.
    """
    if width is None or _cell_width(text) + len(indent) <= width or "evsys-bus " in text or width < _MIN_WRAP_COLUMNS:
        return [f"{indent}{text}"]
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + _INNER,
        break_long_words=False,
        break_on_hyphens=False,
    )


def pluralize(count: int, noun: str) -> str:
    """Return ``1 arm`` or ``5 arms``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _wrap_numbered(text: str, available: int) -> list[tuple[int, str]]:
    lines = wrap(text, available)
    return list(enumerate([lines[0], *(line.removeprefix(_INNER) for line in lines[1:])]))


def _pack(pairs: Sequence[str], width: int, indent: str) -> list[str]:
    """Put as many pairs on each line as fit, at least one."""
    lines: list[str] = []
    for pair in pairs:
        longer = f"{lines[-1]}{GAP}{pair}" if lines else ""
        if lines and _cell_width(longer) <= width:
            lines[-1] = longer
        else:
            lines += wrap(pair, width, indent=indent)
    return lines


def _cell_width(text: str) -> int:
    """Return the width in cells of a terminal."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
