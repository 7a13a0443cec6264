"""`SinkReceiver`: what a courier delivers to when the adapter is a `Sink`.

It owns what becomes of a batch; `retry` owns when a call is made again. A batch on which the sink fails for no known
reason, or that is too large, is given to it in halves until the event is found on which it fails; that one is dead.

The brake: an outage that the sink does not name (its client has exceptions of its own) looks like one bad event after
the other. When `MOST_DEAD_IN_A_ROW` events died of unknown exceptions and the sink took none between them, the next one
does not die: the sink counts as parked until it takes an event, or is built anew.
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
"""Calls that ignore their cancellation and still run; no other is made until one of so many has ended."""
CLOSE_SECONDS: Final = 5.0


class SinkReceiver:
    """A sink, as its courier sees it.

    Attributes:
        left_behind: How many calls ran out of time and ignored their cancellation, so far.
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
        """As `CountsFailures`."""
        self.task_failures = 0
        """A sink starts none that are counted."""
        self.last_failure: str | None = None
        """As `CountsFailures`."""
        self._report: Report = _nobody
        self._troubled = False
        self._unended: set[asyncio.Task[Ending]] = set()
        self._opening = False
        self._size = self.max_events  # how many are given at once; fewer while the search goes on
        self._searched = 0  # how many events the search covers, from the next one on
        self._dead_in_a_row = 0
        self._part: tuple[Envelope, ...] = ()
        self._returned: list[object] = []

    async def open(self, report: Report) -> None:
        """As `Receiver`: connects the sink, and tries again until it is.

        Raises:
            Exception: What the sink's `open` raised, where trying again will not help.
        """
        self._report = report
        self._opening = True
        ending = await self._retrying(partial(self._call, self._sink.open))
        self._tell_end()
        if ending.error is not None:
            raise ending.error

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        """As `Receiver`. A batch that must be split is taken in parts, the first of them now."""
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
        """What the last `write` said, if it returned although it was to end; of one that was cut off nobody knows."""
        if not self._returned:
            return None
        ending = self._checked(self._part, Ending(self._returned[0]))
        return self._settled(self._part, ending) if ending.error is None else None

    @property
    def writes_starts(self) -> bool:
        """Whether starts that the journal repeats are to come by `take`, because the sink knows no other way."""
        return not callable(getattr(self._sink, "introduce", None))

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Pass the start events on to a sink that has a method `introduce` for them; most need none.

        Raises:
            Exception: What that raises; so do `mark` and `rewind`.
        """
        introduce = getattr(self._sink, "introduce", None)
        if callable(introduce):
            introduce(tuple(starts))

    def mark(self) -> Any:
        """As `Receiver`; None unless the sink is `Rewindable`. Any: plain data."""
        return self._sink.mark() if isinstance(self._sink, Rewindable) else None

    def rewind(self, mark: Any) -> None:
        """As `Receiver`. Any: what `mark` returned."""
        if mark is not None and isinstance(self._sink, Rewindable):
            self._sink.rewind(mark)

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Have confirmed what is owed, and close the sink, if opening it was begun; its failure is logged.

        Args:
            deadline: How long it may take until what is owed is confirmed (monotonic); closing takes `CLOSE_SECONDS`.
            settles: Have the far side confirm what is owed.
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
        """Wait for tasks that the sink started and did not await; what is late is cancelled, counted and told."""
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
            why = "it had not ended at the close" if task in late else error_text(task.exception())
            self.last_failure = f"task {name_of(task)}: {why}"
            error = None if task in late else task.exception()
            fix = "await it in write, which returns when the destination has the batch"
            log().warning("sink.task_failed", sink=self._name, task=name_of(task), why=why, fix=fix, exc_info=error)

    def _fitting(self, sizes: Sequence[int]) -> int:
        """How many events of a batch go in one write: at least one."""
        most = 1 if self._braked() else self._size
        return max(1, bisect_right(list(accumulate(sizes[:most])), self.max_bytes))

    def _braked(self) -> bool:
        return self._dead_in_a_row >= MOST_DEAD_IN_A_ROW

    async def _write(self, part: tuple[Envelope, ...]) -> Ending:
        returned = self._returned = []  # of this attempt; one that is left behind has a list of its own
        self._part = part

        async def write() -> object:
            value = await self._sink.write(part)
            task = asyncio.current_task()
            if value is not None or task is None or not task.cancelling():  # None may be a swallowed cancellation
                returned.append(value)
            return value

        ending = self._checked(part, await self._call(write))
        if ending.error is not None:
            self._returned = []  # it is to be made again, whatever it says yet
        return ending

    @staticmethod
    def _checked(part: tuple[Envelope, ...], ending: Ending) -> Ending:
        value = ending.value
        if ending.error is not None or value is None or (type(value) is int and 0 < value <= len(part)):
            return ending
        if type(value) is int and value == 0:
            return Ending(error=RetryLaterError("write returned 0: it took nothing"))
        what = f"a {type(value).__name__} that is no count of the {len(part)} events it was given"
        return Ending(error=RetryLaterError(f"write returned {what}; return None, or how many it took"))

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
        """What became of the events; None if a smaller part is to be tried."""
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
        self._searched = 0  # it is found
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
    """Where trouble is reported before `open`."""
