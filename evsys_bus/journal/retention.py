"""Removing old segments: those over the limits whose events every registered adapter is finished with.

An adapter is registered if it has a cursor or a spec in the journal, or if the writing program names it. Without a
cursor it has received nothing. An adapter that was removed from the config still counts until it is forgotten.

Older streams of the writer's rank and family that no process writes count as well. They are left by kills, power cuts
and other machines. They are removed first, and nothing of a stream is removed before all older ones are empty:
otherwise a start of training could remain while later rows are removed, and an adapter that starts again would cut
those rows from its output. One segment without events remains of an older stream, to record how many events it had.
"""

import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise, takewhile
from typing import Final, NamedTuple, cast

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.disk import Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import Cursor, CursorStore, SpecSummary
from evsys_bus.journal.layout import Family, SegmentName
from evsys_bus.journal.segment import OpenSegment, read_next_sequence

LOG_SECONDS: Final = 60.0
"""Between two log lines about removed segments."""


class RetentionPolicy(msgspec.Struct, frozen=True):
    """Limits for the streams of one rank. None means no limit."""

    max_bytes: int | None = None
    """Remove the oldest segments while all streams together are larger, those of the oldest stream first."""
    max_age_seconds: float | None = None
    """Remove segments that were last written longer ago."""


class RemovedCounts(msgspec.Struct):
    """Counts of what retention has removed."""

    segments: int = 0
    events: int = 0
    bytes: int = 0
    up_to: int = 0
    """The sequence of the last event."""


class _FinishedSegment(NamedTuple):
    """A segment that is no longer written."""

    name: SegmentName
    size: int
    last_sequence: int
    """The sequence of its last event."""
    is_newest: bool = False
    """Whether it is the last segment of a stream that no process writes."""


