"""The state files: how each delivery fares, as its courier, or whoever looks after that, last wrote it down."""

from typing import Final

import msgspec

from evsys_bus.delivery.followed import CourierState
from evsys_bus.journal import Disk, layout


def state_file(directory: str, name: str) -> str:
    """Where the state of the delivery to this adapter stands."""
    return layout.courier_file(directory, name, "state.json")


def read_state(disk: Disk, directory: str, name: str) -> CourierState | None:
    """The state; None where there is none that can be read."""
    try:
        return _read(disk.read(state_file(directory, name), 0, _MOST_BYTES))
    except (OSError, msgspec.DecodeError):
        return None


def write_state(disk: Disk, directory: str, name: str, state: CourierState) -> None:
    """Write it down.

    Raises:
        OSError: The disk refuses it.
    """
    disk.replace(state_file(directory, name), _write(state))


def write_state_of_idle(disk: Disk, directory: str, name: str, state: CourierState) -> None:
    """Write down what has become of a courier that is no more; where another one delivers, the state is its own.

    Raises:
        OSError: As above.
    """
    if not is_held(disk, directory, name):
        write_state(disk, directory, name, state)


def is_held(disk: Disk, directory: str, name: str) -> bool:
    """Whether a courier delivers to this adapter now, in any process."""
    try:
        return disk.is_locked(layout.courier_file(directory, name, "lock"))
    except OSError:
        return False  # whoever takes the lock will learn


_MOST_BYTES: Final = 1 << 20
_read: Final = msgspec.json.Decoder(CourierState).decode
_write: Final = msgspec.json.Encoder().encode
