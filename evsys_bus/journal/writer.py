"""`JournalWriter`: appends each event by a single write.

append ── written completely ───────────────────── return            (no lock, two integers)
       └─ a new segment is due, or an error ────── `Recorder`        (under a lock, through the backlog)
in the background, on a thread ─────────────────── `Upkeep`          (sync, retry, prune)
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
"""The minimum time for the final sync, after pending records were retried until the deadline."""

Flush = Literal["never", "interval", "always"]
_Event = TypeVar("_Event")


class JournalWriter:
    """Appends the events of one process to its own stream.

    Only one thread at a time may append. All other methods may be called from any thread.

    Args:
        directory: The journal. It is created if it is missing, accessible to its owner only.
        rank: The rank of the process. A stream is continued only by writers of the same rank.
        family: Who writes the stream: a publishing process ("r") or a courier ("c").
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
        """The sequence of the next event. An envelope contains its own sequence, so read it before encoding."""
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
        """Lock a stream and start the maintenance thread.

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
        except BaseException:  # for example no thread can be started: let other writers have the stream
            recorder.state = "closed"
            self._upkeep.abandon()
            with recorder.lock:
                recorder.release()
            raise
        weakref.finalize(self, self._upkeep.abandon).atexit = False
        return self

    def appender(self, encode: Callable[[_Event, int, float], bytes]) -> Callable[[_Event, float], int]:
        """Make a fast append function: given an event and its time, it records the event and returns its sequence.

        The function raises what `append` and ``encode`` raise; the sequence then stays free.

        Args:
            encode: Encodes an event, given its sequence and time.
        """
        recorder = self._recorder

        def append(event: _Event, time: float) -> int:
            sequence = self.next_sequence
            payload = encode(event, sequence, time)
            body = pack_body(MARK, EVENT, len(payload), sequence) + payload  # frame.pack, without the call
            record = pack_sum(crc32(body)) + body
            # Before the write: if Ctrl-C comes between the two, a sequence is skipped; in the other order it would be
            # used for two events and readers would skip the second as a repeat. After all allocations, because these
            # may fail.
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
                            recorder.ready = False  # the next one starts a new segment
                        return sequence
                    refusal = taken
            self._append_with_care(Waiting(sequence, record, keep=False), refusal)
            return sequence

        return append

    def append(self, payload: bytes, *, keep: bool = False) -> int:
        """Record one event under `next_sequence` and return the sequence.

        Args:
            payload: The encoded envelope.
            keep: Whether the event is among the last to be dropped if too many are pending.

        Raises:
            UnrecordedError: The disk returned an error and ``on_unrecorded`` is ``raise``; the sequence stays free.
            ForkedBusError: The process was forked from the one that opened the journal.
            JournalClosedError: The journal is not open.
            MemoryError: There is not enough memory for the record; the sequence stays free.
        """
        if not keep:
            return self._append(payload, 0.0)
        sequence = self.next_sequence
        record = pack(sequence, payload)
        self.next_sequence = sequence + 1
        self._append_with_care(Waiting(sequence, record, keep), None)
        return sequence

    def append_start(self, payload: bytes, scope: str | None) -> int:
        """Append a start event, and repeat it at the beginning of each later segment until its scope ends.

        Args:
            payload: The encoded envelope.
            scope: The run; None for the experiment, which ends after all its runs.
        """
        sequence = self.append(payload, keep=True)
        self._recorder.starts.append((scope, sequence, payload))
        return sequence

    def append_end(self, payload: bytes, scope: str | None) -> int:
        """Append an end event and end its scope; None ends all scopes.

        On a full disk the reserve is released for the event.
        """
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
        """Skip the next sequence, for an event that cannot be recorded. It counts as lost."""
        self._recorder.backlog.lost += 1
        self.next_sequence += 1

    def wait_for(self, followers: Iterable[str]) -> None:
        """Make retention wait for these adapters, whether or not they are registered in the journal yet.

        Call it before the first append, with all adapters. Events that they have not received are then retained.
        """
        self._upkeep.followers = frozenset(followers)

    def flush(self) -> None:
        """Run one round of maintenance now: write pending records, sync, prune."""
        self._upkeep.round()

    def close(self, timeout_seconds: float = 5.0, again: Callable[[], bool] = lambda: False) -> bool:
        """Stop accepting events and sync everything. No append may be in progress.

        Pending records are written first. On a full disk the reserve is used for start and end events and the newest
        others; the rest is dropped and counted as lost.

        Args:
            timeout_seconds: After this time a disk that hangs is left to the maintenance thread.
            again: Called while the disk refuses the pending records: it pauses and returns whether to retry before the
                reserve is used.

        Returns:
            Whether all events of this writer are synced to disk.
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
                    least = _SYNC_SECONDS  # the retries may use up all of the timeout
                    recorder.work_off()
            finally:
                recorder.lock.release()
        if recorder.state != "closed":
            return False
        ended = self._upkeep.stop(max(least, deadline - recorder.clock.monotonic()))
        return ended and not self.unrecorded and not self.lost

    @property
    def directory(self) -> str:
        """The path of the journal."""
        return self._recorder.directory

    @property
    def stream(self) -> str:
        """The name of the stream. Empty before the journal was opened."""
        return self._recorder.claim.stream

    @property
    def recorded(self) -> int:
        """How many events this writer has written to disk."""
        return self.next_sequence - self._first - self.unrecorded - self.lost

    @property
    def unrecorded(self) -> int:
        """How many events are pending in memory."""
        return len(self._recorder.backlog)

    @property
    def lost(self) -> int:
        """How many events were dropped, or were in segments that somebody removed."""
        recorder = self._recorder
        return recorder.backlog.lost + recorder.segments.removed(self.next_sequence - len(recorder.backlog))

    @property
    def removed(self) -> Removed:
        """What retention has removed."""
        return self._upkeep.removed

    @property
    def failures(self) -> int:
        """How many errors the disk has returned, for events, syncs and new segments."""
        return self._recorder.failures

    @property
    def trouble(self) -> OSError | None:
        """The last error of the disk while events are pending; otherwise None."""
        return self._recorder.refusal if self._recorder.backlog else None

    @property
    def written_bytes(self) -> int:
        """How many bytes this writer has written."""
        return self._recorder.written_bytes

    @property
    def segment(self) -> str | None:
        """The path of the current segment."""
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
    """Return a payload that is already encoded."""
    return payload


_open: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


def _disown_all() -> None:
    for recorder in list(_open):
        recorder.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
