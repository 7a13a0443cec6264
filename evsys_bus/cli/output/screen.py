"""The terminal: colour, width, words that are not broken at its edge, and text without control characters.

What is printed, and to which stream, is up to each command.
"""

import os
import re
import sys
import unicodedata
from contextlib import suppress
from typing import Final, Literal, TextIO

import click

from evsys_bus.printable import printable

ColorMode = Literal["auto", "always", "never"]
_DEFAULT_COLUMNS: Final = 80

_STYLE: Final = re.compile(r"\x1b\[[0-9;]*m")
_WORDS: Final = re.compile(r"(\s*)((?:\S+=)?evsys-bus (?:(?!  |;|$).)+|\S+ ± \S+|[<>]= \S+|\S+)")
"""A gap and a word. A command is one word, because only a line that the terminal itself wraps is copied as one; so are
a mean with its deviation, and a sign with its number."""
_SOURCE_LINE: Final = re.compile(r"\s|\d+ +\|")
"""The beginning of a line that is shown as it is: an indented one, or one of a file."""
_INDENT: Final = "  "
_PART_GAP: Final = "   "
_MIN_WRAP_COLUMNS: Final = 20
"""Text is not wrapped into fewer columns than this."""
_STATE_COLORS: Final = {
    **dict.fromkeys(("ok", "completed", "delivering", "live", "running", "whole"), "green"),
    **dict.fromkeys(("pending", "owed", "retrying", "waiting", "cancelled", "killed", "not closed"), "yellow"),
    **dict.fromkeys(("failed", "dead", "parked", "damaged", "unknown", "process gone", "error", "critical"), "red"),
    "warning": "yellow",
}
"""The colour of each state; the word itself is always there, for terminals and eyes without colours."""


class Screen:
    """The terminal of one command; ``--color`` sets its mode before anything is printed."""

    def __init__(self) -> None:
        self.color_mode: ColorMode = "auto"

    def uses_color(self, stream: TextIO) -> bool:
        """Return whether this stream gets colour, by ``--color``, NO_COLOR, FORCE_COLOR, or being a terminal."""
        if self.color_mode != "auto":
            return self.color_mode == "always"
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR", "0") not in {"", "0"}:
            return True
        return is_terminal(stream)

    def note(self, text: str = "", *, wrapped: bool = True) -> None:
        """Print lines to stderr; they are lost if stderr cannot be written, as on a full disk.

        Args:
            text: The lines.
            wrapped: Whether to wrap lines at words where the terminal is narrower; indented ones stay as they are.
        """
        width = terminal_width(sys.stderr) if wrapped else None
        lines = text.split("\n") if width is not None else [text]
        wrapped_lines = [part for line in lines for part in ([line] if _SOURCE_LINE.match(line) else wrap(line, width))]
        with suppress(OSError):
            click.echo("\n".join(wrapped_lines), err=True, color=True)

    def style(self, text: str, stream: TextIO, **styles: bool | str) -> str:
        """Return the text with this style if the stream gets colour."""
        return click.style(text, **styles) if self.uses_color(stream) else text  # pyright: ignore[reportArgumentType] # click's own keywords

    def style_state(self, state: str, stream: TextIO) -> str:
        """Return the state in the colour of its first words if the stream gets colour: ok green, failed red."""
        color = _STATE_COLORS.get(state) or _STATE_COLORS.get(state.partition(",")[0])
        return state if color is None else self.style(state, stream, fg=color)


def is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that can move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except (AttributeError, ValueError):  # the stream is None or closed
        return False


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the stream's terminal; None if it is no terminal, which has no limit."""
    if not is_terminal(stream):
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except OSError:
        return _DEFAULT_COLUMNS


def printable_name(text: str) -> str:
    """Return `printable` text on one line: a name with a line break must not look like two."""
    return printable(text).replace("\n", "\\n")


def cell_width(text: str) -> int:
    """Return the width in cells of a terminal; colours take none."""
    text = _STYLE.sub("", text) if "\x1b" in text else text
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def wrap(text: str, width: int | None = None, *, indent: str = "") -> list[str]:
    """Return the text wrapped to the width, with further lines indented.

    Lines end between parts, which three blanks separate, or else between words. A longer word stays whole, and so does
    a command.
    """
    if width is None or cell_width(text) + len(indent) <= width or width < _MIN_WRAP_COLUMNS:
        return [f"{indent}{text}"]
    lines = [indent]
    for number, part in enumerate(text.split(_PART_GAP)):
        fits = cell_width(f"{indent}{_INDENT}{part}") <= width
        if number and fits and cell_width(f"{lines[-1]}{_PART_GAP}{part}") > width:
            lines.append(f"{indent}{_INDENT}")
        elif number:
            lines[-1] += _PART_GAP
        for gap, word in _WORDS.findall(part):
            if lines[-1].strip() and cell_width(f"{lines[-1]}{gap}{word}") > width:
                lines.append(f"{indent}{_INDENT}{word}")
            else:
                lines[-1] += word if len(lines) > 1 and not lines[-1].strip() else f"{gap}{word}"
    return lines


def _set_color_mode(ctx: click.Context, _: click.Parameter, mode: ColorMode) -> None:
    screen = ctx.find_object(Screen)
    if screen is not None:
        screen.color_mode = mode
        ctx.color = True  # only what `Screen` allows is styled, and click shall not remove that


color_option: Final = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    expose_value=False,
    is_eager=True,
    callback=_set_color_mode,
    help="Colour the output; auto obeys NO_COLOR and FORCE_COLOR.",
)
json_option: Final = click.option("--json", "as_json", is_flag=True, help="The result as one JSON object per line.")
