"""`JournalWriter`: one append, one write.

append ── the disk took it ──────────────────── return             (no lock, two integers)
       └─ a new segment is due, or a refusal ── `Recorder`         (under a lock, through the backlog)
meanwhile, on a thread ──────────────────────── `Upkeep`           (sync, retry, prune)
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal, Self, TypeVar
from zlib import crc32

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.errors import JournalOpenError, UnrecordedError
from evsys_bus.journal.backlog import Backlog, Waiting
from evsys_bus.journal.claim import claim
from evsys_bus.journal.clock import Clock, OsClock
from evsys_bus.journal.frame import EVENT, MARK, pack, pack_body, pack_sum
from evsys_bus.journal.layout import Family
from evsys_bus.journal.recorder import Recorder
from evsys_bus.journal.retain import Removed, Retain
from evsys_bus.journal.upkeep import Upkeep

_SYNC_SECONDS: Final = 1.0
"""What is left for the disk to sync, after what waited was tried until the deadline."""

Flush = Literal["never", "interval", "always"]
_Event = TypeVar("_Event")


class JournalWriter:
    """Appends the events of one process to a stream of its own.

    One thread at a time appends; everything else may be called from any thread.

    Args:
        directory: The journal; made, for the owner alone, if it is not there.
        rank: A stream is continued by writers of the same rank only.
        family: Whose stream it is: a publishing process's ("r"), or a courier's ("c").
        flush: What a power cut may take: ``always`` nothing that was appended, ``interval`` the last ``flush_seconds``,
            ``never`` what the system has not written by itself. The end of the process takes nothing in any case.
        flush_seconds: Between two rounds of upkeep.
        segment_bytes: A segment that is larger is followed by a new one.
        retain: What may be removed once every follower is done with it; by default nothing.
        on_unrecorded: When the disk does not take an event: let it wait in memory, or raise.
        max_unrecorded: How many may wait; after that the oldest are lost, and counted.
        max_unrecorded_bytes: And how large they may be together.
        reserve_bytes: Room on disk that is kept for the end events; 0 for none.
        disk: The file system.
        clock: The clocks.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int = 0,
        family: Family = "r",
        flush: Flush = "interval",
        flush_seconds: float = 1.0,
        segment_bytes: int = 64 << 20,
        retain: Retain | None = None,
        on_unrecorded: Literal["queue", "raise"] = "queue",
        max_unrecorded: int = 10_000,
        max_unrecorded_bytes: int = 64 << 20,
        reserve_bytes: int = 1 << 20,
        disk: Disk | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.next_sequence = 1
        """What the next append will be given; an envelope holds its own sequence, so ask before."""
        self._rank = rank
        self._family: Family = family
        self._raises = on_unrecorded == "raise"
        self._reserve_bytes = reserve_bytes
        self._first = 1
        self._recorder: Final = Recorder(
            OsDisk() if disk is None else disk,
            OsClock() if clock is None else clock,
            str(Path(directory).absolute()),
            segment_bytes=segment_bytes,
            synced=flush == "always",
            backlog=Backlog(max_unrecorded, max_unrecorded_bytes),
        )
        self._append: Final = self.appender(_encoded)
        self._upkeep: Final = Upkeep(self._recorder, syncs=flush != "never", every_seconds=flush_seconds, retain=retain)

    def open(self) -> Self:
        """Find the stream to write, and start the upkeep.

        Raises:
            JournalOpenError: The directory cannot be written.
        """
        recorder = self._recorder
        try:
            claimed = claim(recorder.disk, recorder.clock, recorder.directory, self._rank, self._family)
        except OSError as error:
            raise JournalOpenError(
                f"the journal {recorder.directory} cannot be written: {error.strerror or error}",
                fix="give a directory that this user can write, with space left",
            ) from error
        self._first = self.next_sequence = claimed.next_sequence
        try:
            recorder.open(claimed, self._reserve_bytes)
            _open.add(recorder)
            self._upkeep.start()
        except BaseException:  # no thread is to be had, say: the stream is for others to write
            recorder.state = "closed"
            self._upkeep.abandon()
            with recorder.lock:
                recorder.release()
            raise
        weakref.finalize(self, self._upkeep.abandon).atexit = False
        return self

    def appender(self, encode: Callable[[_Event, int, float], bytes]) -> Callable[[_Event, float], int]:
        """What appends the many: given an event and its time, it records that, and returns its sequence.

        The plain append stands here alone, and in one frame with what it needs. It raises as `append`, and what
        ``encode`` raises; the sequence then stays free.

        Args:
            encode: Given the event, the sequence that it gets, and its time.
        """
        recorder = self._recorder

        def append(event: _Event, time: float) -> int:
            sequence = self.next_sequence
            payload = encode(event, sequence, time)
            body = pack_body(MARK, EVENT, len(payload), sequence) + payload  # frame.pack, without the call
            record = pack_sum(crc32(body)) + body
            # Before the write: if Ctrl-C comes between the two, a number is left out; the other way round it would be
            # given to two events, and the second be taken for a repeat. Behind what takes memory, of which there may
            # be none.
            self.next_sequence = sequence + 1
            refusal: OSError | int | None = None
            if recorder.ready:
                try:
                    taken = recorder.write(recorder.file, record)
                except OSError as error:
                    refusal = error
                else:
                    if taken == len(record):
                        recorder.left = left = recorder.left - taken
                        if left <= 0:
                            recorder.ready = False  # the next one begins a new segment
                        return sequence
                    refusal = taken
            self._append_with_care(Waiting(sequence, record, keep=False), refusal)
            return sequence

        return append

    def append(self, payload: bytes, *, keep: bool = False) -> int:
        """Record one event under `next_sequence`, and return that.

        Args:
            payload: The encoded envelope.
            keep: If it has to wait, and not all can be kept: give it up last.

        Raises:
            UnrecordedError: The disk did not take it, and ``on_unrecorded`` is ``raise``; the sequence stays free.
            ForkedBusError: In a child process forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
            MemoryError: There is not enough for the record; the sequence stays free.
        """
        if not keep:
            return self._append(payload, 0.0)
        sequence = self.next_sequence
        record = pack(sequence, payload)
        self.next_sequence = sequence + 1
        self._append_with_care(Waiting(sequence, record, keep), None)
        return sequence

    def append_start(self, payload: bytes, scope: str | None) -> int:
        """As `append`; and each later segment begins with this event, until the scope ends.

        Args:
            payload: The encoded envelope.
            scope: The run; None for the experiment, which ends after all its runs.
        """
        sequence = self.append(payload, keep=True)
        self._recorder.starts.append((scope, sequence, payload))
        return sequence

    def append_end(self, payload: bytes, scope: str | None) -> int:
        """As `append`; on a full disk the reserve is given up for it. Ends the scope; None ends all of them."""
        recorder = self._recorder
        recorder.starts[:] = [each for each in recorder.starts if scope is not None and each[0] != scope]
        try:
            sequence = self.append(payload, keep=True)
        except UnrecordedError:
            if not recorder.reserve.free():
                raise
            return self.append(payload, keep=True)
        if recorder.backlog:
            with recorder.lock:
                if recorder.backlog.bytes < recorder.reserve.size and recorder.reserve.free():
                    recorder.work_off()
        return sequence

    def give_up(self) -> None:
        """Leave out the next sequence, for an event that cannot be recorded at all; it counts as lost."""
        self._recorder.backlog.lost += 1
        self.next_sequence += 1

    def wait_for(self, followers: Iterable[str]) -> None:
        """Have `retain` wait for these, whether or not the journal has them on record yet.

        To be called before the first append, with all who are followed; what they have not had stays then.
        """
        self._upkeep.followers = frozenset(followers)

    def flush(self) -> None:
        """One round of upkeep now: write what waits, sync, prune."""
        self._upkeep.round()

    def close(self, timeout_seconds: float = 5.0, again: Callable[[], bool] = lambda: False) -> bool:
        """Take no more, and have everything on the medium. No append may be in progress.

        What still waits is written first, on a full disk into the reserve: of what does not fit there the starts, ends
        and newest others are written, and the rest is lost, and counted.

        Args:
            timeout_seconds: A disk that hangs is left to the upkeep's thread after that.
            again: Asked while the disk refuses what waits: it pauses, and says whether to try once more before the
                reserve is used.

        Returns:
            Whether all that this writer was given is on the medium.
        """
        recorder = self._recorder
        deadline = recorder.clock.monotonic() + timeout_seconds
        least = 0.0
        while recorder.state == "open":
            last = not recorder.backlog or not again()
            left = deadline - recorder.clock.monotonic()
            if not recorder.lock.acquire(timeout=max(0.0, min(left, threading.TIMEOUT_MAX))):
                return False
            try:
                if last:
                    recorder.sign_off(self.next_sequence)
                else:
                    least = _SYNC_SECONDS  # the tries may take all the time there is
                    recorder.work_off()
            finally:
                recorder.lock.release()
        if recorder.state != "closed":
            return False
        ended = self._upkeep.stop(max(least, deadline - recorder.clock.monotonic()))
        return ended and not self.unrecorded and not self.lost

    @property
    def directory(self) -> str:
        """Where the journal is."""
        return self._recorder.directory

    @property
    def stream(self) -> str:
        """The name of the stream; known once the journal was opened."""
        return self._recorder.claim.stream

    @property
    def recorded(self) -> int:
        """How many events this writer has given to the disk."""
        return self.next_sequence - self._first - self.unrecorded - self.lost

    @property
    def unrecorded(self) -> int:
        """How many wait in memory."""
        return len(self._recorder.backlog)

    @property
    def lost(self) -> int:
        """How many were given up, or were in segments that somebody removed."""
        recorder = self._recorder
        return recorder.backlog.lost + recorder.segments.removed(self.next_sequence - len(recorder.backlog))

    @property
    def removed(self) -> Removed:
        """What `retain` has removed."""
        return self._upkeep.removed

    @property
    def failures(self) -> int:
        """How often the disk refused something: events, syncs, rotations, all together."""
        return self._recorder.failures

    @property
    def trouble(self) -> OSError | None:
        """What the disk says, while events wait."""
        return self._recorder.refusal if self._recorder.backlog else None

    @property
    def written_bytes(self) -> int:
        """How much this writer has written."""
        return self._recorder.written_bytes

    @property
    def segment(self) -> str | None:
        """The path of the segment that is being written."""
        segment = self._recorder.segment
        return None if segment is None else segment.path

    def _append_with_care(self, waiting: Waiting, refusal: OSError | int | None) -> None:
        recorder = self._recorder
        self.next_sequence = waiting.sequence
        recorder.check_open()
        with recorder.lock:
            recorder.check_open()
            self.next_sequence = waiting.sequence + 1
            if recorder.take(waiting, refusal) or not self._raises:
                return
            recorder.backlog.withdraw()
            self.next_sequence = waiting.sequence
        raise UnrecordedError(
            f"the journal {recorder.directory} did not take an event",
            why=str(recorder.refusal),
            fix='make room; or let events wait in memory with on_unrecorded="queue"',
        ) from recorder.refusal


def _encoded(payload: bytes, _: int, __: float) -> bytes:
    """What is encoded already."""
    return payload


_open: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


def _disown_all() -> None:
    for recorder in list(_open):
        recorder.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
