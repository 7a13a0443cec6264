"""What a pickled `EventBus` becomes: the bus itself in the same process, a handle to the open one in another."""

import os
from typing import TYPE_CHECKING, Any, Final

from evsys_bus.errors import BusNotOpenError

if TYPE_CHECKING:
    from evsys_bus.bus.event_bus import EventBus

_open_buses: Final[dict[int, "EventBus"]] = {}


class BusHandle:
    """Behaves like the only open bus of this process, at the time of each use.

    Raises:
        BusNotOpenError: At each use, unless exactly one bus is open here.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if len(_open_buses) != 1:
            raise BusNotOpenError(
                f"an EventBus was sent to process {os.getpid()}, in which {len(_open_buses) or 'none'} "
                f"{'are' if len(_open_buses) > 1 else 'is'} open",
                why="a bus stays in the process that entered it; what is sent is a handle to the only open bus there",
                fix="enter one in that process before the handle is used: `with EventBus(...) as bus:`",
            )
        return getattr(next(iter(_open_buses.values())), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return BusHandle, ()


def find_bus(pid: int, number: int) -> "EventBus | BusHandle":
    """Return the open bus if it is one of this process, else a handle."""
    own = _open_buses.get(number) if pid == os.getpid() else None
    return BusHandle() if own is None else own


def add_open_bus(bus: "EventBus") -> None:
    """Make a bus one of the open ones of this process."""
    _open_buses[id(bus)] = bus


def remove_open_bus(bus: "EventBus") -> None:
    """Undo `add_open_bus`."""
    _open_buses.pop(id(bus), None)


os.register_at_fork(after_in_child=_open_buses.clear)
