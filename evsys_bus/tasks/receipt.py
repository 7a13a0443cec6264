"""What a drain hands back, and how one waits for it."""

import asyncio
import concurrent.futures
import math
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Final, Literal, Protocol

import anyio
import msgspec

from evsys_bus.errors import BusError
from evsys_bus.tasks.loops import call_soon, running_loop

_LOOK_SECONDS: Final = 0.5


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


DeliveryState = Literal["delivering", "idle", "retrying", "parked", "ended", "failed", "other_rank", "unknown"]
"""``idle``: all there is was delivered. ``parked``: it waits for a person, and is tried once a minute. ``failed``: the
adapter cannot be built or opened. ``other_rank``: another rank of the job delivers to it. ``unknown``: its files cannot
be read now, the error says why, and no count means anything."""


class DeliveryStatus(msgspec.Struct, frozen=True):
    """How one delivery fares: the same struct in its state file, in ``health()``, receipts and ``evsys-bus status``.

    At any time ``recorded = delivered + dead + pending``, and ``owed <= delivered``.
    """

    name: str = ""
    """The adapter's."""
    recorded: int = 0
    """Events that are for it."""
    delivered: int = 0
    """Events that the adapter has taken."""
    dead: int = 0
    """Not taken, and never will be; they are in its dead-letter file, with the reason."""
    pending: int = 0
    """Safe in the journal, and still to be delivered."""
    owed: int = 0
    """Of the delivered ones: not confirmed by the far side yet (`Callback.report_owed`)."""
    owed_fix: str | None = None
    """What a person has to do before those can be confirmed; None where nobody has to do anything."""
    hook_failures: int = 0
    """Hooks of a followed callback that raised."""
    task_failures: int = 0
    """Tasks started by those hooks that raised, ran out of time or were cancelled."""
    last_failure: str | None = None
    """The newest of these failures: the hook or the task, and what it raised."""
    state: DeliveryState | None = None
    """As its courier last wrote it down; None before it did."""
    error: str | None = None
    """What its destination, or the adapter, last raised or answered; why something is owed."""
    fix: str | None = None
    """What to do about the error."""
    failing_since: float | None = None
    """Seconds since the epoch."""
    attempts: int = 0
    """Since it began to fail."""
    pid: int = 0
    """The process of its courier."""
    at: float = 0.0
    """When the courier wrote this; seconds since the epoch."""
    busy: bool = False
    """Whether a courier delivers to it now."""
    log: str | None = None
    """The file with the courier's log, tracebacks included, where it has one of its own."""
    absent: int = 0
    """Events that it does not get, because the journal had them no more when it came to them: not recorded for it."""

    @property
    def trouble(self) -> str | None:
        """What keeps events from being delivered or confirmed; None where nothing does."""
        if self.owed and self.error is not None:
            return self.error
        return None if self.state in {None, "delivering", "idle", "other_rank"} else self.error

    @property
    def is_known(self) -> bool:
        """Whether the counts mean anything: not so where its files could not be read."""
        return self.state != "unknown"

    @property
    def complete(self) -> bool:
        """Whether every event was taken and confirmed, and nothing failed on the way; False where that is unknown."""
        failures = self.hook_failures or self.task_failures
        return self.is_known and not (self.pending or self.dead or self.owed or failures)


class Receipt(msgspec.Struct, frozen=True):
    """What a drain hands back."""

    total: TaskCounts
    tasks_by_owner: dict[str, TaskCounts]
    """The same by callback."""
    left: tuple[str, ...] = ()
    """Tasks that had not ended when the deadline passed, as ``owner:name``."""
    seconds: float = 0.0
    """How long the drain took."""
    recorded: int = 0
    """Events that are in the journal, on the medium; 0 where there is none."""
    unrecorded: int = 0
    """Events that the journal's disk did not take, and that end with the process."""
    refused: int = 0
    """Events whose `publish` returned, and that met no hook and are not in the journal; the log says why."""
    without_hooks: int = 0
    """Events that are in the journal and met no hook: another thread's hook held the bus until the end."""
    journal: str | None = None
    """Where the journal is."""
    deliveries: tuple[DeliveryStatus, ...] = ()
    """One for each followed adapter."""
    finish: str | None = None
    """The command that delivers what is pending or owed; None where nothing is."""

    @property
    def owners(self) -> dict[str, TaskCounts]:
        """The name that `tasks_by_owner` had before 0.2."""
        return self.tasks_by_owner


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


def prepare_to_wait() -> None:
    """Import what `wait_shielded` needs: at the end there may be no file left to import it with."""
    anyio.CancelScope()


class Ends(Protocol):
    """A `Draining`, or an `Uninterrupted`."""

    def done(self) -> bool:
        """Whether it has come to its end."""
        ...

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        """Have this called then, on any thread. Any: as a future passes itself."""
        ...


async def wait_shielded(
    ending: Ends,
    *,
    most: float = math.inf,
    on_cancel: Callable[[int], object] | None = None,
    seconds: float = math.inf,
) -> BaseException | None:
    """Wait for the end; the first cancellation or interrupt that arrived meanwhile: the caller raises it now.

    Args:
        ending: What is waited for.
        most: How many of them end the wait.
        on_cancel: Called with how many have arrived so far.
        seconds: After so long it ends too: an interrupt may have torn what would have come to an end.
    """
    count = 0
    first: BaseException | None = None
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    ending.add_done_callback(lambda _: call_soon(loop, partial(_wake, woken)))
    until = time.monotonic() + seconds
    # The scope keeps anyio from cancelling over and over; the loop outlives a bare task.cancel().
    with anyio.CancelScope(shield=True):
        while not ending.done() and (left := until - time.monotonic()) > 0.0 and count < most:
            try:
                # In slices: an interrupt that tears the loop may take what would have woken us.
                await asyncio.wait([woken], timeout=min(left, _LOOK_SECONDS))
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
                count += 1
                first = first or error
                if on_cancel is not None:
                    on_cancel(count)
    return first


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)
