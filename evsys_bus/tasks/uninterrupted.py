"""Work that an interrupt must not tear, and the deadline that an interrupt may bring forward.

Python runs signal handlers on the main thread, between any two instructions: Ctrl-C there leaves whatever was at work
half-way. So what has to be whole runs on a thread of its own, and the main thread only waits for it.

``threading.Event`` and ``Condition``, and with them ``Thread.start``, are written in Python: an interrupt within them
can leave their lock held for ever. What the main thread may call uses `Gate` and `start_thread` in their place.
"""

import _thread
import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

MOST_INTERRUPTS: Final = 2
"""So many are put off until the work is done; one more ends the wait, and the work goes on without."""
_LOOK_SECONDS: Final = 0.5


class Gate:
    """What ``threading.Event`` is: closed at first, opened once. An interrupt in the middle of it leaves nothing held.

    It may be opened in a signal handler and in a finalizer, and more than once.
    """

    def __init__(self) -> None:
        self.is_open = False
        """Whether `open` was called."""
        self._to_release = deque([None])
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let everybody go on who waits."""
        self.is_open = True
        try:
            self._to_release.pop()
        except IndexError:
            return
        self._lock.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait until it is open, at most so long; whether it is."""
        until = time.monotonic() + seconds
        # In slices: an interrupt between two of these lines may keep the lock, for us and for others who wait.
        while not self.is_open and (left := until - time.monotonic()) > 0.0:
            if self._lock.acquire(timeout=min(left, _LOOK_SECONDS)):
                self._lock.release()
        return self.is_open


def start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread that has begun to run this. If an interrupt is raised here, it may begin a little later, or not.

    Raises:
        RuntimeError: The program ends, or may have no more threads.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    if threading.current_thread() is not threading.main_thread():
        thread.start()
        return thread
    begun = Gate()
    refusals: list[BaseException] = []

    def begin() -> None:
        try:
            thread.start()
        except BaseException as error:  # a wall: it is raised where the thread is waited for
            refusals.append(error)
        finally:
            begun.open()

    _thread.start_new_thread(begin, ())  # whole, or not at all
    begun.wait()
    if refusals:
        raise refusals[0]
    return thread


class Deadline:
    """A point in time; may be cut from any thread, which makes it now.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self.at: Final = time.monotonic() + seconds
        """On the clock of ``time.monotonic``, unless it is cut."""
        self._cut = Gate()

    def left(self) -> float:
        """Seconds until then; 0 once it has passed."""
        return 0.0 if self._cut.is_open else max(0.0, self.at - time.monotonic())

    def cut(self) -> None:
        """Let it be now."""
        self._cut.open()

    @property
    def is_cut(self) -> bool:
        """Whether `cut` was called."""
        return self._cut.is_open

    def pause(self, seconds: float) -> bool:
        """Wait so long, or until it has passed; whether anything is left of it."""
        self._cut.wait(min(seconds, self.left()))
        return self.left() > 0.0


class Uninterrupted(Generic[T]):
    """One piece of work on a thread of its own.

    Args:
        work: What to do; it sees the context variables of here.
        name: Of the thread.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = _in_this_context(work)
        self._name = name
        self._free = deque([None])
        self._end = Gate()
        self._on_end: list[Callable[[Any], object]] = []
        self._result: list[T] = []
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is done."""
        return self._end.is_open

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        """Have this called, perhaps twice, once it is done. Any: as a future passes itself."""
        self._on_end.append(call)
        if self.done():
            call(self)

    def start(self) -> None:
        """Begin; where Python starts no thread any more, do it here and now. As `start_thread`."""
        try:
            start_thread(self._run, self._name)
        except RuntimeError:  # the program ends, or may have no more threads
            self._run()

    def do(self, interrupted: Callable[[], object]) -> T:
        """Do it, and wait for the end; off the main thread, where no signal handler runs, here. As `wait`."""
        if threading.current_thread() is not threading.main_thread():
            self._run()
        return self.wait(interrupted)

    def wait(self, interrupted: Callable[[], object], most: int = MOST_INTERRUPTS) -> T:
        """Wait for the end; what it returned.

        Args:
            interrupted: Called when a signal handler has raised: it should make the work end soon.
            most: How many interrupts are put off until then.

        Raises:
            BaseException: What the work raised, or what the signal handler did.
        """
        try:
            if self._free:
                self.start()
            while not self._end.wait(_LOOK_SECONDS):
                if self._free:
                    self.start()  # an interrupt came before the thread was there
        except BaseException:
            if most:
                interrupted()
                self.wait(interrupted, most - 1)
            raise
        if self._error is not None:
            raise self._error
        return self._result[0]

    def withdraw(self) -> None:
        """See to it that it never begins; where it has, wait for the end. Off the main thread."""
        try:
            self._free.pop()
        except IndexError:
            self._end.wait()

    def _run(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            return  # another thread does it
        try:
            self._result.append(self._work())
        except BaseException as error:  # a wall: it is raised where it is waited for
            self._error = error
        finally:
            self._end.open()
            for call in tuple(self._on_end):
                call(self)


def _in_this_context(work: Callable[[], T]) -> Callable[[], T]:
    """The work, to be done with the context variables of here."""
    context = contextvars.copy_context()
    return lambda: context.run(work)
