"""The segments that one writer has created, to count the events in those that somebody removed."""

from collections.abc import Collection
from typing import Final

from evsys_bus.disk import Disk
from evsys_bus.journal.layout import SegmentName


class Begun:
    """The segments of one writer. Segments that retention removes are discarded and not counted."""

    def __init__(self, disk: Disk) -> None:
        self._disk: Final = disk
        self._segments: list[tuple[str, SegmentName]] = []
        self._removed: list[tuple[int, int | None]] = []
        """For each removed segment: its first sequence and the end (exclusive); None while the end is not known."""

    def add(self, path: str, name: SegmentName) -> None:
        """Register a new segment."""
        self._removed = [(first, name.first if behind is None else behind) for first, behind in self._removed]
        self._segments.append((path, name))

    def retired(self, names: Collection[SegmentName]) -> None:
        """Stop watching segments that retention has removed."""
        self._segments = [each for each in self._segments if each[1] not in names]

    def look(self) -> None:
        """Check which segments are missing. A segment that cannot be checked now counts as present."""
        there: list[tuple[str, SegmentName]] = []
        firsts = sorted([*(name.first for _, name in self._segments), *(first for first, _ in self._removed)])
        for path, name in self._segments:
            if self._is_gone(path):
                self._removed.append((name.first, next((each for each in firsts if each > name.first), None)))
            else:
                there.append((path, name))
        self._segments = there

    def removed(self, next_sequence: int) -> int:
        """Count the events in the missing segments, given the sequence of the next event to be written to disk."""
        return sum((next_sequence if behind is None else behind) - first for first, behind in self._removed)

    def _is_gone(self, path: str) -> bool:
        try:
            self._disk.size(path)
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False
