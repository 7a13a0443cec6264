"""`Heard`: what couriers have learnt of runs, read from their own streams of a journal.

It is put beside the events that followers are given, and moves no cursor: who begins anew reads it again.
"""

from typing import Any, Final

from evsys_bus.attached import Learnt
from evsys_bus.codec import decode
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import Clock, JournalReader, Tail

LISTEN_SECONDS: Final = 0.2
"""Between two looks into the couriers' streams."""

_SEEMS_ONE: Final = Learnt.hook.removeprefix("on_").encode()
"""The tag of the event; a payload that holds it by chance is decoded in vain."""


class Heard:
    """What was learnt in one journal.

    Args:
        reader: Of the journal.
        clock: The clocks.
        faults: Where it is said that a stream cannot be read.
    """

    def __init__(self, reader: JournalReader, clock: Clock, faults: FaultLog) -> None:
        self.extras: Final[dict[str, dict[str, Any]]] = {}
        """All that is known, by run. Any: plain values."""
        self._reader: Final = reader
        self._clock: Final = clock
        self._faults: Final = faults
        self._tails: Final[dict[str, Tail]] = {}
        self._due = 0.0

    def listen(self) -> list[Learnt]:
        """What was not known before; nothing, if it was asked for a moment ago."""
        news: list[Learnt] = []
        if self._clock.monotonic() < self._due:
            return news
        try:
            for stream in self._reader.streams("c"):
                if stream not in self._tails:
                    self._tails[stream] = self._reader.tail(stream)
                news += filter(None, (_learnt(record.payload) for record in self._tails[stream].poll()))
        except (OSError, JournalVersionError) as error:
            self._faults.warn("courier.unreadable", self._reader.directory, error=error)
        for each in news:
            self.extras.setdefault(each.run, {}).update(each.extras)
        self._due = self._clock.monotonic() + LISTEN_SECONDS
        return news


def _learnt(payload: bytes) -> Learnt | None:
    if _SEEMS_ONE not in payload:
        return None
    try:
        event = decode(payload).event
    except CodecError:
        return None
    # Another version may have written it, and what is read is kept as it was written.
    return event if isinstance(event, Learnt) and type(event.run) is str and type(event.extras) is dict else None
