"""`JournalWriter`: appends each event by a single write.

append ── written completely ───────────────────── return            (no lock, two integers)
       └─ a new segment is due, or an error ────── `SlowWriter`        (under a lock, through the backlog)
in the background, on a thread ─────────────────── `Maintenance`          (sync, retry, prune)
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, Self, TypeVar
from zlib import crc32

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.errors import JournalOpenError, UnrecordedError
from evsys_bus.journal.clock import Clock, OsClock
from evsys_bus.journal.frame import EVENT, MARKER, pack, pack_checked_header, pack_checksum
from evsys_bus.journal.layout import Family
from evsys_bus.journal.maintenance import Maintenance
from evsys_bus.journal.open_starts import StartRecord, read_boundary
from evsys_bus.journal.reader import Record
from evsys_bus.journal.retention import RemovedCounts, RetentionPolicy
from evsys_bus.journal.slow_writer import Backlog, PendingRecord, SlowWriter
from evsys_bus.journal.stream_lock import acquire_named_stream, acquire_stream, write_owner
from evsys_bus.weak_items import WeakItems

_MIN_SYNC_SECONDS: Final = 1.0
"""The minimum time for the final sync, after pending records were retried until the deadline."""

FlushPolicy = Literal["never", "interval", "always"]
_Event = TypeVar("_Event")
_Other = TypeVar("_Other")


class JournalWriter:
    """Appends the events of one process to its own stream.

    Only one thread at a time may append. All other methods may be called from any thread.

    Args:
        directory: The journal. It is created if it is missing, accessible to its owner only.
        rank: The rank of the process. A stream is continued only by writers of the same rank.
        stream: The name of the stream to write, also of another process: for a mirror of another journal, whose
            events `append_batch` records. By default the newest stream of the rank, or a new one.
        family: Who writes the stream: a publishing process ("r"), a courier ("c") or a sampler ("s").
        flush: What a power cut may lose: with ``always`` nothing that was appended, with ``interval`` the events of
            the last ``flush_seconds``, with ``never`` what the system has not written by itself. The end of the
            process loses nothing in any case.
        flush_seconds: The time between two rounds of maintenance.
        segment_bytes: A segment that is larger is followed by a new one.
        retain: Limits above which segments are removed once every adapter is finished with them; by default none.
        on_unrecorded: Whether an event that the disk refuses waits in memory (``queue``) or is an error (``raise``).
        max_unrecorded: How many events may wait. Beyond that the oldest are dropped and counted.
        max_unrecorded_bytes: How many bytes they may have together.
        reserve_bytes: Disk space that is reserved for the end events; 0 for none.
        disk: The file system.
        clock: The clocks.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int = 0,
        stream: str | None = None,
        family: Family = "r",
        flush: FlushPolicy = "interval",
        flush_seconds: float = 1.0,
        segment_bytes: int = 64 << 20,
        retain: RetentionPolicy | None = None,
        on_unrecorded: Literal["queue", "raise"] = "queue",
        max_unrecorded: int = 10_000,
        max_unrecorded_bytes: int = 64 << 20,
        reserve_bytes: int = 1 << 20,
        disk: Disk | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.next_sequence = 1
        """The sequence of the next event. An envelope contains its own sequence, so read it before encoding."""
        self._rank = rank
        self._stream = stream
        self._family: Family = family
        self._raise_unrecorded = on_unrecorded == "raise"
        self._reserve_bytes = reserve_bytes
        self._first_sequence = 1
        self._skipped = 0
        """Sequences that `append_batch` has skipped."""
        self._slow_writer: Final = SlowWriter(
            OsDisk() if disk is None else disk,
            OsClock() if clock is None else clock,
            str(Path(directory).absolute()),
            segment_bytes=segment_bytes,
            sync_each_write=flush == "always",
            backlog=Backlog(max_unrecorded, max_unrecorded_bytes),
        )
        self._append: Final = self.make_appender(_already_encoded)
        self._maintenance: Final = Maintenance(
            self._slow_writer, sync_enabled=flush != "never", interval_seconds=flush_seconds, policy=retain
        )

    def open(self) -> Self:
        """Lock a stream and start the maintenance thread.

        Raises:
            JournalOpenError: The directory cannot be written, or its file system has no locks or does not append; or
                another process has the named stream open.
            JournalVersionError: A newer version wrote the named stream.
        """
        slow_writer = self._slow_writer
        try:
            disk, clock, directory = slow_writer.disk, slow_writer.clock, slow_writer.directory
            if self._stream is None:
                lease = acquire_stream(disk, clock, directory, self._rank, self._family)
            else:
                lease = acquire_named_stream(disk, clock, directory, self._stream)
        except OSError as error:
            raise JournalOpenError(
                f"the journal {slow_writer.directory} cannot be written: {error.strerror or error}",
                fix="give a directory that this user can write, with space left",
            ) from error
        self._first_sequence = self.next_sequence = lease.next_sequence
        try:
            slow_writer.open(lease, self._reserve_bytes)
            _open_writers.add(slow_writer)
            self._maintenance.start()
        except BaseException:  # for example no thread can be started: let other writers have the stream
            slow_writer.state = "closed"
            self._maintenance.abandon()
            with slow_writer.lock:
                slow_writer.release()
            raise
        weakref.finalize(self, self._maintenance.abandon).atexit = False
        return self

    def make_appender(self, encode: Callable[[_Event, int, float], bytes]) -> Callable[[_Event, float], int]:
        """Make a fast append function: given an event and its time, it records the event and returns its sequence.

        The function raises what `append` and ``encode`` raise; the sequence then stays free.

        Args:
            encode: Encodes an event, given its sequence and time.
        """
        slow_writer = self._slow_writer

        def append(event: _Event, time: float) -> int:
            sequence = self.next_sequence
            payload = encode(event, sequence, time)
            checked = (
                pack_checked_header(MARKER, EVENT, len(payload), sequence) + payload
            )  # frame.pack, without the call
            record = pack_checksum(crc32(checked)) + checked
            # Before the write: if Ctrl-C comes between the two, a sequence is skipped; in the other order it would be
            # used for two events and readers would skip the second as a repeat. After all allocations, because these
            # may fail.
            self.next_sequence = sequence + 1
            outcome: OSError | int | None = None
            if slow_writer.is_ready:
                try:
                    written = slow_writer.write(slow_writer.file, record)
                except OSError as error:
                    outcome = error
                else:
                    if written == len(record):
                        slow_writer.remaining_bytes = remaining_bytes = slow_writer.remaining_bytes - written
                        if remaining_bytes <= 0:
                            slow_writer.is_ready = False  # the next one starts a new segment
                        return sequence
                    outcome = written
            self._append_slow(PendingRecord(sequence, record, essential=False), outcome)
            return sequence

        return append

    def make_pair_appender(
        self, encode_first: Callable[[_Event, int, float], bytes], encode_second: Callable[[_Other, int, float], bytes]
    ) -> Callable[[_Event, _Other, float], None]:
        """Make a function like that of `make_appender` that records two events of one time by a single write."""
        slow_writer = self._slow_writer

        def append_pair(first: _Event, second: _Other, time: float) -> None:
            sequence = self.next_sequence
            payload = encode_first(first, sequence, time)
            checked = pack_checked_header(MARKER, EVENT, len(payload), sequence) + payload
            record = pack_checksum(crc32(checked)) + checked
            payload = encode_second(second, sequence + 1, time)
            checked = pack_checked_header(MARKER, EVENT, len(payload), sequence + 1) + payload
            next_record = pack_checksum(crc32(checked)) + checked
            records = record + next_record
            self.next_sequence = sequence + 2  # before the write, as above
            outcome: OSError | int | None = None
            if slow_writer.is_ready:
                try:
                    written = slow_writer.write(slow_writer.file, records)
                except OSError as error:
                    outcome = error
                else:
                    if written == len(records):
                        slow_writer.remaining_bytes = remaining_bytes = slow_writer.remaining_bytes - written
                        if remaining_bytes <= 0:
                            slow_writer.is_ready = False
                        return
                    outcome = written
            next_outcome: int | None = None
            if isinstance(outcome, int) and outcome >= len(record):
                next_outcome = outcome - len(record)
                slow_writer.remaining_bytes -= len(record)
            else:
                self._append_slow(PendingRecord(sequence, record, essential=False), outcome)
            self._append_slow(PendingRecord(sequence + 1, next_record, essential=False), next_outcome)

        return append_pair

    def append(self, payload: bytes, *, essential: bool = False) -> int:
        """Record one event under `next_sequence` and return the sequence.

        Args:
            payload: The encoded envelope.
            essential: Whether the event is among the last to be dropped if too many are pending: starts, ends and
                checkpoints. A start event is repeated at the beginning of each later segment until the event that ends
                its run or experiment. For an end event on a full disk, the reserve is released.

        Raises:
            UnrecordedError: The disk returned an error and ``on_unrecorded`` is ``raise``; the sequence stays free.
            ForkedBusError: The process was forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
            MemoryError: There is not enough memory for the record; the sequence stays free.
        """
        if not essential:
            return self._append(payload, 0.0)
        boundary = read_boundary(payload)
        if boundary is None:
            return self._append_essential(payload)
        slow_writer = self._slow_writer
        if boundary.is_start:
            sequence = self._append_essential(payload)
            slow_writer.open_starts.update(boundary, StartRecord(sequence, payload))
            return sequence
        slow_writer.open_starts.update(boundary, StartRecord(self.next_sequence, payload))
        try:
            sequence = self._append_essential(payload)
        except UnrecordedError:
            if not slow_writer.reserve.release():
                raise
            return self._append_essential(payload)
        if slow_writer.backlog:
            with slow_writer.lock:
                if slow_writer.backlog.bytes < slow_writer.reserve.size and slow_writer.reserve.release():
                    slow_writer.flush_backlog()
        return sequence

    def _append_essential(self, payload: bytes) -> int:
        sequence = self.next_sequence
        record = pack(sequence, payload)
        self.next_sequence = sequence + 1
        self._append_slow(PendingRecord(sequence, record, essential=True), None)
        return sequence

    def append_batch(self, records: Iterable[tuple[int, bytes]]) -> int:
        """Record events of another journal under their own sequences, and sync them, whatever ``flush`` is.

        Sequences may skip ahead; readers report the gap. Those that the stream already has are skipped, so a batch may
        be given again, for example after a kill between the sync and its acknowledgement.

        Args:
            records: Sequences and encoded envelopes, by ascending sequence.

        Returns:
            The last sequence in the stream; 0 if it has none.

        Raises:
            UnrecordedError: The disk returned an error, so give the batch again. Nothing waits in memory.
            ForkedBusError: The process was forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
            ValueError: The sequences do not ascend from 1 or more; nothing was recorded.
        """
        slow_writer = self._slow_writer
        slow_writer.check_open()
        given = [Record(*each) for each in records]
        if any(later.sequence <= earlier.sequence for earlier, later in pairwise([Record(0, b""), *given])):
            raise ValueError("the sequences of a batch must ascend from 1 or more")
        with self._maintenance.paused(), slow_writer.lock:
            slow_writer.check_open()
            slow_writer.flush_backlog()
            new = [each for each in given if each.sequence >= self.next_sequence]
            if slow_writer.backlog:
                raise self._unrecorded_error()
            if new:
                try:
                    slow_writer.write_batch(new)
                except OSError as error:
                    slow_writer.handle_error(error)
                    raise self._unrecorded_error() from error
                self._skipped += new[-1].sequence + 1 - self.next_sequence - len(new)
                self.next_sequence = new[-1].sequence + 1
            return self.next_sequence - 1

    def set_live(self, is_live: bool) -> None:
        """Declare whether more events may come, for `JournalReader.is_live`. A new stream is live.

        For a mirror, which keeps its streams open although their own writers may be gone. It is stored with the stream.

        Raises:
            UnrecordedError: The disk returned an error.
            ForkedBusError: The process was forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
        """
        slow_writer = self._slow_writer
        with slow_writer.lock:
            slow_writer.check_open()
            lease = slow_writer.lease
            if is_live == lease.is_live or lease.lock is None:
                return
            try:
                write_owner(slow_writer.disk, slow_writer.clock, lease.lock, is_mirror=True, is_live=is_live)
                slow_writer.disk.sync(lease.lock)
            except OSError as error:
                slow_writer.handle_error(error)
                raise self._unrecorded_error() from error
            lease.is_live = is_live

    def skip_sequence(self) -> None:
        """Skip the next sequence, for an event that cannot be recorded. It counts as lost."""
        self._slow_writer.backlog.lost += 1
        self.next_sequence += 1

    def retain_for(self, adapters: Iterable[str]) -> None:
        """Make retention wait for these adapters, whether or not they are registered in the journal yet.

        Call it before the first append, with all adapters. Events that they have not received are then retained.
        """
        self._maintenance.required_adapters = frozenset(adapters)

    def flush(self) -> None:
        """Run one round of maintenance now: write pending records, sync, prune."""
        self._maintenance.run_once()

    def close(self, timeout_seconds: float = 5.0, should_retry: Callable[[], bool] = lambda: False) -> bool:
        """Stop accepting events and sync everything. No append may be in progress.

        Pending records are written first. On a full disk the reserve is used for start and end events and the newest
        others; the rest is dropped and counted as lost.

        Args:
            timeout_seconds: After this time a disk that hangs is left to the maintenance thread.
            should_retry: Called while the disk refuses the pending records: it pauses and returns whether to retry
                before the reserve is used.

        Returns:
            Whether all events of this writer are synced to disk.
        """
        slow_writer = self._slow_writer
        deadline = slow_writer.clock.monotonic() + timeout_seconds
        min_sync_seconds = 0.0
        while slow_writer.state == "open":
            is_removed = isinstance(slow_writer.last_error, FileNotFoundError)  # waiting for it would be in vain
            is_last_attempt = not slow_writer.backlog or is_removed or not should_retry()
            remaining_seconds = deadline - slow_writer.clock.monotonic()
            if not slow_writer.lock.acquire(timeout=max(0.0, min(remaining_seconds, threading.TIMEOUT_MAX))):
                return False
            try:
                if is_last_attempt:
                    slow_writer.finalize(self.next_sequence)
                else:
                    min_sync_seconds = _MIN_SYNC_SECONDS  # the retries may use up all of the timeout
                    slow_writer.flush_backlog()
            finally:
                slow_writer.lock.release()
        if slow_writer.state != "closed":
            return False
        is_finished = self._maintenance.stop(max(min_sync_seconds, deadline - slow_writer.clock.monotonic()))
        return is_finished and not self.unrecorded and not self.lost

    def abandon(self, timeout_seconds: float = 0.0) -> None:
        """Stop without writing or syncing anything more, as a kill of the process would; for simulations of one.

        Args:
            timeout_seconds: How long to wait for the maintenance thread, which releases the stream at its end.
        """
        self._maintenance.abandon(timeout_seconds)

    @property
    def directory(self) -> str:
        """The path of the journal."""
        return self._slow_writer.directory

    @property
    def id(self) -> str:
        """Identifies the journal, wherever it is copied to. Empty before it was opened, or if it cannot be stored."""
        return self._slow_writer.lease.journal_id

    @property
    def stream(self) -> str:
        """The name of the stream. Empty before the journal was opened."""
        return self._slow_writer.lease.stream

    @property
    def recorded(self) -> int:
        """How many events this writer has written to disk."""
        return self.next_sequence - self._first_sequence - self._skipped - self.unrecorded - self.lost

    @property
    def unrecorded(self) -> int:
        """How many events are pending in memory."""
        return len(self._slow_writer.backlog)

    @property
    def lost(self) -> int:
        """How many events were dropped, or were in segments that were removed."""
        slow_writer = self._slow_writer
        return slow_writer.backlog.lost + slow_writer.written_segments.count_removed_events(
            self.next_sequence - len(slow_writer.backlog)
        )

    @property
    def removed(self) -> RemovedCounts:
        """What retention has removed."""
        return self._maintenance.removed

    @property
    def failures(self) -> int:
        """How many errors the disk has returned, for events, syncs and new segments."""
        return self._slow_writer.failures

    @property
    def current_error(self) -> OSError | None:
        """The last error of the disk while events are pending; otherwise None."""
        return self._slow_writer.last_error if self._slow_writer.backlog else None

    @property
    def written_bytes(self) -> int:
        """How many bytes this writer has written."""
        return self._slow_writer.written_bytes

    @property
    def segment(self) -> str | None:
        """The path of the current segment."""
        segment = self._slow_writer.segment
        return None if segment is None else segment.path

    def _append_slow(self, pending: PendingRecord, outcome: OSError | int | None) -> None:
        slow_writer = self._slow_writer
        self.next_sequence = pending.sequence
        slow_writer.check_open()
        with slow_writer.lock:
            slow_writer.check_open()
            self.next_sequence = pending.sequence + 1
            if slow_writer.record(pending, outcome) or not self._raise_unrecorded:
                return
            slow_writer.backlog.pop()
            self.next_sequence = pending.sequence
        raise self._unrecorded_error() from slow_writer.last_error

    def _unrecorded_error(self) -> UnrecordedError:
        slow_writer = self._slow_writer
        return UnrecordedError(
            f"the journal {slow_writer.directory} did not take an event",
            why=str(slow_writer.last_error),
            fix='make room; or let events wait in memory with on_unrecorded="queue"',
        )


def _already_encoded(payload: bytes, _: int, __: float) -> bytes:
    """Return a payload that is already encoded."""
    return payload


_open_writers: Final[WeakItems[SlowWriter]] = WeakItems()


def _after_fork() -> None:
    for slow_writer in list(_open_writers):
        slow_writer.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
