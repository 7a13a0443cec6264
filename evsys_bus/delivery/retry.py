"""`SinkRetrier`: retries `open` and `write` calls of a sink with tenacity's ``AsyncRetrying``.

It decides on pauses and reports them. What finally becomes of a batch is decided in `SinkReceiver`.

    RetryLaterError, OSError     retried without limit; pauses double from 0.1 to 30 s, with jitter, and are at least
                                 ``after_seconds`` (TimeoutError and ConnectionError are OSErrors)
    ParkedError                  retried without limit, every 60 s
    RejectedError,
      BatchTooLargeError         not retried
    anything else                five attempts; then not retried or, if the sink itself seems to be broken, parked
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, Final, cast

from evsys_bus.codec.wire_types import error_text
from evsys_bus.delivery.receiver import bounded_text
from evsys_bus.errors import BatchTooLargeError, EvsysBusError, ParkedError, RejectedError, RetryLaterError
from evsys_bus.tasks import DeliveryStatus, Outcome

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
    text = error_text(error) if message is None else f"{type(error).__name__}: {message}"
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
