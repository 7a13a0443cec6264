"""The state files: the status of each delivery, as last written by its courier or by the courier's supervisor."""

from typing import Final

import msgspec

from evsys_bus.files import load_file
from evsys_bus.journal import Disk, layout
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

    Failure counts and unconfirmed events are kept from the existing file.

    Raises:
        OSError: The file cannot be written.
    """
    if not is_delivering(disk, directory, name):
        previous = carried_over(read_status(disk, directory, name))
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


def carried_over(status: DeliveryStatus | None) -> DeliveryStatus:
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
