"""An event loop without waiting, for simulations."""

import asyncio
import selectors

from evsys_bus.testing import ManualClock


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(_JumpingSelector(clock))
        self._clock = clock

    def time(self):
        return self._clock.monotonic()


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        if timeout:
            self._clock.advance(timeout)
        return super().select(None if timeout is None else 0)
