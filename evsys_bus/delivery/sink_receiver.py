"""`SinkReceiver`: delivers batches to a `Sink`.

`SinkRetrier` decides when a call of the sink is repeated, with tenacity's ``AsyncRetrying``:

    RetryLaterError, OSError     retried without limit; pauses double from 0.1 to 30 s, with jitter, and are at least
                                 ``after_seconds`` (TimeoutError and ConnectionError are OSErrors)
    ParkedError                  retried without limit, every 60 s
    RejectedError,
      BatchTooLargeError         not retried
    anything else                five attempts; then not retried or, if the sink itself seems to be broken, parked

`SinkReceiver` decides what finally becomes of a batch. A batch that is too large, or on which the
sink fails with an unknown error, is split in halves until the failing event is found; that event is dead-lettered.

Circuit breaker: an outage that the sink does not report as one (its client raises its own exceptions) looks like one
bad event after another. After `MAX_CONSECUTIVE_DEAD` consecutive events were dead-lettered for unknown exceptions, the
next failing event stays pending and the sink is parked until it accepts an event or is rebuilt.
"""

import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

from evsys_bus.adapter import Rewindable, RunResumer
from evsys_bus.codec.wire_types import error_text
from evsys_bus.delivery.receiver import ProblemHandler, bounded_text, confirm_deliveries
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import (
    BatchTooLargeError,
    EvsysBusError,
    ParkedError,
    RejectedError,
    RetryLaterError,
    SinkMethodError,
)
from evsys_bus.events import Envelope
from evsys_bus.sink import BatchResult, RawRecord, Sink, sink_name
from evsys_bus.tasks import CANCEL_GRACE_SECONDS, DeliveryStatus, Outcome, call_with_timeout, other_tasks, task_name

if TYPE_CHECKING:
    from tenacity import RetryCallState


FIRST_PAUSE_SECONDS: Final = 0.1
MAX_PAUSE_SECONDS: Final = 30.0
PARKED_PAUSE_SECONDS: Final = 60.0
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
"""The longest pause that a destination can request: a day."""
UNKNOWN_ERROR_ATTEMPTS: Final = 5
"""Attempts for an unknown exception."""

Sleep = Callable[[float], Awaitable[None]]
RetriedCall = Callable[[], Awaitable[Outcome]]
RetryHandler = Callable[[DeliveryStatus, Exception], None]
"""Called before each pause."""


class SinkRetrier:
    """Retries a call depending on its error.

    Args:
        on_retry: Called before each pause.
        sleep: Sleeps for a number of seconds.
        random: Source of the jitter.
    """

    def __init__(self, on_retry: RetryHandler, *, sleep: Sleep, random: Random) -> None:
        self._on_retry = on_retry
        self._sleep = sleep
        self._random = random

    async def __call__(
        self, call: RetriedCall, *, attempts: int = UNKNOWN_ERROR_ATTEMPTS, park: bool = False
    ) -> Outcome:
        """Call until it succeeds or fails with an error that is not retried, and return the last result.

        Args:
            call: Returns an `Outcome` and never raises.
            attempts: Attempts for unknown exceptions.
            park: Whether to continue as parked after those.
        """
        from tenacity import AsyncRetrying, wait_exponential

        tracker = _AttemptTracker(attempts, park=park)
        backoff = wait_exponential(multiplier=FIRST_PAUSE_SECONDS, max=MAX_PAUSE_SECONDS)

        def pause(retry_state: "RetryCallState") -> float:
            if tracker.problem.state == "parked":
                return PARKED_PAUSE_SECONDS
            return max(backoff(retry_state) * self._random.uniform(0.5, 1.0), _requested_pause(tracker.error))

        retrying = AsyncRetrying(
            retry=lambda retry_state: tracker.should_retry(_outcome(retry_state).error),
            wait=pause,
            before_sleep=lambda _: self._on_retry(tracker.problem, tracker.error),
            sleep=self._sleep,
        )
        return await retrying(call)


