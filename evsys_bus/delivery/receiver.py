"""`Receiver`: what a courier delivers to; one for callbacks (`hooks`), one for sinks (`batches`)."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from evsys_bus.attached import Adapter
from evsys_bus.diagnostics import log
from evsys_bus.events import Envelope
from evsys_bus.tasks import CANCEL_GRACE_SECONDS, Ending, call_bounded


@runtime_checkable
class Rewindable(Protocol):
    """What a followed callback that writes files can do besides, so that a crash doubles none of its rows.

    Its courier keeps the mark beside the cursor, in one file. A courier that begins anew builds the callback, rewinds
    it to the mark, gives it the start events of what is open there (with ``state.step`` behind the largest step that
    was delivered), and goes on at the cursor.
    """

    def mark(self) -> Any:
        """How far what it wrote has got. Any: plain data. What was written is on the medium when this returns."""
        ...

    def rewind(self, mark: Any) -> None:
        """Undo what was written behind the mark, at the latest when it is next looked at. Any: as above."""
        ...


class Trouble(NamedTuple):
    """What keeps a receiver from taking a batch; it goes on trying."""

    state: Literal["retrying", "parked"]
    error: str
    fix: str | None = None
    attempts: int = 1


Report = Callable[[Trouble | None], None]
"""Called whenever trouble begins, changes or ends (None)."""


class Taken(NamedTuple):
    """What became of a batch."""

    done: int
    """How many of its events are done with, from the front; at least one."""
    dead: Mapping[int, str] = {}
    """Of those: the indices of the ones that were not delivered and never will be, with the reason."""
    errors: Mapping[int, Exception] = {}
    """What was raised for them, where that is not in the log yet."""


class Receiver(Protocol):
    """One adapter, as its courier sees it. Used by one courier, on one event loop, one call at a time."""

    max_events: int
    """What a batch may hold at most."""
    max_bytes: int
    """Encoded, all together; a single event may be larger."""
    max_seconds: float
    """How long the courier may wait for more, once a batch has begun."""

    async def open(self, report: Report) -> None:
        """Make ready. Where the destination is away it goes on trying until cancelled, and reports that.

        Raises:
            Exception: The adapter is at fault, and trying again will not help.
        """
        ...

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        """Deliver; returns when the destination has what it will have. Tries again without end, until cancelled.

        Args:
            batch: In the order of their streams, never empty, at most `max_events`.
            sizes: How large each is, encoded, in bytes.
        """
        ...

    def interrupted(self) -> Taken | None:
        """What was done of the batch when `take` was cancelled, if that is known; then it need not come again."""
        ...

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Give start events again of what is open where the events go on; they are not counted.

        An adapter that was built anew gets them, and one whose journal does not go back further. Nothing starts now: a
        training's ``state.step`` is the first step that may come.
        """
        ...

    def mark(self) -> Any:
        """How far what the adapter wrote has got, and on the medium it is; None if it keeps no account of that.

        Any: plain data, given to `rewind` on another day.
        """
        ...

    def rewind(self, mark: Any) -> None:
        """Cut what the adapter wrote behind this mark; called before `introduce`. Any: what `mark` returned."""
        ...

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Finish what is under way; called once.

        Args:
            deadline: How long that may take (monotonic); None for the receiver's own bounds.
            settles: All was delivered: have the far side confirm what the adapter owes.
        """
        ...


@runtime_checkable
class CountsFailures(Protocol):
    """A receiver that counts what its adapter does wrong, beside what becomes of events."""

    failures: int
    """Hooks that raised, and a `close` that failed."""
    task_failures: int
    """Tasks of the adapter that raised, ran out of time or were cancelled."""
    last_failure: str | None
    """The newest of both."""


async def settle(adapter: object, name: str, deadline: float | None) -> None:
    """Call the adapter's `settle_owed` where it has one of its own; what it raises is logged.

    Args:
        adapter: A callback or a sink.
        name: What it is called in the log.
        deadline: Monotonic; None for `SETTLE_SECONDS` from now.
    """
    if not isinstance(adapter, Adapter) or type(adapter).settle_owed is Adapter.settle_owed:
        return
    now = time.monotonic()
    until = now + SETTLE_SECONDS if deadline is None else deadline
    unended: set[asyncio.Task[Ending]] = set()
    ending = await call_bounded(
        adapter.settle_owed,
        until,
        seconds=max(0.0, until - now),
        grace_seconds=CANCEL_GRACE_SECONDS,
        name=f"evsys-bus:{name}:settle",
        unended=unended,
    )
    if ending.error is not None:
        log().warning("owed.not_settled", adapter=name, exc_info=ending.error)


SETTLE_SECONDS: Final = 5.0
