"""`Feed`: reads and decodes the events after a cursor, from every stream of a journal.

The order within a stream is preserved. Streams are read round-robin, batch by batch; but if the writer of a stream has
ended and the same rank has a newer stream, the older one is read to its end first, so that a resumed run comes after
the run that it resumes. Delivery and acknowledgement are not handled here.
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
"""How often reading a segment is retried, with a pause in between, before the segment is skipped."""
REST_SECONDS: Final = 1.0
"""How long a stream without a writer is not polled after it was read to its end."""
MOST_REST_SECONDS: Final = 60.0
"""The longest such pause for a stream that no writer will continue, since its rank has newer ones; each pause is four
times as long as the last."""

_FILLS_PER_LISTING: Final = 64
"""Reads between two listings of the streams; with more streams than this, the number of streams."""
_LOOKS_AT_CLOCK: Final = 4
Filled: TypeAlias = Literal["full", "slice", "dry"]


class Broken(NamedTuple):
    """A record with a valid checksum that is not a valid envelope."""

    stream: str
    sequence: int
    payload: bytes
    why: str


class Batch:
    """Events to deliver, in the order of their streams."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.sizes: list[int] = []
        """Encoded size of each event in bytes."""
        self.sequences: list[int] = []
        """Sequence of each event in its stream."""
        self.parts: list[tuple[str, int]] = []
        """Stream and number of events of each consecutive part."""
        self.bytes = 0
        """Encoded size of all events."""
        self.ends = False
        """Whether nothing may be added: the last event is a start or an end, or a corrupt record follows."""
        self.broken: Broken | None = None
        """The corrupt record after the last event."""
        self.starts: list[Envelope] = []
        """Start events to repeat before the first event: of runs open there whose own starts were removed."""

    def drop(self, count: int) -> list[tuple[str, int, int]]:
        """Remove ``count`` events from the front; return stream, number and last sequence of each part."""
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
    """Reads the streams of one journal, starting at a cursor.

    Args:
        directory: The journal.
        cursor: Where to start; a stream that is not in it is read from its beginning.
        ranks: The ranks whose streams are read; None for all.
        disk: The file system.
        clock: The clocks.
        faults: Where read errors are logged.
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
        """The streams that are polled, next one first."""
        self._resting: list[tuple[float, int, _Source]] = []
        """The streams that are not polled until a time: a heap of (time, tie breaker, stream)."""
        self._number: Final = count()
        self._fills = 0
        self._heard: Final = Heard(self._reader, clock, faults)

    def introduction(self, steps: Mapping[str, int] | None) -> list[Envelope]:
        """The start events of everything that is open at the cursor, the newest of each kind and name, in order.

        Args:
            steps: The largest delivered step of each open training, by run; ``state.step`` is set to the step after
                it. None if not known: ``state.step`` is then the first step that will be delivered.
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
        """Add available events to the batch, up to its limits.

        Args:
            batch: The batch; may already contain events.
            max_events: Maximum number of events in the batch.
            max_bytes: Maximum size of the batch; a single event may be larger.
            slice_seconds: How long to work on it.
            thorough: Read every stream, including those that were at their end a moment ago.

        Returns:
            ``full`` if the batch is complete, ``slice`` if the time is up, ``dry`` if no event is available now.
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
        """Read one stream after another until the batch is full or all streams are at their end."""
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
                again = again or not source.was_at_end  # streams that waited for this one may be readable now
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
        """Poll the streams again whose pause is over."""
        while self._resting and self._resting[0][0] <= now:
            self._turns.append(heapq.heappop(self._resting)[2])

    def _listen(self) -> None:
        """Add new run annotations to the contexts of open runs."""
        for learnt in self._heard.listen():
            for source in self._sources.values():
                source.contexts.learn(learnt)

    def _list_streams(self) -> None:
        """Add the streams that are new."""
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
        """Log how many events of a stream were removed before this adapter could get them."""
        try:
            names = layout.segments(self._disk, f"{self._reader.directory}/{stream}")
        except OSError:
            return  # cannot be listed now; the stream is read once it can be
        events = layout.removed_in_front(names) - self._cursor.place(stream).sequence
        if events > 0:
            why = "their segments were removed before delivery; start events of open runs are repeated"
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
    """Set the first step of a training to the one after ``steps``; False if it has ended in an earlier segment."""
    if not isinstance(envelope.event, TrainStart):
        return True
    step = steps.get(envelope.run or "")
    if step is None:
        return False
    envelope.event.state.step = step + 1
    return True


class _Rank:
    """The streams of one rank: newer ones wait until older ones without a writer were read to their end."""

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        """Sorted by the order of the streams."""
        self._next = 0
        """Index of the first stream that may have to wait."""
        self._blocking: set[_Source] = set()
        """Streams before that index that newer ones wait for; rarely more than one."""

    def add(self, source: "_Source") -> None:
        """Add a stream, nearly always the newest."""
        insort(self._sources, source, key=lambda each: each.order)
        if not self.is_newest(source):
            self._next = 0

    def is_newest(self, source: "_Source") -> bool:
        """Whether no newer stream exists. Only the newest one can be continued by another writer."""
        return self._sources[-1] is source

    def is_due(self, source: "_Source") -> bool:
        """Whether the stream can be read now."""
        return not any(each.order < source.order for each in self._blocking)

    def release(self, drawn: "_Source | None" = None) -> "list[_Source]":
        """The streams that no longer have to wait, each returned once, oldest first.

        Args:
            drawn: The stream that was just read, if any.
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
    """One stream and its read position."""

    def __init__(self, reader: JournalReader, stream: str, after: int, rank: _Rank, contexts: Contexts) -> None:
        self.stream: Final = stream
        self.order: Final = layout.order_of(stream)
        self.contexts: Final = contexts
        self.rank: Final = rank
        self._reader: Final = reader
        self._tail: Final = reader.tail(stream, after, patience=PATIENCE)
        self.starts: Final[dict[int, Envelope]] = {}
        """Start events that the segment repeats, by sequence, for the runs that are open at the next event."""
        self._records: Iterator[tuple[int, bytes]] | None = None
        self._rest_seconds = REST_SECONDS
        self.rests_until = 0.0
        self.was_at_end = False
        self._is_over = False
        """Whether it was read to its end after its writer had ended."""
        self._refusals = 0
        """How often in a row it could not be read."""
        self.released = False
        """Whether `_Rank.release` has returned it, so that it is polled or pausing."""
        self.live = reader.is_live(stream)

    def blocks(self) -> bool:
        """Whether newer streams of its rank wait for it: it has no writer and was not read to its end."""
        return not (self.was_at_end or self.live)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """The records that were not read yet: sequence and payload."""
        if self._records is None:
            # Checked before reading: if the writer had ended by then, nothing follows the end that is found.
            self.live = self._reader.is_live(self.stream)
            self._records = chain.from_iterable(map(self._numbered, self._tail.runs()))
        return self._records

    def _numbered(self, run: Run) -> Iterable[tuple[int, bytes]]:
        """The numbered events of a frame run; repeated starts are stored in `starts` instead."""
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
        """Return and clear the stored start events; they belong to the next event."""
        starts = [*self.starts.values()]
        self.starts.clear()
        return starts

    def put_back(self, record: tuple[int, bytes]) -> None:
        """Return a record, so that it is the next one read."""
        self._records = chain((record,), self.records())

    def at_end(self, now: float, *, found: bool) -> None:
        """Record that the end was reached."""
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
        """Pause after a read error. Newer streams wait as long as the error may pass, since their events come later."""
        self._records = None
        self._refusals += 1
        self.was_at_end = for_good or self._is_over or self._refusals >= PATIENCE
        self.rests_until = now + REST_SECONDS
