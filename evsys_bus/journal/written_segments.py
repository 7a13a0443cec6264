"""The segments that one writer has created, to count the events in those that were removed."""

from collections.abc import Collection
from typing import Final

from evsys_bus.disk import Disk
from evsys_bus.journal.layout import SegmentName


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
