"""SIGTERM, so that a polite end is a drained one.

Where it has its default disposition, our handler stops the code of every open bus once, and when the last of them has
closed the signal is raised again with the default in place: the process ends as its sender expects, its tasks done.
Where the host has a handler, theirs runs and ours only passes it on. SIGINT is the runner's, which cancels the main
task as it is.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class TermSignal:
    """The ear of one bus, from its entry to its exit. Off the main thread nothing is installed.

    ``stop`` is called in the signal handler, on the main thread, once.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self._was_last = False

    def install(self) -> bool:
        """Begin to listen; True if the signal came already, and another bus is still on its way out."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            return False
        now = signal.getsignal(signal.SIGTERM)
        if now is None or now is signal.SIG_IGN:
            return False  # set outside Python, or meant to be ignored
        _shared.listening.append(self)  # first: where an interrupt comes before the rest, `remove` undoes it
        if now is not _handle:
            _shared.earlier = now
            _shared.received = False
            signal.signal(signal.SIGTERM, _handle)
        return _shared.received and _shared.earlier is signal.SIG_DFL

    def remove(self) -> None:
        """Stop listening; the last one gives the host its handler back, unless it has set another one since."""
        # An interrupt may come between any two of these; done once more, they come to the same.
        self._was_last = self._was_last or _shared.listening == [self]
        if self in _shared.listening:
            _shared.listening.remove(self)
        if not _shared.listening:
            _give_back()

    def raise_again(self) -> None:
        """After the last `remove`: end as the signal would have ended the process, had we not been there."""
        if self._was_last and _shared.received and _shared.earlier is signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # a signal's default end flushes nothing
                try:
                    stream.flush()
                except (AttributeError, OSError, ValueError):
                    pass  # no stream, or a broken one: nothing to save
            os.kill(os.getpid(), signal.SIGTERM)


class _Shared:
    """What all buses of the process share: there is one handler for a signal."""

    def __init__(self) -> None:
        self.listening: list[TermSignal] = []
        self.earlier: Any = None  # Any: a handler, or one of the signal module's two constants
        self.received = False
        self.pid = os.getpid()


_shared = _Shared()


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _shared.pid:  # it came in a forked child before the child could forget us
        _forget_in_child()
        os.kill(os.getpid(), number)
    elif not _shared.listening:  # the last bus was left by a thread that may not give the handler back
        _give_back()
        os.kill(os.getpid(), number)
    elif _shared.earlier is not signal.SIG_DFL:
        _shared.earlier(number, frame)
    elif not _shared.received:
        _shared.received = True
        try:
            for each in reversed(_shared.listening):  # the innermost first
                each.stop()
        except RuntimeError:  # of a loop that was closed this instant
            _shared.received = False  # it may have stopped nothing: the next one is heard again
            raise


def _give_back() -> None:
    """Put the host's handler back in the place of ours; Python lets the main thread alone do it."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, _shared.earlier)


def _forget_in_child() -> None:
    """A forked child has no bus to drain: the signal has to end it as it would have ended it without us."""
    _give_back()
    _shared.listening.clear()
    _shared.pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
