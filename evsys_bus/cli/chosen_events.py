"""`ChosenEvents`: some of a journal's events, at the pace that is wanted, for a receiver that knows of no choice."""

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
    """A receiver before another one.

    Args:
        adapter: What gets the events; None for nobody, to count them.
        types: Which types; none means all.
        run: Whose events, besides those of no run; None for everybody's.
        speed: How many seconds of the journal in one; 0 for as fast as they are taken.
        monotonic: The clock.

    Attributes:
        sent: Events that were taken, by type.
        dead: Those that were not, and never will be.
        reasons: Why, of the first few.
        passed_over: Those that were not wanted.
        trouble: What keeps the adapter from taking more, now.
        last: The sequence of the last event that it is done with, by stream.
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
        """Events of the journal that are done with."""
        return self.sent.total() + self.dead + self.passed_over

    @property
    def hook_failures(self) -> int:
        """How often a hook has raised."""
        return 0 if self._hooks is None else self._hooks.failures

    async def open(self, report: Report) -> None:
        """As `Receiver`."""

        def heard(trouble: Trouble | None) -> None:
            self.trouble = trouble
            report(trouble)

        if self._sink is not None:
            self._sink.evsys_attached = self
        if self._receiver is not None:
            await self._receiver.open(heard)

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:
        """As `Receiver`: the wanted ones of the front, once they are due."""
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
        """As `Receiver`."""
        known = None if self._receiver is None or not self._given else self._receiver.interrupted()
        return None if known is None else self._settled(known)

    @property
    def writes_starts(self) -> bool:
        """As `SinkReceiver`."""
        return isinstance(self._receiver, SinkReceiver) and self._receiver.writes_starts

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """As `Receiver`."""
        wanted = [each for each in starts if self._is_wanted(each)]
        if self._receiver is not None and wanted:
            self._receiver.introduce(wanted)

    def mark(self) -> Any:
        """Nothing is marked: nobody will go on from there. Any: as `Receiver`."""

    def rewind(self, mark: Any) -> None:
        """As `mark`."""

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """As `Receiver`; what is owed is not asked for again."""
        del settles
        if self._receiver is not None:
            await self._receiver.close(deadline)
        if self._sink is not None:
            self._sink.evsys_attached = None

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Nobody asks."""

    def publish(self, event: Event) -> None:
        """What a sink learns: it was on record when the run was live, and is not recorded again."""

    def _is_wanted(self, envelope: Envelope) -> bool:
        if self._run is not None and envelope.run not in {None, self._run}:
            return False
        return not self._types or type_of(envelope.event) in self._types

    def _settled(self, taken: Taken) -> Taken:
        """What that means for the batch of which only the wanted ones were given out."""
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
        """Wait for the first one, and give those that are due with it."""
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
