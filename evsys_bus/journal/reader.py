"""Reading a journal, while it is being written or later. A reader writes nothing.

`TailReader` walks a stream forwards and counts what it finds; readers, counters and `verify` all use it.
`read_newest_first` walks it backwards. `verify` checks the integrity of a journal by its checksums and sequences.
Damaged bytes are skipped, never fatal. Repeated records are skipped. An incomplete record at the end of a live stream
is not damage.
"""

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from evsys_bus.disk import Disk, OsDisk, read_fully
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import CorruptRange, Frame, FrameRun, IncompleteTail
from evsys_bus.journal.layout import Family, SegmentName

_CHUNK_BYTES: Final = 1 << 20
MAX_OPEN_FILES: Final = 1024
"""How many segments the readers of this process keep open between two polls, at most; a quarter of what the process may
open if that is less. Others are opened for each read."""


class _OpenFileLimit:
    """Counts the segments that the readers of this process keep open."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come in the middle
        self._count = 0

    def acquire(self) -> bool:
        """Count one more, unless they are as many as may be."""
        soft_limit = os.sysconf("SC_OPEN_MAX")  # -1 if unlimited; no import, which could fail while a program runs
        with self._lock:
            if self._count >= (min(MAX_OPEN_FILES, soft_limit // 4) if soft_limit > 0 else MAX_OPEN_FILES):
                return False
            self._count += 1
            return True

    def release(self) -> None:
        """Count one less."""
        with self._lock:
            self._count -= 1


_open_files: Final = _OpenFileLimit()


class Record(NamedTuple):
    """An event, still encoded."""

    sequence: int
    payload: bytes


class CorruptSegmentRange(msgspec.Struct, frozen=True):
    """Bytes that are not a valid record, followed by valid records."""

    segment: str
    offset: int
    length: int


class JournalReader:
    """Reads the streams of a journal."""

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.directory: Final = os.fspath(directory)
        self._disk = OsDisk() if disk is None else disk
        self._declared_live: dict[str, tuple[int, bool]] = {}
        """By lock file: its size, and what its owner has declared."""

    def streams(self, *families: Family) -> list[str]:
        """List the streams of these families, by default of publishing processes, in order; none without a journal."""
        return layout.list_streams_of(self._disk, self.directory, families or ("r",))

    @property
    def id(self) -> str:
        """Identifies the journal, wherever it is copied to; empty if no version with ids has written it yet."""
        return layout.read_journal_id(self._disk, self.directory)

    def is_live(self, stream: str) -> bool:
        """Whether a process has the stream open for writing, and has not declared that nothing more will come."""
        path = f"{self.directory}/{stream}/{layout.LOCK}"
        return self._disk.is_locked(path) and self._is_declared_live(path)

    def _is_declared_live(self, path: str) -> bool:
        try:
            size = self._disk.size(path)
        except OSError:
            return True
        known_size, is_live = self._declared_live.get(path, (-1, True))
        if size != known_size:
            owner = layout.read_owner(self._disk, path)
            is_live = owner is None or owner.is_live
            self._declared_live[path] = size, is_live
        return is_live

    def read(self, stream: str, after: int = 0) -> Iterator[Record]:
        """Yield the events after sequence ``after`` that the stream has now.

        Raises:
            JournalVersionError: A newer version wrote them.
        """
        return self.tail(stream, after).poll()

    def tail(self, stream: str, after: int = 0, *, patience: int = 0, keep_open: bool = False) -> "TailReader":
        """A reader of the stream, to be polled for new events after a sequence.

        Args:
            stream: Its name.
            after: The sequence.
            patience: After how many failures in a row to read an existing segment it is skipped or, if it is the last
                one, treated as read. Earlier failures raise OSError.
            keep_open: Whether to keep the segment open between two polls, which makes a poll without new events cheap.
        """
        return TailReader(self._disk, f"{self.directory}/{stream}", after, patience, keep_open=keep_open)


class SegmentScan:
    """A position in a segment. It is read in chunks, with memory use independent of the file size."""

    _file: int | None = None  # here, because Ctrl-C may come before the first line of `__init__`

    def __init__(self, disk: Disk, path: str, *, keep_open: bool = False) -> None:
        self.path = path
        self.offset = 0
        """The offset after the last item returned. What follows was not read or is incomplete."""
        self._disk = disk
        self._keep_open = keep_open

    def frames(self) -> Iterator[Frame | CorruptRange | IncompleteTail]:
        """Yield what follows, up to the current end of the file.

        Only the last item can be a `IncompleteTail`; it is read again later.

        Raises:
            JournalVersionError: A newer version wrote it.
            OSError: It cannot be read.
        """
        for item in self.items(None):
            assert not isinstance(item, FrameRun)
            yield item

    def items(
        self, expected_sequence: int | None, *, count_only: bool = False
    ) -> Iterator[FrameRun | Frame | CorruptRange | IncompleteTail]:
        """Yield what follows as `frames` does, with events of consecutive sequences combined into runs.

        Args:
            expected_sequence: The sequence of the next event; None to combine none.
            count_only: Whether to leave the payloads of runs out.
        """
        for buffer, position, at_end in self._chunks():
            start_offset = self.offset - position
            while True:
                if expected_sequence is not None:
                    run, position = frame.read_run(buffer, position, expected_sequence, count_only=count_only)  # noqa: PLW2901 # advances the position
                    self.offset = start_offset + position
                    if run.length:
                        expected_sequence += run.length
                        yield run
                item = next(frame.scan(buffer, position), None)
                if item is None:
                    break
                if isinstance(item, IncompleteTail):
                    if at_end:
                        yield item
                    break
                position = item.end  # noqa: PLW2901 # as above
                self.offset = start_offset + position
                if expected_sequence is not None and isinstance(item, Frame) and item.kind == frame.EVENT:
                    expected_sequence = max(expected_sequence, item.sequence + 1)
                yield item

    def has_grown(self) -> bool:
        """Whether there is something after the offset. Raises OSError."""
        if self._file is not None:
            return bool(self._disk.pread(self._file, 1, self.offset))
        return self._disk.size(self.path) > self.offset

    def close(self) -> None:
        """Close the file if it is open. The next read opens it again."""
        file, self._file = self._file, None
        if file is not None:
            _open_files.release()
            with suppress(OSError):  # nothing was written to it
                self._disk.close(file)

    def __del__(self) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        file = self._file
        if file is None:
            if not self._keep_open or not _open_files.acquire():
                return self._disk.read(self.path, self.offset, size)
            try:
                self._file = file = self._disk.open_read(self.path)
            finally:
                if self._file is None:
                    _open_files.release()
        try:
            return read_fully(self._disk, file, size, self.offset)
        except OSError:
            self.close()  # for example a network file system that lost the file: open it by its path next time
            raise

    def _chunks(self) -> Iterator[tuple[bytes, int, bool]]:
        """Yield buffers from the offset on, the start position in each, and whether it reaches the end of the file."""
        size = _CHUNK_BYTES
        while True:
            start_offset = self.offset
            buffer = self._read(size)
            at_end = len(buffer) < size
            start = self._offset_after_header(buffer) if start_offset == 0 else 0
            self.offset = start_offset + start
            yield buffer, start, at_end
            if at_end:
                return
            # A record or a damaged range is larger than the buffer: read more.
            size = size * 2 if self.offset == start_offset else _CHUNK_BYTES

    def _offset_after_header(self, buffer: bytes) -> int:
        version = frame.read_version(buffer)
        if version is None:
            return 0  # cut or damaged: frames are found by their mark
        if version > frame.VERSION:
            raise JournalVersionError(
                f"{self.path} has format {version}; this version reads up to {frame.VERSION}",
                fix="upgrade evsys-bus where you read this journal",
            )
        return frame.SEGMENT_HEADER_BYTES


class TailReader:
    """Walks a stream forwards and incrementally, from a given sequence on, and counts what it finds.

    Args:
        disk: The file system.
        folder: The stream's folder.
        after: Start after this sequence.
        patience: See `JournalReader.tail`.
        count_only: Whether the runs have no payloads, which is faster.
        skip_newer_formats: Whether segments of a newer format count as unreadable instead of raising.
        keep_open: Whether to keep the segment open between two polls.
    """

    def __init__(
        self,
        disk: Disk,
        folder: str,
        after: int = 0,
        patience: int = 0,
        *,
        count_only: bool = False,
        skip_newer_formats: bool = False,
        keep_open: bool = False,
    ) -> None:
        self.last_sequence = after
        """The sequence of the last event returned."""
        self.first_sequence: int | None = None
        """The sequence of the first event returned."""
        self.events = 0
        """Events returned, without repeats."""
        self.segments = 0
        self.is_closed = False
        """Whether the last segment ends with a closing frame."""
        self.corrupt_ranges: list[CorruptSegmentRange] = []
        self.torn_bytes = 0
        """Bytes after the last complete record of segments that have a successor: writes cut short, as by a kill."""
        self.missing_ranges: list[tuple[int, int]] = []
        """Ranges of missing sequences, first and last."""
        self.unreadable_segments: dict[str, Exception] = {}
        """Paths of segments that were skipped because they could not be read, with the error."""
        self._disk = disk
        self._folder = folder
        self._expected_sequence = (
            after + 1 if after else None
        )  # never one that was returned: a run that starts with it is new
        self._segment: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._upcoming: deque[SegmentName] = deque()
        """The known later segments. The folder is listed again only when they are used up."""
        self._previous_bytes = 0
        self._unconfirmed_end = -1
        """Where damage ended that was seen once and must be read again."""
        self._patience = patience
        self._read_failures = 0
        self._count_only = count_only
        self._skip_newer_formats = skip_newer_formats
        self._keep_open = keep_open
        self._current_run: FrameRun | None = None
        """The last run returned, which the caller may not have consumed completely."""

    @property
    def next_sequence(self) -> int:
        """The sequence that the next event is expected to have."""
        return max(self._expected_sequence or 1, self.last_sequence + 1)

    @property
    def corrupt_bytes(self) -> int:
        """Bytes in `corrupt_ranges`."""
        return sum(each.length for each in self.corrupt_ranges)

    @property
    def bytes(self) -> int:
        """Bytes read, up to the last complete record of each segment."""
        return self._previous_bytes + (0 if self._scan is None else self._scan.offset)

    def poll(self) -> Iterator[Record]:
        """Yield the events since the last poll. Each one counts as returned when the iterator yields it.

        Raises:
            JournalVersionError: A newer version wrote what follows.
        """
        for run in self.poll_runs():
            for sequence, payload in enumerate(run.payloads, run.first_sequence):
                self.last_sequence = sequence
                yield Record(sequence, payload)

    def poll_runs(self, *, is_complete: bool = False, find_next: bool = True) -> Iterator[FrameRun]:
        """Yield the events since the last poll in runs of consecutive sequences, which is faster than `poll`.

        A run counts as returned when the next one is requested.

        Args:
            is_complete: Whether nothing will be appended to the stream any more. Its last segment is then treated like
                those that have a successor.
            find_next: Whether to list the folder if no later segment is known.
        """
        if self._current_run is not None:  # the caller stopped in the middle of it
            first_sequence, length, payloads, is_carried = self._current_run
            consumed = max(0, self.last_sequence + 1 - first_sequence)
            yield from self._emit(
                FrameRun(first_sequence + consumed, length - consumed, payloads[consumed:], is_carried)
            )
        while True:
            if self._segment is None:
                names = layout.list_segments(self._disk, self._folder)
                if not names:
                    return
                # The segment that contains the next sequence, or the first one after it.
                index = max(
                    (at for at, each in enumerate(names) if each.first_sequence <= self.last_sequence + 1), default=0
                )
                self._upcoming.extend(names[index + 1 :])
                if self._expected_sequence is None and names[0].ordinal == 1:
                    self._expected_sequence = 1  # nothing was removed: what is not there is missing
                self._open_segment(names[index])
            yield from self._read_segment(is_final=False)
            next_segment = self._find_next_segment() if find_next or self._upcoming else None
            if next_segment is not None or is_complete:
                # The segment may have grown between the read and the listing. Now it is final.
                yield from self._read_segment(is_final=True)
            if next_segment is None:
                return
            self._open_segment(next_segment)

    def close(self) -> None:
        """Close the segment if it is open. The next poll opens it again."""
        if self._scan is not None:
            self._scan.close()

    def has_grown(self) -> bool:
        """Whether the segment that was read last has new bytes, or anything else may be there to be read."""
        if self._scan is None or self._current_run is not None or self._upcoming:
            return True
        try:
            return self._scan.has_grown()
        except OSError:
            return True  # the next poll handles it

    def is_segment_removed(self) -> bool:
        """Whether the segment that was read last is gone."""
        return self._segment is not None and self._segment not in layout.list_segments(self._disk, self._folder)

    def _find_next_segment(self) -> SegmentName | None:
        """The next segment, or None if there is none yet. A segment that has a successor is final."""
        assert self._segment is not None
        if not self._upcoming:
            self._upcoming.extend(
                each for each in layout.list_segments(self._disk, self._folder) if each > self._segment
            )
        return self._upcoming[0] if self._upcoming else None

    def _emit(self, run: FrameRun) -> Iterator[FrameRun]:
        if run.length:
            self._current_run = run
            yield run
            self.last_sequence = run.first_sequence + run.length - 1
        self._current_run = None

    def _open_segment(self, name: SegmentName) -> None:
        while self._upcoming and self._upcoming[0] <= name:
            self._upcoming.popleft()
        self._previous_bytes = self.bytes
        if self._scan is not None:
            self._scan.close()
        self._advance_to(name.first_sequence)
        self._segment = name
        self._unconfirmed_end = -1
        self._scan = SegmentScan(self._disk, f"{self._folder}/{name}", keep_open=self._keep_open)
        self.segments += 1
        self.is_closed = False

    def _read_segment(self, *, is_final: bool) -> Iterator[FrameRun]:
        """Read the rest of the segment. ``is_final``: nothing is appended to it any more."""
        scan = self._scan
        assert scan is not None
        try:
            while not (yield from self._read_items(scan, is_final=is_final)):
                pass
        except (OSError, JournalVersionError) as error:
            if isinstance(error, JournalVersionError) and not self._skip_newer_formats:
                raise
            is_missing = isinstance(error, FileNotFoundError)
            if not is_missing:
                self._read_failures += 1
                if self._read_failures < self._patience:
                    raise
            if not is_final:
                return  # it may be temporary
            if is_missing:
                self._upcoming.clear()  # list the folder again, because segments were removed
            if not is_missing or scan.offset:  # otherwise its events only count as missing
                self.unreadable_segments[scan.path] = error
        self._read_failures = 0

    def _read_items(self, scan: SegmentScan, *, is_final: bool) -> Generator[FrameRun, None, bool]:
        """Yield what follows. Returns False if the same bytes must be read again."""
        assert self._segment is not None
        # From the start of a segment on, so that events before the position are skipped as runs, too.
        expected_sequence = self._expected_sequence or 1 if scan.offset else self._segment.first_sequence
        for item in scan.items(expected_sequence, count_only=self._count_only):
            if isinstance(item, FrameRun):
                yield from self._emit(self._count_events(item))
            elif isinstance(item, Frame):
                if item.kind == frame.EVENT:
                    payloads = [] if self._count_only else [bytes(item.payload)]
                    yield from self._emit(self._count_events(FrameRun(item.sequence, 1, payloads)))
                elif item.kind == frame.CARRIED and item.sequence > self.last_sequence:
                    yield from self._emit(FrameRun(item.sequence, 1, [bytes(item.payload)], is_carried=True))
                elif item.kind == frame.CLOSED:
                    self._advance_to(item.sequence)
                    self.is_closed = True
            elif isinstance(item, IncompleteTail):
                self.torn_bytes += item.length if is_final else 0
            elif is_final or scan.offset == self._unconfirmed_end:
                self.corrupt_ranges.append(CorruptSegmentRange(scan.path, scan.offset - item.length, item.length))
            else:
                # It may have been read while it was being written. It counts as damage if it is there the second time.
                self._unconfirmed_end = scan.offset
                scan.offset -= item.length
                return False
        return True

    def _count_events(self, run: FrameRun) -> FrameRun:
        """Count the events of a run, and return those that were not returned before."""
        self._advance_to(run.first_sequence)
        end = run.first_sequence + run.length
        self._expected_sequence = max(self._expected_sequence or 1, end)
        repeated = min(run.length, max(0, self.last_sequence + 1 - run.first_sequence))
        new = (
            FrameRun(run.first_sequence + repeated, run.length - repeated, run.payloads[repeated:]) if repeated else run
        )
        if new.length:
            self.events += new.length
            self.first_sequence = new.first_sequence if self.first_sequence is None else self.first_sequence
        return new

    def _advance_to(self, sequence: int) -> None:
        """Record the sequences before this one that were not returned as missing."""
        if self._expected_sequence is not None and sequence > self._expected_sequence:
            self.missing_ranges.append((self._expected_sequence, sequence - 1))
        self._expected_sequence = max(self._expected_sequence or sequence, sequence)


def read_newest_first(disk: Disk, directory: str, stream: str) -> Iterator[Record]:
    """Yield the intact events of a stream, newest first, from the ends of its segments.

    The cost does not grow with the size of the stream. Damaged bytes are skipped without a report.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote them.
    """
    folder = f"{directory}/{stream}"
    names = layout.list_segments(disk, folder)
    previous_sequence: int | None = None
    for name in reversed(names):
        for each in read_frames_newest_first(disk, f"{folder}/{name}"):
            # Carried start events count in the oldest segment only; the later segments repeat them.
            if each.kind != frame.EVENT and (each.kind != frame.CARRIED or name != names[0]):
                continue
            if previous_sequence is None or each.sequence < previous_sequence:
                previous_sequence = each.sequence
                yield Record(each.sequence, bytes(each.payload))


def read_frames_newest_first(disk: Disk, path: str, window_bytes: int = _CHUNK_BYTES) -> Iterator[Frame]:
    """Yield the intact frames of one segment, newest first, of all kinds; ``window_bytes`` are read at a time.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    next(SegmentScan(disk, path).frames(), None)  # checks the format version
    end, window = disk.size(path), window_bytes
    while end > 0:
        start = max(0, end - window)
        # The window may begin in the middle of a frame, which the scan treats as damage and skips.
        frames = [item for item in frame.scan(disk.read(path, start, end - start)) if isinstance(item, Frame)]
        yield from reversed(frames)
        if start == 0:
            return
        if frames:
            end, window = start + frames[0].end - len(frames[0].payload) - frame.FRAME_HEADER_BYTES, window_bytes
        else:
            window *= 2  # a record, or a damaged range, is larger than the window


