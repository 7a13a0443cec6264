"""Who entered a bus: a task of a loop, or a thread without one; and how SIGTERM makes them leave."""

import asyncio
import signal
import sys
from typing import Any

from evsys_bus.bus.signals import TermSignal


class Entrance:
    """The way into one bus, and out of it.

    Args:
        handles_signals: Whether SIGTERM is listened to.
    """

    def __init__(self, *, handles_signals: bool) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The caller's, under ``async with``."""
        self.leaving = False
        """A ``with`` block is on its way out: what it waits for goes on."""
        self._task: asyncio.Task[Any] | None = None  # Any: what the caller's task returns is its own
        self._term = TermSignal(self._stop) if handles_signals else None

    def by_task(self) -> None:
        """The current task enters."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def listen(self) -> None:
        """Listen to SIGTERM from here on; where it came already, leave at once."""
        if self._term is not None and self._term.install() and self.loop is not None:
            self._stop()

    def close(self) -> None:
        """All is done: if SIGTERM brought us here, end by it."""
        if self._term is not None:
            self._term.remove()
            self._term.raise_again()

    def _stop(self) -> None:
        """In the signal handler."""
        if self.loop is not None and self._task is not None:
            self.loop.call_soon_threadsafe(self._task.cancel, "SIGTERM")
        elif not self.leaving:
            sys.exit(128 + signal.SIGTERM)
