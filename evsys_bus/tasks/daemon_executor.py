"""`DaemonExecutor`: runs ``asyncio.to_thread`` calls on daemon threads, so that a call that hangs cannot block exit.

Python joins the threads of its own executors before it exits, even if they are blocked.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonExecutor(ThreadPoolExecutor):
    """Calls functions on daemon threads, at most as many as ThreadPoolExecutor uses by default.

    A subclass only because ``set_default_executor`` requires it; none of the inherited machinery is used.
    """

    def __init__(self) -> None:
        super().__init__(1)  # starts no thread: the inherited `submit` would, and it is overridden
        self._max_threads: Final = min(32, (os.cpu_count() or 1) + 4)
        self._calls: Final[SimpleQueue[Callable[[], None] | None]] = SimpleQueue()
        self._started = 0
        self._unfinished = 0  # calls that are running or queued
        self._is_shut_down = False
        self._lock: Final = threading.Lock()  # guards the counts

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Queue a call and return its future.

        Raises:
            RuntimeError: After `shutdown`, or if there is no thread and none can be started.
        """
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                self._finish_call()
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # isolation: even SystemExit is raised where the future is awaited
                self._finish_call()  # before the future is set: a caller that submits next must see this thread as idle
                future.set_exception(error)
            else:
                self._finish_call()
                future.set_result(result)

        with self._lock:
            if self._is_shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._unfinished >= self._started and self._started < self._max_threads:
                self._start_thread()
            self._unfinished += 1
            self._calls.put(call)
        return future

    @property
    def unfinished(self) -> int:
        """Number of calls that are running or queued; safe from any thread."""
        return self._unfinished

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls. Both arguments are ignored: waiting could block on a call that hangs."""
        del wait, cancel_futures
        with self._lock:
            self._is_shut_down = True
            for _ in range(self._started):
                self._calls.put(None)

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._run_calls, name="evsys-bus-call", daemon=True).start()
        except RuntimeError:
            if not self._started:
                raise  # otherwise the existing threads will run the call
        else:
            self._started += 1

    def _finish_call(self) -> None:
        with self._lock:
            self._unfinished -= 1

    def _run_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # drop the references to its arguments while waiting
