"""Rows of text in columns, for results on stdout: no boxes, no colours, so that ``cut`` and eyes can read them."""

import unicodedata
from collections.abc import Sequence
from typing import Final

GAP: Final = "   "


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """One line per row; every column but the last as wide as its widest cell."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)] if rows else []
    lines: list[str] = []
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + GAP.join(cells)).rstrip())
    return lines


def counted(count: int, thing: str) -> str:
    """``1 arm``, ``5 arms``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _width(text: str) -> int:
    """In cells of a terminal."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)
