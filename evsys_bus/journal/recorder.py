"""`Recorder`: what happens to a record when the plain append will not do.

A segment is due or there is none yet, the disk refused something, the directory is gone: the record goes through the
backlog, in order, and the backlog is worked off into whatever segment takes it. All of this under one lock; the plain
append (`JournalWriter.append`) takes none, and is allowed while ``ready``.
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
"""A segment that could not be followed by a new one grows by an eighth before the next try."""


class Recorder:
    """The writing of one stream, with its troubles."""

    def __init__(
        self, disk: Disk, clock: Clock, directory: str, *, segment_bytes: int, synced: bool, backlog: Backlog
    ) -> None:
        self.disk: Final = disk
        self.clock: Final = clock
        self.directory: Final = directory
        self.faults: Final = FaultLog()
        self.state: Literal["new", "open", "closed", "forked"] = "new"
        self.lock = threading.RLock()  # a signal handler that flushes may come to it in the middle of it
        self.is_at_work = False
        """Read under the lock: true only in a signal handler that came into the middle of `work_off`."""
        self.claim = Claim("", None)
        self.segment: OpenSegment | None = None
        self.retired: list[OpenSegment] = []
        """Written to the end; upkeep syncs them, and a round later closes them."""
        self.parting: list[OpenSegment] = []
        """Synced, and open for one round more: a plain append may have begun before the segment was retired."""
        self.backlog: Final = backlog
        self.reserve = Reserve(disk, "", 0)
        self.starts: list[tuple[str | None, int, bytes]] = []
        """Scope, sequence and payload of the start events of what is still open."""
        self.begun = 0
        """How many segments were begun."""
        self.segments: Final = Begun(disk)
        """Which those are."""
        self.failures = 0
        """How often the disk refused something."""
        self.earlier_bytes = 0
        """In segments before this one."""
        self._segment_bytes = segment_bytes
        self._synced = synced
        self.refusal: OSError | None = None
        """What the disk said last, until it takes records again."""
        # What the plain append uses.
        self.ready = False
        self.file = -1
        self.left = 0
        self.write = self._write_synced if synced else disk.write

    @property
    def folder(self) -> str:
        """Where the stream's segments stand."""
        return f"{self.directory}/{self.claim.stream}"

    @property
    def written_bytes(self) -> int:
        """How much was written."""
        return self.earlier_bytes + (self._segment_bytes - self.left if self.segment else 0)

    def open(self, claim: Claim, reserve_bytes: int) -> None:
        """Take records from here on."""
        self.claim = claim
        self.reserve = Reserve(self.disk, f"{self.folder}/{layout.RESERVE}", reserve_bytes)
        self.reserve.hold()
        self.state = "open"

    def check_open(self) -> None:
        """Raises: ForkedBusError, JournalClosedError."""
        if self.state == "forked":
            raise ForkedBusError(
                "this journal belongs to the process that this one was forked from",
                fix="publish in the parent, or open a bus of its own in the child",
            )
        if self.state != "open":
            when = "before it was opened" if self.state == "new" else "after it was closed"
            raise JournalClosedError(f"append to the journal {when}", fix="append between open() and close()")

    def take(self, waiting: Waiting, refusal: OSError | int | None) -> bool:
        """Record it behind what waits; whether everything is on disk then.

        Args:
            waiting: The newest record.
            refusal: What came of the plain append: an error, how much was taken, or None if it was not tried.
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
        """Write what waits, in order, as far as the disk takes it."""
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
                self.refused(OSError(errno.ENOMEM, "there is no memory for it"))
                return
            except OSError as error:
                self.refused(error)
                if segment is not None and self.segment is None:
                    continue  # that segment takes no more; a new one may
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
        """Count what the disk said. A segment that may not be sound takes no more."""
        self.ready = False
        self.refusal = error
        if self.segment is not None and (not self.segment.clean or error.errno not in _DISK_FULL):
            self.retire()
        self.say("journal.unrecorded", error, waiting=len(self.backlog))

    def retire(self) -> None:
        """Write no more to this segment; the next record begins another one."""
        self.ready = False
        if self.segment is not None:
            self.earlier_bytes = self.written_bytes
            self.retired.append(self.segment)
            self.segment = None

    def sign_off(self, next_sequence: int) -> None:
        """The last words. On a full disk there is the reserve for what waits; what does not fit there is given up."""
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
                pass  # a journal without it reads the same; it only says that this was the end
        self._quietly(self.faults.flush)

    def release(self) -> None:
        """Close what is open, without a sync, and let the stream go."""
        self.retire()
        segments, self.retired, self.parting = [*self.retired, *self.parting], [], []
        lock, self.claim.lock = self.claim.lock, None
        for file in (*(each.file for each in segments), lock):
            try:
                if file is not None:
                    self.disk.close(file)
            except OSError:
                pass  # closing is all that was wanted

    def disown(self) -> None:
        """In a forked child: the journal stays with the parent. Takes no lock: who held it is not here."""
        self.lock, self.is_at_work = threading.RLock(), False
        if self.state == "open":
            self.state = "forked"
        self.release()

    def say(self, phrase: str, error: Exception, **facts: Any) -> None:
        """Count a failure, and log it."""
        self.failures += 1
        self._quietly(lambda: self.faults.warn(phrase, self.directory, error=error, directory=self.directory, **facts))

    @staticmethod
    def _quietly(tell: Callable[[], None]) -> None:
        """Logging is loaded when it is first needed; without a file left to load it with, the counts have to do."""
        try:
            tell()
        except (OSError, ImportError):
            pass

    def _complete(self, record: bytes, taken: int) -> OSError | None:
        """Write the rest of a record that the disk took in part, and so learn why."""
        if self.segment is None:
            return OSError(errno.EIO, "the segment was given up while it was written")
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
                if self.segment is not before:  # the new one is not sound, and the one before has ended
                    raise
                # Too many open files, say: one long segment is better than none.
                more = self._segment_bytes // _OVERDUE_SHARE
                self.earlier_bytes += more - self.left  # so that what was written stays what it was
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
                if not is_sound:  # a power cut may take the file with all that is written to it later
                    self.retire()

    def sync_directories(self) -> None:
        """Have the names of the segment, the stream and the journal on the medium."""
        for path in (self.folder, self.directory, self.directory.rpartition("/")[0] or "/"):
            self.disk.sync_path(path)

    def _carried(self, before: float = math.inf) -> list[bytes]:
        return [pack(number, payload, frame.CARRIED) for _, number, payload in self.starts if number < before]

    def begin_again(self) -> None:
        """Make the directory again that someone removed, and lock it again."""
        self.segments.look()
        self.disk.make_directory(self.directory)
        self.disk.make_directory(self.folder)
        if self.claim.lock is not None and self.disk.is_at(f"{self.folder}/{layout.LOCK}", self.claim.lock):
            return  # only segments are gone
        lock, self.claim.lock = self.claim.lock, hold(self.disk, self.clock, self.directory, self.claim.stream)
        if lock is not None:
            self.disk.close(lock)

    def _write_synced(self, file: int, record: bytes) -> int:
        taken = self.disk.write(file, record)
        try:
            self.disk.sync(file)
        except OSError as error:
            # Whatever it says, the pages are in doubt: not one that the same segment can recover from.
            raise OSError(errno.EIO, f"sync failed: {error}") from error
        return taken
