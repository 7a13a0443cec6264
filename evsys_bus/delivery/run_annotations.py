"""`RunAnnotations`: the `RunAnnotated` events that couriers have written to their own streams of a journal.

They are added to the contexts of the delivered events. No cursor covers them: a new courier reads them again.
"""

from typing import Any, Final

from evsys_bus.adapter import RunAnnotated
from evsys_bus.codec import decode
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import Clock, JournalReader, layout

POLL_SECONDS: Final = 0.2
"""Time between two reads of the couriers' streams."""
MAX_IDLE_SECONDS: Final = 60.0
"""The longest such pause for a stream that has no writer and is not the newest; each pause is four times as long."""

_EVENT_TAG: Final = RunAnnotated.hook.removeprefix("on_").encode()
"""The tag of the event, searched before decoding; a payload that contains it by chance is decoded in vain."""


class RunAnnotations:
    """Collects the run annotations of one journal.

    Args:
        reader: Reader of the journal.
        clock: The clocks.
        faults: Where read errors are logged.
    """

    def __init__(self, reader: JournalReader, clock: Clock, faults: FaultLog) -> None:
        self.extras: Final[dict[str, dict[str, Any]]] = {}
        """All annotations so far, by run."""
        self._reader: Final = reader
        self._clock: Final = clock
        self._faults: Final = faults
        self._streams: Final[dict[str, _AnnotationStream]] = {}
        self._poll_due = 0.0

    def poll(self) -> list[RunAnnotated]:
        """Return new annotations; reads the streams only every `POLL_SECONDS`."""
        annotations: list[RunAnnotated] = []
        now = self._clock.monotonic()
        if now < self._poll_due:
            return annotations
        try:
            names = self._reader.streams("c")
            newest = {layout.rank_of(name): name for name in names}.values()
            for name in names:
                stream = self._streams.setdefault(name, _AnnotationStream(self._reader, name))
                annotations += stream.poll(now, is_newest=name in newest)
        except (OSError, JournalVersionError) as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)
        for each in annotations:
            self.extras.setdefault(each.run, {}).update(each.extras)
        self._poll_due = self._clock.monotonic() + POLL_SECONDS
        return annotations


class _AnnotationStream:
    """One stream and its read position."""

    def __init__(self, reader: JournalReader, name: str) -> None:
        self._reader: Final = reader
        self._name: Final = name
        self._tail: Final = reader.tail(name)
        self._idle_seconds = POLL_SECONDS
        self._idle_until = 0.0

    def poll(self, now: float, *, is_newest: bool) -> list[RunAnnotated]:
        """Return new annotations; empty while the stream is not polled."""
        if now < self._idle_until:
            return []
        can_idle = not is_newest and not self._reader.is_live(
            self._name
        )  # no writer continues it; checked before reading
        before = self._tail.last_sequence
        annotations = [
            each for each in (_decode_annotation(record.payload) for record in self._tail.poll()) if each is not None
        ]
        if can_idle and self._tail.last_sequence == before:
            self._idle_seconds = min(4 * self._idle_seconds, MAX_IDLE_SECONDS)
            self._idle_until = now + self._idle_seconds
        return annotations


def _decode_annotation(payload: bytes) -> RunAnnotated | None:
    if _EVENT_TAG not in payload:
        return None
    try:
        event = decode(payload).event
    except CodecError:
        return None
    # Another version may have written it, so the types of its fields are checked.
    return event if isinstance(event, RunAnnotated) and type(event.run) is str and type(event.extras) is dict else None
