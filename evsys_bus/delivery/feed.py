"""`Feed`: the events behind a cursor, decoded, from every stream of a journal.

The order of each stream is kept. Streams take turns, batch by batch; but where the writer of a stream is gone and
another stream of its rank follows, the older one comes to its end first: a resumed run is seen behind what it resumes.
What becomes of the events, and how far their receiver has got, is not known here.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final, Literal, NamedTuple, TypeAlias

from evsys_bus.codec import decode
from evsys_bus.delivery.heard import Heard
from evsys_bus.delivery.openings import Contexts, Opening, open_at
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Envelope, StepEnd, TrainStart
from evsys_bus.journal import Clock, Cursor, Disk, JournalReader, layout

PATIENCE: Final = 60
"""How often a segment that cannot be read is tried again, with a rest in between, before it is passed over."""
REST_SECONDS: Final = 1.0
"""How long a stream that nobody writes is left alone once it was read to its end."""

_FILLS_PER_LISTING: Final = 64
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
        self._turns: list[_Source] = []
        self._fills = 0
        self._heard: Final = Heard(self._reader, clock, faults)

    def introduction(self, steps: Mapping[str, int] | None) -> list[Envelope]:
        """The start events of what is open at the cursor, the newest of each kind and name, in order.

        Args:
            steps: The largest that was delivered, by run, of the trainings that are open; ``state.step`` is put behind
                it. None where that is not known: then it stays as it was.
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
        return starts if steps is None else [each for each in starts if _put_behind(each, steps)]

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
        if self._fills % _FILLS_PER_LISTING == 0 or thorough:
            self._list_streams()
        self._fills += 1
        until = None if slice_seconds is None else time.monotonic() + slice_seconds
        again = True
        while again:
            again = False
            for source in tuple(self._turns):
                if not source.is_due(self._clock.monotonic(), thorough=thorough):
                    continue
                again = again or not source.was_at_end  # now others may have their turn that waited for it
                filled = self._draw(source, batch, max_events, max_bytes, until)
                if filled != "dry":
                    self._turns.remove(source)
                    self._turns.append(source)
                    return filled
        self._fills = 0
        return "dry"

    def _listen(self) -> None:
        """Let the runs that are open know what couriers have learnt of them."""
        for learnt in self._heard.listen():
            for source in self._sources.values():
                source.contexts.learn(learnt)

    def _list_streams(self) -> None:
        """Notice those that are new."""
        try:
            for name in self._reader.streams():
                rank = layout.rank_of(name)
                if name in self._sources or (self._ranks is not None and rank not in self._ranks):
                    continue
                older = [each for each in self._sources.values() if layout.rank_of(each.stream) == rank]
                contexts = Contexts(self._heard.extras)
                source = _Source(self._reader, name, self._cursor.place(name).sequence, older, contexts)
                self._sources[name] = source
                self._turns.append(source)
        except OSError as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)

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
                if total > max_bytes and envelopes:
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
            source.rest(self._clock.monotonic())
        if len(envelopes) > before:
            batch.parts.append((source.stream, len(envelopes) - before))
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


class _Source:
    """One stream, as far as it was read."""

    def __init__(
        self, reader: JournalReader, stream: str, after: int, older: "list[_Source]", contexts: Contexts
    ) -> None:
        self.stream: Final = stream
        self.contexts: Final = contexts
        self._reader: Final = reader
        self._tail: Final = reader.tail(stream, after, patience=PATIENCE)
        self._older: Final = older
        """Streams of the same rank that began before."""
        self._records: Iterator[tuple[int, bytes]] | None = None
        self._rests_until = 0.0
        self.was_at_end = False
        self.live = reader.is_live(stream)

    def is_due(self, now: float, *, thorough: bool) -> bool:
        """Whether it is this stream's turn to be looked into."""
        if now < self._rests_until and not thorough:
            return False
        return all(each.was_at_end or each.live for each in self._older)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """What was not taken yet: sequence and payload."""
        if self._records is None:
            # Asked before it is read: of a writer that is gone by then there is nothing to come behind the end.
            self.live = self._reader.is_live(self.stream)
            self._records = chain.from_iterable(enumerate(payloads, first) for first, payloads in self._tail.runs())
        return self._records

    def put_back(self, record: tuple[int, bytes]) -> None:
        """Have this one come again, first."""
        self._records = chain((record,), self.records())

    def at_end(self, now: float, *, found: bool) -> None:
        """There is no more for now."""
        self._records = None
        self.was_at_end = True
        if not found and not self.live:
            self._rests_until = now + REST_SECONDS

    def rest(self, now: float) -> None:
        """It cannot be read now, and others need not wait for it."""
        self._records = None
        self.was_at_end = True
        self._rests_until = now + REST_SECONDS
