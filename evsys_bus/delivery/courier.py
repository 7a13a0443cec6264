"""`Courier`: delivers a journal to one adapter, starting at its cursor.

    open ── rewind, repeat starts ── ┌ read a batch ── deliver it ── record the result ── commit ┐ ── close
                                     └──────────── until finished or stopped ────────────────────┘

The cursor moves only after the receiver has acknowledged the events. A commit writes the dead letters, then takes the
receiver's mark, then writes one cursor file with both. Errors of the adapter are written to the state file and the log.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, cast

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback
from evsys_bus.codec import error_text
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.delivery.delivery_store import DeliveryStore
from evsys_bus.delivery.open_rows import MergedRow
from evsys_bus.delivery.progress import PendingCounter
from evsys_bus.delivery.receiver import HasFailureCounts, Receiver, confirm_deliveries, unconfirmed_status
from evsys_bus.delivery.source import Batch, EventSource
from evsys_bus.delivery.subscription import DeliveryPolicy, adapter_kind
from evsys_bus.delivery.subscriptions import is_subscribed
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import Clock, Cursor, Disk, OsClock, OsDisk
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus, running_loop

if TYPE_CHECKING:
    from evsys_bus.delivery.sink_receiver import SinkReceiver

COMMIT_SECONDS: Final = 0.2
"""Minimum time between two commits while events arrive."""
MAX_FAILED_MARKS: Final = 10
"""How often in a row an adapter's `mark` may fail before the adapter is rebuilt and rewound."""
RETRY_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 0.3
"""How long an adapter with nothing to deliver may take to open, or for its idle work, once its courier is to end."""
NO_DEADLINE_SECONDS: Final = 86_400.0
"""A deadline that is as good as none."""


