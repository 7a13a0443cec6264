"""`Feed`: the events behind a cursor, decoded, from every stream of a journal.

The order of each stream is kept. Streams take turns, batch by batch; but where the writer of a stream is gone and
another stream of its rank follows, the older one comes to its end first: a resumed run is seen behind what it resumes.
What becomes of the events, and how far their receiver has got, is not known here.
"""

import heapq
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count
from typing import Final, Literal, NamedTuple, TypeAlias

from evsys_bus.codec import decode
from evsys_bus.delivery.heard import Heard
from evsys_bus.delivery.openings import Contexts, Opening, begin_at_what_comes, open_at
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Envelope, StepEnd, TrainStart
from evsys_bus.journal import Clock, Cursor, Disk, JournalReader, layout
from evsys_bus.journal.frame import Run

PATIENCE: Final = 60
"""How often a segment that cannot be read is tried again, with a rest in between, before it is passed over."""
REST_SECONDS: Final = 1.0
"""How long a stream that nobody writes is left alone once it was read to its end."""
MOST_REST_SECONDS: Final = 60.0
"""The same, where newer streams of its rank are there: no writer continues it. Each rest is four times as long."""

_FILLS_PER_LISTING: Final = 64
"""At least: where there are more streams than that, as many as there are streams."""
_LOOKS_AT_CLOCK: Final = 4
Filled: TypeAlias = Literal["full", "slice", "dry"]


class Broken(NamedTuple):
    """A record that is whole and no envelope."""

    stream: str
    sequence: int
    payload: bytes
    why: str