class StreamReport(
    msgspec.Struct,
    rename={
        "is_live": "live",
        "first_sequence": "first",
        "last_sequence": "last",
        "is_closed": "closed",
        "corrupt_ranges": "damaged",
        "missing_ranges": "missing",
        "unreadable_segments": "unreadable",
        "removed_events": "removed",
    },
):
    """The result for one stream."""

    stream: str
    is_live: bool
    """Whether a process is writing it."""
    segments: int = 0
    records: int = 0
    """Events, without repeats."""
    bytes: int = 0
    first_sequence: int | None = None
    """The sequence of the first event."""
    last_sequence: int | None = None
    """The sequence of the last event."""
    is_closed: bool = False
    """Whether the last writer closed it."""
    corrupt_ranges: list[CorruptSegmentRange] = []
    missing_ranges: list[tuple[int, int]] = []
    """Ranges of missing sequences, first and last."""
    torn_bytes: int = 0
    """Bytes after the last complete record of a segment: a write cut short, as by a kill. This is not damage."""
    unreadable_segments: list[str] = []
    """Segments that could not be read, with the reason."""
    removed_events: int = 0
    """Events in segments that retention removed from the front. This is not damage."""

    @property
    def is_intact(self) -> bool:
        """Whether no recorded event is known to be lost."""
        return not (self.corrupt_ranges or self.missing_ranges or self.unreadable_segments)