class RetentionManager:
    """Removes old segments from the stream of a writer and from older ones, and counts them.

    Args:
        disk: The file system.
        clock: The clocks.
        directory: The journal.
        policy: The limits.
    """

    def __init__(self, disk: Disk, clock: Clock, directory: str, policy: RetentionPolicy) -> None:
        self.removed: Final = RemovedCounts()
        self._disk: Final = disk
        self._clock: Final = clock
        self._directory: Final = directory
        self._policy: Final = policy
        self._cursors: Final = CursorStore(directory, disk)
        self._sizes: dict[SegmentName, int] = {}
        """Sizes of segments of the writer's stream."""
        self._older_streams: dict[str, list[_FinishedSegment]] = {}
        """The remaining segments of the older streams that no process writes."""
        self._warned_adapters: set[str] = set()
        """Removed adapters about which a warning was logged."""
        self._unlogged_counts: dict[str, RemovedCounts] = {}
        """Counts since the last log line, by stream."""
        self._next_log_time = 0.0

    def prune(self, stream: str, adapters: Collection[str] = ()) -> list[SegmentName]:
        """Remove old segments of this and older streams, oldest first. The newest segment of this stream stays.

        The cursors are read from their files, so they are durable before anything is removed.

        Args:
            stream: The writer's stream.
            adapters: Adapters to wait for, whether or not they are registered in the journal.

        Returns:
            The removed segments of the writer's stream.

        Raises:
            OSError: Something cannot be read now, so nothing was removed; or a segment could not be removed.
        """
        self._scan_older_streams(stream)
        own_segments, newest_size = self._list_own_segments(stream)
        total_bytes = newest_size + sum(
            each.size for segments in (*self._older_streams.values(), own_segments) for each in segments
        )
        min_positions = _MinPositions(self._cursors, adapters)
        removed: list[_FinishedSegment] = []
        for each, segments in (*self._older_streams.items(), (stream, own_segments)):
            expired = self._expired_segments(each, segments, total_bytes)
            removable = self._acknowledged_segments(each, expired, min_positions) if expired else []
            removed = (
                self._remove_segments(each, removable)
                if each == stream
                else self._remove_from_older_stream(each, removable)
            )
            total_bytes -= sum(segment.size for segment in removed)
            del segments[: len(removed)]
            if segments and each != stream:
                removed = []
                break
        self.log_removed(stream)
        return [segment.name for segment in removed]

    def log_removed(self, stream: str, *, is_final: bool = False) -> None:
        """Log what was removed since the last log line, at most once in `LOG_SECONDS` unless ``is_final``.

        All older streams are reported in one line.
        """
        now, pending_counts = self._clock.monotonic(), self._unlogged_counts
        if not pending_counts or (now < self._next_log_time and not is_final):
            return
        self._next_log_time, self._unlogged_counts = now + LOG_SECONDS, {}
        own_counts = pending_counts.pop(stream, None)
        if pending_counts:
            counts = {
                field: sum(getattr(each, field) for each in pending_counts.values())
                for field in ("segments", "events", "bytes")
            }
            log().info("journal.segments_removed", older_streams=len(pending_counts), **counts, why="retain")
        if own_counts is not None:
            log().info("journal.segments_removed", stream=stream, **msgspec.structs.asdict(own_counts), why="retain")

    def _scan_older_streams(self, stream: str) -> None:
        """List the segments of older streams of the rank and family that no process writes, once per stream.

        Also removes the reserve file that a killed writer left.
        """
        same_rank = layout.list_streams(self._disk, self._directory, layout.rank_of(stream), cast("Family", stream[0]))
        older = [each for each in same_rank if layout.stream_sort_key(each) < layout.stream_sort_key(stream)]
        previous, self._older_streams = self._older_streams, {}
        for each in older:
            if each in previous:
                self._older_streams[each] = previous[each]
                continue
            lock = self._disk.lock(f"{self._directory}/{each}/{layout.LOCK}")
            if lock is None:
                continue
            try:
                with suppress(FileNotFoundError):
                    self._disk.remove(f"{self._directory}/{each}/{layout.RESERVE}")
                self._older_streams[each] = self._list_unowned_segments(each)
            finally:
                self._disk.close(lock)

    def _list_unowned_segments(self, stream: str) -> list[_FinishedSegment]:
        """The segments of a stream that no process writes; empty if only one without events is left."""
        folder = f"{self._directory}/{stream}"
        names = layout.list_segments(self._disk, folder)
        sizes = {name: self._disk.size(f"{folder}/{name}") for name in names}
        found = [
            _FinishedSegment(name, sizes[name], next_name.first_sequence - 1) for name, next_name in pairwise(names)
        ]
        if names and sizes[names[-1]] > _EMPTY_SEGMENT_BYTES:
            found.append(_FinishedSegment(names[-1], sizes[names[-1]], 0, is_newest=True))
        return found

    def _list_own_segments(self, stream: str) -> tuple[list[_FinishedSegment], int]:
        """The finished segments of the writer's stream, and the size of its newest one."""
        folder = f"{self._directory}/{stream}"
        names = layout.list_segments(self._disk, folder)
        self._sizes = {name: self._segment_size(folder, name) for name in names[:-1]}
        found = [
            _FinishedSegment(name, self._sizes[name], next_name.first_sequence - 1)
            for name, next_name in pairwise(names)
        ]
        return found, sum(self._disk.size(f"{folder}/{name}") for name in names[-1:])

    def _expired_segments(
        self, stream: str, segments: list[_FinishedSegment], total_bytes: int
    ) -> list[_FinishedSegment]:
        """The segments over the limits, oldest first, given the total size of all streams."""
        max_bytes, expired = self._policy.max_bytes, list[_FinishedSegment]()
        for index, each in enumerate(segments):
            is_over_size = max_bytes is not None and total_bytes > max_bytes
            if not is_over_size and not self._is_too_old(f"{self._directory}/{stream}/{each.name}"):
                break
            if each.is_newest and not each.last_sequence:
                segments[index] = each._replace(last_sequence=self._read_last_sequence(stream, each.name))
            total_bytes -= each.size
            expired.append(segments[index])
        return expired

    def _read_last_sequence(self, stream: str, name: SegmentName) -> int:
        """The sequence of the last event up to the end of a segment."""
        try:
            return max(name.first_sequence, read_next_sequence(self._disk, f"{self._directory}/{stream}", name)) - 1
        except JournalVersionError as error:
            raise OSError(str(error)) from error  # the number of events is unknown

    def _remove_from_older_stream(self, stream: str, segments: Sequence[_FinishedSegment]) -> list[_FinishedSegment]:
        """Remove segments of an older stream, unless a process has locked it. Returns the removed ones."""
        lock = self._disk.lock(f"{self._directory}/{stream}/{layout.LOCK}") if segments else None
        if lock is None:
            return []
        try:
            return self._remove_segments(stream, segments)
        finally:
            self._disk.close(lock)

    def _remove_segments(self, stream: str, segments: Sequence[_FinishedSegment]) -> list[_FinishedSegment]:
        removed: list[_FinishedSegment] = []
        for each in segments:
            try:
                if each.is_newest:
                    self._append_empty_segment(stream, each)
                self._disk.remove(f"{self._directory}/{stream}/{each.name}")
            except OSError:
                if not removed:
                    raise
                break  # report what was removed; the next round raises the error
            removed.append(each)
            for counts in (self.removed, self._unlogged_counts.setdefault(stream, RemovedCounts())):
                counts.segments += 1
                counts.events += each.last_sequence - each.name.first_sequence + 1
                counts.bytes += each.size
                counts.up_to = each.last_sequence
        if removed:
            with suppress(OSError):  # without it a power cut may restore some segments, which costs only space
                self._disk.sync_path(f"{self._directory}/{stream}")
        return removed

    def _append_empty_segment(self, stream: str, segment: _FinishedSegment) -> None:
        """Create a segment without events after the last one, so that no sequence is used twice."""
        folder, next_sequence = f"{self._directory}/{stream}", segment.last_sequence + 1
        name, closed_frame = (
            SegmentName(segment.name.ordinal + 1, next_sequence),
            frame.pack(next_sequence, b"", frame.CLOSED),
        )
        empty_segment = OpenSegment.create(self._disk, folder, name, closed_frame)
        try:
            empty_segment.sync()
        finally:
            empty_segment.close()
        self._disk.sync_path(folder)

    def _segment_size(self, folder: str, name: SegmentName) -> int:
        cached = self._sizes.get(name)
        return self._disk.size(f"{folder}/{name}") if cached is None else cached

    def _is_too_old(self, path: str) -> bool:
        max_age_seconds = self._policy.max_age_seconds
        return max_age_seconds is not None and self._clock.wall() - self._disk.modified(path) > max_age_seconds

    def _acknowledged_segments(
        self, stream: str, expired: list[_FinishedSegment], min_positions: "_MinPositions"
    ) -> list[_FinishedSegment]:
        """The segments whose events all adapters that receive the stream are finished with."""
        last_removable, unsubscribed = min_positions.min_position(stream, expired)
        if unsubscribed:
            self._warn_about_unsubscribed(stream, expired, last_removable, unsubscribed)
        last_removable = min([last_removable, *unsubscribed.values()])
        return list(takewhile(lambda each: each.last_sequence <= last_removable, expired))

    def _warn_about_unsubscribed(
        self, stream: str, expired: list[_FinishedSegment], last_removable: int, unsubscribed: Mapping[str, int]
    ) -> None:
        """Warn once about each removed adapter that prevents the removal of segments."""
        for name, position in unsubscribed.items():
            retained_sizes = [each.size for each in expired if position < each.last_sequence <= last_removable]
            if retained_sizes and name not in self._warned_adapters:
                self._warned_adapters.add(name)
                fix = shlex.join(["evsys-bus", "forget", name, self._directory])
                facts = {
                    "follower": name,
                    "stream": stream,
                    "segments": len(retained_sizes),
                    "bytes": sum(retained_sizes),
                }
                why = "it was removed from the config before these events were delivered to it"
                log().warning("journal.kept_for_left_follower", **facts, why=why, fix=fix)


