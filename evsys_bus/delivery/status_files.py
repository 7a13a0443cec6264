"""The state file of each delivery, as last written by its courier or its supervisor, and the lock of its courier."""

import contextlib
from typing import Final

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.errors import CourierBusyError
from evsys_bus.files import load_file, lock_file
from evsys_bus.journal import Clock, Disk, layout
from evsys_bus.journal.stream_lock import read_owner, write_owner
from evsys_bus.location import decode_json, encode_json
from evsys_bus.tasks import DeliveryStatus


def status_path(directory: str, name: str) -> str:
    """Path of the adapter's state file."""
    return layout.courier_path(directory, name, "state.json")


def read_status(disk: Disk, directory: str, name: str) -> DeliveryStatus | None:
    """Read the state; None if the file is missing, damaged or unreadable."""
    try:
        return load_file(
            status_path(directory, name), _decode, quarantine=False, max_bytes=_MAX_STATUS_BYTES, disk=disk
        )
    except OSError:
        return None


def write_status(disk: Disk, directory: str, name: str, status: DeliveryStatus) -> None:
    """Write the state file.

    Raises:
        OSError: The file cannot be written.
    """
    written = {key: value for key, value in msgspec.structs.asdict(status).items() if value != getattr(_DEFAULTS, key)}
    disk.replace(status_path(directory, name), encode_json(written))  # event counts are in the cursor


def write_status_if_idle(disk: Disk, directory: str, name: str, status: DeliveryStatus) -> None:
    """Write the final state of a courier that has ended, unless another courier delivers now.

    Failure counts and unconfirmed events are copied from the existing file.

    Raises:
        OSError: The file cannot be written.
    """
    if not is_delivering(disk, directory, name):
        previous = status_for_next_courier(read_status(disk, directory, name))
        write_status(
            disk,
            directory,
            name,
            msgspec.structs.replace(
                status,
                hook_failures=previous.hook_failures,
                task_failures=previous.task_failures,
                last_failure=previous.last_failure,
                owed=previous.owed,
                owed_fix=previous.owed_fix,
                log=status.log or previous.log,
            ),
        )


def status_for_next_courier(status: DeliveryStatus | None) -> DeliveryStatus:
    """The part of a state that is still valid for the next courier: failure counts and unconfirmed events."""
    if status is None:
        return DeliveryStatus()
    has_problem = status.state in {"waiting", "retrying", "parked", "failed"}  # in these, `error` is about the delivery
    return DeliveryStatus(
        owed=status.owed,
        owed_fix=status.owed_fix,
        error=status.error if status.owed and not has_problem else None,
        hook_failures=status.hook_failures,
        task_failures=status.task_failures,
        last_failure=status.last_failure,
        log=status.log,
    )


def is_delivering(disk: Disk, directory: str, name: str) -> bool:
    """Whether a courier of any process delivers to this adapter now."""
    try:
        return disk.is_locked(layout.courier_path(directory, name, "lock"))
    except OSError:
        return False  # acquiring the lock will show the error


def _decode(data: bytes) -> DeliveryStatus:
    return decode_json(data, DeliveryStatus)


_MAX_STATUS_BYTES: Final = 1 << 20
_DEFAULTS: Final = DeliveryStatus()


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
        """Whether the lock file was removed or replaced while it was held; False if that is not known."""
        try:
            return self._file is not None and not self._disk.is_at(self._path, self._file)
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the lock is released even if close fails
                self._disk.close(file)
