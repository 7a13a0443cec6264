"""`CourierLock`: the lock that makes a courier the one that delivers to its adapter; its file says who that is."""

import contextlib
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.errors import CourierBusyError
from evsys_bus.files import lock_file
from evsys_bus.journal import Clock, Disk, layout
from evsys_bus.journal.signature import sign, signed


class CourierLock:
    """One lock; it ends with the process, however that ends.

    Args:
        directory: The journal.
        name: The adapter's.
        disk: The file system.
        clock: The clocks.
    """

    def __init__(self, directory: str, name: str, disk: Disk, clock: Clock) -> None:
        self._directory: Final = directory
        self._name: Final = name
        self._path: Final = layout.courier_file(directory, name, "lock")
        self._disk: Final = disk
        self._clock: Final = clock
        self._file: int | None = None

    def take(self) -> None:
        """Lock it, and sign it; without one, where the file system has no locks.

        Raises:
            CourierBusyError: Another courier holds it.
        """
        try:
            self._disk.make_directory(f"{self._directory}/{layout.COURIERS}")
            self._file = lock_file(self._path, disk=self._disk)
            if self._file is not None:
                sign(self._disk, self._clock, self._file)
                return
        except OSError as error:
            phrase = "courier.not_lockable" if self._file is None else "courier.not_signed"
            log().warning(phrase, path=self._path, exc_info=error)
            return
        holder = signed(self._disk, self._path)
        who = "another process" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since},"
        raise CourierBusyError(
            f"{who} delivers {self._directory} to {self._name}",
            fix="let it finish, or end it; evsys-bus status tells how it fares",
        )

    def is_removed(self) -> bool:
        """Whether its file is gone from a journal that is there; one that was removed for good, no courier begins."""
        try:
            if self._file is None or self._disk.is_at(self._path, self._file):
                return False
            self._disk.names(self._directory)
        except OSError:
            return False
        return True

    def let_go(self) -> None:
        """Let others have it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # letting go is all that was wanted
                self._disk.close(file)
