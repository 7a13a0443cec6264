"""Entering and leaving a bus: by a task or a thread, by SIGTERM, or at the end of the program."""

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from evsys_bus.bus.sigterm import SigtermHandler
from evsys_bus.diagnostics import log
from evsys_bus.tasks import Gate


class BusLifecycle:
    """Tracks who entered a bus and who leaves it.

    Args:
        handles_signals: Whether to handle SIGTERM.
    """

    def __init__(self, *, handles_signals: bool) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The caller's loop, under ``async with``."""
        self._task: asyncio.Task[Any] | None = None
        self._sigterm_handler = SigtermHandler(self._on_sigterm) if handles_signals else None
        self._exit_bus: Callable[[], object] | None = None
        self._owner_pid = 0
        self._lock = threading.RLock()  # guards `_exiting_thread`
        self._exiting_thread: threading.Thread | None = None
        self._exited = Gate()

    def enter_from_task(self) -> None:
        """Note that the current task enters."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def install_exit_handlers(self, exit_bus: Callable[[], object]) -> None:
        """Handle SIGTERM and program exit from here on; leave at once if SIGTERM has already arrived.

        Args:
            exit_bus: Leaves the bus if the program ends without having done so.
        """
        self._exit_bus, self._owner_pid = exit_bus, os.getpid()
        atexit.register(self._at_exit)
        if self._sigterm_handler is not None and self._sigterm_handler.install() and self.loop is not None:
            self._on_sigterm()

    def try_begin_exit(self, wait_seconds: float = 0.0) -> bool:
        """Claim leaving the bus for this thread; return False if another thread has left it or is leaving it.

        Args:
            wait_seconds: How long to wait for that other thread.
        """
        current_thread, main_thread = threading.current_thread(), threading.main_thread()
        with self._lock:
            exiting_thread = self._exiting_thread
            # A thread that died half-way does not count; the main thread is not "alive" at interpreter shutdown.
            if not self._exited.is_open and (
                exiting_thread is None
                or exiting_thread is current_thread
                or not (exiting_thread.is_alive() or exiting_thread is main_thread)
            ):
                self._exiting_thread = current_thread
                return True
        self._exited.wait(wait_seconds)
        return False

    def complete_exit(self) -> None:
        """Finish leaving; if SIGTERM was the cause, end the process by it."""
        try:
            self._uninstall()
        except BaseException:  # Ctrl-C between two statements
            self._uninstall()
            raise
        if self._sigterm_handler is not None:
            self._sigterm_handler.raise_again()

    def _uninstall(self) -> None:
        self._exited.open()
        atexit.unregister(self._at_exit)
        if self._sigterm_handler is not None:
            self._sigterm_handler.remove()

    def _at_exit(self) -> None:
        """Finish pending work if the program ends without leaving the bus."""
        if self._exit_bus is not None and self._owner_pid == os.getpid():
            if self._exiting_thread is None:
                fix = "enter it with `with` or `async with`, which leave it even if an exception is raised"
                log().warning("bus.never_left", fix=fix)
            self._exit_bus()

    def _on_sigterm(self) -> None:
        """Called in the signal handler."""
        if self.loop is not None and self._task is not None and self.loop.is_running() and not self._task.done():
            self.loop.call_soon_threadsafe(self._task.cancel, "SIGTERM")
        elif (
            self._exiting_thread is None
        ):  # also if that task or its loop has ended: a cancellation would have no effect
            sys.exit(128 + signal.SIGTERM)
