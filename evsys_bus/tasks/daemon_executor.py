"""`DaemonExecutor`: for ``asyncio.to_thread`` on a loop of ours, so that a call that hangs keeps no program alive.

Python joins the threads of its own executors before it exits, whoever started them and whatever they wait for.
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
    """Calls functions on daemon threads, as many as the usual executor has.

    A subclass because event loops insist; nothing of the usual one is at work.
    """

    def __init__(self) -> None:
        super().__init__(1)  # whose threads are started by its `submit`, and never are
        self._most: Final = min(32, (os.cpu_count() or 1) + 4)
        self._calls: Final[SimpleQueue[Callable[[], None] | None]] = SimpleQueue()
        self._started = 0
        self._unended = 0  # calls, at work or waiting
        self._is_shut = False
        self._lock: Final = threading.Lock()  # over the counts

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """As `Executor.submit`.

        Raises:
            RuntimeError: After `shutdown`; or no thread is there, and none can be started now.
        """
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                self._end()
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # a wall: it is the waiter's, a SystemExit too
                self._end()  # before it is known, for whoever then calls again finds this thread at leisure
                future.set_exception(error)
            else:
                self._end()
                future.set_result(result)

        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._unended >= self._started and self._started < self._most:
                self._start_one()
            self._unended += 1
            self._calls.put(call)
        return future

    @property
    def unended(self) -> int:
        """Calls that are at work or wait for their turn; from any thread."""
        return self._unended

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more. It waits for nobody: who asks for that would wait for a call that hangs."""
        del wait, cancel_futures
        with self._lock:
            self._is_shut = True
            for _ in range(self._started):
                self._calls.put(None)

    def _start_one(self) -> None:
        try:
            threading.Thread(target=self._work, name="evsys-bus-call", daemon=True).start()
        except RuntimeError:
            if not self._started:
                raise  # otherwise those that are there come to it, as where there are as many as may be
        else:
            self._started += 1

    def _end(self) -> None:
        with self._lock:
            self._unended -= 1

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # and with it what it was given
