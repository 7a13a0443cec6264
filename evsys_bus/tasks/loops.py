"""Event loops: the loop that is running on this thread, and `LoopThread`, a loop on a thread of its own."""

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from evsys_bus.diagnostics import log
from evsys_bus.tasks.calls import Gate, start_thread

if TYPE_CHECKING:
    from evsys_bus.tasks.daemon_executor import DaemonExecutor

T = TypeVar("T")
_executors: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, DaemonExecutor]" = weakref.WeakKeyDictionary()

LOOP_NAME: Final = "evsys-bus-loop"
"""Name of the thread of a `LoopThread`."""
STOP_SECONDS: Final = 1.0
"""How long the loop's thread may take to end; a thread that a task blocks is abandoned."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that is running on this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Schedule ``call`` on the loop's thread, from any thread; does nothing once the loop is closed."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        pass  # the loop is closed


def run_on_loop(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Run a coroutine on a loop of another thread and return its result.

    Raises:
        TimeoutError: It took longer and was cancelled.
        BaseException: What the coroutine raised.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result(timeout)
    except TimeoutError:
        future.cancel()
        raise


def count_unfinished_calls(loop: asyncio.AbstractEventLoop) -> int:
    """Number of unfinished executor calls (``run_in_executor``, ``to_thread``) of a `LoopThread`'s loop."""
    executor = _executors.get(loop)
    return 0 if executor is None else executor.unfinished


def other_tasks() -> "list[asyncio.Task[Any]]":
    """All tasks but the current one on the loop of a `LoopThread`; empty on a loop that the host owns."""
    if asyncio.get_running_loop() not in _executors:
        return []
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


class LoopStopped(Exception):  # noqa: N818 - control flow, not an error
    """A loop is needed after `LoopThread.stop`."""


class LoopThread:
    """An event loop on a daemon thread, started when it is first needed; uses uvloop where it is installed."""

    def __init__(self) -> None:
        self._is_stopped = False
        self._lock = threading.RLock()  # reentrant: a signal handler may spawn while it is held
        self._runner: _LoopRunner | None = None
        self._runners: list[_LoopRunner] = []  # more than one if an interrupt or a signal handler came in between

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop; starts it on the first call.

        Raises:
            LoopStopped: `stop` was called. A thread that is started after that would never end.
        """
        runner = self._runner
        if runner is not None:
            return runner.loop
        with self._lock:
            if self._is_stopped:
                raise LoopStopped
            return (self._runner or self._start_runner()).loop

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run a coroutine as a task of the loop, from any other thread; starts the loop if needed.

        The loop and its thread end with it, so that no thread is left if the caller does not wait for its end.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop())
        future.add_done_callback(lambda _: self.request_stop())
        return future

    def _start_runner(self) -> "_LoopRunner":
        new = _LoopRunner()
        self._runners.append(new)  # first, so that `stop` ends it even if an interrupt skips the rest
        try:
            start_thread(new.run, LOOP_NAME)
            new.is_ready.wait()
            if new.error is not None:
                raise new.error
            if self._runner is None:
                self._runner = new
            return self._runner  # may have been started by a signal handler meanwhile
        finally:
            if self._runner is not new:
                new.request_stop()

    def request_stop(self) -> None:
        """Ask the loop and its thread to end, without waiting; may be called on that thread."""
        for each in tuple(self._runners):
            each.request_stop()

    def stop(
        self,
        timeout: float = STOP_SECONDS,
        before_stop: Callable[[float], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """End the loop and its thread for good, waiting at most ``timeout`` seconds. May be called again.

        Args:
            timeout: Seconds.
            before_stop: A coroutine function that the loop runs last; called with the seconds that it may take.
        """
        deadline = monotonic() + timeout
        try:
            self._is_stopped = True
            with self._lock:
                runner, self._runner = self._runner, None
            if runner is not None and before_stop is not None and timeout:
                with contextlib.suppress(TimeoutError):
                    run_on_loop(runner.loop, before_stop(timeout), timeout)
        finally:
            self.request_stop()
            for each in tuple(self._runners):
                each.join(max(0.0, deadline - monotonic()))
            self._runners.clear()  # last: after an interrupt, the next call finds them again


class _LoopRunner:
    """One loop, created and run on its own thread, where no signal handler can interrupt it."""

    loop: asyncio.AbstractEventLoop
    """Set once `is_ready` is open, unless `error` is set."""

    def __init__(self) -> None:
        self.is_ready: Final = Gate()
        self.error: BaseException | None = None
        """Why there is no loop."""
        self._stop_requested: Final = Gate()
        self._thread: threading.Thread | None = None

    def request_stop(self) -> None:
        self._stop_requested.open()
        if self.is_ready.is_open and self.error is None:
            call_soon(self.loop, self.loop.stop)

    def join(self, seconds: float) -> None:
        if self._thread is not None:  # a thread that has not started yet will see `_stop_requested`
            self._thread.join(seconds)

    def run(self) -> None:
        self._thread = threading.current_thread()
        try:
            loop = self.loop = _new_loop()
            _set_daemon_executor(loop)
        except BaseException as error:  # isolation: raised again where the loop is requested
            self.error = error
            return
        finally:
            self.is_ready.open()
        asyncio.set_event_loop(loop)
        try:
            while not self._stop_requested.is_open:  # a task may have called loop.stop()
                try:
                    loop.run_forever()
                except (KeyboardInterrupt, SystemExit) as error:  # raised by a task: no signal arrives on this thread
                    log().warning("task.exit_ignored", exc_info=error)
            ending = loop.create_task(loop.shutdown_asyncgens())
            ending.add_done_callback(lambda _: loop.stop())
            while not ending.done():  # each request to end stops the loop, and there may be several
                loop.run_forever()
        finally:
            loop.close()


def _set_daemon_executor(loop: asyncio.AbstractEventLoop) -> None:
    try:  # imported late: most programs never need it
        from evsys_bus.tasks.daemon_executor import DaemonExecutor
    except RuntimeError:
        return  # the interpreter is shutting down, and `concurrent.futures.thread` can no longer be imported
    executor = _executors[loop] = DaemonExecutor()
    loop.set_default_executor(executor)


def run_in_new_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function to completion on a new loop on this thread; uses uvloop where it is installed."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main())


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except (ImportError, RuntimeError):  # not available on Windows; RuntimeError as in `_set_daemon_executor`
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
