"""A segment that is being written. It is created with its first record, and every record is appended by a single write.

A segment is never shortened, except to remove a partial record after a failed write.
"""

from typing import Self

from evsys_bus.disk import Disk
from evsys_bus.journal import frame
from evsys_bus.journal.layout import SegmentName


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
