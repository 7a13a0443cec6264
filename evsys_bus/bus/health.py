"""Health of a bus: every count that changes when something is dropped, refused, late or raised."""

from typing import ClassVar, Literal

import msgspec

from evsys_bus.deprecated import Renamed
from evsys_bus.tasks import AdoptionState, DeliveryStatus, TaskCounts

CourierLocation = Literal["process", "thread", "loop"]
"""Where the courier of one adapter runs; ``loop``: as a task on the program's own event loop."""


class HookHealth(msgspec.Struct, frozen=True):
    """Counts and times of one hook of one callback."""

    callback: str
    hook: str
    calls: int
    """Exact."""
    failures: int
    """Exact: calls that raised."""
    blocked: int
    """Calls that the watchdog reported as blocking."""
    mean_seconds: float
    """Mean of the sampled calls: the first, then 1 in 64; every call while calls take 1 ms."""
    max_seconds: float
    """The longest of the sampled calls."""

    def merge(self, other: "HookHealth | None") -> "HookHealth":
        """Return the combined counts and times of both."""
        if other is None:
            return self
        calls = self.calls + other.calls
        seconds = self.mean_seconds * self.calls + other.mean_seconds * other.calls
        return HookHealth(
            callback=self.callback,
            hook=self.hook,
            calls=calls,
            failures=self.failures + other.failures,
            blocked=self.blocked + other.blocked,
            mean_seconds=seconds / max(calls, 1),
            max_seconds=max(self.max_seconds, other.max_seconds),
        )


class JournalHealth(msgspec.Struct, frozen=True):
    """Counts of the journal of a bus."""

    directory: str
    stream: str
    recorded: int
    """Events written to the operating system."""
    unrecorded: int
    """Events that wait in memory because the disk refuses them."""
    lost: int
    """Events dropped because too many waited."""
    failures: int
    """How often the disk refused an operation."""
    removed_segments: int = 0
    """Segments removed by `retain`."""
    removed_events: int = 0
    """Events in the removed segments."""
    removed_bytes: int = 0
    """Size of the removed segments."""


class Health(msgspec.Struct, frozen=True):
    """A snapshot of a bus. All counts are exact and only grow."""

    state: Literal["new", "open", "closed", "forked"]
    published: dict[str, int]
    """Events dispatched, by type."""
    hooks: tuple[HookHealth, ...]
    """Every hook that a callback overrides and that was called."""
    tasks: TaskCounts
    tasks_by_owner: dict[str, TaskCounts]
    tasks_running: int
    """Adopted ones included."""
    tasks_waiting: int
    """Accepted tasks that wait for a free slot or for an earlier task of their lane."""
    deferred: int
    """Events of threads that waited `publish_patience_seconds` in vain, left to the thread whose hook held the bus."""
    dropped: int
    """Events whose `publish` returned although no hook was called and nothing was recorded: too many were handed over,
    or the bus was left meanwhile and they could not be recorded."""
    adoption: AdoptionState
    journal: JournalHealth | None = None
    """None if nothing is recorded."""
    deliveries: tuple[DeliveryStatus, ...] = ()
    """One for each followed adapter, read from the journal directory."""
    couriers: dict[str, CourierLocation] = {}
    """Where the courier of each of them runs."""
    handed_over: ClassVar[Renamed] = Renamed("deferred")
    refused: ClassVar[Renamed] = Renamed("dropped")
    without_hooks: int = 0
    """Events that are in the journal but whose hooks were not called: another thread's hook held the bus to the end."""
