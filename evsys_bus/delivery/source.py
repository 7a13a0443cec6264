"""`EventSource`: reads the events after a cursor, from every stream of a journal, and decodes them if requested.

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
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from evsys_bus.codec import decode
from evsys_bus.delivery.open_rows import EndedRows
from evsys_bus.delivery.open_runs import OpenRunKey, RunAnnotations, StreamContexts, open_runs_at, set_first_steps
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Envelope, RunStart, StepEnd, TrainStart
from evsys_bus.journal import Clock, Cursor, Disk, JournalReader, layout
from evsys_bus.journal.frame import FrameRun
from evsys_bus.sink import RawRecord, RecordedEnvelope

MAX_READ_ATTEMPTS: Final = 60
"""How often reading a segment is retried, with a pause in between, before the segment is skipped."""
IDLE_SECONDS: Final = 1.0
"""How long a stream without a writer is not polled after it was read to its end."""
MAX_IDLE_SECONDS: Final = 60.0
"""The longest such pause for a stream that no writer will continue, since its rank has newer ones; each pause is four
times as long as the last."""

MAX_REST_SECONDS: Final = 0.5
"""How long a quiet stream with a writer is not polled, at most; the pause grows with the time without new events."""
MAX_LISTING_SECONDS: Final = 1.0
"""The time between two listings of the streams, at most. It grows in the same way."""
MAX_CHECK_SECONDS: Final = 10.0
"""The time between two checks of a quiet stream for its next segment and its writer, at most; grows likewise."""

_EVENTS_PER_CLOCK_CHECK: Final = 4
ReadResult: TypeAlias = Literal["full", "slice", "dry"]


class CorruptRecord(NamedTuple):
    """A record with a valid checksum that is not a valid envelope."""

    stream: str
    sequence: int
    payload: bytes
    why: str


class Batch:
    """Events to deliver, in the order of their streams."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        """Each is an `Envelope`, a `RecordedEnvelope` if the source is with payloads, or a `RawRecord` if it is raw."""
        self.sizes: list[int] = []
        """Encoded size of each event in bytes."""
        self.sequences: list[int] = []
        """Sequence of each event in its stream."""
        self.parts: list[tuple[str, int]] = []
        """Stream and number of events of each consecutive part."""
        self.bytes = 0
        """Encoded size of all events."""
        self.is_closed = False
        """Whether nothing may be added: the last event is a start or an end, or a corrupt record follows."""
        self.corrupt_record: CorruptRecord | None = None
        """The corrupt record after the last event."""
        self.ended: list[EndedRows] = []
        """After the last event, the rows in parts of streams whose writer has ended, and of runs and trainings that
        start again in the same stream."""
        self.starts: list[Any] = []
        """Start events to repeat before the first event: of runs open there whose own starts were removed. Likewise."""

    def is_empty(self) -> bool:
        """Whether there is nothing to deliver."""
        return not (self.items or self.ended)

    def end_part(self, source: "_StreamSource", first: int) -> None:
        """Take note of the stream of the events from index ``first`` on, and of the starts that come before them."""
        if len(self.items) > first:
            self.parts.append((source.stream, len(self.items) - first))
            if source.starts:
                self.starts += source.pop_starts(self.sequences[first] - 1)

    def end(self, source: "_StreamSource") -> ReadResult:
        """Take note that a stream was read to its end, which matters if its writer has ended in the middle of a row."""
        if not (source.contexts.has_parts and source.is_finished):
            return "dry"
        source.check_writer()  # reading may have taken long, and another process may go on in the stream since
        if source.is_live or source.may_have_more():
            source.is_finished = source.is_exhausted = False
            return "dry"
        source.contexts.has_parts = False
        self.ended.append(EndedRows(source.stream))
        self.is_closed = True
        return "full"

    def drop(self, count: int) -> list[tuple[str, int, int]]:
        """Remove ``count`` events from the front; return stream, number and last sequence of each part."""
        dropped: list[tuple[str, int, int]] = []
        offset = 0
        while offset < count:
            stream, number = self.parts.pop(0)
            removed = min(number, count - offset)
            if removed < number:
                self.parts.insert(0, (stream, number - removed))
            offset += removed
            dropped.append((stream, removed, self.sequences[offset - 1]))
        self.bytes -= sum(self.sizes[:count])
        del self.items[:count], self.sizes[:count], self.sequences[:count]
        self.is_closed = self.is_closed and bool(self.items or self.corrupt_record or self.ended)
        return dropped


class EventSource:
    """Reads the streams of one journal, starting at a cursor.

    Args:
        directory: The journal.
        cursor: Where to start; a stream that is not in it is read from its beginning.
        ranks: The ranks whose streams are read; None for all.
        raw: Whether the batches are of `RawRecord`, and nothing is decoded.
        with_payloads: Whether they are of `RecordedEnvelope`.
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
        raw: bool = False,
        with_payloads: bool = False,
        disk: Disk,
        clock: Clock,
        faults: FaultLog,
    ) -> None:
        self._reader: Final = JournalReader(directory, disk)
        self._cursor: Final = cursor
        self._ranks: Final = ranks
        self._raw: Final = raw
        self._with_payloads: Final = with_payloads
        self._disk: Final = disk
        self._clock: Final = clock
        self._faults: Final = faults
        self._sources: dict[str, _StreamSource] = {}
        self._by_rank: dict[tuple[str, int], _RankStreams] = {}
        """By family and rank: a sampler writes at the same time as its loop, so neither waits for the other."""
        self._active: deque[_StreamSource] = deque()
        """The streams that are polled, next one first."""
        self._idle: list[tuple[float, int, _StreamSource]] = []
        """The streams that are not polled until a time: a heap of (time, tie breaker, stream)."""
        self._tie_breaker: Final = count()
        self._listed_at = self._listing_due = -math.inf
        self._last_found = clock.monotonic()
        self._annotations: Final = RunAnnotations(self._reader, clock, faults)

    def close(self) -> None:
        """Close the open segments."""
        for source in self._sources.values():
            source.close()

    def open_run_starts(self, steps: Mapping[str, int] | None) -> list[Envelope]:
        """The start events of everything that is open at the cursor, the newest of each kind and name, in order.

        None of a raw source: only decoding shows what is open.

        Args:
            steps: The largest delivered step of each open training, by run; ``state.step`` is set to the step after
                it. None if not known: ``state.step`` is then the first step that will be delivered.
        """
        found: dict[OpenRunKey, Envelope] = {}
        if self._raw:
            return []
        self._apply_annotations()
        self._discover_streams()
        for source in self._sources.values():
            sequence = self._cursor.position(source.stream).sequence
            if not sequence:
                continue
            folder = f"{self._reader.directory}/{source.stream}"
            for key, envelope in open_runs_at(self._disk, folder, sequence, source.contexts).items():
                found.pop(key, None)
                found[key] = envelope
        starts = list(found.values())
        if steps is not None:
            return [each for each in starts if _advance_training(each, steps)]
        by_stream: dict[str, list[Envelope]] = {}
        for each in starts:
            by_stream.setdefault(each.stream, []).append(each)
        for stream, own in by_stream.items():
            set_first_steps(own, self._reader, stream, self._cursor.position(stream).sequence)
        return starts

    def read_batch(
        self,
        batch: Batch,
        max_events: int,
        max_bytes: int,
        *,
        slice_seconds: float | None = None,
        include_idle: bool = False,
    ) -> ReadResult:
        """Add available events to the batch, up to its limits.

        Args:
            batch: The batch; may already contain events.
            max_events: Maximum number of events in the batch.
            max_bytes: Maximum size of the batch; a single event may be larger.
            slice_seconds: How long to work on it.
            include_idle: Read every stream, including those that were at their end a moment ago.

        Returns:
            ``full`` if the batch is complete, ``slice`` if the time is up, ``dry`` if no event is available now.
        """
        if batch.is_closed or len(batch.items) >= max_events:
            return "full"
        if not self._raw:
            self._apply_annotations()
        now = self._clock.monotonic()
        if now >= self._listing_due:
            self._discover_streams()
        self._wake_idle(now)
        deadline = None if slice_seconds is None else time.monotonic() + slice_seconds
        read_result = self._read_round_robin(batch, max_events, max_bytes, deadline, thorough=False)
        if read_result == "dry" and include_idle:
            self._discover_streams()
            self._wake_idle(math.inf)
            read_result = self._read_round_robin(batch, max_events, max_bytes, deadline, thorough=True)
        if read_result != "dry":
            self._last_found = now
        else:
            self._listing_due = self._listed_at + min(MAX_LISTING_SECONDS, _pause_seconds(now - self._last_found))
        return read_result

    def _read_round_robin(
        self, batch: Batch, max_events: int, max_bytes: int, deadline: float | None, *, thorough: bool
    ) -> ReadResult:
        """Read one stream after another until the batch is full or all streams are at their end.

        With ``thorough`` also check those for a next segment and a writer that were checked a moment ago.
        """
        again = True
        while again:
            again = False
            remaining = len(self._active)
            while remaining:
                remaining -= 1
                source = self._active[0]
                if not source.rank.is_ready(source):
                    self._active.rotate(-1)
                    continue
                again = again or not source.is_exhausted  # streams that waited for this one may be readable now
                now = self._clock.monotonic()
                source.is_check_due = thorough or source.check_due <= now
                read_result = self._read_stream(source, batch, max_events, max_bytes, deadline)
                if source.idle_until > now:
                    heapq.heappush(self._idle, (source.idle_until, next(self._tie_breaker), self._active.popleft()))
                else:
                    self._active.rotate(-1)
                released = source.rank.release(source)
                self._active.extendleft(reversed(released))
                remaining += len(released)
                if read_result != "dry":
                    return read_result
        return "dry"

    def _wake_idle(self, now: float) -> None:
        """Poll the streams again whose pause is over, except those that can be seen to have nothing new."""
        idle = self._idle
        while idle and idle[0][0] <= now:
            source = idle[0][2]
            if now < source.check_due and not source.may_have_more():
                source.set_exhausted(now, found=False)
                heapq.heapreplace(idle, (source.idle_until, next(self._tie_breaker), source))
            else:
                self._active.append(heapq.heappop(idle)[2])

    def _apply_annotations(self) -> None:
        """Add new run annotations to the contexts of open runs."""
        for annotation in self._annotations.poll():
            for source in self._sources.values():
                source.contexts.annotate(annotation)

    def _discover_streams(self) -> None:
        """Add the streams that are new."""
        self._listed_at = self._clock.monotonic()
        self._listing_due = self._listed_at + MAX_LISTING_SECONDS
        before = len(self._sources)
        try:
            for name in self._reader.streams(*layout.DELIVERED_FAMILIES):
                if name in self._sources:
                    continue
                rank_number = layout.rank_of(name)
                if self._ranks is not None and rank_number not in self._ranks:
                    continue
                rank = self._by_rank.setdefault((name[0], rank_number), _RankStreams())
                contexts = StreamContexts(self._annotations.extras, has_parts=name in self._cursor.rows)
                source = _StreamSource(
                    self._reader,
                    name,
                    self._cursor.position(name).sequence,
                    rank,
                    contexts,
                    raw=self._raw,
                )
                self._sources[name] = source
                if rank.add(source):
                    self._wake_idle(math.inf)  # what the older stream still has comes first
                self._warn_of_removed(name)
        except OSError as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)
        if len(self._sources) > before:
            for rank in self._by_rank.values():
                self._active.extend(rank.release())

    def _warn_of_removed(self, stream: str) -> None:
        """Log how many events of a stream were removed before this adapter could get them."""
        try:
            names = layout.list_segments(self._disk, f"{self._reader.directory}/{stream}")
        except OSError:
            return  # cannot be listed now; the stream is read once it can be
        events = layout.count_removed_events(names) - self._cursor.position(stream).sequence
        if events > 0:
            why = "their segments were removed before delivery; start events of open runs are repeated"
            log().warning("courier.begins_behind_removed", stream=stream, events=events, why=why)

    def _read_stream(
        self, source: "_StreamSource", batch: Batch, max_events: int, max_bytes: int, deadline: float | None
    ) -> ReadResult:
        """Add events of one stream."""
        items, sizes, sequences = batch.items, batch.sizes, batch.sequences
        contexts, contexts_by_run = source.contexts, source.contexts.by_run
        raw, with_payloads, stream = self._raw, self._with_payloads, source.stream
        before = len(items)
        room, total_bytes = max_events - before, batch.bytes
        read_result: ReadResult = "dry"
        try:
            for record in source.records():
                sequence, payload = record
                size = len(payload)
                # Starts go before the first event of a batch.
                if (total_bytes + size > max_bytes or source.starts) and items:
                    source.push_back(record)
                    read_result = "full"
                    break
                try:
                    item: Any = RawRecord(stream, sequence, payload) if raw else decode(payload, contexts_by_run)
                except CodecError as error:
                    batch.corrupt_record = CorruptRecord(source.stream, sequence, payload, str(error.why or error.what))
                    batch.is_closed, read_result = True, "full"
                    break
                if contexts.has_parts and source.is_first_look(item):
                    source.push_back(record)
                    first_step = _first_step(item.event) if type(item.event) is TrainStart else None
                    # As in `OpenRows`: "" is the key of a run without one.
                    batch.ended.append(EndedRows(stream, item.run or "", first_step))
                    batch.is_closed, read_result = True, "full"
                    break
                total_bytes += size
                items.append(RecordedEnvelope.of(item, payload) if with_payloads else item)
                sizes.append(size)
                sequences.append(sequence)
                room -= 1
                if not raw and type(item.event) is not StepEnd and contexts.update(item):  # nearly all are steps
                    batch.is_closed, read_result = True, "full"
                    break
                if not room:
                    read_result = "full"
                    break
                if deadline is not None and not room % _EVENTS_PER_CLOCK_CHECK and time.monotonic() >= deadline:
                    read_result = "slice"
                    break
            else:
                source.set_exhausted(self._clock.monotonic(), found=len(items) > before)
                read_result = batch.end(source)
        except (OSError, JournalVersionError) as error:
            self._faults.warn("courier.unreadable", source.stream, error=error, stream=source.stream)
            source.back_off(self._clock.monotonic(), is_permanent=isinstance(error, JournalVersionError))
        batch.bytes = total_bytes
        batch.end_part(source, before)
        return read_result


