"""The state files: how each delivery fares, as its courier, or whoever looks after that, last wrote it down."""

from typing import Final

import msgspec

from evsys_bus.files import load_file
from evsys_bus.journal import Disk, layout
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import decode_json, encode_json


def state_file(directory: str, name: str) -> str:
    """Where the state of the delivery to this adapter stands."""
    return layout.courier_file(directory, name, "state.json")


def read_state(disk: Disk, directory: str, name: str) -> DeliveryStatus | None:
    """The state; None where there is none that can be read."""
    try:
        return load_file(state_file(directory, name), _read, set_aside=False, most_bytes=_MOST_BYTES, disk=disk)
    except OSError:
        return None


def write_state(disk: Disk, directory: str, name: str, state: DeliveryStatus) -> None:
    """Write it down.

    Raises:
        OSError: The disk refuses it.
    """
    written = {key: value for key, value in msgspec.structs.asdict(state).items() if value != getattr(_UNSET, key)}
    disk.replace(state_file(directory, name), encode_json(written))  # counts are the cursor's


def write_state_of_idle(disk: Disk, directory: str, name: str, state: DeliveryStatus) -> None:
    """Write down what has become of a courier that is no more; where another one delivers, the state is its own.

    Counts of failures, and what is owed, stay as they were.

    Raises:
        OSError: The disk refuses it.
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
    """What stays true of a state when another courier takes over: counts of failures, and what is owed and why."""
    if state is None:
        return DeliveryStatus()
    troubled = state.state in {"retrying", "parked", "failed"}  # then the error is that of the delivery
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
    """Whether a courier delivers to this adapter now, in any process."""
    try:
        return disk.is_locked(layout.courier_file(directory, name, "lock"))
    except OSError:
        return False  # whoever takes the lock will learn


def _read(data: bytes) -> DeliveryStatus:
    return decode_json(data, DeliveryStatus)


_MOST_BYTES: Final = 1 << 20
_UNSET: Final = DeliveryStatus()
