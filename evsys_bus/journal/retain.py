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
from evsys_bus.disk import NO_LOCKS, Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import Cursor, Cursors, Terms
from evsys_bus.journal.layout import Family, SegmentName
from evsys_bus.journal.scanning import next_sequence_in
from evsys_bus.journal.segment import OpenSegment

LOG_SECONDS: Final = 60.0
"""Between two log lines about removed segments."""


class Retain(msgspec.Struct, frozen=True):
    """Limits for the streams of one rank. None means no limit."""

    max_bytes: int | None = None
    """Remove the oldest segments while all streams together are larger, those of the oldest stream first."""
    max_age_seconds: float | None = None
    """Remove segments that were last written longer ago."""


class Removed(msgspec.Struct):
    """Counts of what retention has removed."""

    segments: int = 0
    events: int = 0
    bytes: int = 0
    up_to: int = 0
    """The sequence of the last event."""


class _Segment(NamedTuple):
    """A segment that is no longer written."""

    name: SegmentName
    size: int
    last: int
    """The sequence of its last event."""
    is_last: bool = False
    """Whether it is the last segment of a stream that no process writes."""


class Retention:
    """Removes old segments from the stream of a writer and from older ones, and counts them.

    Args:
        disk: The file system.
        clock: The clocks.
        directory: The journal.
        retain: The limits.
    """

    def __init__(self, disk: Disk, clock: Clock, directory: str, retain: Retain) -> None:
        self.removed: Final = Removed()
        self._disk: Final = disk
        self._clock: Final = clock
        self._directory: Final = directory
        self._retain: Final = retain
        self._cursors: Final = Cursors(directory, disk)
        self._sizes: dict[SegmentName, int] = {}
        """Sizes of segments of the writer's stream."""
        self._older: dict[str, list[_Segment]] = {}
        """The remaining segments of the older streams that no process writes."""
        self._warned: set[str] = set()
        """Removed adapters about which a warning was logged."""
        self._unlogged: dict[str, Removed] = {}
        """Counts since the last log line, by stream."""
        self._log_due = 0.0

    def prune(self, stream: str, followers: Collection[str] = ()) -> list[SegmentName]:
        """Remove old segments of this and older streams, oldest first. The newest segment of this stream stays.

        The cursors are read from their files, so they are durable before anything is removed.

        Args:
            stream: The writer's stream.
            followers: Adapters to wait for, whether or not they are registered in the journal.

        Returns:
            The removed segments of the writer's stream.

        Raises:
            OSError: Something cannot be read now, so nothing was removed; or a segment could not be removed.
        """
        self._look_at_older(stream)
        own, newest = self._segments_of(stream)
        total = newest + sum(each.size for segments in (*self._older.values(), own) for each in segments)
        passed = _Passed(self._cursors, followers)
        gone: list[_Segment] = []
        for each, segments in (*self._older.items(), (stream, own)):
            due = self._due(each, segments, total)
            may_go = self._passed(each, due, passed) if due else []
            gone = self._remove(each, may_go) if each == stream else self._remove_older(each, may_go)
            total -= sum(segment.size for segment in gone)
            del segments[: len(gone)]
            if segments and each != stream:
                gone = []
                break
        self.log_removed(stream)
        return [segment.name for segment in gone]

    def log_removed(self, stream: str, *, last: bool = False) -> None:
        """Log what was removed since the last log line, at most once in `LOG_SECONDS` unless ``last``.

        All older streams are reported in one line.
        """
        now, unlogged = self._clock.monotonic(), self._unlogged
        if not unlogged or (now < self._log_due and not last):
            return
        self._log_due, self._unlogged = now + LOG_SECONDS, {}
        own = unlogged.pop(stream, None)
        if unlogged:
            counts = {
                what: sum(getattr(each, what) for each in unlogged.values()) for what in ("segments", "events", "bytes")
            }
            log().info("journal.segments_removed", older_streams=len(unlogged), **counts, why="retain")
        if own is not None:
            log().info("journal.segments_removed", stream=stream, **msgspec.structs.asdict(own), why="retain")

    def _look_at_older(self, stream: str) -> None:
        """List the segments of older streams of the rank and family that no process writes, once per stream.

        Also removes the reserve file that a killed writer left.
        """
        of_rank = layout.streams(self._disk, self._directory, layout.rank_of(stream), cast("Family", stream[0]))
        older = [each for each in of_rank if layout.order_of(each) < layout.order_of(stream)]
        known, self._older = self._older, {}
        for each in older:
            if each in known:
                self._older[each] = known[each]
                continue
            try:
                lock = self._disk.lock(f"{self._directory}/{each}/{layout.LOCK}")
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._older[each] = []  # without locks it may be in use
                continue
            if lock is None:
                continue
            try:
                with suppress(FileNotFoundError):
                    self._disk.remove(f"{self._directory}/{each}/{layout.RESERVE}")
                self._older[each] = self._segments_left(each)
            finally:
                self._disk.close(lock)

    def _segments_left(self, stream: str) -> list[_Segment]:
        """The segments of a stream that no process writes; empty if only one without events is left."""
        folder = f"{self._directory}/{stream}"
        names = layout.segments(self._disk, folder)
        sizes = {name: self._disk.size(f"{folder}/{name}") for name in names}
        found = [_Segment(name, sizes[name], following.first - 1) for name, following in pairwise(names)]
        if names and sizes[names[-1]] > _EMPTY_BYTES:
            found.append(_Segment(names[-1], sizes[names[-1]], 0, is_last=True))
        return found

    def _segments_of(self, stream: str) -> tuple[list[_Segment], int]:
        """The finished segments of the writer's stream, and the size of its newest one."""
        folder = f"{self._directory}/{stream}"
        names = layout.segments(self._disk, folder)
        self._sizes = {name: self._size(folder, name) for name in names[:-1]}
        found = [_Segment(name, self._sizes[name], following.first - 1) for name, following in pairwise(names)]
        return found, sum(self._disk.size(f"{folder}/{name}") for name in names[-1:])

    def _due(self, stream: str, segments: list[_Segment], total: int) -> list[_Segment]:
        """The segments over the limits, oldest first, given the total size of all streams."""
        most, due = self._retain.max_bytes, list[_Segment]()
        for number, each in enumerate(segments):
            too_many = most is not None and total > most
            if not too_many and not self._is_too_old(f"{self._directory}/{stream}/{each.name}"):
                break
            if each.is_last and not each.last:
                segments[number] = each._replace(last=self._last_in(stream, each.name))
            total -= each.size
            due.append(segments[number])
        return due

    def _last_in(self, stream: str, name: SegmentName) -> int:
        """The sequence of the last event up to the end of a segment."""
        try:
            return max(name.first, next_sequence_in(self._disk, f"{self._directory}/{stream}", name)) - 1
        except JournalVersionError as error:
            raise OSError(str(error)) from error  # the number of events is unknown

    def _remove_older(self, stream: str, segments: Sequence[_Segment]) -> list[_Segment]:
        """Remove segments of an older stream, unless a process has locked it. Returns the removed ones."""
        lock = self._disk.lock(f"{self._directory}/{stream}/{layout.LOCK}") if segments else None
        if lock is None:
            return []
        try:
            return self._remove(stream, segments)
        finally:
            self._disk.close(lock)

    def _remove(self, stream: str, segments: Sequence[_Segment]) -> list[_Segment]:
        gone: list[_Segment] = []
        for each in segments:
            try:
                if each.is_last:
                    self._follow_by_empty(stream, each)
                self._disk.remove(f"{self._directory}/{stream}/{each.name}")
            except OSError:
                if not gone:
                    raise
                break  # report what was removed; the next round raises the error
            gone.append(each)
            self._count(stream, each)
        if gone:
            with suppress(OSError):  # without it a power cut may restore some segments, which costs only space
                self._disk.sync_path(f"{self._directory}/{stream}")
        return gone

    def _follow_by_empty(self, stream: str, segment: _Segment) -> None:
        """Create a segment without events after the last one, so that no sequence is used twice."""
        folder, following = f"{self._directory}/{stream}", segment.last + 1
        name, closed = SegmentName(segment.name.ordinal + 1, following), frame.pack(following, b"", frame.CLOSED)
        empty = OpenSegment.begin(self._disk, folder, name, closed)
        try:
            empty.sync()
        finally:
            empty.close()
        self._disk.sync_path(folder)

    def _size(self, folder: str, name: SegmentName) -> int:
        known = self._sizes.get(name)
        return self._disk.size(f"{folder}/{name}") if known is None else known

    def _is_too_old(self, path: str) -> bool:
        oldest = self._retain.max_age_seconds
        return oldest is not None and self._clock.wall() - self._disk.modified(path) > oldest

    def _passed(self, stream: str, due: list[_Segment], passed: "_Passed") -> list[_Segment]:
        """The segments whose events all adapters that receive the stream are finished with."""
        up_to, left = passed.up_to(stream, due)
        if left:
            self._warn_of_left(stream, due, up_to, left)
        up_to = min([up_to, *left.values()])
        return list(takewhile(lambda each: each.last <= up_to, due))

    def _warn_of_left(self, stream: str, due: list[_Segment], up_to: int, left: Mapping[str, int]) -> None:
        """Warn once about each removed adapter that prevents the removal of segments."""
        for name, place in left.items():
            held = [each.size for each in due if place < each.last <= up_to]
            if held and name not in self._warned:
                self._warned.add(name)
                fix = shlex.join(["evsys-bus", "forget", name, self._directory])
                facts = {"follower": name, "stream": stream, "segments": len(held), "bytes": sum(held)}
                why = "it was removed from the config before these events were delivered to it"
                log().warning("journal.kept_for_left_follower", **facts, why=why, fix=fix)

    def _count(self, stream: str, segment: _Segment) -> None:
        for counts in (self.removed, self._unlogged.setdefault(stream, Removed())):
            counts.segments += 1
            counts.events += segment.last - segment.name.first + 1
            counts.bytes += segment.size
            counts.up_to = segment.last


