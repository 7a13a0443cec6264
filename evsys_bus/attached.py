"""What adapters are attached to while they are at work, a bus or a courier, and what they tell there.

    a callback, inline        the bus: spawns its tasks; what it publishes is an event like any other
    a callback, followed      its courier: likewise, but what it publishes goes into the couriers' own stream
    a sink                    its courier, for publishing alone

Followers are given no events of the couriers' stream, and nobody counts them: who delivers would never come to an end.
But one of them all couriers heed: `Learnt`.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from evsys_bus.events import Event

RetryPolicy = Callable[..., Awaitable[object]]
"""Called as ``await policy(fn, *args)``: a bound caller of stamina, an ``AsyncRetrying`` of tenacity, or your own."""


class Learnt(Event, frozen=True):
    """What became known of a run off the loop, as the page that shows it; in ``ctx.extras`` of followers from then on.

    It reaches every followed callback and sink of the journal, also those of another process or another day. Who learns
    it looks there first, for a courier that begins anew calls the start hooks again. Inline callbacks share the live
    context; one of them that learns something writes it there besides.
    """

    run: str
    """The run key."""
    extras: dict[str, Any]
    """What to put into ``ctx.extras``; the newest of a key counts. Any: plain values."""


class Publishes(Protocol):
    """What an adapter may publish to."""

    def publish(self, event: Event) -> None:
        """Record what was learnt."""
        ...


class Spawner(Publishes, Protocol):
    """What a callback is attached to: an open bus, or its courier."""

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        lane: str | None = None,
        owner: str | None = None,
    ) -> bool:
        """As `Callback.spawn`. Any: the arguments are those of ``fn``."""
        ...

    def publishes_here(self) -> bool:
        """Whether this thread is inside a hook that this bus called."""
        ...
