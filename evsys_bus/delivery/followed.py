"""`Followed`: an adapter that couriers deliver to, and how its delivery is meant to go."""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.delivery.receiver import Rewindable
from evsys_bus.sink import Sink

OnFailure = Literal["count", "dead", "retry"]
"""What a followed hook that raises means for its event: ``count`` it and go on, as inline (the event is delivered);
make it ``dead``, a dead letter; or ``retry`` it a few times with growing pauses, and make it a dead letter then."""


class Recipe(msgspec.Struct, frozen=True):
    """How an adapter is built again, in another process or on another day."""

    kind: str
    """Its name in the registry."""
    params: dict[str, Any] = {}
    """Any: the adapter's Config says what they are."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, which register the kind."""
    half: Literal["whole", "delivery"] = "whole"
    """Of an adapter with two halves, the courier builds the delivery half."""


class Terms(msgspec.Struct, frozen=True):
    """How a delivery is meant to go."""

    ranks: tuple[int, ...] | None = (0,)
    """Of which ranks' streams; None means all."""
    on_failure: OnFailure = "count"
    required: bool = False
    """Stop the run if its delivery ends for good, or is parked."""
    stop_after_seconds: float | None = None
    """Stop the run once its delivery has failed for so long."""
    max_staleness_seconds: float | None = None
    """Stop the run once the delivery has not caught up for so long."""

    @property
    def stops(self) -> bool:
        """Whether there is a case in which the run must stop."""
        return self.required or self.stop_after_seconds is not None or self.max_staleness_seconds is not None


class Followed(msgspec.Struct, frozen=True):
    """An adapter that is followed: built again from a recipe in the courier process, or live, on a thread."""

    name: str
    """Keys its cursor, its counts and its lock."""
    recipe: Recipe | None = None
    live: Callback | Sink | None = None
    """Where there is no recipe, or where it cannot be used from another process."""
    build: Callable[[], Callback | Sink] | None = None
    """Builds it by its recipe in this process, for a bus whose couriers are threads."""
    terms: Terms = Terms()
    here: bool = False
    """Deliver on a thread of the bus's own process, wherever the others are delivered to."""


class CourierState(msgspec.Struct, omit_defaults=True):
    """How a delivery fares, as its courier last wrote it down; counts and places are in the cursor."""

    state: Literal["delivering", "idle", "retrying", "parked", "ended", "failed"]
    """Idle: all there is was delivered. Failed: the adapter cannot be built or opened."""
    pid: int
    at: float
    """When this was written; seconds since the epoch, wall clock."""
    error: str | None = None
    """What the destination, or the adapter, said last."""
    fix: str | None = None
    failing_since: float | None = None
    """Wall clock."""
    attempts: int = 0
    """Since it began to fail."""
    hook_failures: int = 0
    """Of a followed callback, in this process."""


def kind_of(adapter: object) -> str:
    """What tells it from another adapter of the same name: its kind, or, where it leaves marks, its class's name.

    Of a live object that leaves none nothing is told: its name says who it is.
    """
    kind: object = getattr(type(adapter), "name", None)
    if isinstance(kind, str) and kind:
        return kind
    return type(adapter).__name__ if isinstance(adapter, Rewindable) else ""
