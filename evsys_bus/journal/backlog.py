"""A bounded in-memory queue of records that the disk has refused so far."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Waiting(NamedTuple):
    """A record that is not on disk yet."""

    sequence: int
    record: bytes
    keep: bool
    """Whether it is among the last to be dropped: starts, ends and checkpoints."""


class Backlog:
    """Pending records in sequence order. Records beyond the limits are dropped by `trim` and counted in ``lost``."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.lost = 0
        self.bytes = 0
        self._most = most
        self._most_bytes = most_bytes
        self._waiting: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(tuple(self._waiting))

    def put(self, waiting: Waiting) -> None:
        """Add the newest record."""
        self._waiting.append(waiting)
        self.bytes += len(waiting.record)

    def trim(self) -> None:
        """Drop records until the limits hold: the oldest first, those with `keep` last. The newest one always stays."""
        while len(self._waiting) > 1 and (len(self._waiting) > self._most or self.bytes > self._most_bytes):
            self._give_up(self._least_wanted())

    def first(self) -> Waiting | None:
        """The oldest record, or None. It stays in the queue."""
        return self._waiting[0] if self._waiting else None

    def written(self) -> None:
        """Remove the oldest record, because it is on disk now."""
        self.bytes -= len(self._waiting.popleft().record)

    def withdraw(self) -> None:
        """Remove the newest record, because its publisher gets an error instead."""
        self.bytes -= len(self._waiting.pop().record)

    def reduce(self, most_bytes: int) -> None:
        """Keep only what fits into this many bytes: records with `keep` first, then the newest of the others."""
        chosen: set[int] = set()
        left = most_bytes
        for keep in (True, False):
            for each in reversed(self._waiting):
                if each.keep is keep and len(each.record) <= left:
                    chosen.add(each.sequence)
                    left -= len(each.record)
        self.lost += len(self._waiting) - len(chosen)
        self._waiting = deque(each for each in self._waiting if each.sequence in chosen)
        self.bytes = sum(len(each.record) for each in self._waiting)

    def _least_wanted(self) -> int:
        newest = len(self._waiting) - 1
        return next((place for place, each in enumerate(self._waiting) if not each.keep and place < newest), 0)

    def _give_up(self, place: int) -> None:
        self.bytes -= len(self._waiting[place].record)
        del self._waiting[place]
        self.lost += 1
