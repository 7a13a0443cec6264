"""`Backlog`: writes that the disk refused, held in memory and retried in order. Public as `evsys_bus.files.Backlog`."""

import errno
from collections import deque
from collections.abc import Callable
from typing import Final

from evsys_bus.diagnostics import FaultLog, log

_MAX_PENDING_BYTES: Final = 16 << 20


class Backlog:
    """Ordered writes to one file. What the disk refuses is held in memory and retried with the next write.

    Beyond ``max_bytes`` the newest write is dropped. The first error is logged at once, repeated ones at most once a
    second with their count, and so is every dropped write.
    """

    def __init__(self, file: str, *, max_bytes: int = _MAX_PENDING_BYTES) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._faults = FaultLog()
        self._pending: deque[tuple[Callable[[], object], int]] = deque()
        self._bytes = 0
        self.lost = 0
        """Writes that were dropped because too many were pending."""

    @property
    def pending(self) -> int:
        """How many writes are pending because the disk refused them."""
        return len(self._pending)

    def write(self, action: Callable[[], object], size: int) -> None:
        """Run ``action`` after the pending ones. If it raises OSError, having done nothing, it is retried later.

        ``size`` is about how many bytes it holds in memory. Any other exception is a bug and is raised.
        """
        had_pending = bool(self._pending)
        self._pending.append((action, size))
        self._bytes += size
        self._write_pending(had_pending=had_pending)
        if self._pending and self._bytes > self._max_bytes:
            self._bytes -= self._pending.pop()[1]
            self.lost += 1
            self._faults.warn("rows.lost", "full", file=self._file, lost=self.lost, waiting=len(self._pending))

    def drain(self) -> None:
        """Retry the pending writes and raise if any are left. Call it before a mark.

        Raises:
            OSError: Writes are still pending, or some were dropped.
        """
        if self._pending:
            self._write_pending(had_pending=True)
        self.check_written()

    def check_written(self) -> None:
        """Raise if anything is not in the file, without another try.

        Raises:
            OSError: Writes are still pending, or some were dropped.
        """
        if self._pending or self.lost:
            raise OSError(errno.EAGAIN, f"{len(self._pending)} writes pending, {self.lost} dropped", self._file)

    def flush(self) -> None:
        """Retry the pending writes and log how many are left."""
        if self._pending:
            self._write_pending(had_pending=True)
        self._faults.flush()
        if self._pending:
            log().warning("rows.unwritten", file=self._file, waiting=len(self._pending), lost=self.lost)

    def _write_pending(self, *, had_pending: bool) -> None:
        while self._pending:
            action, size = self._pending.popleft()
            self._bytes -= size
            try:
                action()
            except OSError as error:
                self._pending.appendleft((action, size))
                self._bytes += size
                self._faults.warn(
                    "rows.waiting", "refused", file=self._file, why=str(error), waiting=len(self._pending)
                )
                return
        if had_pending:
            log().info("rows.written_again", file=self._file, lost=self.lost)
