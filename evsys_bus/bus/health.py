"""Health of a bus: every count that changes when something is dropped, refused, late or raised."""

from typing import Literal

import msgspec

from evsys_bus.bus.account import HookHealth
from evsys_bus.bus.following import Following, Place
from evsys_bus.bus.publisher import Publisher
from evsys_bus.bus.recording import JournalHealth, Recording
from evsys_bus.tasks import AdoptionState, DeliveryStatus, TaskCounts, TaskOffice


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
    handed_over: int
    """Events of threads that waited `publish_patience_seconds` in vain, left to the thread whose hook held the bus."""
    refused: int
    """Events whose `publish` returned although no hook was called and nothing was recorded: too many were handed over,
    or the bus was left meanwhile and they could not be recorded."""
    adoption: AdoptionState
    journal: JournalHealth | None = None
    """None if nothing is recorded."""
    deliveries: tuple[DeliveryStatus, ...] = ()
    """One for each followed adapter, read from the journal directory."""
    couriers: dict[str, Place] = {}
    """Where the courier of each of them runs."""
    without_hooks: int = 0
    """Events that are in the journal but whose hooks were not called: another thread's hook held the bus to the end."""


def health_of(
    publisher: Publisher, office: TaskOffice, adoption: AdoptionState, recording: Recording | None, following: Following
) -> Health:
    """Collect the counts of all components of a bus."""
    tasks, by_owner = office.counts()
    running, waiting = office.load()
    return Health(
        state=publisher.state,
        published=publisher.units.published(),
        hooks=publisher.units.hooks(),
        tasks=tasks,
        tasks_by_owner=by_owner,
        tasks_running=running,
        tasks_waiting=waiting,
        handed_over=publisher.handed_over,
        refused=publisher.refused,
        adoption=adoption,
        journal=None if recording is None else recording.health(),
        deliveries=following.deliveries(),
        couriers=following.places(),
        without_hooks=publisher.without_hooks,
    )
