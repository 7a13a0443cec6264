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

CHECKS_PER_LIMIT: Final = 4

CallT = TypeVar("CallT")
"""The publisher's type for a hook."""


class HookCall(NamedTuple, Generic[CallT]):
    """A hook call in progress."""

    hook: CallT
    call_id: Hashable
    """Equal for two observations of the same call, different for two calls."""
    frame: FrameType
    """The innermost frame of the thread that is in the hook."""
    outer: FrameType
    """The publisher's frame that made the call: the reported stack starts inside it."""


class BlockedHook(NamedTuple, Generic[CallT]):
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
        current_call: Returns the hook call in progress.
        on_blocked: Called with a call that takes too long.
        before_check: Called before each check. Exceptions of these, and of the check, are logged and end nothing.
        blocked_seconds: How long a call may take.
    """

    def __init__(
        self,
        current_call: Callable[[], HookCall[CallT] | None],
        on_blocked: Callable[[BlockedHook[CallT]], None],
        before_check: Sequence[Callable[[], None]],
        *,
        blocked_seconds: float,
    ) -> None:
        self._current_call = current_call
        self._on_blocked = on_blocked
        self._before_check = before_check
        self._limit_seconds = blocked_seconds
        self._faults = FaultLog(every_seconds=60.0)
        self._call_id: Hashable = None
        self._started_at = self._report_after = 0.0
        self._stop = Gate()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = start_thread(self._run, "evsys-bus-watchdog")

    def stop(self) -> None:
        """Stop the thread, waiting at most as long as one check takes."""
        self._stop.open()
        if self._thread is not None:
            self._thread.join(self._limit_seconds)
        self._faults.flush()

    def _run(self) -> None:
        pause = self._limit_seconds / CHECKS_PER_LIMIT
        last_check = time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            delay = now - last_check - pause
            last_check = now
            for check in (*self._before_check, partial(self._check_once, now, delay)):
                try:
                    check()
                except Exception as error:  # isolated: the checks must continue
                    self._faults.warn("watchdog.look_failed", type(error), error=error)

    def _check_once(self, now: float, delay: float) -> None:
        call = self._current_call()
        if call is None:
            self._call_id = None
            return
        held_interpreter = delay >= self._limit_seconds
        if call.call_id != self._call_id:
            self._call_id, self._started_at, self._report_after = (
                call.call_id,
                now - delay if held_interpreter else now,
                self._limit_seconds,
            )
        if now - self._started_at >= self._report_after:
            self._report_after = 2 * (now - self._started_at)  # report again after twice the time
            self._on_blocked(BlockedHook(call.hook, now - self._started_at, held_interpreter, _format_stack(call)))


def _format_stack(call: HookCall[CallT]) -> str:
    frames: list[FrameType] = []
    frame: FrameType | None = call.frame
    with collector_paused:
        while frame is not None and frame is not call.outer:
            frames.append(frame)
            frame = frame.f_back
    summary = traceback.StackSummary.extract((each, each.f_lineno) for each in reversed(frames))
    return "".join(summary.format()).rstrip()
