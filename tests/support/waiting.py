"""Waiting for conditions that another thread, task or process makes true."""

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 12.0, *, what: object = "") -> None:
    """Poll until the condition is true; raises `AssertionError` with ``what`` on timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


async def wait_until_async(condition: Callable[[], object], seconds: float = 12.0) -> None:
    """Poll without blocking the event loop until the condition is true; raises `TimeoutError` on timeout."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