class _MinPositions:
    """The positions of all adapters in this round. Each cursor is read once.

    A spec is read only for an adapter that prevents the removal of a segment.

    Args:
        cursors: The cursors of the journal.
        adapters: Adapters to wait for in any case.
    """

    def __init__(self, cursors: CursorStore, adapters: Collection[str]) -> None:
        self._cursors = cursors
        self._adapters = adapters
        self._cursors_by_adapter: dict[str, Cursor] | None = None
        self._spec_summaries: dict[str, SpecSummary] = {}

    def min_position(self, stream: str, expired: Sequence[_FinishedSegment]) -> tuple[int, dict[str, int]]:
        """The sequence that all adapters in use have reached, and the positions of adapters removed from the config.

        Raises:
            OSError: A cursor or spec cannot be read now.
        """
        if self._cursors_by_adapter is None:
            names = sorted({*self._cursors.registered_adapters(), *self._adapters})
            self._cursors_by_adapter = {name: self._cursors.load_readonly(name) for name in names}
        last_removable = expired[-1].last_sequence
        unsubscribed: dict[str, int] = {}
        for name, cursor in self._cursors_by_adapter.items():
            position = cursor.finished_sequence(stream)
            if position >= last_removable:
                continue
            summary = self._spec_summaries.get(name)
            if summary is None:
                summary = self._spec_summaries[name] = self._cursors.load_spec_summary(name)
            if not summary.includes_stream(stream):
                continue
            if summary.unsubscribed_at is not None and name not in self._adapters:
                unsubscribed[name] = position
            else:
                last_removable = min(last_removable, position)
            if last_removable < expired[0].last_sequence:
                return last_removable, {}
        return last_removable, unsubscribed


_EMPTY_SEGMENT_BYTES: Final = len(frame.pack_segment_header() + frame.pack(1, b"", frame.CLOSED))
"""The maximum size of a segment without events."""
