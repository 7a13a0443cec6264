"""SIGTERM, so that a polite end is a drained one.

Where it has its default disposition, our handler stops the program's own code once, and when the bus has closed the
signal is raised again with the default in place: the process ends as its sender expects, with its tasks done. Where the
host has a handler, theirs runs and ours only notes it. SIGINT is the runner's, which cancels the main task as it is.
"""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any


class TermSignal:
    """The handler of one bus, from its entry to its exit. Off the main thread nothing is installed."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._earlier: Any = None  # Any: a handler, or one of the signal module's two constants
        self._installed = False
        self._pid = os.getpid()
        self.received = False

    def install(self) -> None:
        """Begin to listen."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            return
        self._earlier = signal.getsignal(signal.SIGTERM)
        if self._earlier is None or self._earlier is signal.SIG_IGN:
            return  # set outside Python, or meant to be ignored
        signal.signal(signal.SIGTERM, self._handle)
        self._installed = True
        _installed.add(self)

    def remove(self) -> None:
        """Give the host its handler back, unless it has set another one since."""
        if self._installed and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._earlier)
        self._installed = False
        _installed.discard(self)

    def raise_again(self) -> None:
        """After `remove`: end as the signal would have ended the process, had we not been there."""
        if self.received and self._earlier is signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # a signal's default end flushes nothing
                try:
                    stream.flush()
                except (AttributeError, OSError, ValueError):
                    pass  # no stream, or a broken one: nothing to save
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if os.getpid() != self._pid:  # it came in a forked child before the child could remove us
            self.remove()
            self.raise_again()
        elif self._earlier is not signal.SIG_DFL:
            self._earlier(number, frame)
        elif first:
            self._stop()


_installed: "weakref.WeakSet[TermSignal]" = weakref.WeakSet()


def _remove_in_child() -> None:
    """A forked child has no bus to drain: the signal has to end it as it would have ended it without us."""
    for each in list(_installed):
        each.remove()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remove_in_child)