class Courier:
    """Delivers one journal to one adapter; a lock ensures that only one courier does.

    Args:
        directory: The journal.
        name: Name of the adapter; identifies its cursor, lock and counts.
        adapter: A callback, a sink, or a `Receiver`.
        policy: Which ranks to deliver, and what a failure means.
        publish: Records what the adapter publishes about a run; None to discard it.
        persistent: Whether to store the cursor; if not, as for a replay, there is no lock and no dead-letter file
            either.
        start_after: Start after these sequences, by stream, if there is no cursor.
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
        policy: DeliveryPolicy,
        *,
        publish: Callable[[Event], None] | None = None,
        persistent: bool = True,
        start_after: Mapping[str, int] | None = None,
        slice_seconds: float | None = None,
        poll_seconds: float = 0.02,
        retry_seconds: float = RETRY_SECONDS,
        log_path: str | None = None,
        clock: Clock | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.name: Final = name
        self.directory: Final = os.fspath(directory)
        """The journal."""
        self._policy: Final = policy
        self._publish: Final = publish
        self._start_after: Final = start_after
        self._slice_seconds: Final = slice_seconds
        self._poll_seconds: Final = poll_seconds
        self._retry_seconds: Final = retry_seconds
        self._log_path: Final = log_path
        self._clock: Final[Clock] = OsClock() if clock is None else clock
        self._disk: Final[Disk] = OsDisk() if disk is None else disk
        self._faults: Final = FaultLog()
        self._store: Final = DeliveryStore(
            self.directory,
            name,
            adapter_kind(adapter),
            persistent=persistent,
            disk=self._disk,
            clock=self._clock,
            faults=self._faults,
        )
        self._sink: Final = adapter if isinstance(adapter, Sink) else None
        self._receiver: Final = self._make_receiver(adapter)
        self._finishing = False
        self._deadline: float | None = None
        self._is_complete = False
        self._previous_status = DeliveryStatus()
        """Counts and unconfirmed events of the previous courier."""
        self._stopping = False
        self._is_opening = False
        self._next_check: asyncio.TimerHandle | None = None
        """The next call of `_give_up_idle_open`."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: asyncio.Timeout | None = None
        self._idle_scope: asyncio.Timeout | None = None
        self._last_batch_at = -math.inf
        self._commit_due = 0.0
        self._commit_failed = False
        self._failed_marks = 0
        self._is_delivering = False
        self._fatal_error: Exception | None = None
        self._problem: DeliveryStatus | None = None
        self._failing_since: float | None = None
        self._unconfirmed = DeliveryStatus()
        """Unconfirmed events: the fields ``owed``, ``owed_fix`` and ``error``."""
        self._waiting: DeliveryStatus | None = None
        """What the sink waits for while nothing is pending: the fields ``state``, ``error`` and ``fix``."""
        self._saved_failures = (0, 0)
        """Failure counts of hooks and tasks, as last written before a commit."""
        self._pending_counter = PendingCounter(self.directory, policy.ranks, self._disk)

    async def run(self) -> None:
        """Deliver until finished or stopped. Errors of the adapter during delivery are handled, not raised.

        Raises:
            CourierBusyError: Another process delivers to this adapter.
            Exception: The adapter cannot be opened or rewound, or its `mark` keeps failing.
        """
        self._loop = asyncio.get_running_loop()
        has_cursor = self._store.open()
        previous = self._previous_status = self._store.previous_status()
        self._unconfirmed = unconfirmed_status(previous.owed, previous.error, previous.owed_fix)
        if not has_cursor and self._start_after is not None:
            self._store.start_after(self._start_after)
        try:
            async with asyncio.timeout(None) as self._scope:
                if not self._stopping:
                    await self._run_session(has_cursor=has_cursor)
        except TimeoutError:
            if self._scope is None or not self._scope.expired():
                raise
        finally:
            self._scope = None
            self._store.close()
            self._faults.flush()

    def finish(self, deadline: float | None = None) -> None:
        """End once every event in the journal was delivered; from any thread.

        If there are none to deliver, an adapter that cannot be opened is given up.

        Args:
            deadline: Until when the adapter's tasks may run after that (monotonic); None for no limit.
        """
        self._deadline = time.monotonic() + NO_DEADLINE_SECONDS if deadline is None else deadline
        self._finishing = True
        self._call_on_loop(self._give_up_idle_open)
        self._call_on_loop(self._limit_idle_work)

    def stop(self) -> None:
        """End now, from any thread: the current batch is cancelled and will be delivered again later."""
        self._stopping = True
        self._call_on_loop(self._cancel_run)

    def _call_on_loop(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, so nothing is running
                self._loop.call_soon_threadsafe(call)

    def publish(self, event: Event) -> None:
        """Record an event that the adapter publishes; discarded if the courier has no `publish` function."""
        if self._publish is not None:
            self._publish(event)

    def has_subscription(self, name: str) -> bool:
        """Whether an adapter of this name is followed in this journal."""
        return is_subscribed(self.directory, name, self._disk)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Store the report in the state file, from any thread; see `Adapter.report_owed`."""
        del adapter  # a courier has only one
        unconfirmed = unconfirmed_status(events, why, fix)
        if self._loop is not None and running_loop() is not self._loop:
            with suppress(RuntimeError):  # the loop is closed; the last state file is final
                self._loop.call_soon_threadsafe(self._set_unconfirmed, unconfirmed)
        else:
            self._set_unconfirmed(unconfirmed)

    def _set_unconfirmed(self, unconfirmed: DeliveryStatus) -> None:
        previous, self._unconfirmed = self._unconfirmed, unconfirmed
        if unconfirmed != previous:
            same_texts = (previous.error, previous.owed_fix) == (unconfirmed.error, unconfirmed.owed_fix)
            self._write_status("delivering", urgent=not (same_texts and unconfirmed.owed and previous.owed))

    def report_waiting(self, why: str | None, events: int = 0, fix: str | None = None) -> None:
        """Store what the sink waits for, on the courier's loop; see `Sink.report_waiting`."""
        cursor, count = self._store.cursor, 0 if why is None else events
        if count != cursor.waiting:
            cursor.waiting = count
            self._store.has_changes = True
        waiting = None if why is None else DeliveryStatus(state="waiting", error=why, fix=fix)
        if waiting != self._waiting:
            self._waiting = waiting
            self._write_status("idle", urgent=True)

    @property
    def counts(self) -> DeliveryStatus:
        """Current counts, from any thread. Pending events are counted in the journal, on the caller's thread."""
        cursor = Cursor(dict(self._store.cursor.streams), waiting=self._store.cursor.waiting)
        delivered, dead, waiting = cursor.counts()
        pending = self._pending_counter.count(cursor.streams)
        return DeliveryStatus(
            self.name,
            recorded=delivered + dead + waiting + pending,
            delivered=delivered,
            dead=dead,
            pending=pending,
            waiting=waiting,
        )

    @property
    def handled(self) -> int:
        """How many events were handled; from any thread."""
        return self._store.handled

    @property
    def last_status(self) -> DeliveryStatus | None:
        """The state that was last written, without counts of events; from any thread."""
        return self._store.last_status

    @property
    def failure_counts(self) -> HasFailureCounts | None:
        """Failures of the adapter in this courier; None if its receiver does not count them."""
        return self._receiver if isinstance(self._receiver, HasFailureCounts) else None

    # -- on the courier's loop ----------------------------------------------------------------------------------------

    def _make_receiver(self, adapter: Callback | Sink | Receiver) -> Receiver:
        if isinstance(adapter, Sink):
            from evsys_bus.delivery.sink_receiver import SinkReceiver

            return SinkReceiver(adapter, raw=adapter.raw)
        if hasattr(adapter, "deliver"):
            return cast("Receiver", adapter)
        return CallbackReceiver(
            adapter, self._policy.on_failure, slice_seconds=self._slice_seconds, faults=self._faults, courier=self
        )

    async def _run_session(self, *, has_cursor: bool) -> None:
        receiver, store = self._receiver, self._store
        source = EventSource(
            self.directory,
            store.cursor,
            ranks=self._policy.ranks,
            raw=self._sink is not None and self._sink.raw,
            with_payloads=self._sink is not None and self._sink.with_payloads,
            disk=self._disk,
            clock=self._clock,
            faults=self._faults,
        )
        try:
            self._write_status("delivering", urgent=True)
            if self._sink is not None:
                self._sink.evsys_attached = self
            await self._open(source, has_cursor=has_cursor)
            await self._deliver_all(source)
        finally:
            source.close()
            self._commit(last=True)
            await receiver.close(
                time.monotonic() if self._stopping else self._deadline,
                confirm=self._is_complete and not self._stopping,
            )
            if self._sink is not None:
                self._sink.evsys_attached = None
            self._write_status("ended" if self._fatal_error is None else "failed", urgent=True)

    async def _open(self, source: EventSource, *, has_cursor: bool) -> None:
        """Open the adapter and bring it to the position of the cursor."""
        cursor = self._store.cursor
        try:
            self._is_opening = True
            try:
                self._give_up_idle_open()
                await self._receiver.open(self._set_problem)
            finally:
                self._is_opening = False
                if self._next_check is not None:
                    self._next_check.cancel()
            if cursor.mark is not None:
                self._receiver.rewind(cursor.mark)
            starts = source.open_run_starts(cursor.steps if has_cursor else None)
            if starts:
                self._receiver.resume_runs(starts)
                if not has_cursor:
                    self._store.record_open_trainings(starts)
            self._store.has_changes = (
                True  # save a mark before the first event, so that there is one after an early kill
            )
            self._commit(at_once=True)
        except Exception as error:  # raised again: the caller of `run` decides what to do
            self._fatal_error = error
            raise

    async def _deliver_all(self, source: EventSource) -> None:
        """Deliver batch by batch until finished or stopped."""
        receiver, store, clock = self._receiver, self._store, self._clock
        batch = Batch()
        began = 0.0
        was_exhausted = (
            False  # by a thorough read; finish only after two, since one may have started before the last event came
        )
        while not self._stopping:
            include_idle = self._finishing
            if batch.is_empty():
                began = clock.monotonic()
            read_result = source.read_batch(
                batch,
                receiver.max_events,
                receiver.max_bytes,
                slice_seconds=self._slice_seconds,
                include_idle=include_idle,
            )
            if read_result == "dry" and batch.is_empty():
                self._commit(at_once=True)
                self._write_status("idle")
                if include_idle and was_exhausted:
                    await self._settle_waiting()
                    self._is_complete = True
                    return
                was_exhausted = include_idle
                await self._pause(is_finishing=include_idle)
                continue
            was_exhausted = False
            remaining = self._batch_began(began) + receiver.max_seconds - clock.monotonic()
            if read_result != "full" and remaining > 0 and not (read_result == "dry" and include_idle):
                await asyncio.sleep(
                    min(remaining, self._poll_seconds) if read_result == "dry" else self._slice_seconds or 0.0
                )
                continue
            is_closed = batch.is_closed
            if not batch.is_empty():
                self._last_batch_at = clock.monotonic()
                await self._deliver_batch(batch)
            if batch.corrupt_record is not None and not batch.items:
                store.reject_corrupt(batch.corrupt_record)
                batch = Batch()
            self._commit(at_once=is_closed and batch.is_empty())
            self._write_status("delivering")
            while (store.is_full or self._failed_marks) and not self._stopping:
                await asyncio.sleep(self._poll_seconds)
                self._commit()
                if not self._failed_marks:
                    self._set_problem(None)
            await asyncio.sleep(self._slice_seconds or 0.0)

    def _batch_began(self, first_event_at: float) -> float:
        """Return from when on a batch takes `max_batch_seconds`: from its first event, or from the last batch on."""
        return self._last_batch_at if self._sink is not None and self._sink.first_at_once else first_event_at

    async def _settle_waiting(self) -> None:
        """Let the sink deliver what waits, if its destination is there by now."""
        if self._store.cursor.waiting and self._sink is not None:
            await confirm_deliveries(self._sink, self.name, self._deadline)
            self._commit(at_once=True)

    async def _pause(self, *, is_finishing: bool) -> None:
        """Wait a moment for new events; meanwhile the sink may do what is due."""
        if self._sink is not None and self._sink.idle_seconds is not None and not is_finishing:
            try:
                async with asyncio.timeout(None) as self._idle_scope:
                    await cast("SinkReceiver", self._receiver).do_idle_work(self._clock.monotonic())
            except TimeoutError:
                pass
            finally:
                self._idle_scope = None
        await asyncio.sleep(0.0 if is_finishing else self._poll_seconds)

    async def _resume_runs(self, batch: Batch) -> None:
        """Repeat the start events of open runs whose segments were removed; they are not counted."""
        starts, batch.starts = batch.starts, []
        try:
            self._is_delivering = True
            if getattr(self._receiver, "needs_starts_as_events", False):
                await self._deliver_uncounted(starts)
            else:
                self._receiver.resume_runs(starts)
            self._is_delivering = False
        except RetryLaterError as error:
            self._fatal_error = error
            raise
        except Exception as error:  # isolation: the events after the starts must still be delivered
            self._is_delivering = False
            self._faults.warn("courier.start_not_taken", self.name, error=error, adapter=self.name)
        self._store.record_open_trainings(starts)

    async def _deliver_batch(self, batch: Batch) -> None:
        """Deliver the front of the batch. If that is cancelled, record the part that is known to be delivered."""
        if batch.starts:
            await self._resume_runs(batch)
        if not batch.items:
            await self._deliver_open_rows(batch)
            return
        try:
            self._is_delivering = True
            result = await self._receiver.deliver(batch.items, batch.sizes)
            self._is_delivering = False
            if not 0 < result.handled <= len(batch.items):
                raise ValueError(f"a receiver took {result.handled} of {len(batch.items)} events")  # noqa: TRY301
        except asyncio.CancelledError:
            partial_result = self._receiver.interrupted_result()
            if partial_result is not None:
                self._is_delivering = False
                self._store.acknowledge(batch, partial_result)
            raise
        except RetryLaterError as error:  # raised by a hook: everything after the last mark is delivered again
            self._fatal_error = error
            raise
        except Exception as error:  # isolation: receivers retry by themselves, so this is a bug in the receiver
            self._is_delivering = False
            self._faults.warn("courier.receiver_failed", self.name, error=error, adapter=self.name)
            self._set_problem(_retrying(error))
            await asyncio.sleep(self._retry_seconds)
            self._set_problem(None)
            return
        self._store.acknowledge(batch, result)

    async def _deliver_open_rows(self, batch: Batch) -> None:
        """Deliver the rows that were logged in parts, and whose program ended before they were complete."""
        ended, batch.ended, batch.is_closed = batch.ended, [], False
        rows = self._store.rows
        try:
            self._is_delivering = True
            await self._deliver_uncounted([row for each in ended for row in rows.of(each)])
            self._is_delivering = False
        except RetryLaterError as error:
            self._fatal_error = error
            raise
        except Exception as error:  # isolation: the rows remain, for the next courier
            self._is_delivering = False
            self._faults.warn("courier.receiver_failed", self.name, error=error, adapter=self.name)
        else:
            for each in ended:
                rows.remove(each)
            self._store.has_changes = True

    async def _deliver_uncounted(self, envelopes: list[Envelope]) -> None:
        """Deliver events that are not counted, because they repeat or complete others.

        A rejected start is logged; a rejected row is a dead letter, which its last part is counted as.
        """
        offset = 0
        while offset < len(envelopes):
            part = envelopes[offset : offset + self._receiver.max_events]
            result = await self._receiver.deliver(part, [0] * len(part))
            for index, why in result.rejected.items():
                if isinstance(part[index], MergedRow):
                    self._store.reject_row(part[index], why)
                else:
                    self._faults.warn("courier.start_not_taken", self.name, adapter=self.name, why=why)
            offset += max(1, result.handled)

    def _commit(self, *, at_once: bool = False, last: bool = False) -> None:
        """Save all recorded results, unless the last commit or failed commit was a moment ago."""
        now = self._clock.monotonic()
        if not self._store.has_changes and (not last or self._fatal_error is not None):
            return
        if now < self._commit_due and not last and (self._commit_failed or not at_once):
            return
        try:
            if last and self._is_delivering and (not self._store.save_cursor() or self._receiver.mark() is not None):
                return  # stopped in the middle of a batch: the mark may cover rows that are not recorded yet
            # Before the cursor moves: after a kill in between, failures are counted twice, not lost.
            counts = self.failure_counts
            if counts is not None:
                failures = counts.failures, counts.task_failures
                if failures != self._saved_failures:
                    self._saved_failures = failures
                    self._write_status("delivering", urgent=True)
            committed = self._store.commit(self._receiver.mark)
            if last and committed:
                self._receiver.mark()  # lets the adapter delete what it needed for the mark before the last one
            self._failed_marks = 0
        except Exception as error:  # isolation: without the adapter's mark the cursor must not move
            self._faults.warn("courier.not_marked", self.name, error=error, adapter=self.name)
            self._set_problem(_retrying(error))
            committed = False
            self._failed_marks += 1
            if self._failed_marks >= MAX_FAILED_MARKS and not last:
                raise
        self._commit_failed = not committed
        self._commit_due = now + (COMMIT_SECONDS if committed else self._retry_seconds)

    def _set_problem(self, problem: DeliveryStatus | None) -> None:
        """Store and write the problem that the receiver reports; None when it has ended."""
        previous, self._problem = self._problem, problem
        if problem is None or problem.state == "waiting":
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = self._clock.wall()
        summaries = [None if each is None else (each.state, each.error) for each in (previous, problem)]
        self._write_status("delivering", urgent=summaries[0] != summaries[1])

    def _write_status(self, state: Literal["delivering", "idle", "ended", "failed"], *, urgent: bool = False) -> None:
        """Write the state file."""
        problem = self._problem if self._fatal_error is None else _retrying(self._fatal_error, attempts=0)
        unconfirmed, previous = self._unconfirmed, self._previous_status
        # A problem of the delivery comes before the reason for unconfirmed events.
        shown = unconfirmed if problem is None else problem
        is_waiting = problem is None and (state in {"idle", "delivering"} or self._store.cursor.waiting > 0)
        if is_waiting and self._waiting is not None:
            shown = self._waiting
        counts = self.failure_counts
        failures, task_failures, last_failure = (
            (0, 0, None) if counts is None else (counts.failures, counts.task_failures, counts.last_failure)
        )
        status = DeliveryStatus(
            state=state if shown.state is None or (problem and state in {"ended", "failed"}) else shown.state,
            pid=os.getpid(),
            owed=unconfirmed.owed,
            owed_fix=unconfirmed.owed_fix,
            error=shown.error,
            fix=shown.fix,
            failing_since=self._failing_since,
            attempts=shown.attempts,
            hook_failures=previous.hook_failures + failures,
            task_failures=previous.task_failures + task_failures,
            last_failure=last_failure or previous.last_failure,
            log=self._log_path,
        )
        self._store.write_status(status, urgent=urgent)

    def _give_up_idle_open(self, *, began: float | None = None) -> None:
        """End the run if it should finish, nothing is to be delivered, and the adapter cannot be opened or is slow."""
        loop = self._loop
        if loop is None or not (self._finishing and self._is_opening):
            return
        began = loop.time() if began is None else began
        is_late = self._problem is not None or loop.time() - began >= IDLE_SECONDS
        if is_late and not self._unconfirmed.owed and not self.counts.pending:
            self._cancel_run()
        else:
            if self._next_check is not None:
                self._next_check.cancel()
            self._next_check = loop.call_later(IDLE_SECONDS, partial(self._give_up_idle_open, began=began))

    def _limit_idle_work(self) -> None:
        if self._idle_scope is not None:
            self._idle_scope.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)

    def _cancel_run(self) -> None:
        try:
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())
        except RuntimeError:
            pass  # the scope is already exiting


def _retrying(error: Exception, attempts: int = 1) -> DeliveryStatus:
    return DeliveryStatus(state="retrying", error=error_text(error), attempts=attempts)
