"""`Maintenance`: periodic maintenance of the journal on its own thread, so that no publisher waits for a sync.

Each round writes pending records, closes old segments, syncs what was written, detects a removed directory, prunes old
segments and restores the reserve.
"""

import threading
from contextlib import AbstractContextManager, suppress
from typing import Final

from evsys_bus.journal.retention import RemovedCounts, RetentionManager, RetentionPolicy
from evsys_bus.journal.segment import OpenSegment
from evsys_bus.journal.slow_writer import SlowWriter
from evsys_bus.journal.stream_lock import record_inherited_synced
from evsys_bus.tasks import Gate, start_thread


class Maintenance:
    """Runs the maintenance rounds and owns their thread."""

    def __init__(
        self, slow_writer: SlowWriter, *, sync_enabled: bool, interval_seconds: float, policy: RetentionPolicy | None
    ) -> None:
        self.sync_failures = 0
        self._slow_writer: Final = slow_writer
        self._sync_enabled = sync_enabled
        self._interval_seconds = min(interval_seconds, threading.TIMEOUT_MAX)
        self._retention = (
            None
            if policy is None
            else RetentionManager(slow_writer.disk, slow_writer.clock, slow_writer.directory, policy)
        )
        self.required_adapters: frozenset[str] = frozenset()
        """Adapters that retention waits for, whether or not they are registered in the journal."""
        self._run_lock = threading.RLock()  # reentrant like the recorder's lock
        self._is_running = False
        self._stop_gate = Gate()
        self._thread: threading.Thread | None = None
        self._is_finished = False
        self._is_abandoned = False
        self._synced_bytes = 0
        self._synced_segments_created = -1
        self._pruned_segments_created = 0

    @property
    def removed(self) -> RemovedCounts:
        """What retention has removed."""
        return RemovedCounts() if self._retention is None else self._retention.removed

    def start(self) -> None:
        """Start the thread."""
        self._thread = start_thread(self._run_thread, "evsys-bus journal")

    def stop(self, timeout_seconds: float) -> bool:
        """Run a last round and close all files. Returns whether that finished in time and everything is synced."""
        self._stop_gate.open()
        if self._thread is None:
            return False
        self._thread.join(timeout_seconds)
        return self._is_finished and not self.sync_failures

    def abandon(self, timeout_seconds: float = 0.0) -> None:
        """Request the end of the thread because the writer was dropped and not closed; wait for it only this long."""
        self._is_abandoned = True
        self._stop_gate.open()
        if self._thread is not None and timeout_seconds:
            self._thread.join(timeout_seconds)

    def paused(self) -> AbstractContextManager[object]:
        """Let no round run inside the block, so that the error of a sync is seen there and not in a round."""
        return self._run_lock

    def run_once(self) -> None:
        """Run one round."""
        slow_writer = self._slow_writer
        if slow_writer.state == "forked":
            return
        with self._run_lock:
            if self._is_running:  # this is a signal handler that interrupted a round
                return
            self._is_running = True
            try:
                self._run_once_locked()
            finally:
                self._is_running = False

    def _run_once_locked(self) -> None:
        slow_writer = self._slow_writer
        with slow_writer.lock:
            if slow_writer.is_flushing:
                return
            if slow_writer.state == "open" and slow_writer.backlog:
                slow_writer.flush_backlog()
            retired_segments = [*slow_writer.retired_segments]
            closing_segments, slow_writer.closing_segments = slow_writer.closing_segments, []
            segment, written_bytes, segments_created = (
                slow_writer.segment,
                slow_writer.written_bytes,
                slow_writer.segments_created,
            )
        self._sync_inherited()
        for each in closing_segments:
            self._close_segment(each)
        for each in retired_segments:
            self._sync_segment(each)
            self._schedule_close(each)
        if segment is not None:
            if written_bytes != self._synced_bytes:
                self._sync_segment(segment)
            self._synced_bytes = written_bytes
            if not self._check_segment_exists(segment):
                return
        if segments_created != self._synced_segments_created and self._sync_directories():
            self._synced_segments_created = segments_created
        if slow_writer.state == "open":
            self._prune_and_reserve(segments_created)

    def _run_thread(self) -> None:
        while not self._stop_gate.wait(self._interval_seconds):
            self._run_once_logged()
        if self._is_abandoned:
            with self._slow_writer.lock:
                self._slow_writer.release()
            return
        self._run_once_logged()
        with self._slow_writer.lock:
            self._slow_writer.retire_segment()
            self._slow_writer.written_segments.check_removed()  # so that the receipt also counts removed older segments
        self._run_once_logged()
        if self._retention is not None:
            self._retention.log_removed(self._slow_writer.lease.stream, is_final=True)
        self._slow_writer.reserve.release()
        self._slow_writer.release()
        self._is_finished = True

    def _run_once_logged(self) -> None:
        try:
            self.run_once()
        except Exception as error:  # isolation: without this thread nothing would be synced any more
            self._slow_writer.log_failure("journal.upkeep_failed", error)

    def _schedule_close(self, segment: OpenSegment) -> None:
        """Let the next round close the segment.

        Called only after the sync, because Ctrl-C may interrupt a round anywhere.
        """
        slow_writer = self._slow_writer
        with slow_writer.lock:
            if segment in slow_writer.retired_segments:
                slow_writer.retired_segments.remove(segment)
                slow_writer.closing_segments.append(segment)

    def _sync_segment(self, segment: OpenSegment) -> None:
        if not self._sync_enabled:
            return
        try:
            segment.sync()
        except OSError as error:
            # The state of pages that could not be written depends on the system: do not use this segment again.
            self.sync_failures += 1
            with self._slow_writer.lock:
                if self._slow_writer.segment is segment:
                    self._slow_writer.retire_segment()
            self._slow_writer.log_failure("journal.not_synced", error)

    def _sync_inherited(self) -> None:
        """Sync the segments of previous writers, which may have crashed before they synced them; each only once."""
        slow_writer, lease = self._slow_writer, self._slow_writer.lease
        if not lease.inherited_segments:
            return
        while lease.inherited_segments:
            try:
                if self._sync_enabled:
                    slow_writer.disk.sync_path(lease.inherited_segments[-1])
            except OSError as error:
                lease.inherited_ordinal = 0  # the next writer tries again
                slow_writer.log_failure("journal.not_synced", error)
            lease.inherited_segments.pop()
        if self._sync_enabled and lease.inherited_ordinal:
            with suppress(OSError):  # the next writer syncs them again
                record_inherited_synced(slow_writer.disk, slow_writer.directory, lease)

    def _sync_directories(self) -> bool:
        try:
            if self._sync_enabled:
                self._slow_writer.sync_directories()
        except FileNotFoundError as error:
            with self._slow_writer.lock:
                self._slow_writer.handle_removal(error)
        except OSError as error:
            self._slow_writer.log_failure("journal.not_synced", error)
            return False
        return True

    def _close_segment(self, segment: OpenSegment) -> None:
        try:
            segment.close()
        except OSError as error:
            self._slow_writer.log_failure("journal.not_closed", error)

    def _check_segment_exists(self, segment: OpenSegment) -> bool:
        """Whether the file still exists. If it was removed, its segment is retired and its events are counted."""
        slow_writer = self._slow_writer
        try:
            if slow_writer.disk.is_at(segment.path, segment.file):
                return True
        except OSError as error:
            self._slow_writer.log_failure("journal.not_found", error)
            return True
        with slow_writer.lock:
            if slow_writer.segment is segment:
                slow_writer.retire_segment()
            slow_writer.handle_removal(FileNotFoundError(f"{segment.path} was removed, with its events"))
        return False

    def _prune_and_reserve(self, segments_created: int) -> None:
        slow_writer = self._slow_writer
        try:
            if self._retention is not None and segments_created != self._pruned_segments_created:
                removed = self._retention.prune(slow_writer.lease.stream, self.required_adapters)
                with slow_writer.lock:
                    slow_writer.written_segments.discard(removed)
                self._pruned_segments_created = segments_created
        except OSError as error:
            self._slow_writer.log_failure("journal.not_pruned", error)
        if not slow_writer.backlog:
            slow_writer.reserve.allocate()
