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

AGAIN_SECONDS: Final = 0.5
"""Interval at which a task that is to stop waiting is cancelled again."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles signals within the block; outside the main thread it does nothing."""

    def __init__(self, on_first: Callable[[signal.Signals], None]) -> None:
        self.received: signal.Signals | None = None
        """The first signal that was received."""
        self._on_first = on_first
        self._cancel: Callable[[], object] | None = None
        self._leave: Callable[[], object] | None = None
        self._earlier: dict[signal.Signals, Any] = {}

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
        """Cancel the current task on the first signal."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)

    def end_the_wait_of_this_task(self) -> None:
        """Cancel the current task, which only waits from now on, on the next signal, until it has ended."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def leave() -> None:  # a bus needs one cancellation for tasks, and up to two for deliveries
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
