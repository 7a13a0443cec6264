"""`Courier`: delivers a journal to one adapter, starting at its cursor.

    open ── rewind, repeat starts ── ┌ read a batch ── deliver it ── record the result ── commit ┐ ── close
                                     └──────────── until finished or stopped ────────────────────┘

The cursor moves only after the receiver has acknowledged the events. A commit writes the dead letters, then takes the
receiver's mark, then writes one cursor file with both. What the adapter raises goes to the state file and the log.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, Literal, NamedTuple, cast

from evsys_bus.attached import Adapter
from evsys_bus.callback import Callback
from evsys_bus.codec import error_text
from evsys_bus.delivery.accounts import Pending
from evsys_bus.delivery.books import Books
from evsys_bus.delivery.feed import Batch, Feed
from evsys_bus.delivery.followed import Terms, kind_of
from evsys_bus.delivery.hooks import HookReceiver
from evsys_bus.delivery.receiver import CountsFailures, Receiver, Trouble
from evsys_bus.delivery.retry import owed_of
from evsys_bus.delivery.roster import is_followed
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Event
from evsys_bus.journal import Clock, Disk, OsClock, OsDisk
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus, running_loop

COMMIT_SECONDS: Final = 0.2
"""Minimum time between two commits while events arrive."""
MOST_UNMARKED: Final = 10
"""How often in a row an adapter's `mark` may fail before the adapter is rebuilt and rewound."""
RETRY_SECONDS: Final = 1.0
LONGEST_SECONDS: Final = 86_400.0
"""A deadline that is as good as none."""


class Counts(NamedTuple):
    """The event counts of one courier."""

    delivered: int
    dead: int
    pending: int


