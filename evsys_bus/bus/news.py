"""What becomes of the deliveries while a program runs, said in its log: couriers in a process have a log of their own.

Said once: that an adapter is stuck, with why and what to do, and that it goes on. What a courier tries again is told
only once it has lasted: most of it passes. Nothing is lost in any case.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from evsys_bus.diagnostics import log

if TYPE_CHECKING:  # at run time it is imported where something is followed
    from evsys_bus.delivery.followed import CourierState

LASTING_SECONDS: Final = 10.0
"""After so long a failure that is tried again is told."""
_STUCK: Final = ("parked", "failed")


class News:
    """Of the adapters that a process delivers to.

    Args:
        directory: The journal.
        names: The adapters'.
        every_seconds: Between two looks at the couriers' states.
    """

    def __init__(self, directory: str, names: Sequence[str], *, every_seconds: float = 0.5) -> None:
        from evsys_bus.journal import OsDisk

        self._disk: Final = OsDisk()
        self._directory: Final = directory
        self._told: Final[dict[str, str | None]] = dict.fromkeys(names)
        """What was said last of each; None where all is well."""
        self._every_seconds: Final = every_seconds
        self._due = 0.0

    def look(self) -> None:
        """Say what has changed; nothing, if it was asked for a moment ago."""
        from evsys_bus.delivery.states import read_state

        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._every_seconds
        for name in self._told:
            state = read_state(self._disk, self._directory, name)
            if state is not None:
                self._tell(name, state)

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
