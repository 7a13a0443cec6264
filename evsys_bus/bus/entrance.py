"""Entering and leaving a bus: by a task or a thread, by SIGTERM, or at the end of the program."""

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
    """Tracks who entered a bus and who leaves it.

    Args:
        handles_signals: Whether to handle SIGTERM.
    """

    def __init__(self, *, handles_signals: bool) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The caller's loop, under ``async with``."""
        self._task: asyncio.Task[Any] | None = None
        self._term = TermSignal(self._stop) if handles_signals else None
        self._leave: Callable[[], object] | None = None
        self._owner = 0
        self._lock = threading.RLock()  # guards `_leaver`
        self._leaver: threading.Thread | None = None
        self._is_left = Gate()

    def by_task(self) -> None:
        """Note that the current task enters."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def listen(self, leave: Callable[[], object]) -> None:
        """Handle SIGTERM and program exit from here on; leave at once if SIGTERM has already arrived.

        Args:
            leave: Leaves the bus if the program ends without having done so.
        """
        self._leave, self._owner = leave, os.getpid()
        atexit.register(self._at_exit)
        if self._term is not None and self._term.install() and self.loop is not None:
            self._stop()

    def leaves_here(self, wait_seconds: float = 0.0) -> bool:
        """Claim leaving the bus for this thread; return False if another thread has left it or is leaving it.

        Args:
            wait_seconds: How long to wait for that other thread.
        """
        here, main = threading.current_thread(), threading.main_thread()
        with self._lock:
            by = self._leaver
            # A thread that died half-way does not count; the main thread is not "alive" at interpreter shutdown.
            if not self._is_left.is_open and (by is None or by is here or not (by.is_alive() or by is main)):
                self._leaver = here
                return True
        self._is_left.wait(wait_seconds)
        return False

    def close(self) -> None:
        """Finish leaving; if SIGTERM was the cause, end the process by it."""
        try:
            self._let_go()
        except BaseException:  # Ctrl-C between two statements
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
        """Finish pending work if the program ends without leaving the bus."""
        if self._leave is not None and self._owner == os.getpid():
            if self._leaver is None:
                fix = "enter it with `with` or `async with`, which leave it even if an exception is raised"
                log().warning("bus.never_left", fix=fix)
            self._leave()

    def _stop(self) -> None:
        """Called in the signal handler."""
        if self.loop is not None and self._task is not None and self.loop.is_running() and not self._task.done():
            self.loop.call_soon_threadsafe(self._task.cancel, "SIGTERM")
        elif self._leaver is None:  # also if that task or its loop has ended: a cancellation would have no effect
            sys.exit(128 + signal.SIGTERM)
