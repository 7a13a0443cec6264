"""Chooses the view and refreshes it from a thread, so that no training step draws anything."""

import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Literal, ParamSpec, Protocol, TextIO, TypeVar

from evsys_bus.cli.progress.board import Board
from evsys_bus.cli.progress.transfers import Look, no_uploads
from evsys_bus.cli.screen import Screen, is_terminal
from evsys_bus.diagnostics import log

if TYPE_CHECKING:
    from evsys_bus.tasks import DeliveryStatus

P = ParamSpec("P")
T = TypeVar("T")

ProgressMode = Literal["auto", "live", "plain", "json", "off"]

REDRAW_SECONDS: Final = 0.2
"""Interval of redraws: each takes a few milliseconds, during which the event loop waits for the interpreter lock."""


class View(Protocol):
    """Shows the board on every tick."""

    def tick(self) -> None:
        """Show what has changed since the last tick."""
        ...

    def close(self) -> None:
        """Show the remaining changes, and release the terminal."""
        ...


@contextmanager
def shown(
    board: Board,
    mode: ProgressMode,
    screen: Screen,
    *,
    title: str,
    success_metric: str | None,
    uploads: Look = no_uploads,
    troubles: Callable[[], Sequence["DeliveryStatus"]] = tuple,
) -> Generator[None]:
    """Show the board, the uploads and the problems of deliveries on stderr within the block.

    All of them are read on the view's thread.
    """
    view = _view(
        board,
        mode,
        screen,
        sys.stderr,
        title=title,
        success_metric=success_metric,
        uploads=_last_of(uploads, no_uploads()),
        troubles=_last_of(troubles, ()),
    )
    if view is None:
        yield
        return
    over = threading.Event()
    timer = threading.Thread(target=_keep_ticking, args=(view, over), name="evsys-bus-progress", daemon=True)
    timer.start()
    try:
        yield
    finally:
        over.set()
        timer.join()


def resolved(mode: ProgressMode, stream: TextIO) -> ProgressMode:
    """Resolve ``auto`` for this stream."""
    if mode != "auto":
        return mode
    return "live" if is_terminal(stream) else "plain"


def _view(
    board: Board,
    mode: ProgressMode,
    screen: Screen,
    stream: TextIO,
    *,
    title: str,
    success_metric: str | None,
    uploads: Look,
    troubles: Callable[[], Sequence["DeliveryStatus"]],
) -> View | None:
    mode = resolved(mode, stream)
    if mode == "off" or stream is None:  # pyright: ignore[reportUnnecessaryComparison] # a closed stderr is None
        return None
    if mode == "live":
        from evsys_bus.cli.progress.live import LiveView

        color = screen.colourful(stream)
        return LiveView(
            board,
            stream,
            title=title,
            success_metric=success_metric,
            color=color,
            uploads=uploads,
            troubles=troubles,
        )
    from evsys_bus.cli.progress.lines import LineView, as_json, plain

    return LineView(board, stream, as_json if mode == "json" else plain, uploads=uploads)


def _last_of(look: Callable[P, T], first: T) -> Callable[P, T]:
    """Wrap a function so that it returns its last result while files cannot be read, which must not end the view."""
    found = [first]

    def last(*args: P.args, **kwargs: P.kwargs) -> T:
        with suppress(OSError):
            found[0] = look(*args, **kwargs)
        return found[0]

    return last


def _keep_ticking(view: View, over: threading.Event) -> None:
    """Refresh the view until ``over`` is set; an error of the view ends this thread and nothing else."""
    try:
        try:
            while not over.is_set():
                view.tick()
                over.wait(REDRAW_SECONDS)
        finally:
            view.close()
    except (OSError, ValueError) as error:  # a closed terminal, or a log on a full disk
        log().warning("progress.closed", error=str(error))
