"""Progress as a table that is redrawn in place: title, arms, failures, uploads and problems."""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Final, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evsys_bus.cli.amounts import NONE, duration
from evsys_bus.cli.deliveries import count_words
from evsys_bus.cli.progress.board import Board, RunProgress
from evsys_bus.cli.progress.capture import Captured, CapturedStream
from evsys_bus.cli.progress.figures import ArmFigures, arm_figures, eta, headline, pair
from evsys_bus.cli.progress.transfer_bar import bar_line
from evsys_bus.cli.progress.transfers import Look, Transfer
from evsys_bus.cli.screen import is_terminal, printable
from evsys_bus.tasks import DeliveryStatus

_MAX_FAILURES: Final = 4
_MAX_UPLOADS: Final = 2
_OVERHEAD: Final = 9
"""Lines besides the arms: title, headings, footer, notice, and the blank lines between them."""
_WIDE: Final = 90
_NARROW: Final = 70
_ARM_WIDTH: Final = 32
_NARROW_ARM_WIDTH: Final = 16


class LiveView:
    """Shows a table at the bottom of the terminal; other output is printed above it."""

    def __init__(
        self,
        board: Board,
        stream: TextIO,
        *,
        title: str,
        success_metric: str | None,
        color: bool,
        uploads: Look,
        troubles: Callable[[], Sequence[DeliveryStatus]] = tuple,
    ) -> None:
        self._board = board
        self._uploads = uploads
        self._troubles = troubles
        self._title = title
        self._success_metric = success_metric
        self._captured = Captured()
        self._streams = [CapturedStream(stream, self._captured)]
        self._restored = ExitStack()
        self._console = Console(file=stream, force_terminal=True, no_color=not color, highlight=False, emoji=False)
        self._restored.enter_context(redirect_stderr(self._streams[0]))
        if is_terminal(sys.stdout):  # a redirected stdout is left as it is
            self._streams.append(CapturedStream(sys.stdout, self._captured))
            self._restored.enter_context(redirect_stdout(self._streams[1]))
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def tick(self) -> None:
        """Print captured output, and redraw the table."""
        self._show_printed()
        size = shutil.get_terminal_size()
        self._console.size = (size.columns, size.lines)  # pyright: ignore[reportAttributeAccessIssue] # its setter takes a pair
        table = draw(
            self._board,
            self._title,
            self._success_metric,
            width=size.columns,
            height=size.lines,
            uploads=self._uploads().under_way,
            troubles=self._troubles(),
        )
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Remove the table, and restore the streams."""
        self._restored.close()
        self._live.stop()
        for stream in self._streams:
            stream.finish()
        self._show_printed()

    def _show_printed(self) -> None:
        lines = self._captured.take()
        if lines:
            self._console.print(Text("\n").join(map(Text.from_ansi, lines)), soft_wrap=True)


def draw(
    board: Board,
    title: str,
    success_metric: str | None,
    *,
    width: int,
    height: int,
    uploads: Sequence[Transfer] = (),
    troubles: Sequence[DeliveryStatus] = (),
) -> RenderableType:
    """Return the table for a terminal of this size, followed by active uploads and problems of deliveries."""
    now = board.clock()
    below = _upload_lines(uploads, width)
    if board.waiting is None:  # the drain's text includes them
        below += _trouble_lines(troubles, width, max(0, height - _OVERHEAD - 1 - len(below)))
    notices = _notices(board, width)
    height -= len(below) + max(len(notices) - 1, 0)
    show = headline(board, success_metric)
    arms = arm_figures(board, show, now)
    failures = [run for run in list(board.runs.values()) if run.status == "failed"]
    told = failures[max(len(failures) - min(_MAX_FAILURES, max(height - _OVERHEAD - 1, 0) // 4), 0) :]
    room = max(height - _OVERHEAD - 2 * len(told), 1)
    shown = _fitting(arms, room)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    arm_width = _ARM_WIDTH if width >= _WIDE else _NARROW_ARM_WIDTH
    table.add_column("arm", no_wrap=True, overflow="ellipsis", max_width=arm_width)
    table.add_column("seeds", no_wrap=True)
    table.add_column("step", no_wrap=True)
    glue = "/" if width >= _WIDE else "/\n"
    table.add_column(f"train{glue}{printable(show.train or NONE)}" if show.train else "train", no_wrap=True)
    table.add_column(glue.join(map(printable, show.eval)) if show.eval else "eval", no_wrap=True)
    table.add_column("eta", no_wrap=True)
    for arm in shown:
        table.add_row(*_cells(arm, sd=width >= _NARROW))
    parts: list[RenderableType] = [Text(title, style="bold", overflow="ellipsis", no_wrap=True), Text(""), table]
    if len(shown) < len(arms):
        parts.append(_dim_line(f"… and {len(arms) - len(shown)} more arms"))
    parts += [_failure(run, board.folder, width) for run in told]
    if len(failures) > len(told):
        parts.append(Text(f"! and {len(failures) - len(told)} more failed runs", style="red"))
    parts += [Text(""), *below, _dim_line(_footer(board, now, hint=width >= _NARROW))]
    return Group(*parts, *notices)


def _notices(board: Board, width: int) -> list[Text]:
    """Return the text about the drain, wrapped, or the current notice."""
    waiting = None if board.waiting is None else board.waiting.text()
    if waiting is not None:
        return [Text(line, style="yellow") for line in textwrap.wrap(waiting, max(width, 1))]
    return [Text(board.notice, style="yellow", overflow="ellipsis", no_wrap=True)] if board.notice else []


def _cells(arm: ArmFigures, *, sd: bool) -> list[RenderableType]:
    style = "" if arm.running else "red" if arm.failed == arm.runs else "green" if arm.completed == arm.runs else "dim"
    return [
        Text(printable(arm.arm), style="red" if arm.failed else ""),
        Text(f"{arm.completed}/{arm.runs}{' !' if arm.failed else ''}", style="red" if arm.failed else ""),
        Text(f"{arm.step:,}/{arm.num_steps:,}" if arm.num_steps else NONE, style=style),
        Text(pair(arm.train, sd=sd)),
        Text(pair(arm.eval, sd=sd)),
        Text("done" if arm.completed + arm.failed == arm.runs else duration(arm.eta)),
    ]


def _fitting(arms: list[ArmFigures], room: int) -> list[ArmFigures]:
    """Return all arms if they fit, else the running, failed and completed ones first, in their order."""
    if len(arms) <= room:
        return arms
    by_weight = sorted(arms, key=lambda arm: (-arm.running, -arm.failed, -arm.completed))
    kept = {arm.arm for arm in by_weight[:room]}
    return [arm for arm in arms if arm.arm in kept]


def failure_line(run: RunProgress) -> str:
    """Return which run failed, at which step, and why."""
    stage = f" {run.stage}" if run.stage else ""
    return f"! {run.arm} seed {run.seed}{stage} failed at step {run.step:,}: {first_line(run.error)}"


def first_line(error: str | None) -> str:
    """Return the most informative line of an error: the last one of a traceback, else the first."""
    lines = [line.strip() for line in (error or "no reason given").strip().splitlines()] or [""]
    return printable(lines[-1] if lines[0].startswith("Traceback") else lines[0])


def _failure(run: RunProgress, folder: str, width: int) -> RenderableType:
    text = Text(failure_line(run), style="red")
    show = Text(f"show: evsys-bus show {printable(folder)}/{printable(run.key)}", style="dim")
    line = Text("   ").join([text, show])
    if line.cell_len <= width:
        return line
    for each in (text, show):
        each.no_wrap, each.overflow = True, "ellipsis"
    return Group(text, Text("  ", no_wrap=True, overflow="ellipsis") + show)


def _upload_lines(uploads: Sequence[Transfer], width: int) -> list[Text]:
    lines = [bar_line("checkpoints", "↑", each, width=width, now=time.time()) for each in uploads[:_MAX_UPLOADS]]
    if len(uploads) > _MAX_UPLOADS:
        lines.append(_dim_line(f"… and {len(uploads) - _MAX_UPLOADS} more uploads"))
    return lines


def _trouble_lines(troubles: Sequence[DeliveryStatus], width: int, room: int) -> list[Text]:
    """Return the problems in full, each with its fix; those that do not fit are counted."""
    lines: list[Text] = []
    for number, each in enumerate(troubles):
        state = f"{each.state}: " if each.state in {"parked", "failed", "retrying"} else ""
        why = "" if each.trouble is None else f"{state}{each.trouble}"
        fix = each.owed_fix or each.fix
        parts = (each.name, ", ".join(count_words(each)), why, f"fix: {fix}" if fix and why else "")
        texts = textwrap.wrap(printable("   ".join(filter(None, parts))), max(width, 1), subsequent_indent="  ")
        if len(lines) + len(texts) + (number + 1 < len(troubles)) > room:
            more = _dim_line(f"… {len(troubles) - number} more with problems: evsys-bus status")
            return [*lines, more] if len(lines) < room else lines
        lines += [Text(text, style="yellow") for text in texts]
    return lines


def _dim_line(text: str) -> Text:
    return Text(text, style="dim", overflow="ellipsis", no_wrap=True)


def _footer(board: Board, now: float, *, hint: bool) -> str:
    runs = list(board.runs.values())
    over = sum(run.status in {"completed", "failed", "cancelled"} for run in runs)
    running = sum(run.status == "running" for run in runs)
    left = eta(board, now)
    parts = [f"{over}/{len(runs)} runs done", f"{running} running", f"{duration(now - board.began)} elapsed"]
    parts += [f"eta {duration(left)}"] if left is not None else []
    return "   ".join([*parts, *(["Ctrl-C stops"] if hint else [])])
