"""One segment, while it is written: begun with its first record, added to by single writes, never shortened again.

The one exception: a record of which the disk takes only a part is taken back, by the writer that wrote it.
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
        self.clean = True
        """Whether it ends with a whole record; if not, nothing may be added."""
        self._disk = disk

    @classmethod
    def begin(cls, disk: Disk, folder: str, name: SegmentName, records: bytes) -> Self:
        """Make the file and write its head and first records; where that fails, no segment is left.

        Raises:
            OSError: As the disk said.
        """
        segment = cls(disk, folder, name, disk.open_append(f"{folder}/{name}"))
        try:
            segment.write(frame.head() + records)
        except OSError:
            try:
                disk.close(segment.file)
                disk.remove(segment.path)
            except OSError:
                pass  # what is left has no whole head, or no record; readers pass over it
            raise
        return segment

    def write(self, record: bytes, taken: int = 0) -> None:
        """Append it, whole or not at all.

        Args:
            record: The whole of it.
            taken: How much of it an earlier write took.

        Raises:
            OSError: As the disk said.
        """
        try:
            while taken < len(record):
                taken += self._disk.write(self.file, record[taken:])
        except OSError:
            if taken:
                self.clean = False
                self._disk.truncate(self.file, self._disk.length(self.file) - taken)
                self.clean = True
            raise

    def sync(self) -> None:
        """Have it on the medium."""
        self._disk.sync(self.file)

    def close(self) -> None:
        """Close the file."""
        self._disk.close(self.file)
