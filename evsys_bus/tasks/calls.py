"""Calls that end as their caller needs: with a timeout, to completion, or without being broken off by an interrupt.

`call_with_timeout` awaits an adapter's coroutine function with a timeout that it cannot overrun. ``asyncio.timeout``
waits for the task that it cancels; here, a call that ignores its cancellation is abandoned and the caller continues.
`run_to_completion` lets the task of a training loop end in an orderly way when its caller is cancelled.

`UninterruptibleCall` is work that an interrupt must not break off, and `Deadline` one that an interrupt may bring
forward. Python runs signal handlers on the main thread, between any two instructions, so Ctrl-C can leave the code that
runs there half done. Work that must be completed runs on a thread of its own, and the main thread only waits for it.

``threading.Event`` and ``Condition``, and with them ``Thread.start``, are written in Python: an interrupt inside them
can leave their lock held forever. Code that the main thread may call uses `Gate` and `start_thread` instead.
"""

import _thread
import asyncio
import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, NamedTuple, TypeVar

import anyio

T = TypeVar("T")

MAX_INTERRUPTS: Final = 2
"""How many interrupts are deferred until the work is done; one more ends the wait, and the work continues."""
_CHECK_SECONDS: Final = 0.5


class Gate:
    """Like ``threading.Event``, but an interrupt inside it leaves no lock held. Closed at first, opened once.

    It may be opened in a signal handler and in a finalizer, and more than once.
    """

    def __init__(self) -> None:
        self.is_open = False
        """Whether `open` was called."""
        self._to_release = deque([None])
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Release all waiters."""
        self.is_open = True
        try:
            self._to_release.pop()
        except IndexError:
            return
        self._lock.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait until it is open, at most ``seconds``; return whether it is."""
        deadline = time.monotonic() + seconds
        # In slices: an interrupt between two of these lines may leave the lock held for every waiter.
        while not self.is_open and (remaining := deadline - time.monotonic()) > 0.0:
            if self._lock.acquire(timeout=min(remaining, _CHECK_SECONDS)):
                self._lock.release()
        return self.is_open


def start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread and return it. After an interrupt in here, the thread may start later or not at all.

    Raises:
        RuntimeError: The interpreter is shutting down, or no more threads can be started.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    if threading.current_thread() is not threading.main_thread():
        thread.start()
        return thread
    started = Gate()
    errors: list[BaseException] = []

    def start() -> None:
        try:
            thread.start()
        except BaseException as error:  # isolation: raised again on the calling thread
            errors.append(error)
        finally:
            started.open()

    _thread.start_new_thread(start, ())  # atomic: no signal handler runs inside it
    started.wait()
    if errors:
        raise errors[0]
    return thread


class Deadline:
    """A point in time, which any thread may bring forward to now.

    Args:
        seconds: How far in the future.
    """

    def __init__(self, seconds: float) -> None:
        self.at: Final = time.monotonic() + seconds
        """On the clock of ``time.monotonic``; does not change when it is cut short."""
        self._cut_short = Gate()

    def remaining(self) -> float:
        """Seconds until the deadline; 0 once it has passed."""
        return 0.0 if self._cut_short.is_open else max(0.0, self.at - time.monotonic())

    def cut_short(self) -> None:
        """Bring the deadline forward to now."""
        self._cut_short.open()

    @property
    def is_cut_short(self) -> bool:
        """Whether `cut_short` was called."""
        return self._cut_short.is_open

    def pause(self, seconds: float) -> bool:
        """Wait for ``seconds``, at most until the deadline; return whether any time remains."""
        self._cut_short.wait(min(seconds, self.remaining()))
        return self.remaining() > 0.0


