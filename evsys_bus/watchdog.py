"""The watchdog: reports a hook that blocks, with its stack, while it blocks.

It costs the publisher nothing: a daemon thread checks a few times in `blocked_seconds` whether the same hook call is
still in progress, by the publisher's own frame. This module runs the thread and measures the time; its user supplies
the hook call in progress and handles a blocked one.
"""

import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FrameType
from typing import Final, Generic, NamedTuple, TypeVar

from evsys_bus.diagnostics import FaultLog, collector_paused
from evsys_bus.tasks import Gate, start_thread

LOOKS_PER_PATIENCE: Final = 4

CallT = TypeVar("CallT")
"""The publisher's type for a hook."""


class Sighting(NamedTuple, Generic[CallT]):
    """A hook call in progress."""

    hook: CallT
    mark: Hashable
    """Equal for two observations of the same call, different for two calls."""
    frame: FrameType
    """The innermost frame of the thread that is in the hook."""
    outer: FrameType
    """The publisher's frame that made the call: the reported stack starts inside it."""


class Blocked(NamedTuple, Generic[CallT]):
    """A hook call that has taken too long."""

    hook: CallT
    seconds: float
    """How long it has taken so far, at least."""
    held_interpreter: bool
    """It let no other thread run (the GIL was held), so it is reported only after it has returned or released the
    GIL."""
    stack: str
    """The hook's stack, outermost call first."""


class Watchdog(Generic[CallT]):
    """A daemon thread that reports hook calls that take too long.

    Args:
        look: Returns the hook call in progress.
        tell: Called with a call that takes too long.
        between: Called before each check. Exceptions of these, and of the check, are logged and end nothing.
        blocked_seconds: How long a call may take.
    """

    def __init__(
        self,
        look: Callable[[], Sighting[CallT] | None],
        tell: Callable[[Blocked[CallT]], None],
        between: Sequence[Callable[[], None]],
        *,
        blocked_seconds: float,
    ) -> None:
        self._look = look
        self._tell = tell
        self._between = between
        self._patience = blocked_seconds
        self._faults = FaultLog(every_seconds=60.0)
        self._mark: Hashable = None
        self._since = self._tell_after = 0.0
        self._stop = Gate()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = start_thread(self._run, "evsys-bus-watchdog")

    def stop(self) -> None:
        """Stop the thread, waiting at most as long as one check takes."""
        self._stop.open()
        if self._thread is not None:
            self._thread.join(self._patience)
        self._faults.flush()

    def _run(self) -> None:
        pause = self._patience / LOOKS_PER_PATIENCE
        looked = time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            late = now - looked - pause
            looked = now
            for look in (*self._between, partial(self._look_once, now, late)):
                try:
                    look()
                except Exception as error:  # isolated: the checks must continue
                    self._faults.warn("watchdog.look_failed", type(error), error=error)

    def _look_once(self, now: float, late: float) -> None:
        seen = self._look()
        if seen is None:
            self._mark = None
            return
        held = late >= self._patience
        if seen.mark != self._mark:
            self._mark, self._since, self._tell_after = seen.mark, now - late if held else now, self._patience
        if now - self._since >= self._tell_after:
            self._tell_after = 2 * (now - self._since)  # report again after twice the time
            self._tell(Blocked(seen.hook, now - self._since, held, _stack(seen)))


def _stack(seen: Sighting[CallT]) -> str:
    frames: list[FrameType] = []
    frame: FrameType | None = seen.frame
    with collector_paused:
        while frame is not None and frame is not seen.outer:
            frames.append(frame)
            frame = frame.f_back
    summary = traceback.StackSummary.extract((each, each.f_lineno) for each in reversed(frames))
    return "".join(summary.format()).rstrip()
