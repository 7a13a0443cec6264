"""`Upkeep`: what the journal needs now and then, on a thread of its own so that no publisher waits for a disk to sync.

Each round writes what waits, closes old segments, syncs what was written, notices a removed directory, removes what may
go, and takes the reserve again.
"""

import threading
from typing import Final

from evsys_bus.journal.recorder import Recorder
from evsys_bus.journal.retain import Removed, Retain, Retention
from evsys_bus.journal.segment import OpenSegment
from evsys_bus.tasks import Gate, start_thread


class Upkeep:
    """The rounds, and the thread that makes them."""

    def __init__(self, recorder: Recorder, *, syncs: bool, every_seconds: float, retain: Retain | None) -> None:
        self.sync_failures = 0
        self._recorder: Final = recorder
        self._syncs = syncs
        self._every = min(every_seconds, threading.TIMEOUT_MAX)
        self._retention = (
            None if retain is None else Retention(recorder.disk, recorder.clock, recorder.directory, retain)
        )
        self.followers: frozenset[str] = frozenset()
        """Who is to be waited for, whether or not the journal has them on record."""
        self._one_at_a_time = threading.RLock()  # as the recorder's
        self._is_in_round = False
        self._stopping = Gate()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._abandoned = False
        self._synced_bytes = 0
        self._synced_begun = -1
        self._pruned_begun = 0

    @property
    def removed(self) -> Removed:
        """What retention has removed."""
        return Removed() if self._retention is None else self._retention.removed

    def start(self) -> None:
        """Make rounds from now on."""
        self._thread = start_thread(self._run, "evsys-bus journal")

    def stop(self, timeout_seconds: float) -> bool:
        """Make a last round, and close everything; whether that ended in time and all is on the medium."""
        self._stopping.open()
        if self._thread is None:
            return False
        self._thread.join(timeout_seconds)
        return self._ended and not self.sync_failures

    def abandon(self) -> None:
        """End soon, without waiting: the writer was dropped and not closed. What it appended stays as it is."""
        self._abandoned = True
        self._stopping.open()

    def round(self) -> None:
        """One round."""
        recorder = self._recorder
        if recorder.state == "forked":
            return
        with self._one_at_a_time:
            if self._is_in_round:  # a signal handler came into the middle of one
                return
            self._is_in_round = True
            try:
                self._round()
            finally:
                self._is_in_round = False

    def _round(self) -> None:
        recorder = self._recorder
        with recorder.lock:
            if recorder.is_at_work:
                return
            if recorder.state == "open" and recorder.backlog:
                recorder.work_off()
            retired = [*recorder.retired]
            parting, recorder.parting = recorder.parting, []
            segment, written, begun = recorder.segment, recorder.written_bytes, recorder.begun
        self._sync_inherited()
        for each in parting:
            self._close(each)
        for each in retired:
            self._sync(each)
            self._part_with(each)
        if segment is not None:
            if written != self._synced_bytes:
                self._sync(segment)
            self._synced_bytes = written
            if not self._is_there(segment):
                return
        if begun != self._synced_begun and self._sync_directory():
            self._synced_begun = begun
        if recorder.state == "open":
            self._make_room(begun)

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            self._round_or_say()
        if self._abandoned:
            with self._recorder.lock:
                self._recorder.release()
            return
        self._round_or_say()
        with self._recorder.lock:
            self._recorder.retire()
            self._recorder.segments.look()  # what the receipt says is true also of older ones
        self._round_or_say()
        if self._retention is not None:
            self._retention.log_removed(self._recorder.claim.stream, last=True)
        self._recorder.reserve.free()
        self._recorder.release()
        self._ended = True

    def _round_or_say(self) -> None:
        try:
            self.round()
        except Exception as error:  # a wall: without this thread nothing more would be synced
            self._recorder.say("journal.upkeep_failed", error)

    def _part_with(self, segment: OpenSegment) -> None:
        """Have the next round close it. Not before it is synced: a Ctrl-C may end a round at any line."""
        recorder = self._recorder
        with recorder.lock:
            if segment in recorder.retired:
                recorder.retired.remove(segment)
                recorder.parting.append(segment)

    def _sync(self, segment: OpenSegment) -> None:
        if not self._syncs:
            return
        try:
            segment.sync()
        except OSError as error:
            # What the system does with pages that it could not write is its own affair: leave them alone.
            self.sync_failures += 1
            with self._recorder.lock:
                if self._recorder.segment is segment:
                    self._recorder.retire()
            self._recorder.say("journal.not_synced", error)

    def _sync_inherited(self) -> None:
        """A power cut may come soon after the crash of the writer before."""
        inherited = self._recorder.claim.inherited
        while inherited:
            try:
                if self._syncs:
                    self._recorder.disk.sync_path(inherited[-1])
            except OSError as error:
                self._recorder.say("journal.not_synced", error)
            inherited.pop()

    def _sync_directory(self) -> bool:
        try:
            if self._syncs:
                self._recorder.sync_directories()
        except OSError as error:
            self._recorder.say("journal.not_synced", error)
            return False
        return True

    def _close(self, segment: OpenSegment) -> None:
        try:
            segment.close()
        except OSError as error:
            self._recorder.say("journal.not_closed", error)

    def _is_there(self, segment: OpenSegment) -> bool:
        """A file that was removed still takes every write; the next record goes to a new one."""
        recorder = self._recorder
        try:
            if recorder.disk.is_at(segment.path, segment.file):
                return True
        except OSError as error:
            self._recorder.say("journal.not_found", error)
            return True
        with recorder.lock:
            if recorder.segment is segment:
                recorder.retire()
            try:
                recorder.begin_again()  # now, not with the next record: couriers keep their books where a journal is
            except OSError:
                pass  # the next record will tell
        self._recorder.say("journal.removed", FileNotFoundError(f"{segment.path} was removed, with what it held"))
        return False

    def _make_room(self, begun: int) -> None:
        recorder = self._recorder
        try:
            if self._retention is not None and begun != self._pruned_begun:
                gone = self._retention.prune(recorder.claim.stream, self.followers)
                with recorder.lock:
                    recorder.segments.retired(gone)
                self._pruned_begun = begun
        except OSError as error:
            self._recorder.say("journal.not_pruned", error)
        if not recorder.backlog:
            recorder.reserve.hold()
