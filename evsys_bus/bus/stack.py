"""Who is inside a publish, read off the stacks: so the fast path has no mark to set, and none to forget.

The frame of compiled code (`compile`) says which hook by its line; the two functions of the publisher that wait for the
token and that hold it are known by their code.
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
"""How long the token must have been with nobody to count as lost."""


class StackReader:
    """Reads stacks for one publisher."""

    def __init__(
        self, publisher: object, units: Mapping[str, Unit], prefix: str, *, waits: CodeType, holds: CodeType
    ) -> None:
        self._publisher = publisher
        self._prefix = prefix  # units that are gone count too: a `publish` of theirs holds the token until it returns
        self._units = units  # by the filename of their code
        self._waits = waits
        self._holds = holds

    def holder(self, frame: FrameType | None) -> FrameType | None:
        """The innermost frame, from this one outward, that holds the token; a publish that waits for it holds none."""
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
        """The hook that the frame is calling, if it is calling one."""
        unit = None if holder is None else self._units.get(holder.f_code.co_filename)
        return None if unit is None or holder is None else unit.lines.get(holder.f_lineno)

    def holders(self) -> list[tuple[FrameType, FrameType]]:
        """Of every thread that holds the token (one, or none): its innermost frame, and the one that holds."""
        found: list[tuple[FrameType, FrameType]] = []
        with collector_paused:
            for frame in sys._current_frames().values():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # documented
                holder = self.holder(frame)
                if holder is not None:
                    found.append((frame, holder))
        return found


class LostToken:
    """Brings back a token that an interrupt lost between taking and guarding it: it is missing, and nobody is inside.

    Args:
        tokens: Where it should be.
        holders: Who holds it.
        dispatched: How many events were dispatched so far.
    """

    def __init__(self, tokens: deque[None], holders: Callable[[], object], dispatched: Callable[[], int]) -> None:
        self._tokens = tokens
        self._holders = holders
        self._dispatched = dispatched
        self._looks = threading.RLock()
        self._looking = False
        self._missed: tuple[int, float] | None = None

    def restore(self) -> None:
        """Called while one waits for it.

        It must be missed twice, with nothing dispatched in between: while we look, it passes from hand to hand. One
        looks at a time; who comes meanwhile, as a signal handler in the middle of a look, does without.
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
