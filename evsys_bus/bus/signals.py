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


class TermSignal:
    """The SIGTERM handler of one bus, from its entry to its exit. Nothing is installed off the main thread.

    ``stop`` is called once in the signal handler, on the main thread.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self._was_last = False

    def install(self) -> bool:
        """Install the handler; return True if the signal has arrived already and another bus is still closing."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            return False
        now = signal.getsignal(signal.SIGTERM)
        if now is None or now is signal.SIG_IGN:
            return False  # set outside Python, or meant to be ignored
        _shared.listening.append(self)  # first, so that `remove` undoes it after an interrupt
        if now is not _handle:
            _shared.earlier = now
            _shared.received = False
            signal.signal(signal.SIGTERM, _handle)
        return _shared.received and _shared.earlier is signal.SIG_DFL

    def remove(self) -> None:
        """Remove the handler; the last one restores the host's handler, unless it has set another one since."""
        # An interrupt may come between any two statements; calling this again has the same result.
        self._was_last = self._was_last or _shared.listening == [self]
        if self in _shared.listening:
            _shared.listening.remove(self)
        if not _shared.listening:
            _give_back()

    def raise_again(self) -> None:
        """End the process as the signal would have, after the last `remove`."""
        if self._was_last and _shared.received and _shared.earlier is signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # the default disposition flushes nothing
                try:
                    stream.flush()
                except (AttributeError, OSError, ValueError):
                    pass  # no stream, or a broken one
            os.kill(os.getpid(), signal.SIGTERM)


class _Shared:
    """State shared by all buses of the process, because a signal has only one handler."""

    def __init__(self) -> None:
        self.listening: list[TermSignal] = []
        self.earlier: Any = None  # a handler, or SIG_DFL or SIG_IGN
        self.received = False
        self.pid = os.getpid()


_shared = _Shared()


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _shared.pid:  # it arrived in a forked child before the after-fork hook ran
        _forget_in_child()
        os.kill(os.getpid(), number)
    elif not _shared.listening:  # the last bus was left by a thread that may not restore the handler
        _give_back()
        os.kill(os.getpid(), number)
    elif _shared.earlier is not signal.SIG_DFL:
        _shared.earlier(number, frame)
    elif not _shared.received:
        _shared.received = True
        try:
            for each in reversed(_shared.listening):  # the innermost first
                each.stop()
        except RuntimeError:  # its loop was just closed
            _shared.received = False  # possibly nothing was stopped: handle the next signal
            raise


def _give_back() -> None:
    """Restore the host's handler; Python allows this on the main thread only."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, _shared.earlier)


def _forget_in_child() -> None:
    """Remove the handlers in a forked child, which has no bus to drain."""
    _give_back()
    _shared.listening.clear()
    _shared.pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
