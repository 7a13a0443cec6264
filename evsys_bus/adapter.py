"""`Adapter`, the base of callbacks and sinks, and the protocols of what they are attached to: a bus or a courier.

    an inline callback        the bus: runs its tasks; events that it publishes are ordinary events
    a followed callback       its courier: runs its tasks; events that it publishes go into the couriers' own stream
    a sink                    its courier, for publishing alone

Adapters are not given the events of the couriers' stream, and these are not counted as pending: a delivery would
otherwise cause the next one without end. The exception is `RunAnnotated`, which all couriers read. `DeliveryChanged`
and `HookTimes` are for programs that read the journal, such as a dashboard.
"""

import copy
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

from evsys_bus.events import Envelope, Event

Ranks = Literal["rank0", "all"] | tuple[int, ...]
"""In a job of several processes: the ranks whose events an adapter is given."""

RetryPolicy = Callable[..., Awaitable[object]]
"""Called as ``await policy(fn, *args)``: stamina's bound caller, tenacity's ``AsyncRetrying``, or your own."""


class RunAnnotated(Event, frozen=True):
    """Facts about a run that became known off the loop, such as the URL of its page; merged into ``ctx.extras``.

    Every followed callback and sink of the journal gets them, also in another process or on another day. An adapter
    should look into ``ctx.extras`` before it acts, because a restarted courier calls the start hooks again. Inline
    callbacks share the live context; an inline callback should also write such facts to its ``ctx.extras``.
    """

    run: str
    """The run key."""
    extras: dict[str, Any]
    """Entries for ``ctx.extras``, as plain values; the newest value of a key counts."""


class DeliveryChanged(Event, frozen=True, tag="run.delivery_changed"):
    """The status of the delivery to an adapter, recorded by its courier after a change, every few seconds at most."""

    adapter: str
    """Its name."""
    journal: str
    """The path of the journal."""
    status: dict[str, Any]
    """The fields of `evsys_bus.tasks.DeliveryStatus` that differ from their defaults."""


class HookTimes(Event, frozen=True, tag="run.hook_times"):
    """How long the hooks of a bus take, recorded by a courier of its journal while the counts change."""

    journal: str
    """The path of the journal."""
    rank: int
    """The rank of the bus."""
    hooks: list[dict[str, Any]]
    """The fields of `evsys_bus.bus.HookHealth` for each hook: counts of calls and failures, times in seconds."""


class EventInfo(NamedTuple):
    """When the event of a hook was published, and its position in the journal."""

    time: float
    """Seconds since the epoch, wall clock."""
    stream: str = ""
    """The journal stream; empty if nothing is recorded."""
    sequence: int = 0
    """Its number in that stream, from 1; 0 if nothing is recorded."""
    carried: bool = False
    """The event is a start that is repeated, so that the adapter knows which runs are open. Nothing starts now, nothing
    written before may be truncated, and the event is not counted."""
    merged: bool = False
    """The event is a row whose program ended before it was complete. It was made of its parts and has the sequence of
    the last one, so it may be delivered after events with greater ones."""


