"""The terminal: whether it gets colour, its width, and text without control characters.

This module decides about colour; what is printed, and to which stream, is up to each command.
"""

import os
from contextlib import suppress
from typing import Final, Literal, TextIO

import click

from evsys_bus.location import printable

ColorMode = Literal["auto", "always", "never"]


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

    def note(self, text: str = "") -> None:
        """Print a line to stderr; it is lost if stderr cannot be written, as on a full disk."""
        with suppress(OSError):
            click.echo(text, err=True, color=True)

    def style(self, text: str, stream: TextIO, **styles: bool | str) -> str:
        """Return the text with this style if the stream gets colour."""
        return click.style(text, **styles) if self.uses_color(stream) else text  # pyright: ignore[reportArgumentType] # click's own keywords


def is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that can move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except (AttributeError, ValueError):  # the stream is None or closed
        return False


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the stream's terminal; None if it is no terminal, which has no limit."""
    import shutil  # it imports compression modules, which `--help` does not need

    return shutil.get_terminal_size().columns if is_terminal(stream) else None


def printable_name(text: str) -> str:
    """Return `printable` text on one line: a name with a line break must not look like two."""
    return printable(text).replace("\n", "\\n")


def _set_color_mode(ctx: click.Context, _: click.Parameter, mode: ColorMode) -> None:
    screen = ctx.find_object(Screen)
    if screen is not None:
        screen.color_mode = mode


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