class _AttemptTracker:
    """The attempts of one call."""

    def __init__(self, attempts: int, *, park: bool) -> None:
        self._remaining = attempts
        self._park = park
        self._attempts_made = 0
        self.error: Exception
        self.problem: DeliveryStatus

    def should_retry(self, error: Exception | None) -> bool:
        """Record an attempt; return whether to make another one."""
        self._attempts_made += 1
        if error is None or isinstance(error, RejectedError | BatchTooLargeError):
            return False
        is_parked, fix = isinstance(error, ParkedError), text_attribute(error, "fix")
        if not _is_transient(error):
            self._remaining -= 1
            if self._remaining <= 0:
                if not self._park:
                    return False
                is_parked, fix = (
                    True,
                    "it fails on every event: fix the sink; no more events are rejected until it accepts one",
                )
        self.error = error
        is_waiting = isinstance(error, RetryLaterError) and error.waiting
        self.problem = DeliveryStatus(
            state="parked" if is_parked else "waiting" if is_waiting else "retrying",
            error=describe_error(error),
            fix=fix if is_parked else None,
            attempts=self._attempts_made,
        )
        return True


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may help; for an exception group, whether it may for each of its exceptions."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(map(_is_transient, group.exceptions))
    return isinstance(error, RetryLaterError | ParkedError | OSError)


def describe_error(error: Exception) -> str:
    """The type and message of an error, shortened and safe to encode; for an EvsysBusError on one line."""
    message = text_attribute(error, "what")
    text = error_text(error if message is None else f"{type(error).__name__}: {message}")
    return bounded_text(text)


def text_attribute(error: Exception, name: str) -> str | None:
    """The named attribute of an EvsysBusError if it is a string, else None."""
    value = getattr(error, name, None) if isinstance(error, EvsysBusError) else None
    return value if isinstance(value, str) else None


def _requested_pause(error: Exception) -> float:
    after = error.after_seconds if isinstance(error, RetryLaterError) else None
    # An adapter may pass anything; `after > 0` is False for NaN.
    return min(after, MAX_RETRY_AFTER_SECONDS) if isinstance(after, int | float) and after > 0 else 0.0


def _outcome(retry_state: "RetryCallState") -> Outcome:
    assert retry_state.outcome is not None
    return retry_state.outcome.result()


MAX_CONSECUTIVE_DEAD: Final = 3
MAX_ABANDONED_CALLS: Final = 3
"""How many calls that ignored their cancellation may still run; no other call is made until one of them has ended."""
CLOSE_SECONDS: Final = 5.0
IDLE_WORK_SECONDS: Final = 3.0
"""How long the sink's `on_idle` may take: so much longer may the end of an idle courier take."""