def _pause_seconds(quiet_seconds: float) -> float:
    """How long to pause after so much time without new events, so that a pause adds little to it."""
    return quiet_seconds / 8


def _first_step(start: TrainStart) -> int | None:
    """The first step of a training; None if its state, of whatever class, has none."""
    step: Any = getattr(start.state, "step", None)
    return step if type(step) is int else None


def _advance_training(envelope: Envelope, steps: Mapping[str, int]) -> bool:
    """Set the first step of a training to the one after ``steps``; False if it has ended in an earlier segment."""
    if not isinstance(envelope.event, TrainStart):
        return True
    step = steps.get(envelope.run or "")
    if step is None:
        return False
    envelope.event.state.step = step + 1
    return True


class _RankStreams:
    """The streams of one rank: newer ones wait until older ones without a writer were read to their end."""

    def __init__(self) -> None:
        self._sources: list[_StreamSource] = []
        """Sorted by the order of the streams."""
        self._next = 0
        """Index of the first stream that may have to wait."""
        self._blocking: set[_StreamSource] = set()
        """Streams before that index that newer ones wait for; rarely more than one."""

    def add(self, source: "_StreamSource") -> bool:
        """Add a stream, nearly always the newest. Returns whether the stream before it must be read again first.

        What is known of that stream is from its last read, and its writer may have ended since.
        """
        insort(self._sources, source, key=lambda each: each.order)
        if not self.is_newest(source):
            self._next = 0
            return False
        previous = self._sources[-2] if len(self._sources) > 1 else None
        if previous is None or not previous.is_released:
            return False
        previous.is_exhausted = False
        previous.check_due = -math.inf
        previous.check_writer()
        self._next = min(self._next, len(self._sources) - 2)
        return True

    def is_newest(self, source: "_StreamSource") -> bool:
        """Whether no newer stream exists. Only the newest one can be continued by another writer."""
        return self._sources[-1] is source

    def is_ready(self, source: "_StreamSource") -> bool:
        """Whether the stream can be read now."""
        return not any(each.order < source.order for each in self._blocking)

    def release(self, just_read: "_StreamSource | None" = None) -> "list[_StreamSource]":
        """The streams that no longer have to wait, each returned once, oldest first.

        Args:
            just_read: The stream that was just read, if any.
        """
        if just_read is not None:
            (self._blocking.add if just_read.is_blocking() else self._blocking.discard)(just_read)
        released: list[_StreamSource] = []
        while self._next < len(self._sources) and not self._blocking:
            source = self._sources[self._next]
            self._next += 1
            if source.is_blocking():
                self._blocking.add(source)
            if not source.is_released:
                source.is_released = True
                released.append(source)
        return released


