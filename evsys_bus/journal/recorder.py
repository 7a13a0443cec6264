"""`Recorder`: everything about writing a record beyond the plain append.

It handles the start of a segment, errors of the disk and a removed directory. The record is put into the backlog, and
the backlog is written in order to whichever segment accepts it. All of this is under one lock. The plain append
(`JournalWriter.append`) takes no lock and is allowed while ``ready`` is true.
"""

import errno
import math
import threading
from collections.abc import Callable
from typing import Any, Final, Literal

from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.disk import Disk
from evsys_bus.errors import ForkedBusError, JournalClosedError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.backlog import Backlog, Waiting
from evsys_bus.journal.begun import Begun
from evsys_bus.journal.claim import Claim, hold
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.frame import pack
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.reserve import Reserve
from evsys_bus.journal.segment import OpenSegment

_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})
_OVERDUE_SHARE: Final = 8
"""If a new segment cannot be created, the current one grows by an eighth before the next attempt."""


class Recorder:
    """Writes one stream and handles the errors of the disk."""

    def __init__(
        self, disk: Disk, clock: Clock, directory: str, *, segment_bytes: int, synced: bool, backlog: Backlog
    ) -> None:
        self.disk: Final = disk
        self.clock: Final = clock
        self.directory: Final = directory
        self.faults: Final = FaultLog()
        self.state: Literal["new", "open", "closed", "forked"] = "new"
        self.lock = threading.RLock()  # reentrant: a signal handler that flushes may interrupt its holder
        self.is_at_work = False
        """Checked under the lock: true only in a signal handler that interrupted `work_off`."""
        self.claim = Claim("", None)
        self.segment: OpenSegment | None = None
        self.retired: list[OpenSegment] = []
        """Finished segments, to be synced by `Upkeep` and closed one round later."""
        self.parting: list[OpenSegment] = []
        """Synced segments that stay open for one more round: a plain append may have started before."""
        self.backlog: Final = backlog
        self.reserve = Reserve(disk, "", 0)
        self.starts: list[tuple[str | None, int, bytes]] = []
        """Scope, sequence and payload of the start events whose scope is still open."""
        self.begun = 0
        """How many segments were created."""
        self.segments: Final = Begun(disk)
        """The segments that were created."""
        self.failures = 0
        """How many errors the disk has returned."""
        self.earlier_bytes = 0
        """Bytes in the previous segments."""
        self._segment_bytes = segment_bytes
        self._synced = synced
        self.refusal: OSError | None = None
        """The last error, until the disk accepts records again."""
        # Used by the plain append.
        self.ready = False
        self.file = -1
        self.left = 0
        self.write = self._write_synced if synced else disk.write

    @property
    def folder(self) -> str:
        """The directory of the stream."""
        return f"{self.directory}/{self.claim.stream}"

    @property
    def written_bytes(self) -> int:
        """How many bytes were written."""
        return self.earlier_bytes + (self._segment_bytes - self.left if self.segment else 0)

    def open(self, claim: Claim, reserve_bytes: int) -> None:
        """Start to accept records."""
        self.claim = claim
        self.reserve = Reserve(self.disk, f"{self.folder}/{layout.RESERVE}", reserve_bytes)
        self.reserve.hold()
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

    def take(self, waiting: Waiting, refusal: OSError | int | None) -> bool:
        """Write the record after the pending ones. Returns whether all of them are on disk.

        Args:
            waiting: The newest record.
            refusal: The outcome of the plain append: its error, how many bytes it wrote, or None if it was not tried.
        """
        if isinstance(refusal, int):
            refusal = self._complete(waiting.record, refusal)
            if refusal is None:
                return True
        if refusal is not None:
            self.refused(refusal)
        self.backlog.put(waiting)
        self.work_off()
        self.backlog.trim()
        return not self.backlog

    def work_off(self) -> None:
        """Write the pending records in order until the disk returns an error."""
        if not self.is_at_work:
            self.is_at_work = True
            try:
                self._work_off()
            finally:
                self.is_at_work = False

    def _work_off(self) -> None:
        while True:
            segment = self.segment
            try:
                while (waiting := self.backlog.first()) is not None:
                    self._write_one(waiting)
                    self.backlog.written()
            except MemoryError:
                self.refused(OSError(errno.ENOMEM, "there is not enough memory for the record"))
                return
            except OSError as error:
                self.refused(error)
                if segment is not None and self.segment is None:
                    continue  # that segment is retired; a new one may accept the record
                return
            break
        if self.refusal is not None:
            self.refusal = None
            self._quietly(self.faults.flush)
            self._quietly(lambda: log().info("journal.records_again", directory=self.directory, lost=self.backlog.lost))
        if self.segment is not None and self.left > 0:
            self.file = self.segment.file
            self.ready = True

    def refused(self, error: OSError) -> None:
        """Count and log an error of the disk. A segment that may be damaged by it is retired."""
        self.ready = False
        self.refusal = error
        if self.segment is not None and (not self.segment.clean or error.errno not in _DISK_FULL):
            self.retire()
        self.say("journal.unrecorded", error, waiting=len(self.backlog))

    def retire(self) -> None:
        """Stop writing to the current segment. The next record starts another one."""
        self.ready = False
        if self.segment is not None:
            self.earlier_bytes = self.written_bytes
            self.retired.append(self.segment)
            self.segment = None

    def sign_off(self, next_sequence: int) -> None:
        """Write the pending records and the closing frame.

        On a full disk the reserve is used, and what does not fit is dropped.
        """
        self.work_off()
        if self.backlog and self.reserve.free():
            spent = 0 if self.segment is not None else frame.HEAD_BYTES + sum(len(each) for each in self._carried())
            self.backlog.reduce(self.reserve.size - spent)
            self.work_off()
        self.ready = False
        self.state = "closed"
        if self.segment is not None and not self.backlog:
            try:
                self.segment.write(pack(next_sequence, b"", frame.CLOSED))
            except OSError:
                pass  # optional: without it the journal has the same events
        self._quietly(self.faults.flush)

    def release(self) -> None:
        """Close all files without syncing them, and unlock the stream."""
        self.retire()
        segments, self.retired, self.parting = [*self.retired, *self.parting], [], []
        lock, self.claim.lock = self.claim.lock, None
        for file in (*(each.file for each in segments), lock):
            try:
                if file is not None:
                    self.disk.close(file)
            except OSError:
                pass  # nothing more can be done

    def disown(self) -> None:
        """Detach a forked child from the journal. Takes no lock, because its owner may not exist in the child."""
        self.lock, self.is_at_work = threading.RLock(), False
        if self.state == "open":
            self.state = "forked"
        self.release()

    def say(self, phrase: str, error: Exception, **facts: Any) -> None:
        """Count and log a failure."""
        self.failures += 1
        self._quietly(lambda: self.faults.warn(phrase, self.directory, error=error, directory=self.directory, **facts))

    @staticmethod
    def _quietly(tell: Callable[[], None]) -> None:
        """Log, unless logging cannot be imported because no file can be opened. Failures are counted anyway."""
        try:
            tell()
        except (OSError, ImportError):
            pass

    def _complete(self, record: bytes, taken: int) -> OSError | None:
        """Write the rest of a record that was partly written, which also shows the error of the disk."""
        if self.segment is None:
            return OSError(errno.EIO, "the segment was retired during the write")
        try:
            self.segment.write(record, taken)
            if self._synced:
                self.segment.sync()
        except OSError as error:
            return error
        self.left -= len(record)
        return None

    def _write_one(self, waiting: Waiting) -> None:
        before = self.segment
        if before is not None and self.left <= 0:
            try:
                self._begin(waiting)
            except OSError as error:
                if self.segment is not before:  # the new one may be damaged, and the previous one is retired
                    raise
                # For example too many open files: one long segment is better than none.
                more = self._segment_bytes // _OVERDUE_SHARE
                self.earlier_bytes += more - self.left  # keeps `written_bytes` unchanged
                self.left = more
                self.say("journal.not_rotated", error)
            else:
                return
        if self.segment is None:
            self._begin(waiting)
            return
        self.segment.write(waiting.record)
        self.left -= len(waiting.record)
        if self._synced:
            self.segment.sync()

    def _begin(self, waiting: Waiting) -> None:
        self.claim.ordinal += 1
        name = SegmentName(self.claim.ordinal, waiting.sequence)
        records = b"".join((*self._carried(name.first), waiting.record))
        try:
            segment = OpenSegment.begin(self.disk, self.folder, name, records)
        except FileNotFoundError:
            self.begin_again()
            segment = OpenSegment.begin(self.disk, self.folder, name, records)
        self.retire()
        self.segment = segment
        self.left = self._segment_bytes - len(records)
        self.begun += 1
        self.segments.add(segment.path, name)
        if self._synced:
            is_sound = False
            try:
                segment.sync()
                self.sync_directories()
                is_sound = True
            finally:
                if not is_sound:  # a power cut may remove the file with all later records
                    self.retire()

    def sync_directories(self) -> None:
        """Sync the directory entries of the segment, the stream and the journal."""
        for path in (self.folder, self.directory, self.directory.rpartition("/")[0] or "/"):
            self.disk.sync_path(path)

    def _carried(self, before: float = math.inf) -> list[bytes]:
        return [pack(number, payload, frame.CARRIED) for _, number, payload in self.starts if number < before]

    def begin_again(self) -> None:
        """Create and lock the stream's directory again after somebody removed it."""
        self.segments.look()
        self.disk.make_directory(self.directory)
        self.disk.make_directory(self.folder)
        if self.claim.lock is not None and self.disk.is_at(f"{self.folder}/{layout.LOCK}", self.claim.lock):
            return  # only segments were removed
        lock, self.claim.lock = self.claim.lock, hold(self.disk, self.clock, self.directory, self.claim.stream)
        if lock is not None:
            self.disk.close(lock)

    def _write_synced(self, file: int, record: bytes) -> int:
        taken = self.disk.write(file, record)
        try:
            self.disk.sync(file)
        except OSError as error:
            # After any sync error the state of the pages is unknown, so this segment must not be used again.
            raise OSError(errno.EIO, f"sync failed: {error}") from error
        return taken
