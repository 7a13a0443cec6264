"""A transfer as one line of a terminal: name, bar if it fits, and figures."""

from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from evsys_bus.cli.progress.transfers import Transfer, format_transfer
from evsys_bus.cli.screen import printable

_GAP: Final = "  "
_MAX_BAR: Final = 20
_MIN_BAR: Final = 10
_MIN_NAME: Final = 12
_MIN_RUN: Final = 4


def format_transfer_bar(label: str, short_label: str, transfer: Transfer, *, width: int, now: float) -> Text:
    """Return the line, at most ``width`` cells wide.

    Whatever does not fit is left out in this order: bar, label, the run's name, the last figures.

    Args:
        label: The text in front.
        short_label: Replaces a label that is too long.
        transfer: The transfer.
        width: Width of the terminal.
        now: Seconds since the epoch.
    """
    figures = [
        Text(each, style="yellow" if each.startswith("silent") else "") for each in format_transfer(transfer, now)
    ]
    name = printable(transfer.name)
    head = [Text(label, style="dim")]
    room = width - _total_width([*head, *figures]) - len(_GAP)
    if room < cell_len(name):
        head = [Text(short_label, style="dim")]
        room += cell_len(label) - cell_len(short_label)
    while figures and room < min(_MIN_NAME, cell_len(name)):
        room += figures.pop().cell_len + len(_GAP)
    spare = room - cell_len(name) - len(_GAP)
    if spare >= _MIN_BAR:
        figures.insert(0, _draw_bar(transfer.fraction, min(spare, _MAX_BAR)))
    shown = Text(_shorten(printable(transfer.run), printable(transfer.checkpoint), room))
    line = Text(_GAP).join([*head, shown, *figures])
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _shorten(run: str, checkpoint: str, room: int) -> str:
    """Fit both names into the cells; the run's name is shortened first, because the checkpoint's holds the step."""
    run_room = room - cell_len(checkpoint) - 1
    if cell_len(run) <= run_room:
        return f"{run}/{checkpoint}"
    if run_room >= _MIN_RUN:
        return f"{set_cell_size(run, run_room - 1).rstrip()}…/{checkpoint}"
    return checkpoint


def _total_width(parts: list[Text]) -> int:
    return sum(part.cell_len for part in parts) + len(_GAP) * max(len(parts) - 1, 0)


def _draw_bar(fraction: float, cells: int) -> Text:
    """Draw a bar with a resolution of half a cell."""
    halves = int(fraction * cells * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble((done, "cyan"), ("━" * (cells - len(done)), "bright_black"))
