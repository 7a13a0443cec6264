"""Clocks. Wall time is for display and for ages; waiting uses monotonic time."""

import time
from typing import Protocol


class Clock(Protocol):
    """The clocks that the journal needs."""

    def wall(self) -> float:
        """Seconds since the epoch. May jump."""
        ...

    def monotonic(self) -> float:
        """Seconds. Never goes backwards."""
        ...


class OsClock:
    """The clocks of the operating system."""

    wall = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