class UninterruptibleCall(Generic[T]):
    """A function call on a thread of its own.

    Args:
        work: The function; it runs with the caller's context variables.
        name: Name of the thread.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = _in_this_context(work)
        self._name = name
        self._unclaimed = deque([None])
        self._finished = Gate()
        self._done_callbacks: list[Callable[[Any], object]] = []
        self._result: list[T] = []
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is done."""
        return self._finished.is_open

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        """Call the function with this object once it is done; perhaps twice."""
        self._done_callbacks.append(call)
        if self.done():
            call(self)

    def start(self) -> None:
        """Start the work with `start_thread`; where no thread can be started, do it on this thread."""
        try:
            start_thread(self._execute, self._name)
        except RuntimeError:  # the interpreter is shutting down, or no more threads can be started
            self._execute()

    def run(self, on_interrupt: Callable[[], object]) -> T:
        """Do the work and `wait` for it; off the main thread, where no signal handler runs, do it on this thread."""
        if threading.current_thread() is not threading.main_thread():
            self._execute()
        return self.wait(on_interrupt)

    def wait(self, on_interrupt: Callable[[], object], max_interrupts: int = MAX_INTERRUPTS) -> T:
        """Wait until the work is done and return its result.

        Args:
            on_interrupt: Called when a signal handler has raised: it should make the work end soon.
            max_interrupts: How many interrupts are deferred until the work is done.

        Raises:
            BaseException: What the work or a signal handler raised.
        """
        try:
            if self._unclaimed:
                self.start()
            while not self._finished.wait(_CHECK_SECONDS):
                if self._unclaimed:
                    self.start()  # an interrupt came before the thread was started
        except BaseException:
            if max_interrupts:
                on_interrupt()
                self.wait(on_interrupt, max_interrupts - 1)
            raise
        if self._error is not None:
            raise self._error
        return self._result[0]

    def cancel_or_wait(self) -> None:
        """Prevent the work from starting, or wait for its end if it has started. Not for the main thread."""
        try:
            self._unclaimed.pop()
        except IndexError:
            self._finished.wait()

    def _execute(self) -> None:
        try:
            self._unclaimed.pop()
        except IndexError:
            return  # another thread does the work
        try:
            self._result.append(self._work())
        except BaseException as error:  # isolation: raised again in `wait`
            self._error = error
        finally:
            self._finished.open()
            for call in tuple(self._done_callbacks):
                call(self)


def _in_this_context(work: Callable[[], T]) -> Callable[[], T]:
    """Bind the function to a copy of the current context variables."""
    context = contextvars.copy_context()
    return lambda: context.run(work)


class Outcome(NamedTuple):
    """The result of a call: the value that it returned, or its error."""

    value: Any = None
    error: Exception | None = None


async def call_with_timeout(
    fn: Callable[..., Awaitable[object]],
    *args: object,
    seconds: float,
    grace_seconds: float,
    name: str,
    unfinished: "set[asyncio.Task[Outcome]]",
) -> Outcome:
    """Await ``fn(*args)`` in its own task for at most ``seconds``, then cancel it and wait ``grace_seconds``.

    Cancelling the caller cancels the call; the caller continues after at most ``grace_seconds``.

    Args:
        unfinished: Holds the task as long as it runs, also after it was abandoned.

    Returns:
        The returned value or the raised exception. The error is a TimeoutError for a late call, whatever the call did
        in the end, and a RuntimeError for anything that is not an Exception (KeyboardInterrupt, SystemExit,
        CancelledError).
    """
    task = asyncio.get_running_loop().create_task(_capture_outcome(fn, args), name=name)
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        with anyio.CancelScope(shield=True):  # anyio repeats a cancellation until the scope exits
            await asyncio.wait([task], timeout=grace_seconds)
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=grace_seconds)
        note = "" if task.done() else "; it ignored its cancellation and was abandoned"
        return Outcome(error=TimeoutError(f"it took longer than {seconds:g} s{note}"))
    # A task that cancels itself has no result, even if it returns.
    return Outcome(error=RuntimeError("it cancelled its own task")) if task.cancelled() else task.result()


async def _capture_outcome(fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> Outcome:
    try:
        return Outcome(await fn(*args))
    except Exception as error:
        return Outcome(error=error)
    except BaseException as error:  # a task that raises KeyboardInterrupt raises it in the event loop as well
        wrapper = RuntimeError(f"it raised {type(error).__name__}")
        wrapper.__cause__ = error
        return Outcome(error=wrapper)


GIVE_UP_SECONDS: Final = 1.0
"""How long the work may take to end once it was cancelled."""


async def run_to_completion(work: Coroutine[Any, Any, T], *, on_cancel: Callable[[], object]) -> T:
    """Await ``work`` in a task of its own.

    The first cancellation of the caller calls ``on_cancel``, which should make the work end soon; it is raised once the
    work has ended. A second cancellation cancels the work and is raised after at most `GIVE_UP_SECONDS`.

    Raises:
        BaseException: What the work raised, including KeyboardInterrupt and SystemExit.
    """
    task = asyncio.get_running_loop().create_task(_capture_error(work), name="evsys-bus:training")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        on_cancel()
        await _wait_or_give_up(task)
        result = task.result() if task.done() and not task.cancelled() else None
        if isinstance(result, _Raised) and not isinstance(result.error, asyncio.CancelledError):
            raise result.error from None
        raise
    outcome = task.result()
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


class _Raised:
    """An exception as a result: a task that raises KeyboardInterrupt would raise it in the event loop as well."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _capture_error(work: Coroutine[Any, Any, T]) -> T | _Raised:
    try:
        return await work
    except BaseException as error:
        return _Raised(error)


async def _wait_or_give_up(task: "asyncio.Task[Any]") -> None:
    # anyio repeats the cancellation of a cancelled scope until it exits; the shield reduces that to one.
    # A bare task.cancel() passes the shield, so a second one is noticed.
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
