"""`SlowWriter`: everything about writing a record beyond the plain append.

It handles the start of a segment and errors of the disk. The record is put into the backlog, and
the `Backlog` is written in order to whichever segment accepts it. All of this is under one lock. The plain append
(`JournalWriter.append`) takes no lock and is allowed while ``is_ready`` is true.
"""

import errno
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.disk import Disk
from evsys_bus.errors import ForkedBusError, JournalClosedError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.frame import pack
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.open_starts import OpenStarts, StartRecord, read_boundary
from evsys_bus.journal.reader import Record
from evsys_bus.journal.segment import OpenSegment, WrittenSegments
from evsys_bus.journal.stream_lock import StreamLease


class PendingRecord(NamedTuple):
    """A record that is not on disk yet."""

    sequence: int
    data: bytes
    essential: bool
    """Whether it is among the last to be dropped: starts, ends and checkpoints."""


class Backlog:
    """Pending records in sequence order. Records beyond the limits are dropped by `trim` and counted in ``lost``."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.lost = 0
        self.bytes = 0
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._pending: deque[PendingRecord] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[PendingRecord]:
        return iter(tuple(self._pending))

    def append(self, pending: PendingRecord) -> None:
        """Add the newest record."""
        self._pending.append(pending)
        self.bytes += len(pending.data)

    def trim(self) -> None:
        """Drop records until the limits hold: oldest first, those with `essential` last, never the newest one."""
        while len(self._pending) > 1 and (len(self._pending) > self._max_records or self.bytes > self._max_bytes):
            newest = len(self._pending) - 1
            index = next((n for n, each in enumerate(self._pending) if not each.essential and n < newest), 0)
            self.bytes -= len(self._pending[index].data)
            del self._pending[index]
            self.lost += 1

    def peek(self) -> PendingRecord | None:
        """The oldest record, or None. It stays in the queue."""
        return self._pending[0] if self._pending else None

    def pop_oldest(self) -> None:
        """Remove the oldest record, because it is on disk now."""
        self.bytes -= len(self._pending.popleft().data)

    def pop(self) -> None:
        """Remove the newest record, because its publisher gets an error instead."""
        self.bytes -= len(self._pending.pop().data)

    def shrink_to(self, max_bytes: int) -> None:
        """Keep only what fits into this many bytes: records with `essential` first, then the newest of the others."""
        retained: set[int] = set()
        remaining_bytes = max_bytes
        for essential in (True, False):
            for each in reversed(self._pending):
                if each.essential is essential and len(each.data) <= remaining_bytes:
                    retained.add(each.sequence)
                    remaining_bytes -= len(each.data)
        self.lost += len(self._pending) - len(retained)
        self._pending = deque(each for each in self._pending if each.sequence in retained)
        self.bytes = sum(len(each.data) for each in self._pending)


class DiskReserve:
    """Disk space that is reserved or not."""

    def __init__(self, disk: Disk, path: str, size: int) -> None:
        self.size: Final = size
        self.is_allocated = False
        self._disk = disk
        self._path = path

    def allocate(self) -> None:
        """Reserve the space if it is available. A full disk is not an error here."""
        if self.is_allocated or not self.size:
            return
        try:
            self._remove_file()
            file = self._disk.open_append(self._path)
            try:
                self.is_allocated = self._disk.write(file, bytes(self.size)) == self.size
            finally:
                self._disk.close(file)
            if not self.is_allocated:
                self._remove_file()
        except OSError:
            self.is_allocated = False

    def release(self) -> bool:
        """Release the space. Returns whether there was any."""
        was_allocated, self.is_allocated = self.is_allocated, False
        try:
            self._remove_file()
        except OSError:
            return False
        return was_allocated

    def _remove_file(self) -> None:
        try:
            self._disk.remove(self._path)
        except FileNotFoundError:
            pass


_DISK_FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})
_OVERDUE_DIVISOR: Final = 8
"""If a new segment cannot be created, the current one grows by an eighth before the next attempt."""


class SlowWriter:
    """Writes one stream and handles the errors of the disk."""

    def __init__(
        self, disk: Disk, clock: Clock, directory: str, *, segment_bytes: int, sync_each_write: bool, backlog: Backlog
    ) -> None:
        self.disk: Final = disk
        self.clock: Final = clock
        self.directory: Final = directory
        self.faults: Final = FaultLog()
        self.state: Literal["new", "open", "closed", "forked"] = "new"
        self.lock = threading.RLock()  # reentrant: a signal handler that flushes may interrupt its holder
        self.is_flushing = False
        """Checked under the lock: true only in a signal handler that interrupted `flush_backlog`."""
        self.lease = StreamLease("", None)
        self.segment: OpenSegment | None = None
        self.retired_segments: list[OpenSegment] = []
        """Finished segments, to be synced by `Maintenance` and closed one round later."""
        self.closing_segments: list[OpenSegment] = []
        """Synced segments that stay open for one more round: a plain append may have started before."""
        self.backlog: Final = backlog
        self.reserve = DiskReserve(disk, "", 0)
        self.open_starts = OpenStarts[StartRecord]()
        """The start events of what is open. Each segment begins with them."""
        self.segments_created = 0
        """How many segments were created."""
        self.written_segments: Final = WrittenSegments(disk)
        """The segments that were created."""
        self.failures = 0
        """How many errors the disk has returned."""
        self.previous_segment_bytes = 0
        """Bytes in the previous segments."""
        self._segment_bytes = segment_bytes
        self._sync_each_write = sync_each_write
        self.last_error: OSError | None = None
        """The last error, until the disk accepts records again."""
        self._is_removal_logged = False
        # Used by the plain append.
        self.is_ready = False
        self.file = -1
        self.remaining_bytes = 0
        self.write = self._write_and_sync if sync_each_write else disk.write

    @property
    def folder(self) -> str:
        """The directory of the stream."""
        return f"{self.directory}/{self.lease.stream}"

    @property
    def written_bytes(self) -> int:
        """How many bytes were written."""
        return self.previous_segment_bytes + (self._segment_bytes - self.remaining_bytes if self.segment else 0)

    def open(self, lease: StreamLease, reserve_bytes: int) -> None:
        """Start to accept records."""
        self.lease = lease
        self.open_starts = lease.open_starts
        self.reserve = DiskReserve(self.disk, f"{self.folder}/{layout.RESERVE}", reserve_bytes)
        self.reserve.allocate()
        self.state = "open"

    def check_open(self) -> None:
        """Raise if no records are accepted.

        Raises:
            ForkedBusError: The process was forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
        """
        if self.state == "forked":
            raise ForkedBusError(
                "this journal belongs to the process that this one was forked from",
                fix="publish in the parent, or open a bus of its own in the child",
            )
        if self.state != "open":
            when = "before it was opened" if self.state == "new" else "after it was closed"
            raise JournalClosedError(f"append to the journal {when}", fix="append between open() and close()")

    def record(self, pending: PendingRecord, outcome: OSError | int | None) -> bool:
        """Write the record after the pending ones. Returns whether all of them are on disk.

        Args:
            pending: The newest record.
            outcome: The outcome of the plain append: its error, how many bytes it wrote, or None if it was not tried.
        """
        if isinstance(outcome, int):
            outcome = self._finish_write(pending.data, outcome)
            if outcome is None:
                return True
        if outcome is not None:
            self.handle_error(outcome)
        self.backlog.append(pending)
        self.flush_backlog()
        self.backlog.trim()
        return not self.backlog

    def flush_backlog(self) -> None:
        """Write the pending records in order until the disk returns an error."""
        if not self.is_flushing:
            self.is_flushing = True
            try:
                self._flush_backlog()
            finally:
                self.is_flushing = False

    def _flush_backlog(self) -> None:
        while True:
            segment = self.segment
            try:
                while (pending := self.backlog.peek()) is not None:
                    self._write_pending(pending)
                    self.backlog.pop_oldest()
            except MemoryError:
                self.handle_error(OSError(errno.ENOMEM, "there is not enough memory for the record"))
                return
            except OSError as error:
                self.handle_error(error)
                if segment is not None and self.segment is None:
                    continue  # that segment is retired; a new one may accept the record
                return
            break
        if self.last_error is not None:
            self.last_error = None
            self._is_removal_logged = False
            self._log_safely(self.faults.flush)
            self._log_safely(
                lambda: log().info("journal.records_again", directory=self.directory, lost=self.backlog.lost)
            )
        if self.segment is not None and self.remaining_bytes > 0:
            self.file = self.segment.file
            self.is_ready = True

    def write_batch(self, records: Sequence[Record]) -> None:
        """Write the records, with one write to each segment, and sync them. Nothing may be pending.

        Raises:
            OSError: The disk returned an error. All of them must be written again; readers skip repeats.
        """
        previous_segment, segments_created = self.segment, self.segments_created
        unsynced_segments: list[OpenSegment] = []
        is_synced = False
        try:
            start = 0
            while start < len(records):
                start = self._write_part(records, start)
                assert self.segment is not None
                if self.segment not in unsynced_segments:
                    unsynced_segments.append(self.segment)
            for segment in unsynced_segments:
                segment.sync()
            if self.segments_created > segments_created:
                self.sync_directories()
            is_synced = True
        finally:
            if not is_synced and (unsynced_segments or self.segment is not previous_segment):
                self.retire_segment()  # it is not known what of it is on disk
        self.flush_backlog()  # the disk accepts records again

    def _write_part(self, records: Sequence[Record], start: int) -> int:
        """Write what fits into the segment, at least one record. Returns the index after it."""
        first = records[start]
        begins_segment = self.segment is None or self.remaining_bytes <= 0
        boundary = read_boundary(first.payload)
        if begins_segment and boundary is not None and not boundary.is_start:
            self.open_starts.update(boundary, StartRecord(*first))  # the new segment need not begin with its start
        room = self.remaining_bytes
        if begins_segment:
            room = self._segment_bytes - frame.SEGMENT_HEADER_BYTES - sum(map(len, self._carried_frames()))
        frames: list[bytes] = []
        end = start
        while end < len(records) and (end == start or room > 0):
            frames.append(pack(*records[end]))
            room -= len(frames[-1])
            end += 1
        data = b"".join(frames)
        if begins_segment:
            self._begin_segment(PendingRecord(first.sequence, data, essential=True))
        else:
            assert self.segment is not None
            self.segment.write(data)
            self.remaining_bytes -= len(data)
        for record in records[start:end]:
            boundary = read_boundary(record.payload)
            if boundary is not None:
                self.open_starts.update(boundary, StartRecord(*record))
        return end

    def handle_error(self, error: OSError) -> None:
        """Count and log an error of the disk. A segment that may be damaged by it is retired."""
        self.is_ready = False
        self.last_error = error
        if self.segment is not None and (not self.segment.is_clean or error.errno not in _DISK_FULL_ERRNOS):
            self.retire_segment()
        if isinstance(error, FileNotFoundError):
            self.handle_removal(error)
        else:
            self.log_failure("journal.unrecorded", error, waiting=len(self.backlog))

    def handle_removal(self, error: FileNotFoundError) -> None:
        """Count the events in segments that another program removed, and log it once.

        A removed directory is not created again. Records stay in the backlog, in case it was only moved and comes back.
        """
        self.written_segments.check_removed()
        if self._is_removal_logged:
            self.failures += 1
            return
        self._is_removal_logged = True
        fix = "leave a journal in use where it is; restart the program to record into a new one"
        self.log_failure("journal.removed", error, fix=fix)

    def retire_segment(self) -> None:
        """Stop writing to the current segment. The next record starts another one."""
        self.is_ready = False
        if self.segment is not None:
            self.previous_segment_bytes = self.written_bytes
            self.retired_segments.append(self.segment)
            self.segment = None

    def finalize(self, next_sequence: int) -> None:
        """Write the pending records and the closing frame.

        On a full disk the reserve is used, and what does not fit is dropped.
        """
        self.flush_backlog()
        if self.backlog and self.reserve.release():
            used_bytes = (
                0
                if self.segment is not None
                else frame.SEGMENT_HEADER_BYTES + sum(len(each) for each in self._carried_frames())
            )
            self.backlog.shrink_to(self.reserve.size - used_bytes)
            self.flush_backlog()
        self.is_ready = False
        self.state = "closed"
        if self.segment is not None and not self.backlog:
            try:
                self.segment.write(pack(next_sequence, b"", frame.CLOSED))
            except OSError:
                pass  # optional: without it the journal has the same events
        self._log_safely(self.faults.flush)

    def release(self) -> None:
        """Close all files without syncing them, and unlock the stream."""
        self.retire_segment()
        segments, self.retired_segments, self.closing_segments = (
            [*self.retired_segments, *self.closing_segments],
            [],
            [],
        )
        lock, self.lease.lock = self.lease.lock, None
        for file in (*(each.file for each in segments), lock):
            try:
                if file is not None:
                    self.disk.close(file)
            except OSError:
                pass  # nothing more can be done

    def after_fork(self) -> None:
        """Detach a forked child from the journal. Takes no lock, because its owner may not exist in the child."""
        self.lock, self.is_flushing = threading.RLock(), False
        if self.state == "open":
            self.state = "forked"
        self.release()

    def log_failure(self, phrase: str, error: Exception, **facts: Any) -> None:
        """Count and log a failure."""
        self.failures += 1
        self._log_safely(
            lambda: self.faults.warn(phrase, self.directory, error=error, directory=self.directory, **facts)
        )

    @staticmethod
    def _log_safely(write_log: Callable[[], None]) -> None:
        """Log, unless logging cannot be imported because no file can be opened. Failures are counted anyway."""
        try:
            write_log()
        except (OSError, ImportError):
            pass

    def _finish_write(self, record: bytes, written: int) -> OSError | None:
        """Write the rest of a record that was partly written, which also shows the error of the disk."""
        if self.segment is None:
            return OSError(errno.EIO, "the segment was retired during the write")
        try:
            self.segment.write(record, written)
            if self._sync_each_write:
                self.segment.sync()
        except OSError as error:
            return error
        self.remaining_bytes -= len(record)
        return None

    def _write_pending(self, pending: PendingRecord) -> None:
        previous_segment = self.segment
        if previous_segment is not None and self.remaining_bytes <= 0:
            try:
                self._begin_segment(pending)
            except OSError as error:
                if self.segment is not previous_segment:  # the new one may be damaged, and the previous one is retired
                    raise
                # For example too many open files: one long segment is better than none.
                extra_bytes = self._segment_bytes // _OVERDUE_DIVISOR
                self.previous_segment_bytes += extra_bytes - self.remaining_bytes  # keeps `written_bytes` unchanged
                self.remaining_bytes = extra_bytes
                self.log_failure("journal.not_rotated", error)
            else:
                return
        if self.segment is None:
            self._begin_segment(pending)
            return
        self.segment.write(pending.data)
        self.remaining_bytes -= len(pending.data)
        if self._sync_each_write:
            self.segment.sync()

    def _begin_segment(self, pending: PendingRecord) -> None:
        self.lease.ordinal += 1
        name = SegmentName(self.lease.ordinal, pending.sequence)
        records = b"".join((*self._carried_frames(name.first_sequence), pending.data))
        segment = OpenSegment.create(self.disk, self.folder, name, records)
        self.retire_segment()
        self.segment = segment
        self.remaining_bytes = self._segment_bytes - len(records)
        self.segments_created += 1
        self.written_segments.add(segment.path, name)
        if self._sync_each_write:
            is_sound = False
            try:
                segment.sync()
                self.sync_directories()
                is_sound = True
            finally:
                if not is_sound:  # a power cut may remove the file with all later records
                    self.retire_segment()

    def sync_directories(self) -> None:
        """Sync the directory entries of the segment, the stream and the journal."""
        for path in (self.folder, self.directory, self.directory.rpartition("/")[0] or "/"):
            self.disk.sync_path(path)

    def _carried_frames(self, before_sequence: float = math.inf) -> list[bytes]:
        return [
            pack(sequence, payload, frame.CARRIED)
            for sequence, payload in self.open_starts
            if sequence < before_sequence
        ]

    def _write_and_sync(self, file: int, record: bytes) -> int:
        written = self.disk.write(file, record)
        try:
            self.disk.sync(file)
        except OSError as error:
            # After any sync error the state of the pages is unknown, so this segment must not be used again.
            raise OSError(errno.EIO, f"sync failed: {error}") from error
        return written
