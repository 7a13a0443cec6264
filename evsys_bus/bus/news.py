"""What becomes of the deliveries while a program runs, said in its log: couriers in a process have a log of their own.

Said once: that an adapter is stuck, with why and what to do, and that it goes on. What a courier tries again is told
only once it has lasted: most of it passes. Nothing is lost in any case.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from evsys_bus.diagnostics import log

if TYPE_CHECKING:  # at run time it is imported where something is followed
    from evsys_bus.delivery.followed import CourierState

LASTING_SECONDS: Final = 10.0
"""After so long a failure that is tried again is told."""
_STUCK: Final = ("parked", "failed")
COARSE_SECONDS: Final = 1.0


class News:
    """Of the adapters that a process delivers to.

    Args:
        directory: The journal.
        names: The adapters'.
        every_seconds: Between two looks at the couriers' states, at first; up to four times that while they stay.
        monotonic: The clock.
    """

    def __init__(
        self,
        directory: str,
        names: Sequence[str],
        *,
        every_seconds: float = 0.5,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        from evsys_bus.journal import OsDisk, layout

        self._disk: Final = OsDisk()
        self._directory: Final = directory
        self._folder: Final = f"{directory}/{layout.COURIERS}"
        self._changed: int = 0
        """When something in the folder was last seen to be replaced; nanoseconds since the epoch."""
        self._again_at = math.inf
        """When the states have to be read again all the same; monotonic."""
        self._states: Final[dict[str, CourierState | None]] = dict.fromkeys(names)
        self._told: Final[dict[str, str | None]] = dict.fromkeys(names)
        """What was said last of each; None where all is well."""
        self._every_seconds: Final = every_seconds
        self._pause = every_seconds
        self._due = 0.0
        self._monotonic: Final = monotonic
        self._lock: Final = threading.Lock()  # the last look is not the watchdog's

    def look(self, *, last: bool = False) -> None:
        """Say what has changed; nothing, if it was asked for a moment ago and this is not the ``last`` look."""
        with self._lock:
            now = self._monotonic()
            if now < self._due and not last:
                return
            self._pause = min(self._pause * 1.5, 4 * self._every_seconds)
            self._read(-math.inf if last else self._again_at, now)
            self._due = now + self._pause
            for name, state in self._states.items():
                if state is not None:
                    self._tell(name, state)

    def _read(self, again_at: float, now: float) -> None:
        """Most looks are one system call: each lets go of the interpreter, which a loop that computes notices."""
        from evsys_bus.delivery.states import read_state

        try:
            changed = os.stat(self._folder).st_mtime_ns  # noqa: PTH116 # a Path of it would cost as much as the call
        except OSError:
            return
        if changed == self._changed and now < again_at:
            return
        self._states.update({name: read_state(self._disk, self._directory, name) for name in self._states})
        # Clocks of file systems are coarse: what was replaced just now may be so again, and look the same.
        unsure = changed != self._changed or None in self._states.values()
        self._again_at = now + COARSE_SECONDS if unsure else math.inf
        if changed != self._changed:
            self._changed = changed
            self._pause = self._every_seconds

    def _tell(self, name: str, state: "CourierState") -> None:
        fails = state.state in _STUCK or (
            state.failing_since is not None and time.time() - state.failing_since >= LASTING_SECONDS
        )
        said, news = self._told[name], state.state if fails else None
        if news == said:
            return
        if news is not None:
            fix = state.fix or "it is tried again; evsys-bus status tells how it fares"
            log().warning(f"delivery.{news}", adapter=name, why=state.error, safe="its events wait on disk", fix=fix)
        elif state.state in {"delivering", "idle"}:
            log().info("delivery.goes_on", adapter=name)
        else:
            return
        self._told[name] = news
