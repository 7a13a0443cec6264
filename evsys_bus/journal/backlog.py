"""A bounded in-memory queue of records that the disk has refused so far."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class PendingRecord(NamedTuple):
    """A record that is not on disk yet."""

    sequence: int
    data: bytes
    essential: bool
    """Whether it is among the last to be dropped: starts, ends and checkpoints."""


class Backlog:
    """Pending records in sequence order. Records beyond the limits are dropped by `trim` and counted in ``lost``."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.lost = 0
        self.bytes = 0
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._pending: deque[PendingRecord] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[PendingRecord]:
        return iter(tuple(self._pending))

    def append(self, pending: PendingRecord) -> None:
        """Add the newest record."""
        self._pending.append(pending)
        self.bytes += len(pending.data)

    def trim(self) -> None:
        """Drop records until the limits hold: oldest first, those with `essential` last, never the newest one."""
        while len(self._pending) > 1 and (len(self._pending) > self._max_records or self.bytes > self._max_bytes):
            self._drop(self._index_to_drop())

    def peek(self) -> PendingRecord | None:
        """The oldest record, or None. It stays in the queue."""
        return self._pending[0] if self._pending else None

    def pop_oldest(self) -> None:
        """Remove the oldest record, because it is on disk now."""
        self.bytes -= len(self._pending.popleft().data)

    def pop(self) -> None:
        """Remove the newest record, because its publisher gets an error instead."""
        self.bytes -= len(self._pending.pop().data)

    def shrink_to(self, max_bytes: int) -> None:
        """Keep only what fits into this many bytes: records with `essential` first, then the newest of the others."""
        retained: set[int] = set()
        remaining_bytes = max_bytes
        for essential in (True, False):
            for each in reversed(self._pending):
                if each.essential is essential and len(each.data) <= remaining_bytes:
                    retained.add(each.sequence)
                    remaining_bytes -= len(each.data)
        self.lost += len(self._pending) - len(retained)
        self._pending = deque(each for each in self._pending if each.sequence in retained)
        self.bytes = sum(len(each.data) for each in self._pending)

    def _index_to_drop(self) -> int:
        newest = len(self._pending) - 1
        return next((index for index, each in enumerate(self._pending) if not each.essential and index < newest), 0)

    def _drop(self, index: int) -> None:
        self.bytes -= len(self._pending[index].data)
        del self._pending[index]
        self.lost += 1