class Batch:
    """Events on their way to a receiver, in the order of their streams."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.sizes: list[int] = []
        """Encoded, in bytes."""
        self.sequences: list[int] = []
        """As the journal numbers them."""
        self.parts: list[tuple[str, int]] = []
        """From which streams they are: name and number, from the front."""
        self.bytes = 0
        self.ends = False
        """Nothing may be added: it ends with a start or an end, or before a broken record."""
        self.broken: Broken | None = None
        """What follows the last event."""
        self.starts: list[Envelope] = []
        """To be introduced before the first event: what was open there, where the journal does not go back further."""

    def drop(self, count: int) -> list[tuple[str, int, int]]:
        """Take these many off the front; from which streams they were: name, number and last sequence."""
        dropped: list[tuple[str, int, int]] = []
        place = 0
        while place < count:
            stream, number = self.parts.pop(0)
            taken = min(number, count - place)
            if taken < number:
                self.parts.insert(0, (stream, number - taken))
            place += taken
            dropped.append((stream, taken, self.sequences[place - 1]))
        self.bytes -= sum(self.sizes[:count])
        del self.envelopes[:count], self.sizes[:count], self.sequences[:count]
        self.ends = self.ends and bool(self.envelopes or self.broken)
        return dropped


class Feed:
    """The streams of one journal, read from a cursor on.

    Args:
        directory: The journal.
        cursor: Where to begin; a stream that it does not name is read from its beginning.
        ranks: Whose streams; None for all.
    """

    def __init__(
        self,
        directory: str,
        cursor: Cursor,
        *,
        ranks: tuple[int, ...] | None,
        disk: Disk,
        clock: Clock,
        faults: FaultLog,
    ) -> None:
        self._reader: Final = JournalReader(directory, disk)
        self._cursor: Final = cursor
        self._ranks: Final = ranks
        self._disk: Final = disk
        self._clock: Final = clock
        self._faults: Final = faults
        self._sources: dict[str, _Source] = {}
        self._by_rank: dict[int, _Rank] = {}
        self._turns: deque[_Source] = deque()
        """Those that are read by turns, the next one first."""
        self._resting: list[tuple[float, int, _Source]] = []
        """Until when, and those that are left alone until then; a heap."""
        self._number: Final = count()
        self._fills = 0
        self._heard: Final = Heard(self._reader, clock, faults)

    def introduction(self, steps: Mapping[str, int] | None) -> list[Envelope]:
        """The start events of what is open at the cursor, the newest of each kind and name, in order.

        Args:
            steps: The largest that was delivered, by run, of the trainings that are open; ``state.step`` is put behind
                it. None where that is not known: then it is the first step that comes.
        """
        found: dict[Opening, Envelope] = {}
        self._listen()
        self._list_streams()
        for source in self._sources.values():
            sequence = self._cursor.place(source.stream).sequence
            if not sequence:
                continue
            folder = f"{self._reader.directory}/{source.stream}"
            for key, envelope in open_at(self._disk, folder, sequence, source.contexts).items():
                found.pop(key, None)
                found[key] = envelope
        starts = list(found.values())
        if steps is not None:
            return [each for each in starts if _put_behind(each, steps)]
        by_stream: dict[str, list[Envelope]] = {}
        for each in starts:
            by_stream.setdefault(each.stream, []).append(each)
        for stream, own in by_stream.items():
            begin_at_what_comes(own, self._reader, stream, self._cursor.place(stream).sequence)
        return starts

    def fill(
        self,
        batch: Batch,
        max_events: int,
        max_bytes: int,
        *,
        slice_seconds: float | None = None,
        thorough: bool = False,
    ) -> Filled:
        """Add what is there, up to the bounds.

        Args:
            batch: May hold events already.
            max_events: All together.
            max_bytes: All together, unless it is one event.
            slice_seconds: How long to work on it.
            thorough: Look into every stream, also one that was at its end a moment ago.

        Returns:
            Whether the batch is complete, or the time is up, or there is nothing more to add for now.
        """
        if batch.ends or len(batch.envelopes) >= max_events:
            return "full"
        self._listen()
        if self._fills % max(_FILLS_PER_LISTING, len(self._sources)) == 0:
            self._list_streams()
        self._fills += 1
        self._wake(self._clock.monotonic())
        until = None if slice_seconds is None else time.monotonic() + slice_seconds
        filled = self._take_turns(batch, max_events, max_bytes, until)
        if filled == "dry" and thorough:
            self._list_streams()
            self._wake(math.inf)
            filled = self._take_turns(batch, max_events, max_bytes, until)
        if filled == "dry":
            self._fills = 0
        return filled

    def _take_turns(self, batch: Batch, max_events: int, max_bytes: int, until: float | None) -> Filled:
        """Draw from one stream after another, until one has filled the batch or all are at their ends."""
        again = True
        while again:
            again = False
            left = len(self._turns)
            while left:
                left -= 1
                source = self._turns[0]
                if not source.rank.is_due(source):
                    self._turns.rotate(-1)
                    continue
                again = again or not source.was_at_end  # now others may have their turn that waited for it
                filled = self._draw(source, batch, max_events, max_bytes, until)
                if source.rests_until > self._clock.monotonic():
                    heapq.heappush(self._resting, (source.rests_until, next(self._number), self._turns.popleft()))
                else:
                    self._turns.rotate(-1)
                released = source.rank.release(source)
                self._turns.extendleft(reversed(released))
                left += len(released)
                if filled != "dry":
                    return filled
        return "dry"

    def _wake(self, now: float) -> None:
        """Have those take turns again that have rested until now."""
        while self._resting and self._resting[0][0] <= now:
            self._turns.append(heapq.heappop(self._resting)[2])

    def _listen(self) -> None:
        """Let the runs that are open know what couriers have learnt of them."""
        for learnt in self._heard.listen():
            for source in self._sources.values():
                source.contexts.learn(learnt)

    def _list_streams(self) -> None:
        """Notice those that are new."""
        try:
            for name in self._reader.streams():
                number = layout.rank_of(name)
                if name in self._sources or (self._ranks is not None and number not in self._ranks):
                    continue
                rank = self._by_rank.setdefault(number, _Rank())
                contexts = Contexts(self._heard.extras)
                source = _Source(self._reader, name, self._cursor.place(name).sequence, rank, contexts)
                self._sources[name] = source
                rank.add(source)
                self._warn_of_removed(name)
        except OSError as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)
        for rank in self._by_rank.values():
            self._turns.extend(rank.release())

    def _warn_of_removed(self, stream: str) -> None:
        """Say how many events of a stream this follower does not get, where it begins behind removed ones."""
        try:
            names = layout.segments(self._disk, f"{self._reader.directory}/{stream}")
        except OSError:
            return  # it cannot be listed now; the stream is read when it can
        events = layout.removed_in_front(names) - self._cursor.place(stream).sequence
        if events > 0:
            why = "their segments were removed before it had them; starts of what is open are given again"
            log().warning("courier.begins_behind_removed", stream=stream, events=events, why=why)

    def _draw(self, source: "_Source", batch: Batch, max_events: int, max_bytes: int, until: float | None) -> Filled:
        """Add events of one stream."""
        envelopes, sizes, sequences = batch.envelopes, batch.sizes, batch.sequences
        contexts, of_run = source.contexts, source.contexts.of_run
        before = len(envelopes)
        room, total = max_events - before, batch.bytes
        filled: Filled = "dry"
        try:
            for record in source.records():
                sequence, payload = record
                size = len(payload)
                total += size
                if (total > max_bytes or source.starts) and envelopes:  # starts go before the first event of a batch
                    source.put_back(record)
                    total -= size
                    filled = "full"
                    break
                try:
                    envelope = decode(payload, of_run)
                except CodecError as error:
                    batch.broken = Broken(source.stream, sequence, payload, str(error.why or error.what))
                    total -= size
                    batch.ends, filled = True, "full"
                    break
                envelopes.append(envelope)
                sizes.append(size)
                sequences.append(sequence)
                room -= 1
                if type(envelope.event) is not StepEnd and contexts.heed(envelope):  # nearly all are steps
                    batch.ends, filled = True, "full"
                    break
                if not room:
                    filled = "full"
                    break
                if until is not None and not room % _LOOKS_AT_CLOCK and time.monotonic() >= until:
                    filled = "slice"
                    break
            else:
                source.at_end(self._clock.monotonic(), found=len(envelopes) > before)
        except (OSError, JournalVersionError) as error:
            self._faults.warn("courier.unreadable", source.stream, error=error, stream=source.stream)
            source.rest(self._clock.monotonic(), for_good=isinstance(error, JournalVersionError))
        if len(envelopes) > before:
            batch.parts.append((source.stream, len(envelopes) - before))
            if source.starts:
                starts = source.take_starts()
                begin_at_what_comes(starts, self._reader, source.stream, sequences[before] - 1)
                batch.starts += starts
        batch.bytes = total
        return filled


def _put_behind(envelope: Envelope, steps: Mapping[str, int]) -> bool:
    """Have a training begin behind what was delivered of it; False if it has ended, in a segment before."""
    if not isinstance(envelope.event, TrainStart):
        return True
    step = steps.get(envelope.run or "")
    if step is None:
        return False
    envelope.event.state.step = step + 1
    return True


class _Rank:
    """The streams of one rank: newer ones wait until those before them that nobody writes were read to their ends."""

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        """In the order of their streams."""
        self._next = 0
        """The place of the first one that may have to wait."""
        self._blocking: set[_Source] = set()
        """Those before that place that newer ones wait for. Hardly ever more than one."""

    def add(self, source: "_Source") -> None:
        """One more stream; nearly always the newest."""
        insort(self._sources, source, key=lambda each: each.order)
        if not self.is_newest(source):
            self._next = 0

    def is_newest(self, source: "_Source") -> bool:
        """Whether no stream was begun after it. Only the newest one is continued by another writer."""
        return self._sources[-1] is source

    def is_due(self, source: "_Source") -> bool:
        """Whether it need not wait."""
        return not any(each.order < source.order for each in self._blocking)

    def release(self, drawn: "_Source | None" = None) -> "list[_Source]":
        """Those that need not wait any more, each once, oldest first.

        Args:
            drawn: The one that was read just now, if one was.
        """
        if drawn is not None:
            (self._blocking.add if drawn.blocks() else self._blocking.discard)(drawn)
        released: list[_Source] = []
        while self._next < len(self._sources) and not self._blocking:
            source = self._sources[self._next]
            self._next += 1
            if source.blocks():
                self._blocking.add(source)
            if not source.released:
                source.released = True
                released.append(source)
        return released


class _Source:
    """One stream, as far as it was read."""

    def __init__(self, reader: JournalReader, stream: str, after: int, rank: _Rank, contexts: Contexts) -> None:
        self.stream: Final = stream
        self.order: Final = layout.order_of(stream)
        self.contexts: Final = contexts
        self.rank: Final = rank
        self._reader: Final = reader
        self._tail: Final = reader.tail(stream, after, patience=PATIENCE)
        self.starts: Final[dict[int, Envelope]] = {}
        """By sequence, those that the segment repeats and that were not delivered: what is open at the next event."""
        self._records: Iterator[tuple[int, bytes]] | None = None
        self._rest_seconds = REST_SECONDS
        self.rests_until = 0.0
        self.was_at_end = False
        self._is_over = False
        """Whether it was read to its end when nobody wrote it any more."""
        self._refusals = 0
        """How often in a row it could not be read."""
        self.released = False
        """Whether it takes turns, or rests."""
        self.live = reader.is_live(stream)

    def blocks(self) -> bool:
        """Whether newer streams of its rank wait for it: nobody writes it, and it was not read to its end."""
        return not (self.was_at_end or self.live)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """What was not taken yet: sequence and payload."""
        if self._records is None:
            # Asked before it is read: of a writer that is gone by then there is nothing to come behind the end.
            self.live = self._reader.is_live(self.stream)
            self._records = chain.from_iterable(map(self._numbered, self._tail.runs()))
        return self._records

    def _numbered(self, run: Run) -> Iterable[tuple[int, bytes]]:
        """The events of a run; starts that the segment repeats are none, and kept for the event that follows."""
        if not run.carried:
            return enumerate(run.payloads, run.first)
        for sequence, payload in enumerate(run.payloads, run.first):
            try:
                envelope = decode(payload, self.contexts.of_run)
            except CodecError as error:
                log().warning("courier.start_unreadable", stream=self.stream, seq=sequence, exc_info=error)
                continue
            self.contexts.heed(envelope)
            self.starts[sequence] = envelope
        return ()

    def take_starts(self) -> list[Envelope]:
        """The starts that were kept; they go with the next event."""
        starts = [*self.starts.values()]
        self.starts.clear()
        return starts

    def put_back(self, record: tuple[int, bytes]) -> None:
        """Have this one come again, first."""
        self._records = chain((record,), self.records())

    def at_end(self, now: float, *, found: bool) -> None:
        """There is no more for now."""
        self._records = None
        self.was_at_end = True
        self._is_over = not self.live
        self._refusals = 0
        if found:
            self._rest_seconds = REST_SECONDS
        elif not self.live:
            self.rests_until = now + self._rest_seconds
            if not self.rank.is_newest(self):
                self._rest_seconds = min(4 * self._rest_seconds, MOST_REST_SECONDS)

    def rest(self, now: float, *, for_good: bool) -> None:
        """It cannot be read now. Newer streams wait while there is hope: what they hold comes behind what it holds."""
        self._records = None
        self._refusals += 1
        self.was_at_end = for_good or self._is_over or self._refusals >= PATIENCE
        self.rests_until = now + REST_SECONDS
