"""`FilteredReceiver`: passes selected events of a journal to a receiver, at a chosen speed."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Final

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback
from evsys_bus.cli.event_facts import type_of
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.delivery.receiver import BatchResult, Problem, ProblemHandler, Receiver
from evsys_bus.delivery.sink_receiver import SinkReceiver
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, Event
from evsys_bus.sink import Sink

_MAX_REASONS: Final = 5


class FilteredReceiver:
    """Wraps the receiver of an adapter: filters its events by type and run, paces and counts them.

    Args:
        adapter: Receives the events; None only counts them.
        types: The types of events to pass on; empty for all.
        run: Only events of this run, and those that belong to no run; None for all.
        speed: Seconds of the journal per second; 0 for as fast as the adapter accepts them.
        monotonic: The clock.

    Attributes:
        sent: Number of delivered events, by type.
        dead: Number of rejected events.
        reasons: Why the first few were rejected.
        skipped: Number of events that the filter skipped.
        problem: What keeps the adapter from accepting events now; None if nothing does.
        last_sequences: The sequence of the last handled event, by stream.
        is_waiting: Whether the next event is not due yet.
    """

    def __init__(
        self,
        adapter: Callback | Sink | None,
        *,
        types: frozenset[str] = frozenset(),
        run: str | None = None,
        speed: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent: Final[Counter[str]] = Counter()
        self.dead = 0
        self.reasons: Final[list[str]] = []
        self.skipped = 0
        self.last_sequences: Final[dict[str, int]] = {}
        self.problem: Problem | None = None
        self.is_waiting = False
        self._sink: Final = adapter if isinstance(adapter, Sink) else None
        self._hooks: Final = CallbackReceiver(adapter, faults=FaultLog()) if isinstance(adapter, Callback) else None
        self._receiver: Final[Receiver | None] = self._hooks if self._sink is None else SinkReceiver(self._sink)
        self._types: Final = types
        self._run: Final = run
        self._speed: Final = speed
        self._monotonic: Final = monotonic
        self._clock_start: tuple[float, float] | None = None
        self._batch: Sequence[Envelope] = ()
        self._selected: Sequence[int] = ()
        self.max_events = 512 if self._receiver is None else self._receiver.max_events
        self.max_bytes = 8 << 20 if self._receiver is None else self._receiver.max_bytes
        self.max_seconds = 0.0

    @property
    def processed(self) -> int:
        """Number of handled events: delivered, rejected or skipped."""
        return self.sent.total() + self.dead + self.skipped

    @property
    def hook_failures(self) -> int:
        """Number of hook calls that raised."""
        return 0 if self._hooks is None else self._hooks.failures

    async def open(self, on_problem: ProblemHandler) -> None:
        """Open the adapter's receiver, and remember the problems it reports."""

        def store_problem(problem: Problem | None) -> None:
            self.problem = problem
            on_problem(problem)

        if self._sink is not None:
            self._sink.evsys_attached = self
        if self._receiver is not None:
            await self._receiver.open(store_problem)

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:
        """Deliver the selected events from the front of the batch, once they are due."""
        self._batch = ()
        if self._speed:
            batch = await self._wait_until_due(batch)
        selected = [index for index, envelope in enumerate(batch) if self._is_selected(envelope)]
        self._batch, self._selected = batch, selected
        result = BatchResult(len(selected))
        if self._receiver is not None and selected:
            result = await self._receiver.deliver(
                [batch[each] for each in selected], [sizes[each] for each in selected]
            )
        return self._to_batch_result(result)

    def interrupted_result(self) -> BatchResult | None:
        """Return the result of a cancelled `deliver` if it is known."""
        known = None if self._receiver is None or not self._batch else self._receiver.interrupted_result()
        return None if known is None else self._to_batch_result(known)

    @property
    def needs_starts_as_events(self) -> bool:
        """Whether the sink writes the start events of open runs itself; see `SinkReceiver`."""
        return isinstance(self._receiver, SinkReceiver) and self._receiver.needs_starts_as_events

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Pass on the selected start events."""
        selected = [each for each in starts if self._is_selected(each)]
        if self._receiver is not None and selected:
            self._receiver.resume_runs(selected)

    def mark(self) -> Any:
        """Return None: the delivery is never resumed."""

    def rewind(self, mark: Any) -> None:
        """Do nothing: the delivery is never resumed."""

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        """Close the receiver; unconfirmed events are not confirmed."""
        del confirm
        if self._receiver is not None:
            await self._receiver.close(deadline)
        if self._sink is not None:
            self._sink.evsys_attached = None

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Do nothing: unconfirmed events are not tracked here."""

    def publish(self, event: Event) -> None:
        """Do nothing: the event was recorded while the run was live."""

    def _is_selected(self, envelope: Envelope) -> bool:
        if self._run is not None and envelope.run not in {None, self._run}:
            return False
        return not self._types or type_of(envelope.event) in self._types

    def _to_batch_result(self, result: BatchResult) -> BatchResult:
        """Translate the result for the selected events into one for the whole batch."""
        selected = self._selected
        done = len(self._batch) if result.handled >= len(selected) else selected[result.handled]
        self._count(self._batch, selected[: result.handled], result, done)
        return BatchResult(done, {selected[index]: why for index, why in result.rejected.items()})

    def _count(self, batch: Sequence[Envelope], selected: Sequence[int], result: BatchResult, done: int) -> None:
        dead = {selected[index] for index in result.rejected}
        self.sent.update(type_of(batch[each].event) for each in selected if each not in dead)
        self.dead += len(dead)
        self.skipped += done - len(selected)
        self.last_sequences.update((each.stream, each.seq) for each in batch[:done])
        room = _MAX_REASONS - len(self.reasons)
        self.reasons.extend(list(dict.fromkeys(result.rejected.values()))[: max(0, room)])

    async def _wait_until_due(self, batch: Sequence[Envelope]) -> Sequence[Envelope]:
        """Wait until the first event is due, and return the events that are due by then."""
        if self._clock_start is None:
            self._clock_start = self._monotonic(), batch[0].time
        began, first = self._clock_start
        wait = began + (batch[0].time - first) / self._speed - self._monotonic()
        if wait > 0:
            self.is_waiting = True
            await asyncio.sleep(wait)
            self.is_waiting = False
        until = first + (self._monotonic() - began) * self._speed
        return [batch[0], *takewhile(lambda each: each.time <= until, batch[1:])]
