"""`ChosenEvents`: passes selected events of a journal to a receiver, at a chosen speed."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Final

from evsys_bus.attached import Adapter
from evsys_bus.callback import Callback
from evsys_bus.cli.event_facts import type_of
from evsys_bus.delivery.batches import SinkReceiver
from evsys_bus.delivery.hooks import HookReceiver
from evsys_bus.delivery.receiver import Receiver, Report, Taken, Trouble
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, Event
from evsys_bus.sink import Sink

_MOST_REASONS: Final = 5


class ChosenEvents:
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
        passed_over: Number of events that the filter skipped.
        trouble: What keeps the adapter from accepting events now; None if nothing does.
        last: The sequence of the last handled event, by stream.
        waiting: Whether the next event is not due yet.
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
        self.passed_over = 0
        self.last: Final[dict[str, int]] = {}
        self.trouble: Trouble | None = None
        self.waiting = False
        self._sink: Final = adapter if isinstance(adapter, Sink) else None
        self._hooks: Final = HookReceiver(adapter, faults=FaultLog()) if isinstance(adapter, Callback) else None
        self._receiver: Final[Receiver | None] = self._hooks if self._sink is None else SinkReceiver(self._sink)
        self._types: Final = types
        self._run: Final = run
        self._speed: Final = speed
        self._monotonic: Final = monotonic
        self._began: tuple[float, float] | None = None
        self._given: Sequence[Envelope] = ()
        self._wanted: Sequence[int] = ()
        self.max_events = 512 if self._receiver is None else self._receiver.max_events
        self.max_bytes = 8 << 20 if self._receiver is None else self._receiver.max_bytes
        self.max_seconds = 0.0

    @property
    def seen(self) -> int:
        """Number of handled events: delivered, rejected or skipped."""
        return self.sent.total() + self.dead + self.passed_over

    @property
    def hook_failures(self) -> int:
        """Number of hook calls that raised."""
        return 0 if self._hooks is None else self._hooks.failures

    async def open(self, report: Report) -> None:
        """Open the adapter's receiver, and remember the problems it reports."""

        def heard(trouble: Trouble | None) -> None:
            self.trouble = trouble
            report(trouble)

        if self._sink is not None:
            self._sink.evsys_attached = self
        if self._receiver is not None:
            await self._receiver.open(heard)

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        """Deliver the selected events from the front of the batch, once they are due."""
        self._given = ()
        if self._speed:
            batch = await self._due(batch)
        wanted = [index for index, envelope in enumerate(batch) if self._is_wanted(envelope)]
        self._given, self._wanted = batch, wanted
        taken = Taken(len(wanted))
        if self._receiver is not None and wanted:
            taken = await self._receiver.take([batch[each] for each in wanted], [sizes[each] for each in wanted])
        return self._settled(taken)

    def interrupted(self) -> Taken | None:
        """Return the result of a cancelled `take` if it is known."""
        known = None if self._receiver is None or not self._given else self._receiver.interrupted()
        return None if known is None else self._settled(known)

    @property
    def writes_starts(self) -> bool:
        """Whether the sink writes the start events of open runs itself; see `SinkReceiver`."""
        return isinstance(self._receiver, SinkReceiver) and self._receiver.writes_starts

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Pass on the selected start events."""
        wanted = [each for each in starts if self._is_wanted(each)]
        if self._receiver is not None and wanted:
            self._receiver.introduce(wanted)

    def mark(self) -> Any:
        """Return None: the delivery is never resumed."""

    def rewind(self, mark: Any) -> None:
        """Do nothing: the delivery is never resumed."""

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Close the receiver; unconfirmed events are not confirmed."""
        del settles
        if self._receiver is not None:
            await self._receiver.close(deadline)
        if self._sink is not None:
            self._sink.evsys_attached = None

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Do nothing: unconfirmed events are not tracked here."""

    def publish(self, event: Event) -> None:
        """Do nothing: the event was recorded while the run was live."""

    def _is_wanted(self, envelope: Envelope) -> bool:
        if self._run is not None and envelope.run not in {None, self._run}:
            return False
        return not self._types or type_of(envelope.event) in self._types

    def _settled(self, taken: Taken) -> Taken:
        """Translate the result for the selected events into one for the whole batch."""
        wanted = self._wanted
        done = len(self._given) if taken.done >= len(wanted) else wanted[taken.done]
        self._count(self._given, wanted[: taken.done], taken, done)
        return Taken(done, {wanted[index]: why for index, why in taken.dead.items()})

    def _count(self, batch: Sequence[Envelope], given: Sequence[int], taken: Taken, done: int) -> None:
        dead = {given[index] for index in taken.dead}
        self.sent.update(type_of(batch[each].event) for each in given if each not in dead)
        self.dead += len(dead)
        self.passed_over += done - len(given)
        self.last.update((each.stream, each.seq) for each in batch[:done])
        room = _MOST_REASONS - len(self.reasons)
        self.reasons.extend(list(dict.fromkeys(taken.dead.values()))[: max(0, room)])

    async def _due(self, batch: Sequence[Envelope]) -> Sequence[Envelope]:
        """Wait until the first event is due, and return the events that are due by then."""
        if self._began is None:
            self._began = self._monotonic(), batch[0].time
        began, first = self._began
        wait = began + (batch[0].time - first) / self._speed - self._monotonic()
        if wait > 0:
            self.waiting = True
            await asyncio.sleep(wait)
            self.waiting = False
        until = first + (self._monotonic() - began) * self._speed
        return [batch[0], *takewhile(lambda each: each.time <= until, batch[1:])]
