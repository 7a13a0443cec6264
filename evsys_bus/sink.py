"""The contract for authors of sinks: an async destination that takes events in batches, off the loop.

    open()                        once, before the first batch; connect here, not in __init__
    write(batch)                  one at a time, in order; returns when the destination has the batch
    close()                       once, at the end, also after an `open` that raised

The journal is the queue: what `write` has not acknowledged is given to it again, also on another day. So a batch may
come twice after a crash; ``(envelope.stream, envelope.seq)`` names an event for ever, and a repeat should change
nothing. What `write` raises says what becomes of the batch:

    nothing, or None returned     delivered
    a number n returned           the first n are delivered, the others come again
    RetryLaterError, OSError,     tried again without end, with growing pauses; ``after_seconds`` is honoured
      TimeoutError
    ParkedError                   the adapter is parked: tried once a minute, and shown
    RejectedError({index: why})   those are dead letters, the others are delivered
    BatchTooLargeError            halved; a single event is a dead letter
    anything else                 tried a few times; then halved to find the event it fails on, which is a dead letter;
                                    after three of those in a row the sink is parked until it takes one
"""

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Final

from evsys_bus.attached import Adapter, Publishes
from evsys_bus.errors import NotAttachedError, SinkMethodError
from evsys_bus.events import Envelope, Event


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

    max_batch_events: int = 500
    max_batch_bytes: int = 1 << 20
    """Of encoded events; one event that is larger is a batch by itself."""
    max_batch_seconds: float = 0.5
    """How old the first event of a batch may grow before it is sent alone."""
    write_timeout_seconds: float = 60.0
    """An `open` or `write` that takes longer is cancelled and tried again; one that ignores that is left behind."""

    evsys_attached: Publishes | None = None
    """The courier, while the sink is open."""

    async def open(self) -> None:
        """Connect. Raises what `write` may raise, with the same meaning; it is then called again."""

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Deliver the batch: events in the order of their streams, never none."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    async def close(self) -> None:
        """Disconnect."""

    def publish(self, event: Event) -> None:
        """Have what the delivery learnt (a URL, an upload) on record, in the courier's own stream of the journal.

        Raises:
            NotAttachedError: The sink is not open.
        """
        if self.evsys_attached is None:
            raise NotAttachedError(
                f"{type(self).__name__}.publish() needs a courier", fix="publish between open() and close()"
            )
        self.evsys_attached.publish(event)

    def report_owed(self, events: int, why: str | None = None, fix: str | None = None) -> None:
        """Say how many delivered events the far side has not confirmed; see `Adapter.report_owed`."""
        if self.evsys_attached is not None:
            self.evsys_attached.report_owed(self, events, why, fix)


def sink_name(sink: Sink) -> str:
    """How a sink is called in logs, status and receipts."""
    return sink.spec_name or sink.name or type(sink).__name__


_METHODS: Final[dict[str, tuple[str, ...]]] = {"open": (), "write": ("batch",), "close": ()}
_AWAITABLES: Final = ("Awaitable", "Coroutine", "Future", "Task")


def check_sink(sink: Sink | type[Sink]) -> None:
    """Check a sink's methods before it is added, so that a mistake shows in second 1 and not as dead letters.

    Args:
        sink: The sink, or the class, where another process will make it.

    Raises:
        SinkMethodError: `open`, `write` or `close` is not async, or cannot be called as a courier does; `write` is not
            there; or as `check_marks`.
    """
    owner = _owner(sink)
    write = sink.write
    if getattr(write, "__func__", write) is Sink.write:
        raise SinkMethodError(
            f"{owner} has no write, so nothing would ever be delivered",
            fix="write `async def write(self, batch): ...`; it returns when the destination has the batch",
        )
    for name, arguments in _METHODS.items():
        method = getattr(sink, name)
        given = ("self", *arguments) if isinstance(sink, type) and isinstance(method, FunctionType) else arguments
        _check_method(f"{owner}.{name}", method, given, f"async def {name}({', '.join(('self', *arguments))})")
    check_marks(sink)


def check_marks(adapter: object) -> None:
    """Check the two methods that something has which is followed and can be rewound.

    Args:
        adapter: It, or its class.

    Raises:
        SinkMethodError: There is one without the other, or one is ``async def``.
    """
    owner = _owner(adapter)
    found = {name: getattr(adapter, name, None) for name in ("mark", "rewind")}
    lacking = [name for name, method in found.items() if not callable(method)]
    if len(lacking) == 1:
        (other,) = found.keys() - lacking
        raise SinkMethodError(
            f"{owner} has `{other}` and no `{lacking[0]}`, so its courier would call neither",
            fix="write both: `def mark(self)` returns plain data, `def rewind(self, mark)` undoes what came after it; "
            "if that is not meant, choose another name",
        )
    for name, method in found.items():
        if inspect.iscoroutinefunction(method):
            raise SinkMethodError(
                f"{owner}.{name} is async, but couriers call it without awaiting it", fix=f"write `def {name}(...)`"
            )


def _owner(adapter: object) -> str:
    return adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__


def _check_method(label: str, method: Callable[..., object], given: Sequence[str], declared: str) -> None:
    if _is_sync(method):
        raise SinkMethodError(
            f"{label} is not async, but couriers await it",
            why="what it returns could not be awaited, so each call would count as failed",
            fix=f"write `{declared}`; what blocks goes to a thread: await asyncio.to_thread(...)",
        )
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return  # a callable written in C may have none; its first call will tell
    try:
        signature.bind(*given)
    except TypeError as error:
        raise SinkMethodError(
            f"{label}{signature} cannot be called as couriers do", why=str(error), fix=f"write `{declared}`"
        ) from None


def _is_sync(method: Callable[..., object]) -> bool:
    """Whether it is a plain function; not a decorator's, or one that says what it returns: that may be awaitable."""
    function = method.__func__ if isinstance(method, MethodType) else method
    if not isinstance(function, FunctionType) or inspect.unwrap(function) is not function:
        return False
    returns = str(function.__annotations__.get("return", ""))
    return not inspect.iscoroutinefunction(function) and not any(each in returns for each in _AWAITABLES)