class SinkReceiver:
    """The receiver of a sink; see `Receiver`.

    Args:
        sink: The sink.
        raw: Whether the batches are of `RawRecord`.
        sleep: Sleeps for a number of seconds.
        random: Source of the jitter.
        grace_seconds: How long a call may continue after its cancellation.
        close_seconds: How long the sink's `close` may take.

    Attributes:
        abandoned_calls: How many calls have timed out and ignored their cancellation.

    Raises:
        SinkMethodError: The sink is raw, and the batches are not, since a filter by type or run needs decoded events.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        raw: bool = False,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
        grace_seconds: float = CANCEL_GRACE_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        if sink.raw and not raw:
            raise SinkMethodError(
                f"{sink_name(sink)} takes raw records, but here events are decoded, to count and select them",
                why="a filter by type or run, and a pace, need what is in the events",
                fix="deliver the whole journal: `evsys-bus follow RUN --to KIND --name NAME`, or `evsys-bus sync RUN`",
            )
        self.max_events = max(1, sink.max_batch_events)
        self.max_bytes = max(1, sink.max_batch_bytes)
        self.max_seconds = max(0.0, sink.max_batch_seconds)
        self.abandoned_calls = 0
        self._sink = sink
        self._name = sink_name(sink)
        self._retry = SinkRetrier(self._report_problem, sleep=sleep, random=Random() if random is None else random)  # noqa: S311
        self._grace_seconds = grace_seconds
        self._close_seconds = close_seconds
        self._faults = FaultLog()
        self.failures = 0
        """Failures of the sink's `close`."""
        self.task_failures = 0
        """Tasks that the sink started but did not await, and that failed or did not end."""
        self.last_failure: str | None = None
        """The newest of both."""
        self._on_problem: ProblemHandler = _ignore_problem
        self._has_problem = False
        self._unfinished_calls: set[asyncio.Task[Outcome]] = set()
        self._open_called = False
        self._batch_limit = self.max_events  # events per write; fewer while a failing event is searched
        self._bisect_remaining = 0  # how many of the next events the search covers
        self._consecutive_dead = 0
        self._last_part: tuple[Envelope | RawRecord, ...] = ()
        self._returned: list[object] = []
        self._idle_work_due = -math.inf

    async def open(self, on_problem: ProblemHandler) -> None:
        """Open the sink; retries until that succeeds.

        Raises:
            Exception: What the sink's `open` raised, if a retry cannot help.
        """
        self._on_problem = on_problem
        self._open_called = True
        outcome = await self._retry(partial(self._call, self._sink.open))
        self._report_recovery()
        if outcome.error is not None:
            raise outcome.error

    async def deliver(self, batch: Sequence[Envelope | RawRecord], sizes: Sequence[int]) -> BatchResult:
        """Deliver the batch, or its first part if it must be split; see `Receiver.deliver`."""
        self._returned = []
        self.max_seconds = max(0.0, self._sink.max_batch_seconds)  # the sink may change it while it is open
        while True:
            limit = 1 if self._is_breaker_open() else self._batch_limit
            part = tuple(batch[: max(1, bisect_right(list(accumulate(sizes[:limit])), self.max_bytes))])
            is_bisecting = self._bisect_remaining > 0 and len(part) > 1
            attempts = 1 if is_bisecting else UNKNOWN_ERROR_ATTEMPTS
            outcome = await self._retry(partial(self._write, part), attempts=attempts, park=self._is_breaker_open())
            result = self._resolve(part, outcome)
            if result is not None:
                self._report_recovery()
                return result

    def interrupted_result(self) -> BatchResult | None:
        """The result of the last `write` if it returned although it was cancelled; None if it was cut off."""
        if not self._returned:
            return None
        outcome = self._validate(self._last_part, Outcome(self._returned[0]))
        return self._resolve(self._last_part, outcome) if outcome.error is None else None

    async def do_idle_work(self, now: float) -> None:
        """Call the sink's `on_idle` if that is due; a failure is logged.

        Args:
            now: Monotonic time.
        """
        seconds = self._sink.idle_seconds
        if seconds is None or now < self._idle_work_due or self._unfinished_calls:
            return
        self._idle_work_due = now + seconds
        outcome = await self._call_with_timeout(self._sink.on_idle, IDLE_WORK_SECONDS)
        if outcome.error is not None:
            why = describe_error(outcome.error)
            self._faults.warn("sink.idle_work_failed", type(outcome.error), sink=self._name, why=why)

    @property
    def needs_starts_as_events(self) -> bool:
        """Whether repeated start events must be delivered by `deliver`, because the sink has no method for them."""
        return not isinstance(self._sink, RunResumer)

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Pass the start events to the sink, if it is a `RunResumer`.

        Raises:
            Exception: What that method raised.
        """
        if isinstance(self._sink, RunResumer):
            self._sink.resume_runs(tuple(starts))

    def mark(self) -> Any:
        """The sink's mark; None unless the sink is `Rewindable`."""
        return self._sink.mark() if isinstance(self._sink, Rewindable) else None

    def rewind(self, mark: Any) -> None:
        """Rewind the sink to the mark, if it is `Rewindable`."""
        if mark is not None and isinstance(self._sink, Rewindable):
            self._sink.rewind(mark)

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        """Close the sink if it was opened, or if opening it was tried; a failure is logged.

        Args:
            deadline: Until when the destination may confirm delivered events (monotonic); closing takes up to
                `MIN_CLOSE_SECONDS` more.
            confirm: Whether to ask for that confirmation.
        """
        for task in self._unfinished_calls:
            task.cancel()
        if confirm and self._open_called:
            await confirm_deliveries(self._sink, self._name, deadline)
        if self._open_called:
            outcome = await self._call_with_timeout(self._sink.close, self._close_seconds)
            if outcome.error is not None:
                self.failures += 1
                self.last_failure = f"close: {describe_error(outcome.error)}"
                log().warning(
                    "sink.close_failed", sink=self._name, error=describe_error(outcome.error), exc_info=outcome.error
                )
        await self._wait_for_leftover_tasks(deadline)
        self._faults.flush()

    async def _wait_for_leftover_tasks(self, deadline: float | None) -> None:
        """Wait for tasks that the sink started but did not await; cancel, count and log the late ones."""
        leftover = [task for task in other_tasks() if task not in self._unfinished_calls]
        if not leftover:
            return
        remaining = math.inf if deadline is None else deadline - time.monotonic()
        ended, late = await asyncio.wait(leftover, timeout=max(0.0, min(self._close_seconds, remaining)))
        failed = [task for task in ended if not task.cancelled() and task.exception() is not None]
        for task in late:
            task.cancel()
        self.task_failures += len(failed) + len(late)
        for task in (*failed, *late):
            why = "it had not ended when the sink was closed" if task in late else error_text(task.exception())
            self.last_failure = f"task {task_name(task)}: {why}"
            error = None if task in late else task.exception()
            fix = "await it in write, which returns when the destination has the batch"
            log().warning("sink.task_failed", sink=self._name, task=task_name(task), why=why, fix=fix, exc_info=error)

    def _is_breaker_open(self) -> bool:
        return self._consecutive_dead >= MAX_CONSECUTIVE_DEAD

    async def _write(self, part: tuple[Envelope | RawRecord, ...]) -> Outcome:
        returned = self._returned = []  # per attempt, because an abandoned one may still append to its list
        self._last_part = part

        async def write() -> object:
            value = await self._sink.write(part)
            task = asyncio.current_task()
            if value is not None or task is None or not task.cancelling():  # None may mean a suppressed cancellation
                returned.append(value)
            return value

        outcome = self._validate(part, await self._call(write))
        if outcome.error is not None:
            self._returned = []  # it will be repeated, whatever it still returns
        return outcome

    @staticmethod
    def _validate(part: tuple[Envelope | RawRecord, ...], outcome: Outcome) -> Outcome:
        """Replace the value by a valid `BatchResult`, or by an error that is retried."""
        if outcome.error is not None:
            return outcome
        value = BatchResult(len(part)) if outcome.value is None else outcome.value
        result = BatchResult(value) if type(value) is int else value
        if _is_valid_result(result, len(part)):
            rejected = {index: bounded_text(error_text(why)) for index, why in result.rejected.items()}
            return Outcome(result._replace(rejected=rejected))
        if type(value) is int and value == 0:
            return Outcome(error=RetryLaterError("write returned 0: it accepted no events"))
        description = f"a {type(value).__name__} that is not a count of the {len(part)} events it was given"
        return Outcome(error=RetryLaterError(f"write returned {description}; return None, or how many it accepted"))

    async def _call(self, fn: Callable[..., Awaitable[object]], *args: object) -> Outcome:
        while len(self._unfinished_calls) >= MAX_ABANDONED_CALLS:
            error = TimeoutError(
                f"{len(self._unfinished_calls)} calls ignore their cancellation; waiting for one to end"
            )
            problem = DeliveryStatus(state="retrying", error=describe_error(error), attempts=1)
            self._report_problem(problem, error)
            await asyncio.wait(self._unfinished_calls, return_when=asyncio.FIRST_COMPLETED)
        return await self._call_with_timeout(fn, self._sink.write_timeout_seconds, *args)

    async def _call_with_timeout(self, fn: Callable[..., Awaitable[object]], seconds: float, *args: object) -> Outcome:
        previous = set(self._unfinished_calls)
        outcome = await call_with_timeout(
            fn,
            *args,
            seconds=seconds,
            grace_seconds=self._grace_seconds,
            name=f"evsys-bus:{self._name}",
            unfinished=self._unfinished_calls,
        )
        self.abandoned_calls += len(self._unfinished_calls - previous)
        return outcome

    def _resolve(self, part: tuple[Envelope | RawRecord, ...], outcome: Outcome) -> BatchResult | None:
        """The result for these events; None if a smaller part must be tried."""
        error = outcome.error
        if error is None:
            return self._reset_after_batch(outcome.value)
        if isinstance(error, RejectedError):
            rejected = self._rejected_events(error, len(part))
            return self._reset_after_batch(BatchResult(len(part) - len(rejected), rejected))
        if len(part) > 1:
            self._batch_limit = len(part) // 2
            self._bisect_remaining = max(self._bisect_remaining, len(part))
            return None
        consecutive_dead = 0 if isinstance(error, BatchTooLargeError) else self._consecutive_dead + 1
        self._bisect_remaining = 0  # the failing event is found
        return self._reset_after_batch(BatchResult(0, {0: describe_error(error)}, {0: error}), consecutive_dead)

    def _reset_after_batch(self, result: BatchResult, consecutive_dead: int = 0) -> BatchResult:
        """Set the counters that the next batch starts with; return the result."""
        self._consecutive_dead = consecutive_dead
        self._bisect_remaining = max(0, self._bisect_remaining - result.handled)
        if not self._bisect_remaining:
            self._batch_limit = self.max_events
        return result

    def _rejected_events(self, error: RejectedError, count: int) -> dict[int, str]:
        valid = {index: why for index, why in error.reasons.items() if type(index) is int and 0 <= index < count}
        if len(valid) < len(error.reasons):
            invalid_count = len(error.reasons) - len(valid)
            self._faults.warn("sink.rejected_unknown", None, sink=self._name, events=count, outside=invalid_count)
        return {index: bounded_text(error_text(why)) for index, why in valid.items()}

    def _report_problem(self, problem: DeliveryStatus, error: Exception) -> None:
        self._has_problem = True
        self._on_problem(problem)
        if problem.state == "waiting":
            return
        is_expected = isinstance(error, RetryLaterError | OSError) or problem.state == "parked"
        self._faults.warn(
            "sink.parked" if problem.state == "parked" else "sink.retrying",
            type(error),
            error=None if is_expected else error,
            sink=self._name,
            attempts=problem.attempts,
            why=problem.error,
        )

    def _report_recovery(self) -> None:
        if self._has_problem:
            self._has_problem = False
            self._on_problem(None)


def _is_valid_result(result: object, count: int) -> bool:
    """Return whether a sink may return this for so many events."""
    if not isinstance(result, BatchResult):
        return False
    # A sink may put anything into it.
    delivered, rejected, errors = cast("tuple[object, object, object]", result)
    if type(delivered) is not int or delivered < 0 or not isinstance(rejected, Mapping):
        return False
    indices = cast("Mapping[object, object]", rejected)
    handled = delivered + len(indices)
    is_valid = all(type(each) is int and 0 <= each < handled for each in indices)
    return is_valid and 0 < handled <= count and isinstance(errors, Mapping)


def _ignore_problem(problem: DeliveryStatus | None) -> None:
    """Does nothing: the report function before `open`."""