class _StreamSource:
    """One stream and its read position."""

    def __init__(
        self,
        reader: JournalReader,
        stream: str,
        after: int,
        rank: _RankStreams,
        contexts: StreamContexts,
        *,
        raw: bool,
    ) -> None:
        self.stream: Final = stream
        self.order: Final = layout.stream_sort_key(stream)
        self.contexts: Final = contexts
        self.rank: Final = rank
        self._raw: Final = raw
        self._reader: Final = reader
        self._tail: Final = reader.tail(stream, after, patience=MAX_READ_ATTEMPTS, keep_open=True)
        self.starts: Final[dict[int, Any]] = {}
        """Start events that the segment repeats, by sequence, for the runs that are open at the next event."""
        self._records: Iterator[tuple[int, bytes]] | None = None
        self._idle_seconds = IDLE_SECONDS
        self.idle_until = 0.0
        self.is_check_due = True
        """Whether this read also looks for the next segment and the writer."""
        self.check_due = -math.inf
        self._last_found = -math.inf
        """When the stream last had new events; at first when it was first read."""
        self.is_exhausted = False
        self.is_finished = False
        """Whether it was read to its end after its writer had ended."""
        self._read_failures = 0
        """How often in a row it could not be read."""
        self._start_sequence = 0
        """The sequence of the last start that `is_first_look` has seen."""
        self.is_released = False
        """Whether `_RankStreams.release` has returned it, so that it is polled or pausing."""
        self.is_live = reader.is_live(stream)

    def is_blocking(self) -> bool:
        """Whether newer streams of its rank wait for it: it has no writer and was not read to its end."""
        return not (self.is_exhausted or self.is_live)

    def close(self) -> None:
        """Close the open segment."""
        self._tail.close()

    def records(self) -> Iterator[tuple[int, bytes]]:
        """The records that were not read yet: sequence and payload."""
        if self._records is None:
            if self.is_check_due:
                self.check_writer()
            runs = self._tail.poll_runs(find_next=self.is_check_due)
            self._records = chain.from_iterable(map(self._number_events, runs))
        return self._records

    def check_writer(self) -> None:
        """Check whether the stream has a writer, before reading: if it has none, nothing follows the end then found."""
        self.is_live = self._reader.is_live(self.stream)

    def may_have_more(self) -> bool:
        """Whether there may be something to read in the segment that was read last."""
        return self._records is not None or self._tail.has_grown()

    def _number_events(self, run: FrameRun) -> Iterable[tuple[int, bytes]]:
        """The numbered events of a frame run; repeated starts are stored in `starts` instead."""
        if not run.is_carried:
            return enumerate(run.payloads, run.first_sequence)
        for sequence, payload in enumerate(run.payloads, run.first_sequence):
            if self._raw:
                self.starts[sequence] = RawRecord(self.stream, sequence, payload)
                continue
            try:
                envelope = decode(payload, self.contexts.by_run)
            except CodecError as error:
                log().warning("courier.start_unreadable", stream=self.stream, seq=sequence, exc_info=error)
                continue
            self.contexts.update(envelope)
            self.starts[sequence] = envelope
        return ()

    def pop_starts(self, after: int) -> list[Any]:
        """Return and clear the stored start events; they belong to the event after this sequence."""
        starts = [*self.starts.values()]
        self.starts.clear()
        if not self._raw:
            set_first_steps(starts, self._reader, self.stream, after)
        return starts

    def is_first_look(self, envelope: Envelope) -> bool:
        """Whether this is a start not read before: a row that an earlier process left open comes first.

        Of a training only if its step is known: rows from that step on are void, and may be of this process.
        """
        event = envelope.event
        is_start = type(event) is RunStart or (type(event) is TrainStart and _first_step(event) is not None)
        if not is_start or envelope.seq == self._start_sequence:
            return False
        self._start_sequence = envelope.seq
        return True

    def push_back(self, record: tuple[int, bytes]) -> None:
        """Return a record, so that it is the next one read."""
        self._records = chain((record,), self.records())

    def set_exhausted(self, now: float, *, found: bool) -> None:
        """Record that the end was reached."""
        self._records = None
        self.is_exhausted = True
        self.is_finished = not self.is_live
        self._read_failures = 0
        if found or self._last_found < 0:
            self._last_found = now
        if found:
            self._idle_seconds = IDLE_SECONDS
        pause = _pause_seconds(now - self._last_found)
        if self.is_check_due:
            # Only a stream that a writer may continue: what is known of others decides when newer ones are read.
            is_growing = self.is_live and self.rank.is_newest(self)
            self.check_due = now + min(MAX_CHECK_SECONDS, pause) if is_growing else -math.inf
            self.is_check_due = False
        if self.is_live:
            self.idle_until = now + min(MAX_REST_SECONDS, pause)
        elif not found:
            self.idle_until = now + self._idle_seconds
            if not self.rank.is_newest(self):
                self._idle_seconds = min(4 * self._idle_seconds, MAX_IDLE_SECONDS)

    def back_off(self, now: float, *, is_permanent: bool) -> None:
        """Pause after a read error. Newer streams wait as long as the error may pass, since their events come later."""
        self._records = None
        self._read_failures += 1
        self.is_exhausted = is_permanent or self.is_finished or self._read_failures >= MAX_READ_ATTEMPTS
        self.idle_until = now + IDLE_SECONDS
