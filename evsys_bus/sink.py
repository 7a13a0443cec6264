"""The contract for authors of sinks: an async destination that takes events in batches, off the loop.

    open()                        once, before the first batch; connect here, not in __init__
    write(batch)                  one at a time, in order; returns when the destination has the batch
    close()                       once, at the end, also after an `open` that raised

The journal is the queue: events that `write` has not acknowledged are delivered again, possibly on another day. A batch
may therefore be repeated after a crash; ``(envelope.stream, envelope.seq)`` identifies an event forever, and a repeated
event should change nothing. What `write` returns or raises decides what happens to the batch:

    nothing, or None returned     delivered
    a number n returned           the first n are delivered, the others are delivered again
    a BatchResult returned        the same, where some of the first were rejected: those become dead letters
    RetryLaterError, OSError,     retried without end, with growing pauses; ``after_seconds`` is honoured, and with
      TimeoutError                  ``waiting`` it is shown as a healthy wait
    ParkedError                   the adapter is parked: retried once a minute, and shown
    RejectedError({index: why})   those become dead letters, the others are delivered
    BatchTooLargeError            halved; a single event becomes a dead letter
    anything else                 retried a few times; then halved to find the failing event, which becomes a dead
                                    letter; after three of those in a row the sink is parked until it takes an event

A sink that only forwards events declares ``raw: ClassVar[bool] = True``, and its batches are of `RawRecord` instead of
`Envelope`: nothing is decoded on the way. All of the above is the same. A sink that needs both, the event and how it is
recorded, declares ``with_payloads: ClassVar[bool] = True``, and its envelopes are `RecordedEnvelope`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, ClassVar, Final, NamedTuple

import msgspec

from evsys_bus.adapter import Adapter, EventPublisher, RunResumer
from evsys_bus.errors import NotAttachedError, SinkMethodError
from evsys_bus.events import Envelope, Event, declared_events


class BatchResult(NamedTuple):
    """What became of the events at the front of a batch; the events after these are delivered again.

    Example:
        >>> BatchResult(delivered=3, rejected={1: "no such column"}).handled  # of these 4, the second was rejected
        4
    """

    delivered: int
    """How many of them were delivered."""
    rejected: Mapping[int, str] = {}
    """Index and reason of each that was rejected for good, and becomes a dead letter."""
    errors: Mapping[int, Exception] = {}
    """Exceptions of rejected events, by index, to be logged with them."""

    @property
    def handled(self) -> int:
        """How many they are: delivered and rejected ones."""
        return self.delivered + len(self.rejected)


class RawRecord(msgspec.Struct, frozen=True, gc=False):
    """An event as it is in the journal, in a batch of a raw sink. ``(stream, sequence)`` identifies it forever."""

    stream: str
    sequence: int
    payload: bytes
    """The encoded envelope, its checksum verified; `evsys_bus.codec.decode` decodes it, unless a program has recorded
    something else or a newer version wrote it."""


class RecordedEnvelope(Envelope, frozen=True, gc=False):
    """An event with the bytes that the journal holds of it, in a batch of a sink that is ``with_payloads``."""

    payload: bytes = b""
    """The encoded envelope."""

    @classmethod
    def of(cls, envelope: Envelope, payload: bytes) -> "RecordedEnvelope":
        """Return the envelope with its encoded form."""
        return cls(
            envelope.stream,
            envelope.seq,
            envelope.time,
            envelope.event,
            envelope.run,
            envelope.rank,
            envelope.replaced,
            payload,
        )


class Sink(Adapter):
    """An async destination. Subclass it, and override `write`.

    Example:
        >>> class Lines(Sink):
        ...     def __init__(self) -> None:
        ...         self.seen: list[int] = []
        ...
        ...     async def write(self, batch):
        ...         self.seen += [envelope.seq for envelope in batch]
    """

    raw: ClassVar[bool] = False
    """Whether `write` takes `RawRecord` instead of `Envelope`."""
    with_payloads: ClassVar[bool] = False
    """Whether a courier gives `write` `RecordedEnvelope`; a replay may give it plain ones."""
    max_batch_events: int = 500
    max_batch_bytes: int = 1 << 20
    """Size of the encoded events; a single event that is larger is a batch by itself."""
    max_batch_seconds: float = 0.5
    """How long the first event of a batch waits for more."""
    first_at_once: bool = False
    """Whether an event does not wait where the last batch was that long ago; else as long as is left of that time."""
    write_timeout_seconds: float = 60.0
    """An `open` or `write` that takes longer is cancelled and retried; one that ignores the cancellation is
    abandoned."""

    idle_seconds: float | None = None
    """How often `on_idle` is called while there is nothing to deliver; None for never."""

    evsys_attached: EventPublisher | None = None
    """The courier, while the sink is open."""

    async def open(self) -> None:
        """Connect. It may raise the same errors as `write`, with the same meaning, and is then called again."""

    async def write(self, batch: Sequence[Any]) -> int | BatchResult | None:
        """Deliver the batch: at least one event, in the order of their streams.

        Args:
            batch: Each item is an `Envelope`, or a `RawRecord` if the sink is `raw`.
        """
        raise NotImplementedError(f"{type(self).__name__}.write")

    async def on_idle(self) -> None:
        """Do what is due while there is nothing to deliver; never called during `write`.

        It is cancelled after a few seconds, and an error is logged and has no other effect.
        """

    async def close(self) -> None:
        """Disconnect."""

    def publish(self, event: Event) -> None:
        """Record a result of the delivery (a URL, an upload) in the courier's own stream of the journal.

        Raises:
            NotAttachedError: The sink is not open.
        """
        if self.evsys_attached is None:
            raise NotAttachedError(
                f"{type(self).__name__}.publish() needs a courier", fix="publish between open() and close()"
            )
        self.evsys_attached.publish(event)

    def report_owed(self, events: int, why: str | None = None, fix: str | None = None) -> None:
        """Report how many delivered events the destination has not confirmed; see `Adapter.report_owed`."""
        if self.evsys_attached is not None:
            self.evsys_attached.report_owed(self, events, why, fix)

    def report_waiting(self, why: str | None, events: int = 0, fix: str | None = None) -> None:
        """Show that the sink waits, with nothing pending: the healthy state ``waiting``.

        Args:
            why: What it waits for; None once that is over.
            events: How many of the events that `write` has accepted wait with it. They count as neither delivered nor
                pending, and nothing retries them: with None, or less of them, they count as delivered.
            fix: What a person can do, such as the command that delivers them.
        """
        report = getattr(self.evsys_attached, "report_waiting", None)  # a courier; a replay has no status
        if report is not None:
            report(why, events, fix)


def sink_name(sink: Sink) -> str:
    """Return the name of a sink in logs, status and receipts."""
    return sink.spec_name or sink.name or type(sink).__name__


_METHODS: Final[dict[str, tuple[str, ...]]] = {"open": (), "write": ("batch",), "close": ()}
_AWAITABLES: Final = ("Awaitable", "Coroutine", "Future", "Task")


def check_sink(sink: Sink | type[Sink]) -> None:
    """Check a sink's methods when it is added, so that a mistake shows in second 1 and not as dead letters.

    Args:
        sink: The sink, or its class if another process will construct it.

    Raises:
        SinkMethodError: `open`, `write` or `close` is not async, or cannot be called by a courier; `write` is missing;
            ``raw`` is no bool of the class; it has a hook; the sink is raw and has a method that takes envelopes; or
            an error of `check_marks`.
    """
    owner = _class_name(sink)
    write = sink.write
    if getattr(write, "__func__", write) is Sink.write:
        raise SinkMethodError(
            f"{owner} has no write, so nothing would ever be delivered",
            fix="write `async def write(self, batch): ...`; it returns when the destination has the batch",
        )
    for name, arguments in _METHODS.items():
        method = getattr(sink, name)
        call_arguments = (
            ("self", *arguments) if isinstance(sink, type) and isinstance(method, FunctionType) else arguments
        )
        _check_method(f"{owner}.{name}", method, call_arguments, f"async def {name}({', '.join(('self', *arguments))})")
    _check_raw(sink, owner)
    cls = sink if isinstance(sink, type) else type(sink)
    own_names = {name for each in cls.__mro__ if issubclass(each, Sink) for name in vars(each)}
    hook = next((event.hook for event in declared_events().values() if event.hook in own_names), None)
    if hook is not None:
        raise SinkMethodError(
            f"{owner} is a sink, and its method {hook} would never be called",
            why="a sink gets every event by `write`; hooks are methods of a callback",
            fix="handle the event in `write`, or write a Callback whose `delivery` is the sink",
        )
    check_marks(sink)


def _check_raw(sink: Sink | type[Sink], owner: str) -> None:
    cls = sink if isinstance(sink, type) else type(sink)
    raw: object = sink.raw
    if type(raw) is not bool or raw is not cls.raw:
        raise SinkMethodError(
            f"{owner}.raw is {raw!r:.60}, but only its class can declare it, as True or False",
            fix="write `raw: ClassVar[bool] = True` in the class, or choose another name for what it is now",
        )
    if raw and isinstance(sink, RunResumer):
        raise SinkMethodError(
            f"{owner} has resume_runs, which takes envelopes, but it is raw: its events are not decoded",
            fix="leave out `resume_runs`, and `write` is given these records too; or leave out `raw = True`",
        )


def check_marks(adapter: object) -> None:
    """Check ``mark`` and ``rewind`` of a followed adapter.

    Args:
        adapter: The adapter, or its class.

    Raises:
        SinkMethodError: One of them is missing, or is ``async def``.
    """
    owner = _class_name(adapter)
    found = {name: getattr(adapter, name, None) for name in ("mark", "rewind")}
    missing = [name for name, method in found.items() if not callable(method)]
    if len(missing) == 1:
        (other,) = found.keys() - missing
        raise SinkMethodError(
            f"{owner} has `{other}` and no `{missing[0]}`, so its courier would call neither",
            fix="write both: `def mark(self)` returns plain data, `def rewind(self, mark)` undoes what came after it; "
            "if that is not meant, choose another name",
        )
    for name, method in found.items():
        if inspect.iscoroutinefunction(method):
            raise SinkMethodError(
                f"{owner}.{name} is async, but couriers call it without awaiting it", fix=f"write `def {name}(...)`"
            )


def _class_name(adapter: object) -> str:
    return adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__


def _check_method(label: str, method: Callable[..., object], arguments: Sequence[str], declaration: str) -> None:
    if _is_sync(method):
        raise SinkMethodError(
            f"{label} is not async, but couriers await it",
            why="what it returns could not be awaited, so each call would count as failed",
            fix=f"write `{declaration}`; run blocking code on a thread: await asyncio.to_thread(...)",
        )
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return  # a callable written in C may have no signature
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise SinkMethodError(
            f"{label}{signature} cannot be called as couriers do", why=str(error), fix=f"write `{declaration}`"
        ) from None


def _is_sync(method: Callable[..., object]) -> bool:
    """Return whether it is a plain function: not decorated, and not annotated with an awaitable result."""
    function = method.__func__ if isinstance(method, MethodType) else method
    if not isinstance(function, FunctionType) or inspect.unwrap(function) is not function:
        return False
    returns = str(function.__annotations__.get("return", ""))
    return not inspect.iscoroutinefunction(function) and not any(each in returns for each in _AWAITABLES)
