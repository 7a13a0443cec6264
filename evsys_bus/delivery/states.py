"""The state files: the status of each delivery, as last written by its courier or by the courier's supervisor."""

from typing import Final

import msgspec

from evsys_bus.files import load_file
from evsys_bus.journal import Disk, layout
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import decode_json, encode_json


def state_file(directory: str, name: str) -> str:
    """Path of the adapter's state file."""
    return layout.courier_file(directory, name, "state.json")


def read_state(disk: Disk, directory: str, name: str) -> DeliveryStatus | None:
    """Read the state; None if the file is missing, damaged or unreadable."""
    try:
        return load_file(state_file(directory, name), _read, set_aside=False, most_bytes=_MOST_BYTES, disk=disk)
    except OSError:
        return None


def write_state(disk: Disk, directory: str, name: str, state: DeliveryStatus) -> None:
    """Write the state file.

    Raises:
        OSError: The file cannot be written.
    """
    written = {key: value for key, value in msgspec.structs.asdict(state).items() if value != getattr(_UNSET, key)}
    disk.replace(state_file(directory, name), encode_json(written))  # event counts are in the cursor


def write_state_of_idle(disk: Disk, directory: str, name: str, state: DeliveryStatus) -> None:
    """Write the final state of a courier that has ended, unless another courier delivers now.

    Failure counts and unconfirmed events are kept from the existing file.

    Raises:
        OSError: The file cannot be written.
    """
    if not is_held(disk, directory, name):
        before = kept(read_state(disk, directory, name))
        write_state(
            disk,
            directory,
            name,
            msgspec.structs.replace(
                state,
                hook_failures=before.hook_failures,
                task_failures=before.task_failures,
                last_failure=before.last_failure,
                owed=before.owed,
                owed_fix=before.owed_fix,
                log=state.log or before.log,
            ),
        )


def kept(state: DeliveryStatus | None) -> DeliveryStatus:
    """The part of a state that is still valid for the next courier: failure counts and unconfirmed events."""
    if state is None:
        return DeliveryStatus()
    troubled = state.state in {"retrying", "parked", "failed"}  # in these, `error` is about the delivery
    return DeliveryStatus(
        owed=state.owed,
        owed_fix=state.owed_fix,
        error=state.error if state.owed and not troubled else None,
        hook_failures=state.hook_failures,
        task_failures=state.task_failures,
        last_failure=state.last_failure,
        log=state.log,
    )


def is_held(disk: Disk, directory: str, name: str) -> bool:
    """Whether a courier of any process delivers to this adapter now."""
    try:
        return disk.is_locked(layout.courier_file(directory, name, "lock"))
    except OSError:
        return False  # acquiring the lock will show the error


def _read(data: bytes) -> DeliveryStatus:
    return decode_json(data, DeliveryStatus)


_MOST_BYTES: Final = 1 << 20
_UNSET: Final = DeliveryStatus()
