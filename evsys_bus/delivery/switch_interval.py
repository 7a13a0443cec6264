"""`SWITCH_INTERVAL`: a shorter interpreter switch interval while couriers run on threads of the program.

A thread that wakes up has to wait for the running thread to release the GIL, by default up to 5 ms
(``sys.setswitchinterval``). System calls release the GIL too, but after a short one the running thread reacquires it
before the waiting thread has woken up (measured; "convoy effect"). So the interval is shortened while any courier
thread runs, and restored when the last one has ended.
"""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final


class SwitchInterval:
    """Reference-counted override of ``sys.setswitchinterval``; one object for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._previous = 0.0
        self._applied = 0.0

    @contextmanager
    def at_most(self, seconds: float) -> Generator[None, None, None]:
        """Limit the switch interval inside the block; safe from any thread.

        The first of several nested or concurrent blocks sets the value. A shorter interval that the program has set is
        kept, and so is one that it sets meanwhile.
        """
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._previous = sys.getswitchinterval()
                sys.setswitchinterval(min(self._previous, seconds))
                self._applied = sys.getswitchinterval()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and sys.getswitchinterval() == self._applied:
                    sys.setswitchinterval(self._previous)


SWITCH_INTERVAL: Final = SwitchInterval()
