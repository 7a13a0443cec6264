"""Chooses the view and refreshes it from a thread, so that no training step draws anything."""

import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Literal, ParamSpec, Protocol, TextIO, TypeVar

from evsys_bus.cli.progress.run_state import RunStateTracker
from evsys_bus.cli.progress.transfers import PollUploads, no_uploads
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
def show_progress(
    tracker: RunStateTracker,
    mode: ProgressMode,
    screen: Screen,
    *,
    title: str,
    success_metric: str | None,
    poll_uploads: PollUploads = no_uploads,
    poll_problems: Callable[[], Sequence["DeliveryStatus"]] = tuple,
) -> Generator[None]:
    """Show the board, the uploads and the problems of deliveries on stderr within the block.

    All of them are read on the view's thread.
    """
    view = _make_view(
        tracker,
        mode,
        screen,
        sys.stderr,
        title=title,
        success_metric=success_metric,
        poll_uploads=_keep_last_result(poll_uploads, no_uploads()),
        poll_problems=_keep_last_result(poll_problems, ()),
    )
    if view is None:
        yield
        return
    stopped = threading.Event()
    timer = threading.Thread(target=_run_view, args=(view, stopped), name="evsys-bus-progress", daemon=True)
    timer.start()
    try:
        yield
    finally:
        stopped.set()
        timer.join()


def resolve_mode(mode: ProgressMode, stream: TextIO) -> ProgressMode:
    """Resolve ``auto`` for this stream."""
    if mode != "auto":
        return mode
    return "live" if is_terminal(stream) else "plain"


def _make_view(
    tracker: RunStateTracker,
    mode: ProgressMode,
    screen: Screen,
    stream: TextIO,
    *,
    title: str,
    success_metric: str | None,
    poll_uploads: PollUploads,
    poll_problems: Callable[[], Sequence["DeliveryStatus"]],
) -> View | None:
    mode = resolve_mode(mode, stream)
    if mode == "off" or stream is None:  # pyright: ignore[reportUnnecessaryComparison] # a closed stderr is None
        return None
    if mode == "live":
        from evsys_bus.cli.progress.live import LiveView

        color = screen.uses_color(stream)
        return LiveView(
            tracker,
            stream,
            title=title,
            success_metric=success_metric,
            color=color,
            poll_uploads=poll_uploads,
            poll_problems=poll_problems,
        )
    from evsys_bus.cli.progress.lines import LineView, format_json, format_plain

    return LineView(tracker, stream, format_json if mode == "json" else format_plain, poll_uploads=poll_uploads)


def _keep_last_result(poll: Callable[P, T], first: T) -> Callable[P, T]:
    """Wrap a function so that it returns its last result while files cannot be read, which must not end the view."""
    results = [first]

    def poll_or_last(*args: P.args, **kwargs: P.kwargs) -> T:
        with suppress(OSError):
            results[0] = poll(*args, **kwargs)
        return results[0]

    return poll_or_last


def _run_view(view: View, stopped: threading.Event) -> None:
    """Refresh the view until ``stopped`` is set; an error of the view ends this thread and nothing else."""
    try:
        try:
            while not stopped.is_set():
                view.tick()
                stopped.wait(REDRAW_SECONDS)
        finally:
            view.close()
    except (OSError, ValueError) as error:  # a closed terminal, or a log on a full disk
        log().warning("progress.closed", error=str(error))
