"""SIGTERM handling: drain every open bus before the process ends.

With the default disposition, our handler stops the code of every open bus once. When the last bus has closed, the
signal is raised again with the default in place, so that the process ends as its sender expects. If the host has a
handler, that one runs, and ours only forwards to it. SIGINT is left to the asyncio runner, which cancels the main task.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class SigtermHandler:
    """The SIGTERM handler of one bus, from its entry to its exit. Nothing is installed off the main thread.

    ``on_sigterm`` is called once in the signal handler, on the main thread.
    """

    def __init__(self, on_sigterm: Callable[[], None]) -> None:
        self.on_sigterm = on_sigterm
        self._was_last = False

    def install(self) -> bool:
        """Install the handler; return True if the signal has arrived already and another bus is still closing."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            return False
        current = signal.getsignal(signal.SIGTERM)
        if current is None or current is signal.SIG_IGN:
            return False  # set outside Python, or meant to be ignored
        _process_state.handlers.append(self)  # first, so that `remove` undoes it after an interrupt
        if current is not _on_signal:
            _process_state.previous_handler = current
            _process_state.received = False
            signal.signal(signal.SIGTERM, _on_signal)
        return _process_state.received and _process_state.previous_handler is signal.SIG_DFL

    def remove(self) -> None:
        """Remove the handler; the last one restores the host's handler, unless it has set another one since."""
        # An interrupt may come between any two statements; calling this again has the same result.
        self._was_last = self._was_last or _process_state.handlers == [self]
        if self in _process_state.handlers:
            _process_state.handlers.remove(self)
        if not _process_state.handlers:
            _restore_previous_handler()

    def raise_again(self) -> None:
        """End the process as the signal would have, after the last `remove`."""
        if self._was_last and _process_state.received and _process_state.previous_handler is signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # the default disposition flushes nothing
                try:
                    stream.flush()
                except (AttributeError, OSError, ValueError):
                    pass  # no stream, or a broken one
            os.kill(os.getpid(), signal.SIGTERM)


class _ProcessState:
    """State shared by all buses of the process, because a signal has only one handler."""

    def __init__(self) -> None:
        self.handlers: list[SigtermHandler] = []
        self.previous_handler: Any = None  # a handler, or SIG_DFL or SIG_IGN
        self.received = False
        self.pid = os.getpid()


_process_state = _ProcessState()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _process_state.pid:  # it arrived in a forked child before the after-fork hook ran
        _reset_after_fork()
        os.kill(os.getpid(), number)
    elif not _process_state.handlers:  # the last bus was left by a thread that may not restore the handler
        _restore_previous_handler()
        os.kill(os.getpid(), number)
    elif _process_state.previous_handler is not signal.SIG_DFL:
        _process_state.previous_handler(number, frame)
    elif not _process_state.received:
        _process_state.received = True
        try:
            for each in reversed(_process_state.handlers):  # the innermost first
                each.on_sigterm()
        except RuntimeError:  # its loop was just closed
            _process_state.received = False  # possibly nothing was stopped: handle the next signal
            raise


def _restore_previous_handler() -> None:
    """Restore the host's handler; Python allows this on the main thread only."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGTERM, _process_state.previous_handler)


def _reset_after_fork() -> None:
    """Remove the handlers in a forked child, which has no bus to drain."""
    _restore_previous_handler()
    _process_state.handlers.clear()
    _process_state.pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
