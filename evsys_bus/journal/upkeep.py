"""`Upkeep`: periodic maintenance of the journal on its own thread, so that no publisher waits for a sync.

Each round writes pending records, closes old segments, syncs what was written, detects a removed directory, prunes old
segments and restores the reserve.
"""

import threading
from typing import Final

from evsys_bus.journal.recorder import Recorder
from evsys_bus.journal.retain import Removed, Retain, Retention
from evsys_bus.journal.segment import OpenSegment
from evsys_bus.tasks import Gate, start_thread


class Upkeep:
    """Runs the maintenance rounds and owns their thread."""

    def __init__(self, recorder: Recorder, *, syncs: bool, every_seconds: float, retain: Retain | None) -> None:
        self.sync_failures = 0
        self._recorder: Final = recorder
        self._syncs = syncs
        self._every = min(every_seconds, threading.TIMEOUT_MAX)
        self._retention = (
            None if retain is None else Retention(recorder.disk, recorder.clock, recorder.directory, retain)
        )
        self.followers: frozenset[str] = frozenset()
        """Adapters that retention waits for, whether or not they are registered in the journal."""
        self._one_at_a_time = threading.RLock()  # reentrant like the recorder's lock
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
        """Start the thread."""
        self._thread = start_thread(self._run, "evsys-bus journal")

    def stop(self, timeout_seconds: float) -> bool:
        """Run a last round and close all files. Returns whether that finished in time and everything is synced."""
        self._stopping.open()
        if self._thread is None:
            return False
        self._thread.join(timeout_seconds)
        return self._ended and not self.sync_failures

    def abandon(self) -> None:
        """Request the end of the thread without waiting, because the writer was dropped and not closed."""
        self._abandoned = True
        self._stopping.open()

    def round(self) -> None:
        """Run one round."""
        recorder = self._recorder
        if recorder.state == "forked":
            return
        with self._one_at_a_time:
            if self._is_in_round:  # this is a signal handler that interrupted a round
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
            self._recorder.segments.look()  # so that the receipt also counts removed older segments
        self._round_or_say()
        if self._retention is not None:
            self._retention.log_removed(self._recorder.claim.stream, last=True)
        self._recorder.reserve.free()
        self._recorder.release()
        self._ended = True

    def _round_or_say(self) -> None:
        try:
            self.round()
        except Exception as error:  # isolation: without this thread nothing would be synced any more
            self._recorder.say("journal.upkeep_failed", error)

    def _part_with(self, segment: OpenSegment) -> None:
        """Let the next round close the segment.

        Called only after the sync, because Ctrl-C may interrupt a round anywhere.
        """
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
            # The state of pages that could not be written depends on the system: do not use this segment again.
            self.sync_failures += 1
            with self._recorder.lock:
                if self._recorder.segment is segment:
                    self._recorder.retire()
            self._recorder.say("journal.not_synced", error)

    def _sync_inherited(self) -> None:
        """Sync the segments of the previous writer, which may have crashed before it synced them."""
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
        """Whether the file still exists. If it was removed, its segment is retired and the directory created again."""
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
                recorder.begin_again()  # now, because couriers need the directory before the next record is written
            except OSError:
                pass  # writing the next record reports the error
        self._recorder.say("journal.removed", FileNotFoundError(f"{segment.path} was removed, with its events"))
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
