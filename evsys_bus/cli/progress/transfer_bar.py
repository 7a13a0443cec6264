"""A transfer as one line of a terminal: name, bar if it fits, and figures."""

from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from evsys_bus.cli.progress.transfers import Transfer, amounts
from evsys_bus.cli.screen import printable

_GAP: Final = "  "
_BAR: Final = 20
_LEAST_BAR: Final = 10
_LEAST_NAME: Final = 12
_LEAST_RUN: Final = 4


def bar_line(label: str, mark: str, transfer: Transfer, *, width: int, now: float) -> Text:
    """Return the line, at most ``width`` cells wide.

    Whatever does not fit is left out in this order: bar, label, the run's name, the last figures.

    Args:
        label: The text in front.
        mark: Replaces a label that is too long.
        transfer: The transfer.
        width: Width of the terminal.
        now: Seconds since the epoch.
    """
    figures = [Text(each, style="yellow" if each.startswith("silent") else "") for each in amounts(transfer, now)]
    name = printable(transfer.name)
    head = [Text(label, style="dim")]
    room = width - _length([*head, *figures]) - len(_GAP)
    if room < cell_len(name):
        head = [Text(mark, style="dim")]
        room += cell_len(label) - cell_len(mark)
    while figures and room < min(_LEAST_NAME, cell_len(name)):
        room += figures.pop().cell_len + len(_GAP)
    spare = room - cell_len(name) - len(_GAP)
    if spare >= _LEAST_BAR:
        figures.insert(0, _bar(transfer.share, min(spare, _BAR)))
    shown = Text(_shortened(printable(transfer.run), printable(transfer.checkpoint), room))
    line = Text(_GAP).join([*head, shown, *figures])
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _shortened(run: str, checkpoint: str, room: int) -> str:
    """Fit both names into the cells; the run's name is shortened first, because the checkpoint's holds the step."""
    for_run = room - cell_len(checkpoint) - 1
    if cell_len(run) <= for_run:
        return f"{run}/{checkpoint}"
    if for_run >= _LEAST_RUN:
        return f"{set_cell_size(run, for_run - 1).rstrip()}…/{checkpoint}"
    return checkpoint


def _length(parts: list[Text]) -> int:
    return sum(part.cell_len for part in parts) + len(_GAP) * max(len(parts) - 1, 0)


def _bar(share: float, cells: int) -> Text:
    """Draw a bar with a resolution of half a cell."""
    halves = int(share * cells * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble((done, "cyan"), ("━" * (cells - len(done)), "bright_black"))
