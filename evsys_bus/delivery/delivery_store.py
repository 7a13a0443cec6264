"""`DeliveryStore`: the files of one courier: cursor, dead letters, state, and the lock that makes it the only one.

A line of the dead-letter file is ``{"stream", "seq", "at", "why", "event"}``, with the event as
`evsys_bus.codec.to_json` encodes it. A record that could not be decoded has its ``bytes`` in base64 instead. The cursor
moves past an event only once it is in the file.

A replay keeps all of this in memory only. A disk error never ends a delivery: it is logged, and the write is retried.
"""

import os
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec

from evsys_bus.codec import decode, to_json
from evsys_bus.delivery.open_rows import OpenRows
from evsys_bus.delivery.source import Batch, CorruptRecord
from evsys_bus.delivery.status_files import CourierLock, read_status, status_for_next_courier, write_status
from evsys_bus.diagnostics import FaultLog, log, message_shape
from evsys_bus.errors import CodecError
from evsys_bus.events import Envelope, ExperimentEnd, Metrics, RunEnd, StepEnd, TrainEnd, TrainStart
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import Clock, Cursor, CursorStore, Disk, JournalReader, Position, layout
from evsys_bus.sink import BatchResult, RawRecord
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.weak_items import WeakItems

MAX_PENDING: Final = 1000
"""How many dead letters may wait for the disk before the delivery has to wait."""
MAX_PENDING_BYTES: Final = 16 << 20


