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

from evsys_bus.bus.dispatch import CompiledDispatch, HookStats
from evsys_bus.diagnostics import collector_paused, log

TOKEN_LOST_SECONDS: Final = 0.02
"""How long the token must have been missing without a holder to count as lost."""


class StackReader:
    """Reads stacks for one publisher."""

    def __init__(
        self,
        publisher: object,
        dispatches: Mapping[str, CompiledDispatch],
        prefix: str,
        *,
        waiting_code: CodeType,
        holding_code: CodeType,
    ) -> None:
        self._publisher = publisher
        self._prefix = prefix  # also of retired code: its `publish` holds the token until it returns
        self._dispatches = dispatches  # by the filename of their code
        self._waiting_code = waiting_code
        self._holding_code = holding_code

    def find_holder(self, frame: FrameType | None) -> FrameType | None:
        """Return the innermost frame, from this one outward, that holds the token; a waiting publish holds none."""
        waiting = False
        while frame is not None:
            code = frame.f_code
            if code is self._waiting_code and frame.f_locals["self"] is self._publisher:
                waiting = True
            elif code.co_filename.startswith(self._prefix):
                if not waiting:
                    return frame
                waiting = False
            elif code is self._holding_code and frame.f_locals["self"] is self._publisher:
                return frame
            frame = frame.f_back
        return None

    def hook_at(self, holder: FrameType | None) -> HookStats | None:
        """Return the hook that the frame is calling, if any."""
        compiled = None if holder is None else self._dispatches.get(holder.f_code.co_filename)
        return None if compiled is None or holder is None else compiled.hooks_by_line.get(holder.f_lineno)

    def find_holders(self) -> list[tuple[FrameType, FrameType]]:
        """Return, for every thread that holds the token (at most one), its innermost frame and the holding frame."""
        found: list[tuple[FrameType, FrameType]] = []
        with collector_paused:
            for frame in sys._current_frames().values():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # documented
                holder = self.find_holder(frame)
                if holder is not None:
                    found.append((frame, holder))
        return found


class TokenRecovery:
    """Restores a token that an interrupt lost between taking it and entering the ``try`` block.

    Args:
        tokens: The container of the token.
        find_holders: Returns the frames that hold it.
        count_dispatched: Returns the number of dispatched events.
    """

    def __init__(
        self, tokens: deque[None], find_holders: Callable[[], object], count_dispatched: Callable[[], int]
    ) -> None:
        self._tokens = tokens
        self._find_holders = find_holders
        self._count_dispatched = count_dispatched
        self._check_lock = threading.RLock()
        self._is_checking = False
        self._missing_since: tuple[int, float] | None = None

    def restore(self) -> None:
        """Restore the token if it is lost; called repeatedly while waiting for it.

        It must be missing twice, with nothing dispatched in between, because it may change hands during a check. Only
        one thread checks at a time; others, and a signal handler that interrupts a check, return at once.
        """
        if self._is_checking:
            return
        with self._check_lock:
            if self._is_checking:
                return
            self._is_checking = True
            try:
                self._check()
            finally:
                self._is_checking = False

    def _check(self) -> None:
        if self._tokens or self._find_holders():
            self._missing_since = None
            return
        dispatched = self._count_dispatched()
        if self._missing_since is None or self._missing_since[0] != dispatched:
            self._missing_since = (dispatched, time.monotonic())
        elif time.monotonic() - self._missing_since[1] >= TOKEN_LOST_SECONDS and not self._tokens:
            self._missing_since = None
            self._tokens.append(None)
            log().warning("publish.token_restored")
