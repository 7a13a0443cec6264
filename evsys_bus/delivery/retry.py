"""When a call on a sink is made again: one policy, an ``AsyncRetrying`` of tenacity, for `open` and `write`.

It owns the pauses and what is told of them. What becomes of a batch for good is the business of `batches`.

    RetryLaterError, OSError     again without end; pauses double from 0.1 to 30 s, jittered; ``after_seconds`` is the
                                 least (TimeoutError and ConnectionError are OSErrors)
    ParkedError                  again without end, every 60 s
    RejectedError,
      BatchTooLargeError         not again
    anything else                five attempts; then not again or, where the sink itself seems to be at fault, as parked
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
"""Of what a destination asks for, at most so much is granted: a day."""
ATTEMPTS: Final = 5
"""What an unknown exception is worth."""
MAX_WORDS: Final = 2_000
"""Characters of what a stranger's exception says."""

Sleep = Callable[[float], Awaitable[None]]
Call = Callable[[], Awaitable[Ending]]
Tell = Callable[[Trouble, Exception], None]
"""Called before each pause."""


class RetryPolicy:
    """Makes a call again, as its error asks for."""

    def __init__(self, tell: Tell, *, sleep: Sleep, random: Random) -> None:
        self._tell = tell
        self._sleep = sleep
        self._random = random

    async def __call__(self, call: Call, *, attempts: int = ATTEMPTS, park: bool = False) -> Ending:
        """Call until it ends well, or with an error that no further attempt is to change.

        Args:
            call: Tells its error by what it returns.
            attempts: How many unknown exceptions it may end with.
            park: Go on as if parked after those.
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
        """Whether there is to be another attempt."""
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
                    "it fails on every event: mend the sink; nothing more is given up until it takes one",
                )
        self.error = error
        self.trouble = Trouble("parked" if parked else "retrying", words(error), fix if parked else None, self._made)
        return True


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may help; of a task group's errors, if it may with each of them."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(map(_may_pass, group.exceptions))
    return isinstance(error, RetryLaterError | ParkedError | OSError)


def words(error: Exception) -> str:
    """What an error says, with its type, on one line where it is ours; of bounded length, and fit for a file."""
    what = text_of(error, "what")
    text = error_text(error) if what is None else f"{type(error).__name__}: {what}"
    return plain_text(text)


def plain_text(text: str) -> str:
    """The text, of bounded length, with what UTF-8 cannot carry replaced."""
    return text[:MAX_WORDS].encode("utf-8", "replace").decode()


def owed_of(events: SupportsFloat, why: object, fix: object) -> tuple[int, str | None, str | None]:
    """What an adapter reports as owed, fit for a file: a count, and texts of bounded length where something is owed.

    Raises:
        TypeError: ``events`` is no number.
        ValueError: It is not finite.
    """
    count = max(0, math.ceil(events))
    why, fix = (None if text is None or not count else plain_text(error_text(text)) for text in (why, fix))
    return count, why, fix


def text_of(error: Exception, name: str) -> str | None:
    """That attribute of an error of ours, if it is a text."""
    value = getattr(error, name, None) if isinstance(error, EvsysBusError) else None
    return value if isinstance(value, str) else None


def _asked(error: Exception) -> float:
    after = error.after_seconds if isinstance(error, RetryLaterError) else None
    # Not everyone's Retry-After is a number: 0 < nan is false, like the test of a text's type.
    return min(after, LONGEST_AFTER_SECONDS) if isinstance(after, int | float) and after > 0 else 0.0


def _ending(retry_state: "RetryCallState") -> Ending:
    assert retry_state.outcome is not None
    return retry_state.outcome.result()
