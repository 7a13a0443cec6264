"""Waiting for conditions that another thread, task or process makes true."""

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 12.0, *, message: object = "") -> None:
    """Poll until the condition is true; raises `AssertionError` with ``message`` on timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.005)


async def wait_until_async(condition: Callable[[], object], seconds: float = 12.0) -> None:
    """Poll without blocking the event loop until the condition is true; raises `TimeoutError` on timeout."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
