"""Ctrl-C and SIGTERM: the first one stops the runs after their step, the second one ends the program.

While only deliveries are waited for, one ends that wait.

What is done between the two (checkpoints named ``final``, the drain) is the experiment's and the bus's business.
"""

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

AGAIN_SECONDS: Final = 0.5
"""How soon a task that is to leave its wait is cancelled once more."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Listens while its block lasts; off the main thread it hears nothing."""

    def __init__(self, on_first: Callable[[signal.Signals], None]) -> None:
        self.received: signal.Signals | None = None
        """The first signal, if one came."""
        self._on_first = on_first
        self._cancel: Callable[[], object] | None = None
        self._leave: Callable[[], object] | None = None
        self._earlier: dict[signal.Signals, Any] = {}  # Any: a handler, or one of the signal module's constants

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {each: signal.signal(each, self._hear) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each, earlier in self._earlier.items():
            signal.signal(each, signal.SIG_DFL if earlier is None else earlier)

    def stop_this_task(self) -> None:
        """From here on, the first signal cancels the task that calls this."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)

    def end_the_wait_of_this_task(self) -> None:
        """From here on the task that calls this only waits: the next signal, whatever came before, has it leave."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def leave() -> None:  # a bus takes one cancellation for tasks, and up to two for deliveries
            if not task.done():
                task.cancel()
                loop.call_later(AGAIN_SECONDS, leave)

        self._leave = lambda: loop.call_soon_threadsafe(leave)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        leave, self._leave = self._leave, None
        if leave is not None:
            self.received = self.received or signal.Signals(number)
            leave()
            return
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if not first or self._cancel is None:
            raise KeyboardInterrupt
        self._on_first(signal.Signals(number))
        self._cancel()
