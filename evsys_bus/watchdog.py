"""The watchdog: names a hook that blocks, with its stack, while it blocks.

It costs the publisher nothing: a daemon thread looks a few times in `blocked_seconds` whether the same hook call is
still in progress, by the publisher's own frame. This module owns the thread and the patience; what a hook call looks
like, and what is done about a blocked one, is told to it.
"""

import threading
import time
import traceback
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Final, Generic, NamedTuple, TypeVar

from evsys_bus.diagnostics import collector_paused

LOOKS_PER_PATIENCE: Final = 4

CallT = TypeVar("CallT")
"""How the publisher knows a hook."""


class Sighting(NamedTuple, Generic[CallT]):
    """A hook call in progress."""

    hook: CallT
    mark: Hashable
    """Equal for two sightings of one call, different for two calls."""
    frame: FrameType
    """The innermost frame of the thread that is in the hook."""
    outer: FrameType
    """The publisher's frame that made the call: where the stack that is reported begins."""


class Blocked(NamedTuple, Generic[CallT]):
    """A hook call that has lasted too long."""

    hook: CallT
    seconds: float
    """How long it has lasted at least, so far."""
    held_interpreter: bool
    """It let no other thread run meanwhile, so it shows only now that it has ended or come up for air."""
    stack: str
    """The hook's stack, outermost call first."""


class Watchdog(Generic[CallT]):
    """A daemon thread that looks, waits, and tells."""

    def __init__(
        self,
        look: Callable[[], Sighting[CallT] | None],
        tell: Callable[[Blocked[CallT]], None],
        between: Callable[[], None],
        *,
        blocked_seconds: float,
    ) -> None:
        self._look = look
        self._tell = tell
        self._between = between
        self._patience = blocked_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evsys-bus-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting for longer than a look takes."""
        self._stop.set()
        self._thread.join(self._patience)

    def _run(self) -> None:
        pause = self._patience / LOOKS_PER_PATIENCE
        mark: Hashable = None
        since = looked = time.monotonic()
        tell_after = self._patience
        while not self._stop.wait(pause):
            now = time.monotonic()
            late = now - looked - pause
            looked = now
            self._between()
            seen = self._look()
            if seen is None:
                mark = None
                continue
            held = late >= self._patience
            if seen.mark != mark:
                mark, since, tell_after = seen.mark, now - late if held else now, self._patience
            if now - since >= tell_after:
                tell_after = 2 * (now - since)  # say it again when it has lasted twice as long
                self._tell(Blocked(seen.hook, now - since, held, _stack(seen)))
            del seen  # a frame keeps everything alive that its function can see


def _stack(seen: Sighting[CallT]) -> str:
    frames: list[FrameType] = []
    frame: FrameType | None = seen.frame
    with collector_paused:
        while frame is not None and frame is not seen.outer:
            frames.append(frame)
            frame = frame.f_back
    summary = traceback.StackSummary.extract((each, each.f_lineno) for each in reversed(frames))
    return "".join(summary.format()).rstrip()
