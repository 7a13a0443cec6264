"""`Heard`: the run annotations (`Learnt` events) that couriers have written to their own streams of a journal.

They are added to the contexts of the delivered events. No cursor covers them: a new courier reads them again.
"""

from typing import Any, Final

from evsys_bus.attached import Learnt
from evsys_bus.codec import decode
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import Clock, JournalReader, layout

LISTEN_SECONDS: Final = 0.2
"""Time between two reads of the couriers' streams."""
MOST_REST_SECONDS: Final = 60.0
"""The longest such pause for a stream that has no writer and is not the newest; each pause is four times as long."""

_SEEMS_ONE: Final = Learnt.hook.removeprefix("on_").encode()
"""The tag of the event, searched before decoding; a payload that contains it by chance is decoded in vain."""


class Heard:
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
        self._streams: Final[dict[str, _Stream]] = {}
        self._due = 0.0

    def listen(self) -> list[Learnt]:
        """Return new annotations; reads the streams only every `LISTEN_SECONDS`."""
        news: list[Learnt] = []
        now = self._clock.monotonic()
        if now < self._due:
            return news
        try:
            names = self._reader.streams("c")
            newest = {layout.rank_of(name): name for name in names}.values()
            for name in names:
                stream = self._streams.setdefault(name, _Stream(self._reader, name))
                news += stream.listen(now, is_newest=name in newest)
        except (OSError, JournalVersionError) as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)
        for each in news:
            self.extras.setdefault(each.run, {}).update(each.extras)
        self._due = self._clock.monotonic() + LISTEN_SECONDS
        return news


class _Stream:
    """One stream and its read position."""

    def __init__(self, reader: JournalReader, name: str) -> None:
        self._reader: Final = reader
        self._name: Final = name
        self._tail: Final = reader.tail(name)
        self._rest_seconds = LISTEN_SECONDS
        self._rests_until = 0.0

    def listen(self, now: float, *, is_newest: bool) -> list[Learnt]:
        """Return new annotations; empty while the stream is not polled."""
        if now < self._rests_until:
            return []
        rests = not is_newest and not self._reader.is_live(self._name)  # no writer continues it; checked before reading
        before = self._tail.last
        news = [each for each in (_learnt(record.payload) for record in self._tail.poll()) if each is not None]
        if rests and self._tail.last == before:
            self._rest_seconds = min(4 * self._rest_seconds, MOST_REST_SECONDS)
            self._rests_until = now + self._rest_seconds
        return news


def _learnt(payload: bytes) -> Learnt | None:
    if _SEEMS_ONE not in payload:
        return None
    try:
        event = decode(payload).event
    except CodecError:
        return None
    # Another version may have written it, so the types of its fields are checked.
    return event if isinstance(event, Learnt) and type(event.run) is str and type(event.extras) is dict else None
