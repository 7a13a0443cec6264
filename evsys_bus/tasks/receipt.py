"""What a drain hands back, and how one waits for it."""

import asyncio
import concurrent.futures
import math
from collections.abc import Callable, Generator
from typing import Any

import anyio
import msgspec

from evsys_bus.errors import BusError
from evsys_bus.tasks.loops import running_loop


class TaskCounts(msgspec.Struct):
    """How tasks have fared: an accepted one ends as completed, failed or cancelled."""

    spawned: int = 0
    adopted: int = 0
    """Made by a bare ``asyncio.create_task`` in a hook."""
    retries: int = 0
    """Attempts beyond the first, by a retry policy."""
    completed: int = 0
    failed: int = 0
    """Raised, or ran out of time."""
    cancelled: int = 0
    """Cancelled by the drain's deadline or by others, before or after they began."""
    refused: int = 0
    """Never accepted: too many waited, or the bus was closed."""


class Delivery(msgspec.Struct, frozen=True):
    """How far one followed adapter has got: ``recorded = delivered + dead + pending``."""

    name: str
    recorded: int
    """Events that are for it."""
    delivered: int
    dead: int
    """Not taken, and never will be; they are in its dead-letter file, with the reason."""
    pending: int
    """Safe in the journal, and still to be delivered."""
    trouble: str | None = None
    """What its destination said last, if it does not take events."""


class Receipt(msgspec.Struct, frozen=True):
    """What a drain hands back."""

    total: TaskCounts
    owners: dict[str, TaskCounts]
    """The same by callback."""
    left: tuple[str, ...] = ()
    """Tasks that had not ended when the deadline passed, as ``owner:name``."""
    seconds: float = 0.0
    """How long the drain took."""
    recorded: int = 0
    """Events that are in the journal, on the medium; 0 where there is none."""
    unrecorded: int = 0
    """Events that the journal's disk did not take, and that end with the process."""
    journal: str | None = None
    """Where the journal is."""
    deliveries: tuple[Delivery, ...] = ()
    """One for each followed adapter."""
    finish: str | None = None
    """The command that delivers what is pending; None where nothing is."""


class Draining(concurrent.futures.Future[Receipt]):
    """A drain under way: ``await`` it, or call ``result()`` on a thread that does not run the bus's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self._loop = loop

    def __await__(self) -> Generator[Any, None, Receipt]:
        """Any: what a future yields to its loop is the loop's business."""
        return asyncio.wrap_future(self).__await__()

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt.

        Raises:
            BusError: Called on the thread that has to run the tasks, where it would wait for itself.
            TimeoutError: It took longer than ``timeout`` seconds.
        """
        if not self.done() and self._loop is not None and running_loop() is self._loop:
            raise BusError(
                "drain().result() on the thread that runs the bus's tasks would wait for itself",
                fix="write `receipt = await bus.drain()`",
            )
        return super().result(timeout)


async def wait_shielded(
    draining: Draining, *, most: float = math.inf, else_: Callable[[], Receipt] | None = None
) -> tuple[Receipt, bool]:
    """The receipt, and whether a cancellation arrived meanwhile: the wait went on, and the caller raises it now.

    Args:
        draining: What is waited for.
        most: How many cancellations end the wait.
        else_: Gives the receipt in that case.
    """
    cancelled = 0
    waiting = asyncio.wrap_future(draining)
    # The scope keeps anyio from cancelling over and over; the loop outlives a bare task.cancel().
    with anyio.CancelScope(shield=True):
        while not waiting.done():
            try:
                await asyncio.wait([waiting])
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled >= most and else_ is not None:
                    return else_(), True
    return waiting.result(), cancelled > 0
