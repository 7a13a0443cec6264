"""Event loops as the task room sees them: the one that runs here, and one of our own on a thread."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from evsys_bus.diagnostics import log
from evsys_bus.tasks.uninterrupted import Gate, start_thread

if TYPE_CHECKING:
    from evsys_bus.tasks.daemon_executor import DaemonExecutor

T = TypeVar("T")
_executors: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, DaemonExecutor]" = weakref.WeakKeyDictionary()

LOOP_NAME: Final = "evsys-bus-loop"
"""Of the thread of a `LoopThread`."""
STOP_SECONDS: Final = 1.0
"""How long the loop's thread may take to end; one that a task blocks is left behind."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs on this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Have ``call`` run on the loop's thread, from any thread; nothing happens once the loop is closed."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        pass  # closed, and with it everything that could have cared


def run_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Run a coroutine on a loop that runs on another thread; its result.

    Raises:
        TimeoutError: It took longer, and was cancelled.
        BaseException: What it raised.
    """
    running = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return running.result(timeout)
    except TimeoutError:
        running.cancel()
        raise


def unended_calls(loop: asyncio.AbstractEventLoop) -> int:
    """Calls in the executor of a `LoopThread`'s loop (``run_in_executor``, ``to_thread``) that have not ended."""
    executor = _executors.get(loop)
    return 0 if executor is None else executor.unended


def other_tasks() -> "list[asyncio.Task[Any]]":
    """The tasks beside the current one, on the loop of a `LoopThread`; none on a loop that is not ours alone."""
    if asyncio.get_running_loop() not in _executors:
        return []
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


class LoopThread:
    """An event loop on a daemon thread, started when it is first needed; uvloop where there is one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may spawn in the middle of it
        self._turning: _Turning | None = None
        self._begun: list[_Turning] = []  # more than one where an interrupt, or a signal handler, came in between

    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        turning = self._turning
        if turning is not None:
            return turning.loop
        with self._lock:
            return (self._turning or self._begin()).loop

    def _begin(self) -> "_Turning":
        new = _Turning()
        self._begun.append(new)  # first: where an interrupt comes before the rest, `stop` ends it
        try:
            start_thread(new.run, LOOP_NAME)
            new.is_ready.wait()
            if new.error is not None:
                raise new.error
            if self._turning is None:
                self._turning = new
            return self._turning  # a signal handler's, if one came here meanwhile
        finally:
            if self._turning is not new:
                new.end_soon()

    def end_soon(self) -> None:
        """End the loop and its thread, without waiting; also from its own thread."""
        for each in tuple(self._begun):
            each.end_soon()

    def stop(
        self,
        timeout: float = STOP_SECONDS,
        before: Callable[[float], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """End the loop and its thread, waiting for it at most ``timeout`` seconds.

        Args:
            timeout: Seconds.
            before: A last coroutine that the loop runs, given how long that may take.
        """
        with self._lock:
            turning, self._turning = self._turning, None
        until = monotonic() + timeout
        try:
            if turning is not None and before is not None and timeout:
                with contextlib.suppress(TimeoutError):
                    run_on(turning.loop, before(timeout), timeout)
        finally:
            while self._begun:
                each = self._begun.pop()
                each.end_soon()
                each.join(max(0.0, until - monotonic()))


class _Turning:
    """One loop, made and run on its thread: what an interrupt tears is the main thread's."""

    loop: asyncio.AbstractEventLoop
    """There once it is ready, unless there is an error."""

    def __init__(self) -> None:
        self.is_ready: Final = Gate()
        self.error: BaseException | None = None
        """Why there is no loop."""
        self._is_to_end: Final = Gate()
        self._thread: threading.Thread | None = None

    def end_soon(self) -> None:
        self._is_to_end.open()
        if self.is_ready.is_open and self.error is None:
            call_soon(self.loop, self.loop.stop)

    def join(self, seconds: float) -> None:
        if self._thread is not None:  # one that has not begun finds that it is to end
            self._thread.join(seconds)

    def run(self) -> None:
        self._thread = threading.current_thread()
        try:
            loop = self.loop = _new_loop()
            _give_executor(loop)
        except BaseException as error:  # a wall: it is raised where the loop is asked for
            self.error = error
            return
        finally:
            self.is_ready.open()
        asyncio.set_event_loop(loop)
        try:
            while not self._is_to_end.is_open:  # a task may stop the loop, which is not its own
                try:
                    loop.run_forever()
                except (KeyboardInterrupt, SystemExit) as error:  # of a task; no signal is delivered on this thread
                    log().warning("task.exit_ignored", exc_info=error)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def _give_executor(loop: asyncio.AbstractEventLoop) -> None:
    try:  # what it imports is seldom needed before
        from evsys_bus.tasks.daemon_executor import DaemonExecutor
    except RuntimeError:
        return  # the program ends: what imports `concurrent.futures.thread` cannot be imported any more
    executor = _executors[loop] = DaemonExecutor()
    loop.set_default_executor(executor)


def run_alone(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function on a loop of its own, uvloop where there is one, until it is done; on this thread.

    Any: what a coroutine yields to its loop is the loop's business.
    """
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main())


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except (ImportError, RuntimeError):  # Windows has none; and see `_give_executor`
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
