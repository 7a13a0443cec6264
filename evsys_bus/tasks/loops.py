"""Event loops as the task room sees them: the one that runs here, and one of our own on a thread."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from evsys_bus.diagnostics import log

T = TypeVar("T")

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


class LoopThread:
    """An event loop on a daemon thread, started when it is first needed; uvloop where there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        with self._lock:
            if self._loop is None:
                self._loop = _new_loop()
                try:  # what it imports is seldom needed before
                    from evsys_bus.tasks.daemon_executor import DaemonExecutor
                except RuntimeError:
                    pass  # the program ends: what imports `concurrent.futures.thread` cannot be imported any more
                else:
                    self._loop.set_default_executor(DaemonExecutor())
                self._stopping = threading.Event()
                arguments = (self._loop, self._stopping)
                self._thread = threading.Thread(target=_run, args=arguments, name=LOOP_NAME, daemon=True)
                self._thread.start()
            return self._loop

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the loop and its thread, waiting for it at most ``timeout`` seconds."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            self._stopping.set()
            call_soon(loop, loop.stop)
            thread.join(timeout)


def run_alone(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function on a loop of its own, uvloop where there is one, until it is done; on this thread.

    Any: what a coroutine yields to its loop is the loop's business.
    """
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main())


def _run(loop: asyncio.AbstractEventLoop, stopping: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    try:
        while not stopping.is_set():  # a task may stop the loop, which is not its own
            try:
                loop.run_forever()
            except (KeyboardInterrupt, SystemExit) as error:  # of a task; no signal is delivered on this thread
                log().warning("task.exit_ignored", exc_info=error)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except (ImportError, RuntimeError):  # Windows has none; and see `LoopThread.loop`
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
