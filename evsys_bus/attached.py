"""What callbacks and sinks have in common, and what they are attached to while they work: a bus or a courier.

    a callback, inline        the bus: spawns its tasks; what it publishes is an event like any other
    a callback, followed      its courier: likewise, but what it publishes goes into the couriers' own stream
    a sink                    its courier, for publishing alone

Followers are given no events of the couriers' stream, and nobody counts them: who delivers would never come to an end.
But one of them all couriers heed: `Learnt`.
"""

import copy
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from evsys_bus.events import Event

Ranks = Literal["rank0", "all"] | tuple[int, ...]
"""Of a job of several processes: the ranks whose events an adapter is given."""

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


class EventInfo(NamedTuple):
    """Where and when the event that a hook is handed was published."""

    time: float
    """Seconds since the epoch, wall clock."""
    stream: str = ""
    """The journal stream; empty where nothing is recorded."""
    sequence: int = 0
    """Its number in that stream, from 1; 0 where nothing is recorded."""
    carried: bool = False
    """The event is a start that is given again, so that the adapter knows what is open where its events go on: nothing
    starts now, and nothing that was written before is to be cut. It is not counted."""


class Arguments(NamedTuple):
    """What an adapter was constructed with."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}  # noqa: RUF012 # never written to


class _InitSignature:
    """``inspect.signature(cls)``: that of ``__init__``; ``__new__``, which takes anything, would hide it."""

    def __get__(self, adapter: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class Adapter:
    """The base of `Callback` and `Sink`: remembers its arguments, so that it can be built again, and what is owed."""

    name: ClassVar[str] = ""
    """The kind under which the class is registered."""
    Config: ClassVar[type | None] = None
    """What its params are validated against: a msgspec Struct, a dataclass or a pydantic model. Where the arguments of
    an object pass it, the courier process builds the object again; else it is delivered to on a thread of this one.
    The params that a static method ``from_environment`` of it returns (a dict, no secrets) are recorded too, for a
    later process whose own environment gives none."""
    ranks: ClassVar[Ranks | None] = None
    """Which ranks of a job it serves, unless its spec says: ``"rank0"``, ``"all"`` or a tuple of ranks. None: all for
    what runs inline, rank 0 for what is delivered to by a courier."""

    spec_name: str | None = None
    """The name in the spec that it was built from; its cursor, its counts, logs and receipts go by it."""
    evsys_arguments: Arguments = Arguments()
    """Kept by ``__new__``; never shown."""

    __signature__ = _InitSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Construct, and keep a copy of the arguments."""
        if cls.__init__ is object.__init__ and (args or kwargs):
            raise TypeError(f"{cls.__name__}() takes no arguments")
        new: Any = super().__new__
        self = new(cls) if new is object.__new__ else new(cls, *args, **kwargs)
        if args or kwargs:
            kept = Arguments(tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()})
            object.__setattr__(self, "evsys_arguments", kept)
        return self

    def report_owed(self, events: int, why: str | None = None, fix: str | None = None) -> None:
        """Say how many delivered events the far side has not confirmed; 0 once it has all of them.

        Shown in ``health()``, the receipt, the live view and ``evsys-bus status``; ``--strict`` counts it as
        undelivered, and ``evsys-bus sync`` calls `settle_owed`. Does nothing where the adapter is on no bus.

        Args:
            events: At most as many as were delivered; a part of one counts as one.
            why: What keeps the far side from confirming; None while it is at it.
            fix: What a person has to do; None where it may pass by itself. With ``required``, it stops the run.
        """
        raise NotImplementedError

    async def settle_owed(self, deadline: float) -> None:
        """Have the far side confirm what is owed. Called at the end of a run and by ``evsys-bus sync``.

        Args:
            deadline: On the clock of ``time.monotonic``. Return earlier where a person has to act first.
        """


def _copied(value: Any) -> Any:
    """A copy of plain containers, which the program may change later; anything else as it is."""
    try:
        return copy.deepcopy(value) if type(value) in {list, dict, set} else value
    except Exception:  # a live object in it; then no other process could be given it anyway
        return value


class Publishes(Protocol):
    """What an adapter may publish to."""

    def publish(self, event: Event) -> None:
        """Record what was learnt."""
        ...

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Note what the adapter reports with `Adapter.report_owed`."""
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
        background: bool = False,
    ) -> bool:
        """Run ``fn(*args)`` beside the hooks; see `Callback.spawn`."""
        ...

    def current_event(self) -> EventInfo | None:
        """Of the event whose hook runs on this thread now; None outside a hook."""
        ...

    def publishes_here(self) -> bool:
        """Whether this thread is inside a hook that this bus called."""
        ...