_NO_EVENT: Final = msgspec.Raw()


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the file."""

    stream: str
    seq: int
    at: float
    """When it was rejected; seconds since the epoch, wall clock."""
    why: str
    event: msgspec.Raw = _NO_EVENT
    """The envelope as JSON; empty for a corrupt record."""
    bytes: str | None = None
    """The corrupt record in base64."""


class DeadLetters:
    """The events that an adapter rejected for good, with the reason; the file is created when it is first needed."""

    def __init__(self, directory: str, name: str, *, disk: Disk, clock: Clock) -> None:
        self._folder: Final = f"{directory}/{layout.COURIERS}"
        self._path: Final = layout.courier_path(directory, name, "dead.jsonl")
        self._disk: Final = disk
        self._clock: Final = clock
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._file: int | None = None
        self._torn_at: int | None = None  # offset of a failed write that was not truncated
        self._already_written: set[tuple[str, int]] = set()
        """Stream and sequence of letters after the cursor, from a courier that ended before it moved the cursor."""

    @property
    def is_full(self) -> bool:
        """Whether no more should be added before `flush` succeeds."""
        return len(self._pending) >= MAX_PENDING or self._pending_bytes >= MAX_PENDING_BYTES

    def open(self, cursor: Cursor) -> None:
        """Find the letters after the cursor that are already in the file.

        Raises:
            OSError: The file cannot be read now.
        """
        try:
            size = self._disk.size(self._path)
        except FileNotFoundError:
            return
        tail = self._disk.read(self._path, max(0, size - 2 * MAX_PENDING_BYTES), 2 * MAX_PENDING_BYTES)
        for line in tail.splitlines():
            try:
                letter = _decode(line)
            except DECODE_ERRORS:
                continue  # cut off by a crash, or by reading only the tail
            if letter.seq > cursor.position(letter.stream).sequence:
                self._already_written.add((letter.stream, letter.seq))

    def add(self, stream: str, sequence: int, why: str, source: Envelope | RawRecord | CorruptRecord) -> None:
        """Add a letter; `flush` writes it to the file. A raw record is decoded for it, if that is possible."""
        if (stream, sequence) in self._already_written:
            return
        if isinstance(source, RawRecord):
            try:
                source = decode(source.payload)
            except CodecError:
                source = CorruptRecord(stream, sequence, source.payload, why)
        event = msgspec.Raw(to_json(source)) if isinstance(source, Envelope) else _NO_EVENT
        record = b64encode(source.payload).decode() if isinstance(source, CorruptRecord) else None
        line = _encode(DeadLetter(stream, sequence, self._clock.wall(), why, event, record)) + b"\n"
        self._pending.append(line)
        self._pending_bytes += len(line)

    def flush(self) -> None:
        """Write all added letters to the file and sync it.

        Raises:
            OSError: The write failed; the letters stay pending for the next call.
        """
        if not self._pending:
            return
        if self._file is None:
            self._file = self._open()
        if self._torn_at is not None:  # a failed write that could not be truncated then
            self._disk.truncate(self._file, self._torn_at)
        data = b"".join(self._pending)
        before = self._torn_at = self._disk.length(self._file)
        written = 0
        try:
            while written < len(data):
                written += self._disk.write(self._file, data[written:])
            self._disk.sync(self._file)
            self._disk.sync_path(self._folder)
        except OSError:
            self._disk.truncate(self._file, before)
            self._torn_at = None
            raise
        self._torn_at = None
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._disk.close(self._file)
            self._file = self._torn_at = None

    def _open(self) -> int:
        self._disk.make_directory(self._folder)
        # `Disk.lock` is the only call that opens a file for appending and creates it if it is missing.
        file = self._disk.lock(self._path)
        if file is None:
            raise BlockingIOError(f"{self._path} is locked by another process")
        try:
            size = self._disk.length(file)
            start = max(0, size - 2 * MAX_PENDING_BYTES)
            complete_size = start + self._disk.read(self._path, start, size - start).rfind(b"\n") + 1
            if complete_size < size:
                self._disk.truncate(file, complete_size)  # a line that a crash cut off; its event is delivered again
        except OSError:
            self._disk.close(file)
            raise
        return file


_decode: Final = msgspec.json.Decoder(DeadLetter).decode
_encode: Final = msgspec.json.Encoder().encode


STATUS_WRITE_SECONDS: Final = 1.0
"""Minimum time between two writes of the state file for changes that are not urgent."""


class DeliveryStore:
    """The files of one courier. Used on the courier's thread only.

    Args:
        directory: The journal.
        name: Name of the adapter.
        kind: Kind of the adapter; a cursor that another kind has stored under this name is not used.
        persistent: Whether to store anything on disk.
    """

    def __init__(
        self, directory: str, name: str, kind: str, *, persistent: bool, disk: Disk, clock: Clock, faults: FaultLog
    ) -> None:
        self.cursor = Cursor()
        self.has_changes = False
        """Whether the cursor has moved since it was last saved."""
        self.open_trainings: set[tuple[str, str]] = set()
        """Stream and run of each open training."""
        self.rows: Final = OpenRows()
        """The rows whose parts are delivered, but that are not complete."""
        self._directory: Final = directory
        self._name: Final = name
        self._kind: Final = kind
        self._persistent: Final = persistent
        self._disk: Final = disk
        self._clock: Final = clock
        self._faults: Final = faults
        self._cursors: Final = CursorStore(directory, disk)
        self._dead_letters: Final = DeadLetters(directory, name, disk=disk, clock=clock)
        self._unsaved_cursor: Cursor | None = None
        """The cursor as it was when its mark was taken, until it is saved."""
        self._lock: Final = CourierLock(directory, name, disk, clock)
        self._is_removal_logged = False
        self._handled = 0
        self._last_status: DeliveryStatus | None = None
        self._status_written_at = 0.0

    def after_fork(self) -> None:
        """Release the lock in a forked child; the parent process keeps it."""
        self._lock.release()

    def open(self) -> bool:
        """Acquire the lock and read the cursor; return whether there was one.

        Raises:
            CourierBusyError: Another courier holds the lock.
            OSError: The cursor or the dead-letter file cannot be read now.
        """
        if not self._persistent:
            return False
        self._lock.acquire()
        _open_stores.add(self)
        try:
            self.cursor = self._reset_if_outdated(self._reset_if_other_kind(self._cursors.load_for_update(self._name)))
            self._dead_letters.open(self.cursor)
        except OSError:
            self.close()
            raise
        reader = JournalReader(self._directory, self._disk)
        for stream, first in self.cursor.rows.items():
            self.rows.restore(reader, stream, first, self.cursor.position(stream).sequence)
        return bool(self.cursor.streams)

    def previous_status(self) -> DeliveryStatus:
        """The part of the previous courier's state that is still valid; see `status_for_next_courier`."""
        stored = read_status(self._disk, self._directory, self._name) if self._persistent else None
        return status_for_next_courier(stored)

    def start_after(self, sequences: Mapping[str, int]) -> None:
        """Set the cursor to just after these sequences, by stream."""
        self.cursor = Cursor({stream: Position(sequence) for stream, sequence in sequences.items()})
        self.has_changes = True

    def acknowledge(self, batch: Batch, result: BatchResult) -> None:
        """Record the result for the front of a batch and remove those events from it."""
        envelopes, sequences = batch.items[: result.handled], batch.sequences[: result.handled]
        offset = 0
        for stream, number, last in batch.drop(result.handled):
            indices = range(offset, offset + number)
            offset += number
            rejected = [index for index in result.rejected if index in indices]
            for index in rejected if self._persistent else ():
                self._dead_letters.add(stream, sequences[index], result.rejected[index], envelopes[index])
                self._log_dead_letter(stream, sequences[index], result.rejected[index], result.errors.get(index))
            self._advance(stream, last, number - len(rejected), len(rejected))
            self._track_steps(
                stream, envelopes if number == len(envelopes) else envelopes[indices.start : indices.stop]
            )

    def record_open_trainings(self, starts: Iterable[Envelope | RawRecord]) -> None:
        """Record the trainings that are open, from start events that were repeated and not delivered."""
        for each in starts:
            if isinstance(each, Envelope) and isinstance(each.event, TrainStart):
                self._track_trainings(each.stream, each.run or "", each.event)

    def reject_corrupt(self, record: CorruptRecord) -> None:
        """Record a dead letter for a record that is not a valid envelope."""
        if self._persistent:
            self._dead_letters.add(record.stream, record.sequence, record.why, record)
            self._log_dead_letter(record.stream, record.sequence, record.why)
        self._advance(record.stream, record.sequence, 0, 1)

    def reject_row(self, row: Envelope, why: str) -> None:
        """Record a dead letter for a row that was made of its parts; the last of them is counted as dead."""
        if self._persistent:
            self._dead_letters.add(row.stream, row.seq, why, row)
            self._log_dead_letter(row.stream, row.seq, why)
        position = self.cursor.position(row.stream)
        is_counted = position.delivered > 0
        self.cursor.streams[row.stream] = Position(
            position.sequence, position.delivered - is_counted, position.dead + is_counted
        )

    @property
    def is_full(self) -> bool:
        """Whether so many dead letters wait for the disk that the delivery has to wait too."""
        return self._persistent and self._dead_letters.is_full

    def commit(self, mark: Callable[[], Any]) -> bool:
        """Flush dead letters, then the receiver's own files, then the cursor; return whether all are on disk.

        Args:
            mark: The receiver's `mark`, which flushes what it wrote.

        Raises:
            Exception: What ``mark`` raised; the saved cursor is unchanged.
        """
        while self._persistent and (self.has_changes or self._unsaved_cursor is not None):
            if self._is_removed():
                return False
            try:
                if self._unsaved_cursor is None:
                    self._dead_letters.flush()
            except OSError as error:
                return self._log_commit_failure(error)
            if self._unsaved_cursor is None:
                cursor = self.cursor
                self._unsaved_cursor = Cursor(
                    dict(cursor.streams),
                    dict(cursor.steps),
                    self.rows.first_parts(),
                    mark(),
                    self._kind,
                    cursor.waiting,
                )
                self.has_changes = False
            if not self.save_cursor():
                return False
        return True

    def save_cursor(self) -> bool:
        """Save the cursor of the last `commit` if it is not on disk yet; return whether it is.

        A mark is valid until two more were taken, so no mark may be taken while this returns False.
        """
        if self._unsaved_cursor is not None:
            if self._is_removed():
                return False
            try:
                self._cursors.save(self._name, self._unsaved_cursor)
            except OSError as error:
                return self._log_commit_failure(error)
            self._unsaved_cursor = None
        return True

    def _log_commit_failure(self, error: OSError) -> bool:
        self._faults.warn("courier.not_committed", self._name, error=error, adapter=self._name)
        return False

    @property
    def last_status(self) -> DeliveryStatus | None:
        """The state that was last written, without counts of events; from any thread."""
        return self._last_status

    @property
    def handled(self) -> int:
        """How many events were handled since the store was opened; from any thread."""
        return self._handled

    def write_status(self, status: DeliveryStatus, *, urgent: bool) -> None:
        """Write the state if it differs from the last one; changes that are not urgent once a second at most."""
        now = self._clock.monotonic()
        previous = self._last_status
        if (
            not self._persistent
            or previous == status
            or not (urgent or previous is None or now - self._status_written_at >= STATUS_WRITE_SECONDS)
            or self._is_removed()
        ):
            return
        self._status_written_at = now
        self._last_status = status
        written = msgspec.structs.replace(status, at=self._clock.wall())
        try:
            write_status(self._disk, self._directory, self._name, written)
        except OSError as error:
            self._last_status = None
            self._faults.warn("courier.state_not_written", self._name, error=error, adapter=self._name)

    def _is_removed(self) -> bool:
        """Whether the journal or its couriers' folder was removed. Then nothing is stored, and a warning names the fix.

        What was delivered since the last commit is delivered again by the next courier.
        """
        is_removed = self._lock.is_removed()
        if is_removed and not self._is_removal_logged:
            fix = "leave a journal in use where it is; restart the program to begin a new one"
            log().warning("courier.journal_removed", adapter=self._name, journal=self._directory, fix=fix)
        self._is_removal_logged = is_removed
        return is_removed

    def close(self) -> None:
        """Close the files and release the lock."""
        with suppress(OSError):  # a file that cannot be closed needs no handling
            self._dead_letters.close()
        self._lock.release()

    def _log_dead_letter(self, stream: str, sequence: int, why: str, error: Exception | None = None) -> None:
        """Log the dead letter; repeated ones are logged as a count."""
        file = layout.courier_path(self._directory, self._name, "dead.jsonl")
        self._faults.warn(
            "delivery.dead_letter",
            self._name,
            error=error,
            shape=message_shape(why),
            adapter=self._name,
            why=why,
            stream=stream,
            seq=sequence,
            file=file,
        )

    def _reset_if_other_kind(self, cursor: Cursor) -> Cursor:
        """Return the cursor, or a new one if it belongs to another kind of adapter that had this name.

        That is a new destination, which has received no events yet. The files of the other one are renamed.

        Raises:
            OSError: The files cannot be renamed.
        """
        if cursor.kind in {"", self._kind}:
            return cursor
        suffix = f"{quote(cursor.kind, safe='')}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._clock.wall()))}"
        letters_path, cursor_path = (
            layout.courier_path(self._directory, self._name, "dead.jsonl"),
            layout.cursor_path(self._directory, self._name),
        )
        with suppress(FileNotFoundError):  # there may be no dead letters
            self._disk.replace(
                f"{letters_path}.{suffix}", self._disk.read(letters_path, 0, self._disk.size(letters_path))
            )
            self._disk.remove(letters_path)
        self._disk.replace(f"{cursor_path}.{suffix}", self._disk.read(cursor_path, 0, _MAX_CURSOR_BYTES))
        self._cursors.save(self._name, Cursor(kind=self._kind))
        facts = {"adapter": self._name, "kind": self._kind, "before": cursor.kind, "cursor": f"{cursor_path}.{suffix}"}
        log().warning(
            "courier.begins_anew", **facts, why="another kind of adapter had this name, so this one gets all events"
        )
        return Cursor()

    def _reset_if_outdated(self, cursor: Cursor) -> Cursor:
        """Return the cursor, or a new one if it is older than the removed segments, as after a restore from a backup.

        Rows after its mark belong to events that were removed and cannot be delivered again, so they must not be cut.
        """
        for stream, position in cursor.streams.items() if cursor.mark is not None else ():
            removed = layout.count_removed_events(layout.list_segments(self._disk, f"{self._directory}/{stream}"))
            if removed > position.sequence:
                facts = {"adapter": self._name, "stream": stream, "at": position.sequence, "removed_up_to": removed}
                why = "the cursor is older than the removed segments: what is left is compared with what was written"
                log().warning("courier.begins_anew", **facts, why=why)
                return Cursor()
        return cursor

    def _advance(self, stream: str, sequence: int, delivered: int, dead: int) -> None:
        previous = self.cursor.position(stream)
        self.cursor.streams[stream] = Position(sequence, previous.delivered + delivered, previous.dead + dead)
        self._handled += delivered + dead
        self.has_changes = True

    def _track_steps(self, stream: str, envelopes: list[Envelope] | list[RawRecord]) -> None:
        """Record the largest step of each open training; raw records do not show it, and no raw sink resumes one."""
        steps = self.cursor.steps
        for envelope in envelopes:
            if isinstance(envelope, RawRecord):
                return
            event = envelope.event
            if type(event) is StepEnd:
                if self.rows.have_parts:
                    self.rows.update(envelope)
                if steps:
                    run, step = envelope.run or "", event.step_idx
                    if run in steps and type(step) is int and (step > steps[run] or steps[run] == _NO_STEP_YET):
                        steps[run] = step
            elif isinstance(event, Metrics):
                self.rows.update(envelope)
            elif isinstance(event, _TRAINING_EVENTS):
                self.rows.update(envelope)
                self._track_trainings(stream, envelope.run or "", event)

    def _track_trainings(self, stream: str, run: str, event: TrainStart | TrainEnd | RunEnd | ExperimentEnd) -> None:
        if isinstance(event, TrainStart):
            first_step = getattr(event.state, "step", 0)
            self.open_trainings.add((stream, run))
            self.cursor.steps[run] = first_step - 1 if type(first_step) is int else -1
            return
        if isinstance(event, ExperimentEnd):
            self.open_trainings = {each for each in self.open_trainings if each[0] != stream}
        else:
            self.open_trainings.discard((stream, run))
        open_runs = {each[1] for each in self.open_trainings}
        for each in [each for each in self.cursor.steps if each not in open_runs]:
            del self.cursor.steps[each]


_NO_STEP_YET: Final = sys.maxsize - 1
"""The largest step of a training whose start was repeated and that has no step in the journal yet."""
_TRAINING_EVENTS: Final = (TrainStart, TrainEnd, RunEnd, ExperimentEnd)
_MAX_CURSOR_BYTES: Final = 16 << 20

_open_stores: Final[WeakItems[DeliveryStore]] = WeakItems()


def _release_locks_after_fork() -> None:
    for store in list(_open_stores):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks_after_fork)
