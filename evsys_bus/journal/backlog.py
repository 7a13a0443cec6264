"""What the disk did not take: it waits in memory, in order, within bounds, until the disk takes it or it is lost."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Waiting(NamedTuple):
    """One record that is not on disk."""

    sequence: int
    record: bytes
    keep: bool
    """Whether it is to be given up last: starts, ends and checkpoints."""


class Backlog:
    """Records in their order; what does not fit in the bounds is given up by `trim`, and counted."""

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
        """Add the newest one."""
        self._waiting.append(waiting)
        self.bytes += len(waiting.record)

    def trim(self) -> None:
        """Keep to the bounds: the oldest go first, but for those to be kept. At least the newest one stays."""
        while len(self._waiting) > 1 and (len(self._waiting) > self._most or self.bytes > self._most_bytes):
            self._give_up(self._least_wanted())

    def first(self) -> Waiting | None:
        """The oldest one."""
        return self._waiting[0] if self._waiting else None

    def written(self) -> None:
        """The oldest one is on disk."""
        self.bytes -= len(self._waiting.popleft().record)

    def withdraw(self) -> None:
        """Take the newest one out again; its publisher is told."""
        self.bytes -= len(self._waiting.pop().record)

    def reduce(self, most_bytes: int) -> None:
        """Give up what does not fit: the oldest first, and those to be kept last."""
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