class Arguments(NamedTuple):
    """The arguments with which an adapter was constructed."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}  # noqa: RUF012 # never modified


class _InitSignature:
    """``inspect.signature(cls)``: that of ``__init__``, which ``__new__`` would hide."""

    def __get__(self, adapter: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class Adapter:
    """The base of `Callback` and `Sink`: stores its arguments, so that it can be built again in another process."""

    name: ClassVar[str] = ""
    """The kind under which the class is registered."""
    Config: ClassVar[type | None] = None
    """What its params are validated against: a msgspec Struct, a dataclass or a pydantic model. If the arguments of an
    object are valid for it, the courier process builds the object again; otherwise the object is delivered to on a
    thread of this process. If it has a static method ``from_environment``, the params which that returns (a dict, no
    secrets) are recorded too, for a later process whose environment lacks them."""
    ranks: ClassVar[Ranks | None] = None
    """Which ranks of a job it serves, unless its spec sets them: ``"rank0"``, ``"all"`` or a tuple of ranks. None: all
    ranks for inline callbacks, rank 0 for adapters of a courier."""

    spec_name: str | None = None
    """The name in the spec that it was built from, used for its cursor, counts, logs and receipts."""
    evsys_arguments: Arguments = Arguments()
    """Set by ``__new__``; never displayed."""

    __signature__ = _InitSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Construct the adapter and store a copy of its arguments."""
        if cls.__init__ is object.__init__ and (args or kwargs):
            raise TypeError(f"{cls.__name__}() takes no arguments")
        new: Any = super().__new__
        self = new(cls) if new is object.__new__ else new(cls, *args, **kwargs)
        if args or kwargs:
            arguments = Arguments(
                tuple(map(_copy_containers, args)), {key: _copy_containers(value) for key, value in kwargs.items()}
            )
            object.__setattr__(self, "evsys_arguments", arguments)
        return self

    def report_owed(self, events: int, why: str | None = None, fix: str | None = None) -> None:
        """Report how many delivered events the destination has not confirmed; 0 once it has confirmed all.

        Shown in ``health()``, the receipt, the live view and ``evsys-bus status``; ``--strict`` counts them as
        undelivered, and ``evsys-bus sync`` calls `settle_owed`. Does nothing if the adapter is not attached to a bus.

        Args:
            events: At most the number of delivered events; a partially confirmed event counts as one.
            why: What prevents the confirmation; None while it is in progress.
            fix: What a person has to do; None if it may resolve by itself. With ``required``, it stops the run.
        """
        raise NotImplementedError

    async def settle_owed(self, deadline: float) -> None:
        """Wait for the destination to confirm outstanding events. Called at the end of a run and by ``evsys-bus sync``.

        Args:
            deadline: On the clock of ``time.monotonic``. Return earlier if a person has to act first.
        """


def _copy_containers(value: Any) -> Any:
    """Return a copy of plain containers, which the program may change later; any other value unchanged."""
    try:
        return copy.deepcopy(value) if type(value) in {list, dict, set} else value
    except Exception:  # it contains a live object, which no other process could be given anyway
        return value


@runtime_checkable
class Rewindable(Protocol):
    """Optional methods of a followed callback or sink that writes files, so that no row is written twice after a crash.

    The courier stores the mark with the cursor, in one file. A new courier builds the adapter, rewinds it to the mark,
    repeats the start events of open runs (with ``state.step`` after the largest delivered step), and continues at the
    cursor. Both methods are sync.
    """

    def mark(self) -> Any:
        """Flush written data to disk and return its position, as plain data that JSON can represent exactly.

        Called between two batches, and before the first one; never during a batch. A mark is valid until two more
        were taken.
        """
        ...

    def rewind(self, mark: Any) -> None:
        """Undo what was written after the mark, at the latest before the files are used again."""
        ...


@runtime_checkable
class RunResumer(Protocol):
    """Optional method of a sink: gets repeated start events of open runs; without it, `Sink.write` gets them."""

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Reopen the runs of these start events; nothing starts now, and the events are not counted.

        Called after `open`, for a sink that was built again, and later where the original start events were removed
        from the journal. ``state.step`` of a training is the first step that may follow.
        """
        ...


class EventPublisher(Protocol):
    """What an adapter may publish to."""

    def publish(self, event: Event) -> None:
        """Record an event of the adapter."""
        ...

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Record what the adapter reports with `Adapter.report_owed`."""
        ...


class Spawner(EventPublisher, Protocol):
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
        """Run ``fn(*args)`` as a task beside the hooks; see `Callback.spawn`."""
        ...

    def current_event(self) -> EventInfo | None:
        """Return the event whose hook is running on this thread, or None outside a hook."""
        ...

    def publishes_here(self) -> bool:
        """Return whether this thread is inside a hook that this bus or courier called."""
        ...

    def may_call_hooks(self) -> bool:
        """Return whether it may still call hooks."""
        ...
