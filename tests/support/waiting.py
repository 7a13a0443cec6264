"""Waiting for a condition that another thread, task or process makes true."""

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 12.0, *, what: object = "") -> None:
    """Look again and again until the condition holds; an `AssertionError` with ``what`` if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


async def wait_until_async(condition: Callable[[], object], seconds: float = 12.0) -> None:
    """The same for a task: the others go on meanwhile; a `TimeoutError` if it does not hold in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
