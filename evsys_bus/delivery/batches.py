"""`SinkReceiver`: delivers batches to a `Sink`.

It decides what becomes of a batch; `retry` decides when a call is repeated. A batch that is too large, or on which the
sink fails with an unknown error, is split in halves until the failing event is found; that event is dead-lettered.

Circuit breaker: an outage that the sink does not report as one (its client raises its own exceptions) looks like one
bad event after another. After `MOST_DEAD_IN_A_ROW` consecutive events were dead-lettered for unknown exceptions, the
next failing event is kept and the sink is parked until it accepts an event or is rebuilt.
"""

import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any, Final

from evsys_bus.codec.references import error_text
from evsys_bus.delivery.receiver import Report, Rewindable, Taken, Trouble, settle
from evsys_bus.delivery.retry import ATTEMPTS, RetryPolicy, Sleep, plain_text, words
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BatchTooLargeError, RejectedError, RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.sink import Sink, sink_name
from evsys_bus.tasks import CANCEL_GRACE_SECONDS, Ending, call_bounded, name_of, other_tasks

MOST_DEAD_IN_A_ROW: Final = 3
MOST_LEFT_BEHIND: Final = 3
"""How many calls that ignored their cancellation may still run; no other call is made until one of them has ended."""
CLOSE_SECONDS: Final = 5.0


