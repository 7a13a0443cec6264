"""Handling of Ctrl-C and SIGTERM: the first signal stops the runs after their step, the second ends the program.

During the drain at the end, one signal ends the drain.

The shutdown between the two signals (checkpoints named ``final``, the drain) belongs to the experiment and the bus.
"""

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

CANCEL_INTERVAL_SECONDS: Final = 0.5
"""Interval at which a task that is to stop waiting is cancelled again."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles signals within the block; outside the main thread it does nothing.

    Args:
        on_first: Called with the first signal, if that cancels a task instead of raising KeyboardInterrupt.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None] = lambda _: None) -> None:
        self.received: signal.Signals | None = None
        """The first signal that was received."""
        self._on_first = on_first
        self._cancel: Callable[[], object] | None = None
        self._stop_waiting: Callable[[], object] | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {each: signal.signal(each, self._handle) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each, previous in self._previous_handlers.items():
            signal.signal(each, signal.SIG_DFL if previous is None else previous)

    def cancel_this_task_on_signal(self) -> None:
        """Cancel the current task on the first signal."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)

    def stop_waiting_on_signal(self) -> None:
        """Cancel the current task, which only waits from now on, on the next signal, until it has ended."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def cancel_until_done() -> None:  # a bus needs one cancellation for tasks, and up to two for deliveries
            if not task.done():
                task.cancel()
                loop.call_later(CANCEL_INTERVAL_SECONDS, cancel_until_done)

        self._stop_waiting = lambda: loop.call_soon_threadsafe(cancel_until_done)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        stop_waiting, self._stop_waiting = self._stop_waiting, None
        if stop_waiting is not None:
            self.received = self.received or signal.Signals(number)
            stop_waiting()
            return
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if not first or self._cancel is None:
            raise KeyboardInterrupt
        self._on_first(signal.Signals(number))
        self._cancel()
