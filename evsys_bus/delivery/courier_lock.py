"""`CourierLock`: ensures that one courier delivers to an adapter; the lock file names the process that holds it."""

import contextlib
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.errors import CourierBusyError
from evsys_bus.files import lock_file
from evsys_bus.journal import Clock, Disk, layout
from evsys_bus.journal.signature import sign, signed


class CourierLock:
    """The lock of one adapter; the operating system releases it when the process ends.

    Args:
        directory: The journal.
        name: Name of the adapter.
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
        """Acquire the lock and write this process into its file; logs a warning where locking is not possible.

        Raises:
            CourierBusyError: Another courier holds the lock.
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
            fix="let it finish, or end it; evsys-bus status shows its progress",
        )

    def is_removed(self) -> bool:
        """Whether the lock file is gone while the journal exists; False if the whole journal was removed."""
        try:
            if self._file is None or self._disk.is_at(self._path, self._file):
                return False
            self._disk.names(self._directory)
        except OSError:
            return False
        return True

    def let_go(self) -> None:
        """Release the lock."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the lock is released even if close fails
                self._disk.close(file)
