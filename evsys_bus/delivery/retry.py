"""`RetryPolicy`: retries `open` and `write` calls of a sink with tenacity's ``AsyncRetrying``.

It decides on pauses and reports them. What finally becomes of a batch is decided in `batches`.

    RetryLaterError, OSError     retried without limit; pauses double from 0.1 to 30 s, with jitter, and are at least
                                 ``after_seconds`` (TimeoutError and ConnectionError are OSErrors)
    ParkedError                  retried without limit, every 60 s
    RejectedError,
      BatchTooLargeError         not retried
    anything else                five attempts; then not retried or, if the sink itself seems to be broken, parked
"""

import math
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, Final, SupportsFloat, cast

from evsys_bus.codec.references import error_text
from evsys_bus.delivery.receiver import Trouble
from evsys_bus.errors import BatchTooLargeError, EvsysBusError, ParkedError, RejectedError, RetryLaterError
from evsys_bus.tasks import Ending

if TYPE_CHECKING:
    from tenacity import RetryCallState

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 30.0
PARKED_PAUSE_SECONDS: Final = 60.0
LONGEST_AFTER_SECONDS: Final = 86_400.0
"""The longest pause that a destination can request: a day."""
ATTEMPTS: Final = 5
"""Attempts for an unknown exception."""
MAX_WORDS: Final = 2_000
"""Maximum length of an error text in characters."""

Sleep = Callable[[float], Awaitable[None]]
Call = Callable[[], Awaitable[Ending]]
Tell = Callable[[Trouble, Exception], None]
"""Called before each pause."""


class RetryPolicy:
    """Retries a call depending on its error.

    Args:
        tell: Called before each pause.
        sleep: Sleeps for a number of seconds.
        random: Source of the jitter.
    """

    def __init__(self, tell: Tell, *, sleep: Sleep, random: Random) -> None:
        self._tell = tell
        self._sleep = sleep
        self._random = random

    async def __call__(self, call: Call, *, attempts: int = ATTEMPTS, park: bool = False) -> Ending:
        """Call until it succeeds or fails with an error that is not retried, and return the last result.

        Args:
            call: Returns an `Ending` and never raises.
            attempts: Attempts for unknown exceptions.
            park: Whether to continue as parked after those.
        """
        from tenacity import AsyncRetrying, wait_exponential

        series = _Series(attempts, park=park)
        doubling = wait_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS)

        def pause(retry_state: "RetryCallState") -> float:
            if series.trouble.state == "parked":
                return PARKED_PAUSE_SECONDS
            return max(doubling(retry_state) * self._random.uniform(0.5, 1.0), _asked(series.error))

        retrying = AsyncRetrying(
            retry=lambda retry_state: series.goes_on(_ending(retry_state).error),
            wait=pause,
            before_sleep=lambda _: self._tell(series.trouble, series.error),
            sleep=self._sleep,
        )
        return await retrying(call)


class _Series:
    """The attempts of one call."""

    def __init__(self, attempts: int, *, park: bool) -> None:
        self._left = attempts
        self._park = park
        self._made = 0
        self.error: Exception
        self.trouble: Trouble

    def goes_on(self, error: Exception | None) -> bool:
        """Record an attempt; return whether to make another one."""
        self._made += 1
        if error is None or isinstance(error, RejectedError | BatchTooLargeError):
            return False
        parked, fix = isinstance(error, ParkedError), text_of(error, "fix")
        if not _may_pass(error):
            self._left -= 1
            if self._left <= 0:
                if not self._park:
                    return False
                parked, fix = (
                    True,
                    "it fails on every event: fix the sink; no more events are rejected until it accepts one",
                )
        self.error = error
        self.trouble = Trouble("parked" if parked else "retrying", words(error), fix if parked else None, self._made)
        return True


def _may_pass(error: BaseException) -> bool:
    """Whether a retry may help; for an exception group, whether it may for each of its exceptions."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(map(_may_pass, group.exceptions))
    return isinstance(error, RetryLaterError | ParkedError | OSError)


def words(error: Exception) -> str:
    """The type and message of an error, shortened and safe to encode; for an EvsysBusError on one line."""
    what = text_of(error, "what")
    text = error_text(error) if what is None else f"{type(error).__name__}: {what}"
    return plain_text(text)


def plain_text(text: str) -> str:
    """Shorten the text and replace characters that cannot be encoded as UTF-8."""
    return text[:MAX_WORDS].encode("utf-8", "replace").decode()


def owed_of(events: SupportsFloat, why: object, fix: object) -> tuple[int, str | None, str | None]:
    """Normalize an adapter's report of unconfirmed events: a count, and bounded texts that are None if it is 0.

    Raises:
        TypeError: ``events`` is not a number.
        ValueError: ``events`` is NaN.
        OverflowError: ``events`` is infinite.
    """
    count = max(0, math.ceil(events))
    why, fix = (None if text is None or not count else plain_text(error_text(text)) for text in (why, fix))
    return count, why, fix


def text_of(error: Exception, name: str) -> str | None:
    """The named attribute of an EvsysBusError if it is a string, else None."""
    value = getattr(error, name, None) if isinstance(error, EvsysBusError) else None
    return value if isinstance(value, str) else None


def _asked(error: Exception) -> float:
    after = error.after_seconds if isinstance(error, RetryLaterError) else None
    # An adapter may pass anything; `after > 0` is False for NaN.
    return min(after, LONGEST_AFTER_SECONDS) if isinstance(after, int | float) and after > 0 else 0.0


def _ending(retry_state: "RetryCallState") -> Ending:
    assert retry_state.outcome is not None
    return retry_state.outcome.result()
