"""`SHORT_TURNS`: while couriers work on threads of a program, its other threads need not wait long for the interpreter.

A thread that wakes asks the one at work to let it go on, which it does after the interpreter's switch interval: 5 ms,
unless the program says otherwise. A system call lets go as well, but a short one is over, and the interpreter taken
again, before the thread that waits has woken (seen; "convoy effect"). So the interval is shorter as long as a courier's
thread lives, and what it was before once the last of them has ended.
"""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final


class SwitchInterval:
    """The interpreter's, for those who want it short; there is one for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 0.0
        self._ours = 0.0

    @contextmanager
    def at_most(self, seconds: float) -> Generator[None, None, None]:
        """Inside it, no thread keeps the interpreter for longer while another one waits; from any thread.

        The first to come decides. A program that has set a shorter interval keeps it, and so does one that sets another
        one meanwhile.
        """
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, seconds))
                self._ours = sys.getswitchinterval()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and sys.getswitchinterval() == self._ours:
                    sys.setswitchinterval(self._before)


SHORT_TURNS: Final = SwitchInterval()
