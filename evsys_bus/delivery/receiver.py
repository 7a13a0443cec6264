"""`Receiver`: what a courier delivers to; `hooks` implements it for callbacks, `batches` for sinks."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from evsys_bus.adapter import Adapter
from evsys_bus.diagnostics import log
from evsys_bus.events import Envelope
from evsys_bus.tasks import CANCEL_GRACE_SECONDS, Outcome, call_with_timeout


@runtime_checkable
class Rewindable(Protocol):
    """Optional methods of an adapter that writes files, so that no row is written twice after a crash.

    The courier stores the mark with the cursor, in one file. A new courier builds the adapter, rewinds it to the mark,
    repeats the start events of open runs (with ``state.step`` after the largest delivered step), and continues at the
    cursor.
    """

    def mark(self) -> Any:
        """Flush written data to disk and return its position, as plain data that can be stored."""
        ...

    def rewind(self, mark: Any) -> None:
        """Undo what was written after the mark, at the latest before the files are used again."""
        ...


class Problem(NamedTuple):
    """A problem that prevents a receiver from delivering a batch; it keeps retrying."""

    state: Literal["retrying", "parked"]
    error: str
    fix: str | None = None
    attempts: int = 1


ProblemHandler = Callable[[Problem | None], None]
"""Called when a problem starts, changes, or ends (None)."""


class BatchResult(NamedTuple):
    """The result of delivering a batch."""

    handled: int
    """How many events were handled, from the front; at least one."""
    rejected: Mapping[int, str] = {}
    """Index and reason of each handled event that was rejected for good."""
    errors: Mapping[int, Exception] = {}
    """Exceptions of rejected events, by index, if not logged yet."""


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
