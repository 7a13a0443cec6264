"""Find out from the stacks who is inside a publish, so that the fast path need not set and reset a marker.

The line number of a frame of compiled code (`compile`) identifies the hook. The two methods of the publisher that wait
for the token and that hold it are identified by their code objects.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Final

from evsys_bus.bus.account import HookAccount
from evsys_bus.bus.compile import Unit
from evsys_bus.diagnostics import collector_paused, log

LOST_SECONDS: Final = 0.02
"""How long the token must have been missing without a holder to count as lost."""


class StackReader:
    """Reads stacks for one publisher."""

    def __init__(
        self, publisher: object, units: Mapping[str, Unit], prefix: str, *, waits: CodeType, holds: CodeType
    ) -> None:
        self._publisher = publisher
        self._prefix = prefix  # also of retired code: its `publish` holds the token until it returns
        self._units = units  # by the filename of their code
        self._waits = waits
        self._holds = holds

    def holder(self, frame: FrameType | None) -> FrameType | None:
        """Return the innermost frame, from this one outward, that holds the token; a waiting publish holds none."""
        waiting = False
        while frame is not None:
            code = frame.f_code
            if code is self._waits and frame.f_locals["self"] is self._publisher:
                waiting = True
            elif code.co_filename.startswith(self._prefix):
                if not waiting:
                    return frame
                waiting = False
            elif code is self._holds and frame.f_locals["self"] is self._publisher:
                return frame
            frame = frame.f_back
        return None

    def hook_at(self, holder: FrameType | None) -> HookAccount | None:
        """Return the hook that the frame is calling, if any."""
        unit = None if holder is None else self._units.get(holder.f_code.co_filename)
        return None if unit is None or holder is None else unit.lines.get(holder.f_lineno)

    def holders(self) -> list[tuple[FrameType, FrameType]]:
        """Return, for every thread that holds the token (at most one), its innermost frame and the holding frame."""
        found: list[tuple[FrameType, FrameType]] = []
        with collector_paused:
            for frame in sys._current_frames().values():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # documented
                holder = self.holder(frame)
                if holder is not None:
                    found.append((frame, holder))
        return found


class LostToken:
    """Restores a token that an interrupt lost between taking it and entering the ``try`` block.

    Args:
        tokens: The container of the token.
        holders: Returns the frames that hold it.
        dispatched: Returns the number of dispatched events.
    """

    def __init__(self, tokens: deque[None], holders: Callable[[], object], dispatched: Callable[[], int]) -> None:
        self._tokens = tokens
        self._holders = holders
        self._dispatched = dispatched
        self._looks = threading.RLock()
        self._looking = False
        self._missed: tuple[int, float] | None = None

    def restore(self) -> None:
        """Restore the token if it is lost; called repeatedly while waiting for it.

        It must be missing twice, with nothing dispatched in between, because it may change hands during a check. Only
        one thread checks at a time; others, and a signal handler that interrupts a check, return at once.
        """
        if self._looking:
            return
        with self._looks:
            if self._looking:
                return
            self._looking = True
            try:
                self._look()
            finally:
                self._looking = False

    def _look(self) -> None:
        if self._tokens or self._holders():
            self._missed = None
            return
        dispatched = self._dispatched()
        if self._missed is None or self._missed[0] != dispatched:
            self._missed = (dispatched, time.monotonic())
        elif time.monotonic() - self._missed[1] >= LOST_SECONDS and not self._tokens:
            self._missed = None
            self._tokens.append(None)
            log().warning("publish.token_restored")