class Courier:
    """Delivers one journal to one adapter; a lock ensures that only one courier does.

    Args:
        directory: The journal.
        name: Name of the adapter; identifies its cursor, lock and counts.
        adapter: A callback, a sink, or a `Receiver`.
        terms: Which ranks to deliver, and what a failure means.
        publish: Records what the adapter publishes about a run; None to discard it.
        keep: Whether to store the cursor; if not, as for a replay, there is no lock and no dead-letter file either.
        after: Start after these sequences, by stream, if there is no cursor.
        slice_seconds: Sleep for this long after as much work, so that other threads of the process can run; None for
            never.
        poll_seconds: Time between two reads of an exhausted journal.
        retry_seconds: Pause after a failed commit, and after a receiver that failed unexpectedly.
        log_path: Path of this process's log, if it has one of its own.
        clock: The clocks.
        disk: The file system.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        adapter: Callback | Sink | Receiver,
        terms: Terms,
        *,
        publish: Callable[[Event], None] | None = None,
        keep: bool = True,
        after: Mapping[str, int] | None = None,
        slice_seconds: float | None = None,
        poll_seconds: float = 0.02,
        retry_seconds: float = RETRY_SECONDS,
        log_path: str | None = None,
        clock: Clock | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.name: Final = name
        self._directory: Final = os.fspath(directory)
        self._terms: Final = terms
        self._publish: Final = publish
        self._after: Final = after
        self._slice: Final = slice_seconds
        self._poll_seconds: Final = poll_seconds
        self._retry_seconds: Final = retry_seconds
        self._log_path: Final = log_path
        self._clock: Final[Clock] = OsClock() if clock is None else clock
        self._disk: Final[Disk] = OsDisk() if disk is None else disk
        self._faults: Final = FaultLog()
        self._books: Final = Books(
            self._directory, name, kind_of(adapter), keep=keep, disk=self._disk, clock=self._clock, faults=self._faults
        )
        self._sink: Final = adapter if isinstance(adapter, Sink) else None
        self._receiver: Final = self._receiver_of(adapter)
        self._finishing = False
        self._deadline: float | None = None
        self._complete = False
        self._before = DeliveryStatus()
        """Counts and unconfirmed events of the previous courier."""
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: asyncio.Timeout | None = None
        self._commit_due = 0.0
        self._refused = False
        self._unmarked = 0
        self._taking = False
        self._fault: Exception | None = None
        self._trouble: Trouble | None = None
        self._failing_since: float | None = None
        self._owed: tuple[int, str | None, str | None] = (0, None, None)
        self._failures = (0, 0)
        """Failure counts of hooks and tasks, as last written before a commit."""
        self._pending = Pending(self._directory, terms.ranks, self._disk)

    async def run(self) -> None:
        """Deliver until finished or stopped. Errors of the adapter during delivery are handled, not raised.

        Raises:
            CourierBusyError: Another process delivers to this adapter.
            Exception: The adapter cannot be opened or rewound, or its `mark` keeps failing.
        """
        self._loop = asyncio.get_running_loop()
        has_cursor = self._books.open()
        before = self._before = self._books.state_before()
        self._owed = (before.owed, before.error, before.owed_fix) if before.owed else (0, None, None)
        if not has_cursor and self._after is not None:
            self._books.begin(self._after)
        try:
            async with asyncio.timeout(None) as self._scope:
                if not self._stopping:
                    await self._session(has_cursor=has_cursor)
        except TimeoutError:
            if not self._stopping:
                raise
        finally:
            self._scope = None
            self._books.close()
            self._faults.flush()

    def finish(self, deadline: float | None = None) -> None:
        """End once every event in the journal was delivered; from any thread.

        Args:
            deadline: Until when the adapter's tasks may run after that (monotonic); None for no limit.
        """
        self._deadline = time.monotonic() + LONGEST_SECONDS if deadline is None else deadline
        self._finishing = True

    def stop(self) -> None:
        """End now, from any thread: the current batch is cancelled and will be delivered again later."""
        self._stopping = True
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._interrupt)
            except RuntimeError:
                pass  # the loop is closed, so nothing is running

    def publish(self, event: Event) -> None:
        """Record an event that the adapter publishes; discarded if the courier has no `publish` function."""
        if self._publish is not None:
            self._publish(event)

    def follows(self, name: str) -> bool:
        """Whether an adapter of this name is followed in this journal."""
        return is_followed(self._directory, name, self._disk)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Store the report in the state file, from any thread; see `Adapter.report_owed`."""
        del adapter  # a courier has only one
        owed = owed_of(events, why, fix)
        if self._loop is not None and running_loop() is not self._loop:
            with suppress(RuntimeError):  # the loop is closed; the last state file is final
                self._loop.call_soon_threadsafe(self._note_owed, owed)
        else:
            self._note_owed(owed)

    def _note_owed(self, owed: tuple[int, str | None, str | None]) -> None:
        before, self._owed = self._owed, owed
        if owed != before:
            self._tell("delivering", urgent=before[1:] != owed[1:] or not (owed[0] and before[0]))

    @property
    def counts(self) -> Counts:
        """Current counts, from any thread. Pending events are counted in the journal, on the caller's thread."""
        places = dict(self._books.cursor.streams)
        delivered, dead = (sum(getattr(each, what) for each in places.values()) for what in ("delivered", "dead"))
        return Counts(delivered, dead, self._pending.count(places))

    # -- on the courier's loop ----------------------------------------------------------------------------------------

    def _receiver_of(self, adapter: Callback | Sink | Receiver) -> Receiver:
        if isinstance(adapter, Sink):
            from evsys_bus.delivery.batches import SinkReceiver

            return SinkReceiver(adapter)
        if hasattr(adapter, "take"):
            return cast("Receiver", adapter)
        return HookReceiver(
            adapter, self._terms.on_failure, slice_seconds=self._slice, faults=self._faults, courier=self
        )

    async def _session(self, *, has_cursor: bool) -> None:
        receiver, books = self._receiver, self._books
        feed = Feed(
            self._directory,
            books.cursor,
            ranks=self._terms.ranks,
            disk=self._disk,
            clock=self._clock,
            faults=self._faults,
        )
        try:
            self._tell("delivering", urgent=True)
            if self._sink is not None:
                self._sink.evsys_attached = self
            await self._open(feed, has_cursor=has_cursor)
            await self._deliver(feed)
        finally:
            self._commit(last=True)
            await receiver.close(
                time.monotonic() if self._stopping else self._deadline,
                settles=self._complete and not self._stopping,
            )
            if self._sink is not None:
                self._sink.evsys_attached = None
            self._tell("ended" if self._fault is None else "failed", urgent=True)

    async def _open(self, feed: Feed, *, has_cursor: bool) -> None:
        """Open the adapter and bring it to the position of the cursor."""
        cursor = self._books.cursor
        try:
            await self._receiver.open(self._heard)
            if cursor.mark is not None:
                self._receiver.rewind(cursor.mark)
            starts = feed.introduction(cursor.steps if has_cursor else None)
            if starts:
                self._receiver.introduce(starts)
                if not has_cursor:
                    self._books.introduced(starts)
            self._books.changed = True  # save a mark before the first event, so that there is one after an early kill
            self._commit(at_once=True)
        except Exception as error:  # raised again: the caller of `run` decides what to do
            self._fault = error
            raise

    async def _deliver(self, feed: Feed) -> None:
        """Deliver batch by batch until finished or stopped."""
        receiver, books, clock = self._receiver, self._books, self._clock
        batch = Batch()
        began = 0.0
        dry = False  # by a thorough read; finish only after two, since one may have begun before the last event came
        while not self._stopping:
            thorough = self._finishing
            if not batch.envelopes:
                began = clock.monotonic()
            filled = feed.fill(
                batch, receiver.max_events, receiver.max_bytes, slice_seconds=self._slice, thorough=thorough
            )
            if filled == "dry" and not batch.envelopes:
                self._commit(at_once=True)
                self._tell("idle")
                if thorough and dry:
                    self._complete = True
                    return
                dry = thorough
                await asyncio.sleep(0.0 if thorough else self._poll_seconds)
                continue
            dry = False
            left = began + receiver.max_seconds - clock.monotonic()
            if filled != "full" and left > 0 and not (filled == "dry" and thorough):
                await asyncio.sleep(min(left, self._poll_seconds) if filled == "dry" else self._slice or 0.0)
                continue
            ends = batch.ends
            if batch.envelopes:
                await self._take(batch)
            if batch.broken is not None and not batch.envelopes:
                books.broken(batch.broken)
                batch = Batch()
            self._commit(at_once=ends and not batch.envelopes)
            self._tell("delivering")
            while (books.full or self._unmarked) and not self._stopping:
                await asyncio.sleep(self._poll_seconds)
                self._commit()
                if not self._unmarked:
                    self._heard(None)
            await asyncio.sleep(self._slice or 0.0)

    async def _introduce(self, batch: Batch) -> None:
        """Repeat the start events of open runs whose segments were removed; they are not counted."""
        starts, batch.starts = batch.starts, []
        try:
            self._taking = True
            if getattr(self._receiver, "writes_starts", False):
                place = 0
                while place < len(starts):
                    part = starts[place : place + self._receiver.max_events]
                    taken = await self._receiver.take(part, [0] * len(part))
                    for why in taken.dead.values():
                        self._faults.warn("courier.start_not_taken", self.name, adapter=self.name, why=why)
                    place += max(1, taken.done)
            else:
                self._receiver.introduce(starts)
            self._taking = False
        except RetryLaterError as error:
            self._fault = error
            raise
        except Exception as error:  # isolation: the events after the starts must still be delivered
            self._taking = False
            self._faults.warn("courier.start_not_taken", self.name, error=error, adapter=self.name)
        self._books.introduced(starts)

    async def _take(self, batch: Batch) -> None:
        """Deliver the front of the batch. If that is cancelled, record the part that is known to be delivered."""
        if batch.starts:
            await self._introduce(batch)
        try:
            self._taking = True
            taken = await self._receiver.take(batch.envelopes, batch.sizes)
            self._taking = False
            if not 0 < taken.done <= len(batch.envelopes):
                raise ValueError(f"a receiver took {taken.done} of {len(batch.envelopes)} events")  # noqa: TRY301
        except asyncio.CancelledError:
            known = self._receiver.interrupted()
            if known is not None:
                self._taking = False
                self._books.done(batch, known)
            raise
        except RetryLaterError as error:  # raised by a hook: everything after the last mark is delivered again
            self._fault = error
            raise
        except Exception as error:  # isolation: receivers retry by themselves, so this is a bug in the receiver
            self._taking = False
            self._faults.warn("courier.receiver_failed", self.name, error=error, adapter=self.name)
            self._heard(Trouble("retrying", error_text(error)))
            await asyncio.sleep(self._retry_seconds)
            self._heard(None)
            return
        self._books.done(batch, taken)

    def _commit(self, *, at_once: bool = False, last: bool = False) -> None:
        """Save all recorded results, unless the last commit or failed commit was a moment ago."""
        now = self._clock.monotonic()
        self._books.look(last=last)
        if not self._books.changed and (not last or self._fault is not None):
            return
        if now < self._commit_due and not last and (self._refused or not at_once):
            return
        try:
            if last and self._taking and (not self._books.save() or self._receiver.mark() is not None):
                return  # stopped in the middle of a batch: the mark may cover rows that are not recorded yet
            self._tell_failures()
            committed = self._books.commit(self._receiver.mark)
            if last and committed:
                self._receiver.mark()  # lets the adapter delete what it kept for the mark before the last one
            self._unmarked = 0
        except Exception as error:  # isolation: without the adapter's mark the cursor must not move
            self._faults.warn("courier.not_marked", self.name, error=error, adapter=self.name)
            self._heard(Trouble("retrying", error_text(error)))
            committed = False
            self._unmarked += 1
            if self._unmarked >= MOST_UNMARKED and not last:
                raise
        self._refused = not committed
        self._commit_due = now + (COMMIT_SECONDS if committed else self._retry_seconds)

    def _tell_failures(self) -> None:
        """Write failure counts before the cursor moves: after a kill in between they are counted twice, not lost."""
        receiver = self._receiver
        if isinstance(receiver, CountsFailures):
            failures = receiver.failures, receiver.task_failures
            if failures != self._failures:
                self._failures = failures
                self._tell("delivering", urgent=True)

    def _heard(self, trouble: Trouble | None) -> None:
        """Store and write the problem that the receiver reports; None when it has ended."""
        before, self._trouble = self._trouble, trouble
        if trouble is None:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = self._clock.wall()
        told = [None if each is None else (each.state, each.error) for each in (before, trouble)]
        self._tell("delivering", urgent=told[0] != told[1])

    def _tell(self, state: Literal["delivering", "idle", "ended", "failed"], *, urgent: bool = False) -> None:
        """Write the state file."""
        trouble = self._trouble if self._fault is None else Trouble("retrying", error_text(self._fault), attempts=0)
        owed, owed_why, owed_fix = self._owed
        before, hooks = self._before, self._receiver if isinstance(self._receiver, CountsFailures) else None
        self._books.state(
            DeliveryStatus(
                state=state if trouble is None or state in {"ended", "failed"} else trouble.state,
                pid=os.getpid(),
                owed=owed,
                owed_fix=owed_fix,
                error=owed_why if trouble is None else trouble.error,
                fix=owed_fix if trouble is None else trouble.fix,
                failing_since=self._failing_since,
                attempts=0 if trouble is None else trouble.attempts,
                hook_failures=before.hook_failures + (0 if hooks is None else hooks.failures),
                task_failures=before.task_failures + (0 if hooks is None else hooks.task_failures),
                last_failure=before.last_failure if hooks is None else hooks.last_failure or before.last_failure,
                log=self._log_path,
            ),
            urgent=urgent,
        )

    def _interrupt(self) -> None:
        try:
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())
        except RuntimeError:
            pass  # the scope is already exiting
