"""`CourierLock`: ensures that one courier delivers to an adapter; the lock file names the process that holds it."""

import contextlib
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.errors import CourierBusyError
from evsys_bus.files import lock_file
from evsys_bus.journal import Clock, Disk, layout
from evsys_bus.journal.lock_owner import read_owner, write_owner


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
        self._path: Final = layout.courier_path(directory, name, "lock")
        self._disk: Final = disk
        self._clock: Final = clock
        self._file: int | None = None

    def acquire(self) -> None:
        """Acquire the lock and write this process into its file; logs a warning where locking is not possible.

        Raises:
            CourierBusyError: Another courier holds the lock.
        """
        try:
            self._disk.make_directory(f"{self._directory}/{layout.COURIERS}")
            self._file = lock_file(self._path, disk=self._disk)
            if self._file is not None:
                write_owner(self._disk, self._clock, self._file)
                return
        except OSError as error:
            event_name = "courier.not_lockable" if self._file is None else "courier.not_signed"
            log().warning(event_name, path=self._path, exc_info=error)
            return
        owner = read_owner(self._disk, self._path)
        owner_text = (
            "another process" if owner is None else f"process {owner.pid} on {owner.host}, since {owner.since},"
        )
        raise CourierBusyError(
            f"{owner_text} delivers {self._directory} to {self._name}",
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

    def release(self) -> None:
        """Release the lock."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the lock is released even if close fails
                self._disk.close(file)
