"""`Receiver`: what a courier delivers to. `CallbackReceiver` implements it for callbacks, `SinkReceiver` for sinks."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, SupportsFloat, runtime_checkable

from evsys_bus.adapter import Adapter
from evsys_bus.codec import error_text
from evsys_bus.diagnostics import log
from evsys_bus.events import Envelope
from evsys_bus.sink import BatchResult
from evsys_bus.tasks import CANCEL_GRACE_SECONDS, DeliveryStatus, Outcome, call_with_timeout

ProblemHandler = Callable[[DeliveryStatus | None], None]
"""Called when a problem starts, changes, or ends (None). The status has ``state``, ``error``, ``fix`` and ``attempts``:
what prevents the receiver from delivering a batch. It keeps retrying."""

MAX_TEXT_CHARS: Final = 2_000
"""Maximum length of an error text in characters."""


class Receiver(Protocol):
    """Delivers batches to one adapter. Used by one courier, on one event loop, one call at a time."""

    max_events: int
    """Maximum number of events in a batch."""
    max_bytes: int
    """Maximum encoded size of a batch; a single event may be larger."""
    max_seconds: float
    """How long the courier may wait for more events after the first one of a batch."""

    async def open(self, on_problem: ProblemHandler) -> None:
        """Prepare for delivery. If the destination is unavailable, report that and retry until cancelled.

        Raises:
            Exception: An error of the adapter that a retry cannot fix.
        """
        ...

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:
        """Deliver a batch; retry until the destination has accepted or rejected the events, or until cancelled.

        Args:
            batch: At least one and at most `max_events` events, in the order of their streams.
            sizes: Encoded size of each event in bytes.
        """
        ...

    def interrupted_result(self) -> BatchResult | None:
        """The result of a cancelled `deliver`, so that these events need not be delivered again; None if not known."""
        ...

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Repeat the start events of runs that are open at the next event; they are not counted.

        Called for a rebuilt adapter, and where the original start events were removed from the journal. Nothing starts
        now: ``state.step`` of a training is the first step that may follow.
        """
        ...

    def mark(self) -> Any:
        """The adapter's mark; see `Rewindable.mark`. None if it has none."""
        ...

    def rewind(self, mark: Any) -> None:
        """Undo what the adapter wrote after this mark; called before `resume_runs`."""
        ...

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        """Finish work in progress and close the adapter; called once.

        Args:
            deadline: Until when that may take (monotonic); None for the receiver's own limits.
            confirm: Whether everything was delivered, so that the destination can be asked for confirmation.
        """
        ...


@runtime_checkable
class HasFailureCounts(Protocol):
    """A receiver that counts failures of its adapter."""

    failures: int
    """Hooks that raised, and a `close` that failed."""
    task_failures: int
    """Tasks of the adapter that raised, timed out or were cancelled."""
    last_failure: str | None
    """The newest of both."""


async def confirm_deliveries(adapter: object, name: str, deadline: float | None) -> None:
    """Call the adapter's `settle_owed` if it overrides that method; errors are logged.

    Args:
        adapter: A callback or a sink.
        name: Its name in the log.
        deadline: Monotonic; None for `CONFIRM_SECONDS` from now.
    """
    if not isinstance(adapter, Adapter) or type(adapter).settle_owed is Adapter.settle_owed:
        return
    now = time.monotonic()
    confirm_deadline = now + CONFIRM_SECONDS if deadline is None else deadline
    unfinished: set[asyncio.Task[Outcome]] = set()
    outcome = await call_with_timeout(
        adapter.settle_owed,
        confirm_deadline,
        seconds=max(0.0, confirm_deadline - now),
        grace_seconds=CANCEL_GRACE_SECONDS,
        name=f"evsys-bus:{name}:settle",
        unfinished=unfinished,
    )
    if outcome.error is not None:
        log().warning("owed.not_settled", adapter=name, exc_info=outcome.error)


CONFIRM_SECONDS: Final = 5.0


def bounded_text(text: str) -> str:
    """Shorten the text and replace characters that cannot be encoded as UTF-8."""
    return text[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()


def unconfirmed_status(events: SupportsFloat, why: object, fix: object) -> DeliveryStatus:
    """An adapter's report of unconfirmed events as a status: a count, and bounded texts that are None if it is 0.

    Raises:
        TypeError: ``events`` is not a number.
        ValueError: ``events`` is NaN.
        OverflowError: ``events`` is infinite.
    """
    owed = max(0, math.ceil(events))
    error, fix = (None if text is None or not owed else bounded_text(error_text(text)) for text in (why, fix))
    return DeliveryStatus(owed=owed, error=error, fix=fix, owed_fix=fix)