class SinkReceiver:
    """The receiver of a sink; see `Receiver`.

    Attributes:
        left_behind: How many calls have timed out and ignored their cancellation.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
        grace_seconds: float = CANCEL_GRACE_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.max_events = max(1, sink.max_batch_events)
        self.max_bytes = max(1, sink.max_batch_bytes)
        self.max_seconds = max(0.0, sink.max_batch_seconds)
        self.left_behind = 0
        self._sink = sink
        self._name = sink_name(sink)
        self._retrying = RetryPolicy(self._tell, sleep=sleep, random=Random() if random is None else random)  # noqa: S311
        self._grace_seconds = grace_seconds
        self._close_seconds = close_seconds
        self._faults = FaultLog()
        self.failures = 0
        """Failures of the sink's `close`."""
        self.task_failures = 0
        """Tasks that the sink started but did not await, and that failed or did not end."""
        self.last_failure: str | None = None
        """The newest of both."""
        self._report: Report = _nobody
        self._troubled = False
        self._unended: set[asyncio.Task[Ending]] = set()
        self._opening = False
        self._size = self.max_events  # events per write; fewer while a failing event is searched
        self._searched = 0  # how many of the next events the search covers
        self._dead_in_a_row = 0
        self._part: tuple[Envelope, ...] = ()
        self._returned: list[object] = []

    async def open(self, report: Report) -> None:
        """Open the sink; retries until that succeeds.

        Raises:
            Exception: What the sink's `open` raised, if a retry cannot help.
        """
        self._report = report
        self._opening = True
        ending = await self._retrying(partial(self._call, self._sink.open))
        self._tell_end()
        if ending.error is not None:
            raise ending.error

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        """Deliver the batch, or its first part if it must be split; see `Receiver.take`."""
        self._returned = []
        while True:
            part = tuple(batch[: self._fitting(sizes)])
            searching = self._searched > 0 and len(part) > 1
            attempts = 1 if searching else ATTEMPTS
            ending = await self._retrying(partial(self._write, part), attempts=attempts, park=self._braked())
            taken = self._settled(part, ending)
            if taken is not None:
                self._tell_end()
                return taken

    def interrupted(self) -> Taken | None:
        """The result of the last `write` if it returned although it was cancelled; None if it was cut off."""
        if not self._returned:
            return None
        ending = self._checked(self._part, Ending(self._returned[0]))
        return self._settled(self._part, ending) if ending.error is None else None

    @property
    def writes_starts(self) -> bool:
        """Whether repeated start events must be delivered by `take`, because the sink has no method for them."""
        return not callable(getattr(self._sink, "introduce", None))

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Pass the start events to the sink's method `introduce`, if it has one.

        Raises:
            Exception: What that method raised.
        """
        introduce = getattr(self._sink, "introduce", None)
        if callable(introduce):
            introduce(tuple(starts))

    def mark(self) -> Any:
        """The sink's mark; None unless the sink is `Rewindable`."""
        return self._sink.mark() if isinstance(self._sink, Rewindable) else None

    def rewind(self, mark: Any) -> None:
        """Rewind the sink to the mark, if it is `Rewindable`."""
        if mark is not None and isinstance(self._sink, Rewindable):
            self._sink.rewind(mark)

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Close the sink if it was opened, or if opening it was tried; a failure is logged.

        Args:
            deadline: Until when the destination may confirm delivered events (monotonic); closing takes up to
                `CLOSE_SECONDS` more.
            settles: Whether to ask for that confirmation.
        """
        for task in self._unended:
            task.cancel()
        if settles and self._opening:
            await settle(self._sink, self._name, deadline)
        if self._opening:
            ending = await self._bounded(self._sink.close, self._close_seconds)
            if ending.error is not None:
                self.failures += 1
                self.last_failure = f"close: {words(ending.error)}"
                log().warning("sink.close_failed", sink=self._name, error=words(ending.error), exc_info=ending.error)
        await self._strays_ended(deadline)
        self._faults.flush()

    async def _strays_ended(self, deadline: float | None) -> None:
        """Wait for tasks that the sink started but did not await; cancel, count and log the late ones."""
        strays = [task for task in other_tasks() if task not in self._unended]
        if not strays:
            return
        left = math.inf if deadline is None else deadline - time.monotonic()
        ended, late = await asyncio.wait(strays, timeout=max(0.0, min(self._close_seconds, left)))
        failed = [task for task in ended if not task.cancelled() and task.exception() is not None]
        for task in late:
            task.cancel()
        self.task_failures += len(failed) + len(late)
        for task in (*failed, *late):
            why = "it had not ended when the sink was closed" if task in late else error_text(task.exception())
            self.last_failure = f"task {name_of(task)}: {why}"
            error = None if task in late else task.exception()
            fix = "await it in write, which returns when the destination has the batch"
            log().warning("sink.task_failed", sink=self._name, task=name_of(task), why=why, fix=fix, exc_info=error)

    def _fitting(self, sizes: Sequence[int]) -> int:
        """How many events of the batch to pass to one write: at least one."""
        most = 1 if self._braked() else self._size
        return max(1, bisect_right(list(accumulate(sizes[:most])), self.max_bytes))

    def _braked(self) -> bool:
        return self._dead_in_a_row >= MOST_DEAD_IN_A_ROW

    async def _write(self, part: tuple[Envelope, ...]) -> Ending:
        returned = self._returned = []  # per attempt, because an abandoned one may still append to its list
        self._part = part

        async def write() -> object:
            value = await self._sink.write(part)
            task = asyncio.current_task()
            if value is not None or task is None or not task.cancelling():  # None may mean a suppressed cancellation
                returned.append(value)
            return value

        ending = self._checked(part, await self._call(write))
        if ending.error is not None:
            self._returned = []  # it will be repeated, whatever it still returns
        return ending

    @staticmethod
    def _checked(part: tuple[Envelope, ...], ending: Ending) -> Ending:
        value = ending.value
        if ending.error is not None or value is None or (type(value) is int and 0 < value <= len(part)):
            return ending
        if type(value) is int and value == 0:
            return Ending(error=RetryLaterError("write returned 0: it accepted no events"))
        what = f"a {type(value).__name__} that is not a count of the {len(part)} events it was given"
        return Ending(error=RetryLaterError(f"write returned {what}; return None, or how many it accepted"))

    async def _call(self, fn: Callable[..., Awaitable[object]], *args: object) -> Ending:
        while len(self._unended) >= MOST_LEFT_BEHIND:
            error = TimeoutError(f"{len(self._unended)} calls ignore their cancellation; waiting for one to end")
            self._tell(Trouble("retrying", words(error)), error)
            await asyncio.wait(self._unended, return_when=asyncio.FIRST_COMPLETED)
        return await self._bounded(fn, self._sink.write_timeout_seconds, *args)

    async def _bounded(self, fn: Callable[..., Awaitable[object]], seconds: float, *args: object) -> Ending:
        earlier = set(self._unended)
        ending = await call_bounded(
            fn,
            *args,
            seconds=seconds,
            grace_seconds=self._grace_seconds,
            name=f"evsys-bus:{self._name}",
            unended=self._unended,
        )
        self.left_behind += len(self._unended - earlier)
        return ending

    def _settled(self, part: tuple[Envelope, ...], ending: Ending) -> Taken | None:
        """The result for these events; None if a smaller part must be tried."""
        error = ending.error
        if error is None:
            done = len(part) if ending.value is None else int(ending.value)
            return self._taken(Taken(done))
        if isinstance(error, RejectedError):
            return self._taken(Taken(len(part), self._dead_of(error, len(part))))
        if len(part) > 1:
            self._size = len(part) // 2
            self._searched = max(self._searched, len(part))
            return None
        in_a_row = 0 if isinstance(error, BatchTooLargeError) else self._dead_in_a_row + 1
        self._searched = 0  # the failing event is found
        return self._taken(Taken(1, {0: words(error)}, {0: error}), in_a_row)

    def _taken(self, taken: Taken, dead_in_a_row: int = 0) -> Taken:
        self._dead_in_a_row = dead_in_a_row
        self._searched = max(0, self._searched - taken.done)
        if not self._searched:
            self._size = self.max_events
        return taken

    def _dead_of(self, error: RejectedError, count: int) -> dict[int, str]:
        inside = {index: why for index, why in error.reasons.items() if type(index) is int and 0 <= index < count}
        if len(inside) < len(error.reasons):
            outside = len(error.reasons) - len(inside)
            self._faults.warn("sink.rejected_unknown", None, sink=self._name, events=count, outside=outside)
        return {index: plain_text(error_text(why)) for index, why in inside.items()}

    def _tell(self, trouble: Trouble, error: Exception) -> None:
        self._troubled = True
        self._report(trouble)
        known = isinstance(error, RetryLaterError | OSError) or trouble.state == "parked"
        self._faults.warn(
            "sink.parked" if trouble.state == "parked" else "sink.retrying",
            type(error),
            error=None if known else error,
            sink=self._name,
            attempts=trouble.attempts,
            why=trouble.error,
        )

    def _tell_end(self) -> None:
        if self._troubled:
            self._troubled = False
            self._report(None)


def _nobody(trouble: Trouble | None) -> None:
    """Does nothing: the report function before `open`."""
