"""A segment that is being written. It is created with its first record, and every record is appended by a single write.

A segment is never shortened, except to remove a partial record after a failed write. `WrittenSegments` counts the
events in segments that were removed by hand.
"""

from collections.abc import Collection
from typing import Final, Self

from evsys_bus.disk import Disk
from evsys_bus.journal import frame
from evsys_bus.journal.frame import Frame, FrameRun
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.reader import SegmentScan


class OpenSegment:
    """A segment that is being written."""

    def __init__(self, disk: Disk, folder: str, name: SegmentName, file: int) -> None:
        self.name = name
        self.path = f"{folder}/{name}"
        self.file = file
        self.is_clean = True
        """Whether it ends with a complete record. If not, nothing may be appended."""
        self._disk = disk

    @classmethod
    def create(cls, disk: Disk, folder: str, name: SegmentName, records: bytes) -> Self:
        """Create the file with its header and first records. If that fails, the file is removed.

        Raises:
            OSError: The disk returned an error.
        """
        segment = cls(disk, folder, name, disk.open_append(f"{folder}/{name}"))
        try:
            segment.write(frame.pack_segment_header() + records)
        except OSError:
            try:
                disk.close(segment.file)
                disk.remove(segment.path)
            except OSError:
                pass  # the rest has no complete header or no record, and readers skip it
            raise
        return segment

    def write(self, record: bytes, written: int = 0) -> None:
        """Append a record, completely or not at all.

        Args:
            record: The complete record.
            written: How many bytes of it were already written.

        Raises:
            OSError: The disk returned an error.
        """
        try:
            while written < len(record):
                written += self._disk.write(self.file, record[written:])
        except OSError:
            if written:
                self.is_clean = False
                self._disk.truncate(self.file, self._disk.length(self.file) - written)
                self.is_clean = True
            raise

    def sync(self) -> None:
        """Sync the file to disk."""
        self._disk.sync(self.file)

    def close(self) -> None:
        """Close the file."""
        self._disk.close(self.file)


class WrittenSegments:
    """The segments of one writer. Segments that retention removes are discarded and not counted."""

    def __init__(self, disk: Disk) -> None:
        self._disk: Final = disk
        self._segments: list[tuple[str, SegmentName]] = []
        self._removed: list[tuple[int, int | None]] = []
        """For each removed segment: its first sequence and the end (exclusive); None while the end is not known."""

    def add(self, path: str, name: SegmentName) -> None:
        """Register a new segment."""
        self._removed = [(first, name.first_sequence if end is None else end) for first, end in self._removed]
        self._segments.append((path, name))

    def discard(self, names: Collection[SegmentName]) -> None:
        """Stop watching segments that retention has removed."""
        self._segments = [each for each in self._segments if each[1] not in names]

    def check_removed(self) -> None:
        """Check which segments are missing. A segment that cannot be checked now counts as present."""
        remaining: list[tuple[str, SegmentName]] = []
        first_sequences = sorted(
            [*(name.first_sequence for _, name in self._segments), *(first for first, _ in self._removed)]
        )
        for path, name in self._segments:
            if self._is_missing(path):
                self._removed.append(
                    (name.first_sequence, next((each for each in first_sequences if each > name.first_sequence), None))
                )
            else:
                remaining.append((path, name))
        self._segments = remaining

    def count_removed_events(self, next_sequence: int) -> int:
        """Count the events in the missing segments, given the sequence of the next event to be written to disk."""
        return sum((next_sequence if end is None else end) - first for first, end in self._removed)

    def _is_missing(self, path: str) -> bool:
        try:
            self._disk.size(path)
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False


def read_next_sequence(disk: Disk, folder: str, name: SegmentName) -> int:
    """The sequence after the last complete event of a segment; 0 if it has none.

    Raises:
        JournalVersionError: A newer version wrote it.
        OSError: It cannot be read.
    """
    next_sequence = 0
    for item in SegmentScan(disk, f"{folder}/{name}").items(name.first_sequence, count_only=True):
        if isinstance(item, FrameRun):
            next_sequence = item.first_sequence + item.length
        elif isinstance(item, Frame) and item.kind == frame.EVENT:
            next_sequence = max(next_sequence, item.sequence + 1)
    return next_sequence
