"""Health of a bus: every count that changes when something is dropped, refused, late or raised."""

from typing import ClassVar, Literal

import msgspec

from evsys_bus.bus.delivery_manager import CourierLocation, DeliveryManager
from evsys_bus.bus.hook_stats import HookHealth
from evsys_bus.bus.publisher import Publisher
from evsys_bus.bus.recorder import EventRecorder, JournalHealth
from evsys_bus.deprecated import Renamed
from evsys_bus.tasks import AdoptionState, DeliveryStatus, TaskCounts, TaskManager


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


def collect_health(
    publisher: Publisher,
    task_manager: TaskManager,
    adoption: AdoptionState,
    recorder: EventRecorder | None,
    delivery_manager: DeliveryManager,
) -> Health:
    """Collect the counts of all components of a bus."""
    tasks, by_owner = task_manager.counts()
    running, waiting = task_manager.count_running_and_waiting()
    return Health(
        state=publisher.state,
        published=publisher.dispatches.published_counts(),
        hooks=publisher.dispatches.hook_health(),
        tasks=tasks,
        tasks_by_owner=by_owner,
        tasks_running=running,
        tasks_waiting=waiting,
        deferred=publisher.deferred,
        dropped=publisher.dropped,
        adoption=adoption,
        journal=None if recorder is None else recorder.health(),
        deliveries=delivery_manager.deliveries(),
        couriers=delivery_manager.courier_locations(),
        without_hooks=publisher.without_hooks,
    )