class JournalReport(msgspec.Struct):
    """The result for a journal."""

    directory: str
    streams: list[StreamReport]

    @property
    def is_intact(self) -> bool:
        """Whether every stream is intact."""
        return all(stream.is_intact for stream in self.streams)


def verify(directory: str | os.PathLike[str], disk: Disk | None = None) -> JournalReport:
    """Read a whole journal. A segment of a newer format counts as unreadable."""
    reader = JournalReader(directory, disk)
    file_system: Disk = OsDisk() if disk is None else disk
    streams = reader.streams(*layout.DELIVERED_FAMILIES)
    return JournalReport(reader.directory, [_verify_stream(file_system, reader, stream) for stream in streams])


def _verify_stream(disk: Disk, reader: JournalReader, stream: str) -> StreamReport:
    is_live = reader.is_live(stream)
    folder = f"{reader.directory}/{stream}"
    removed_events = layout.count_removed_events(layout.list_segments(disk, folder))
    tail = TailReader(disk, folder, count_only=True, skip_newer_formats=True)
    for _ in tail.poll_runs(is_complete=not is_live):
        pass
    return StreamReport(
        stream,
        is_live,
        segments=tail.segments,
        records=tail.events,
        bytes=tail.bytes,
        first_sequence=tail.first_sequence,
        last_sequence=None if tail.first_sequence is None else tail.last_sequence,
        is_closed=tail.is_closed,
        corrupt_ranges=tail.corrupt_ranges,
        missing_ranges=tail.missing_ranges,
        torn_bytes=tail.torn_bytes,
        unreadable_segments=[f"{path.rpartition('/')[2]}: {error}" for path, error in tail.unreadable_segments.items()],
        removed_events=removed_events,
    )
