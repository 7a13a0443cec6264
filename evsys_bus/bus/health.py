"""What a bus says of itself: every count that moves when something is dropped, refused, late or raised."""

from typing import Literal

import msgspec

from evsys_bus.bus.account import HookHealth
from evsys_bus.bus.adoption import AdoptionState
from evsys_bus.bus.recording import JournalHealth
from evsys_bus.tasks import TaskCounts


class Health(msgspec.Struct, frozen=True):
    """A bus at one moment. All counts are exact and grow only."""

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
    """Accepted, and waiting for a place or for their lane."""
    handed_over: int
    """Events of a thread that waited `publish_patience_seconds` in vain, left to the thread whose hook held the bus."""
    refused: int
    """Events that were not even handed over, because too many were."""
    adoption: AdoptionState
    journal: JournalHealth | None = None
    """None where nothing is recorded."""
