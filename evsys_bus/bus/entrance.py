"""Who entered a bus: a task of a loop, or a thread without one; how SIGTERM, or the end of the program, has it left."""

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from evsys_bus.bus.signals import TermSignal
from evsys_bus.diagnostics import log
from evsys_bus.tasks import Gate


class Entrance:
    """The way into one bus, and out of it.

    Args:
        handles_signals: Whether SIGTERM is listened to.
    """

    def __init__(self, *, handles_signals: bool) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The caller's, under ``async with``."""
        self._task: asyncio.Task[Any] | None = None  # Any: what the caller's task returns is its own
        self._term = TermSignal(self._stop) if handles_signals else None
        self._leave: Callable[[], object] | None = None
        self._owner = 0
        self._lock = threading.RLock()  # over who leaves
        self._leaver: threading.Thread | None = None
        self._is_left = Gate()

    def by_task(self) -> None:
        """The current task enters."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def listen(self, leave: Callable[[], object]) -> None:
        """Listen to SIGTERM from here on; where it came already, leave at once.

        Args:
            leave: How the bus is left, should the program end without having done so.
        """
        self._leave, self._owner = leave, os.getpid()
        atexit.register(self._at_exit)
        if self._term is not None and self._term.install() and self.loop is not None:
            self._stop()

    def leaves_here(self, wait_seconds: float = 0.0) -> bool:
        """This thread is about to leave the bus; False where another one has left it, or is on its way out.

        Args:
            wait_seconds: How long that one is waited for.
        """
        here, main = threading.current_thread(), threading.main_thread()
        with self._lock:
            by = self._leaver
            # One that ended half-way is no leaver; the main thread passes for ended while the program ends.
            if not self._is_left.is_open and (by is None or by is here or not (by.is_alive() or by is main)):
                self._leaver = here
                return True
        self._is_left.wait(wait_seconds)
        return False

    def close(self) -> None:
        """All is done: if SIGTERM brought us here, end by it."""
        try:
            self._let_go()
        except BaseException:  # Ctrl-C, between two of these
            self._let_go()
            raise
        if self._term is not None:
            self._term.raise_again()

    def _let_go(self) -> None:
        self._is_left.open()
        atexit.unregister(self._at_exit)
        if self._term is not None:
            self._term.remove()

    def _at_exit(self) -> None:
        """The program ends, and has not left the bus: what is under way is finished all the same."""
        if self._leave is not None and self._owner == os.getpid():
            if self._leaver is None:
                fix = "enter it with `with` or `async with`, which leave it also where something is raised"
                log().warning("bus.never_left", fix=fix)
            self._leave()

    def _stop(self) -> None:
        """In the signal handler."""
        if self.loop is not None and self._task is not None and self.loop.is_running() and not self._task.done():
            self.loop.call_soon_threadsafe(self._task.cancel, "SIGTERM")
        elif self._leaver is None:  # also where that task, or its loop, is over: a cancellation would reach nobody
            sys.exit(128 + signal.SIGTERM)
