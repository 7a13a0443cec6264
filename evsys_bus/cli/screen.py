"""What the terminal can show: colour or none, and text that cannot play tricks on it.

It owns the decision about colour. What is said, and on which stream, is each command's business.
"""

import os
import re
from contextlib import suppress
from typing import Final, Literal, TextIO

import click

ColorMode = Literal["auto", "always", "never"]

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """One command's view of the terminal; ``--color`` sets its mode before anything is shown."""

    def __init__(self) -> None:
        self.mode: ColorMode = "auto"

    def colourful(self, stream: TextIO) -> bool:
        """Whether this stream gets colour: ``--color``, then NO_COLOR, then FORCE_COLOR, then whether it is a TTY."""
        if self.mode != "auto":
            return self.mode == "always"
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR", "0") not in {"", "0"}:
            return True
        return is_terminal(stream)

    def note(self, text: str = "") -> None:
        """A line on stderr: progress, notes, errors. Where stderr is a full disk, it is lost; the exit code tells."""
        with suppress(OSError):
            click.echo(text, err=True, color=True)

    def style(self, text: str, stream: TextIO, **how: bool | str) -> str:
        """The text in a colour, where there is colour."""
        return click.style(text, **how) if self.colourful(stream) else text  # pyright: ignore[reportArgumentType] # click's own keywords


def is_terminal(stream: TextIO) -> bool:
    """Whether a person may be looking at it, on something that can move a cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def width_of(stream: TextIO) -> int | None:
    """The columns of the terminal that it goes to; None where it goes elsewhere, and may be as wide as it is."""
    import shutil  # it loads what decompresses, which `--help` does not need

    return shutil.get_terminal_size().columns if is_terminal(stream) else None


def printable(text: str) -> str:
    """The text with control characters spelt out: what came from files and exceptions must not steer a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _set_mode(ctx: click.Context, _: click.Parameter, mode: ColorMode) -> None:
    screen = ctx.find_object(Screen)
    if screen is not None:
        screen.mode = mode


color_option: Final = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    expose_value=False,
    is_eager=True,
    callback=_set_mode,
    help="NO_COLOR and FORCE_COLOR are honoured too.",
)
