"""The contract for authors of sinks: an async destination that takes events in batches, off the loop.

    open()                        once, before the first batch; connect here, not in __init__
    write(batch)                  one at a time, in order; returns when the destination has the batch
    close()                       once, at the end

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

from collections.abc import Sequence
from typing import ClassVar

from evsys_bus.attached import Publishes
from evsys_bus.errors import NotAttachedError
from evsys_bus.events import Envelope, Event


class Sink:
    """An async destination. Subclass it, and override `write`.

    Example:
        >>> class Lines(Sink):
        ...     def __init__(self) -> None:
        ...         self.seen: list[int] = []
        ...
        ...     async def write(self, batch):
        ...         self.seen += [envelope.seq for envelope in batch]
    """

    name: ClassVar[str] = ""
    """The kind under which the sink is registered."""
    Config: ClassVar[type | None] = None
    """What its params are validated against: a msgspec Struct, a dataclass or a pydantic model."""

    max_batch_events: int = 500
    max_batch_bytes: int = 1 << 20
    """Of encoded events; one event that is larger is a batch by itself."""
    max_batch_seconds: float = 0.5
    """How old the first event of a batch may grow before it is sent alone."""
    write_timeout_seconds: float = 60.0
    """An `open` or `write` that takes longer is cancelled and tried again; one that ignores that is left behind."""

    spec_name: str | None = None
    """The name in the spec that it was built from; its cursor and its counts are kept under it."""
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


def sink_name(sink: Sink) -> str:
    """How a sink is called in logs, status and receipts."""
    return sink.spec_name or sink.name or type(sink).__name__
