"""Reading a stream segment by segment, in chunks, with memory use independent of the file size."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from evsys_bus.disk import Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import CorruptRange, Frame, FrameRun, IncompleteTail, scan
from evsys_bus.journal.layout import SegmentName

_CHUNK_BYTES: Final = 1 << 20
_RunT = TypeVar("_RunT")


class SegmentNames:
    """Iterates over the segments of a stream. The folder is listed again only when the known names are used up.

    Args:
        disk: The file system.
        folder: The stream's folder.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk: Final = disk
        self._folder: Final = folder
        self._upcoming: deque[SegmentName] = deque()

    def find(self, sequence: int) -> SegmentName | None:
        """The segment that contains this sequence, or the first one after it; None if there is none."""
        names = layout.list_segments(self._disk, self._folder)
        index = max((position for position, name in enumerate(names) if name.first_sequence <= sequence), default=0)
        self._upcoming = deque(names[index + 1 :])
        return names[index] if names else None

    def next_after(self, name: SegmentName) -> SegmentName | None:
        """The next segment, or None if there is none yet. A segment that has a successor is final."""
        while self._upcoming and self._upcoming[0] <= name:
            self._upcoming.popleft()
        if not self._upcoming:
            self._upcoming.extend(each for each in layout.list_segments(self._disk, self._folder) if each > name)
        return self._upcoming[0] if self._upcoming else None

    def invalidate(self) -> None:
        """List the folder again on the next call, because segments were removed."""
        self._upcoming.clear()


class SegmentScan:
    """A position in a segment."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.path = path
        self.offset = 0
        """The offset after the last item returned. What follows was not read or is incomplete."""
        self._disk = disk

    def frames(self) -> Iterator[Frame | CorruptRange | IncompleteTail]:
        """Yield what follows, up to the current end of the file.

        Only the last item can be a `IncompleteTail`; it is read again later.

        Raises:
            JournalVersionError: A newer version wrote it.
            OSError: It cannot be read.
        """
        for buffer, start, at_end in self._chunks():
            start_offset = self.offset - start
            for item in scan(buffer, start):
                if not isinstance(item, IncompleteTail):
                    self.offset = start_offset + item.end
                    yield item
                elif at_end:
                    yield item

    def frame_runs(self, expected_sequence: int) -> Iterator[Frame | CorruptRange | IncompleteTail | FrameRun]:
        """Yield what follows, with events of consecutive sequences from ``expected_sequence`` on combined into runs."""

        def read_run(buffer: bytes, start: int, sequence: int) -> tuple[FrameRun | None, int, int]:
            run, end, next_sequence = frame.read_events(buffer, start, sequence)
            return run if run.payloads else None, end, next_sequence

        return self._walk(expected_sequence, read_run)

    def count_events(self, expected_sequence: int) -> Iterator[Frame | CorruptRange | IncompleteTail | int]:
        """Yield what follows; for events of consecutive sequences from ``expected_sequence`` on, the next sequence."""

        def skip_run(buffer: bytes, start: int, sequence: int) -> tuple[int | None, int, int]:
            end, next_sequence = frame.skip_events(buffer, start, sequence)
            return next_sequence if next_sequence != sequence else None, end, next_sequence

        return self._walk(expected_sequence, skip_run)

    def _walk(
        self, expected_sequence: int, read_run: Callable[[bytes, int, int], tuple[_RunT | None, int, int]]
    ) -> Iterator[Frame | CorruptRange | IncompleteTail | _RunT]:
        """Yield the runs of events and the items between them.

        Args:
            expected_sequence: The next expected sequence.
            read_run: Reads a run: given a buffer, an offset and the expected sequence, returns a result or None, the
                offset after the run and the next expected sequence.
        """
        for buffer, position, at_end in self._chunks():
            start_offset = self.offset - position
            while True:
                run, position, expected_sequence = read_run(buffer, position, expected_sequence)  # noqa: PLW2901 # advances the position
                self.offset = start_offset + position
                if run is not None:
                    yield run
                item = next(scan(buffer, position), None)
                if item is None:
                    break
                if isinstance(item, IncompleteTail):
                    if at_end:
                        yield item
                    break
                position = item.end  # noqa: PLW2901 # as above
                self.offset = start_offset + position
                if isinstance(item, Frame) and item.kind == frame.EVENT and item.sequence >= expected_sequence:
                    expected_sequence = item.sequence + 1
                yield item

    def _chunks(self) -> Iterator[tuple[bytes, int, bool]]:
        """Yield buffers from the offset on, the start position in each, and whether it reaches the end of the file."""
        size = _CHUNK_BYTES
        while True:
            start_offset = self.offset
            buffer = self._disk.read(self.path, start_offset, size)
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


def read_next_sequence(disk: Disk, folder: str, name: SegmentName) -> int:
    """The sequence after the last complete event of a segment; 0 if it has none."""
    next_sequence = 0
    for item in SegmentScan(disk, f"{folder}/{name}").count_events(name.first_sequence):
        if isinstance(item, int):
            next_sequence = item
        elif isinstance(item, Frame) and item.kind == frame.EVENT:
            next_sequence = max(next_sequence, item.sequence + 1)
    return next_sequence
