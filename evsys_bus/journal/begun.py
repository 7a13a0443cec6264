"""`Begun`: the segments that a writer has begun, so that it can tell how much went with those that somebody removed."""

from collections.abc import Collection
from typing import Final

from evsys_bus.disk import Disk
from evsys_bus.journal.layout import SegmentName


class Begun:
    """The segments of one writer; what retention takes was meant to go, and is not counted."""

    def __init__(self, disk: Disk) -> None:
        self._disk: Final = disk
        self._segments: list[tuple[str, SegmentName]] = []
        self._removed: list[tuple[int, int | None]] = []
        """Their first sequence, and the one behind their last; None for the newest segment, whose end is not known."""

    def add(self, path: str, name: SegmentName) -> None:
        """One more was begun."""
        self._removed = [(first, name.first if behind is None else behind) for first, behind in self._removed]
        self._segments.append((path, name))

    def retired(self, names: Collection[SegmentName]) -> None:
        """Retention took these."""
        self._segments = [each for each in self._segments if each[1] not in names]

    def look(self) -> None:
        """Find out which of them are gone; those that cannot be looked for now are taken to be there."""
        there: list[tuple[str, SegmentName]] = []
        firsts = sorted([*(name.first for _, name in self._segments), *(first for first, _ in self._removed)])
        for path, name in self._segments:
            if self._is_gone(path):
                self._removed.append((name.first, next((each for each in firsts if each > name.first), None)))
            else:
                there.append((path, name))
        self._segments = there

    def removed(self, next_sequence: int) -> int:
        """How many events went with those that were found gone, where this is the sequence of the next one on disk."""
        return sum((next_sequence if behind is None else behind) - first for first, behind in self._removed)

    def _is_gone(self, path: str) -> bool:
        try:
            self._disk.size(path)
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False