class _Passed:
    """The positions of all adapters in this round. Each cursor is read once.

    A spec is read only for an adapter that prevents the removal of a segment.

    Args:
        cursors: The cursors of the journal.
        followers: Adapters to wait for in any case.
    """

    def __init__(self, cursors: Cursors, followers: Collection[str]) -> None:
        self._cursors = cursors
        self._followers = followers
        self._known: dict[str, Cursor] | None = None
        self._terms: dict[str, Terms] = {}

    def up_to(self, stream: str, due: Sequence[_Segment]) -> tuple[int, dict[str, int]]:
        """The sequence that all adapters in use have reached, and the positions of adapters removed from the config.

        Raises:
            OSError: A cursor or spec cannot be read now.
        """
        if self._known is None:
            names = sorted({*self._cursors.registered(), *self._followers})
            self._known = {name: self._cursors.look(name) for name in names}
        up_to = due[-1].last
        left: dict[str, int] = {}
        for name, cursor in self._known.items():
            place = cursor.place(stream).sequence
            if place >= up_to:
                continue
            terms = self._terms.get(name)
            if terms is None:
                terms = self._terms[name] = self._cursors.terms_of(name)
            if not terms.serves(stream):
                continue
            if terms.left_at is not None and name not in self._followers:
                left[name] = place
            else:
                up_to = min(up_to, place)
            if up_to < due[0].last:
                return up_to, {}
        return up_to, left


_EMPTY_BYTES: Final = len(frame.head() + frame.pack(1, b"", frame.CLOSED))
"""The maximum size of a segment without events."""
