"""Time, as the journal sees it. The wall clock is for people and for ages; waiting goes by the monotonic one."""

import time
from typing import Protocol


class Clock(Protocol):
    """What the journal asks of time."""

    def wall(self) -> float:
        """Seconds since the epoch; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds; never goes back."""
        ...


class OsClock:
    """The machine's clocks."""

    wall = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
