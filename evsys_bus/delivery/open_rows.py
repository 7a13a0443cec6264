"""Rows that were logged in parts and whose program ended before they were complete: their parts make the row."""

from typing import Any, Final, NamedTuple, cast

from evsys_bus.codec import decode
from evsys_bus.diagnostics import log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Envelope, Metrics, RunEnd, StepEnd, TrainStart, event_tag
from evsys_bus.journal import JournalReader, layout

_TAGS: Final = tuple(event_tag(each).encode() for each in (Metrics, StepEnd, TrainStart))


class MergedRow(Envelope, frozen=True, gc=False):
    """A row that was made of its parts, with the sequence of the last one; later events may be delivered before it."""


class EndedRows(NamedTuple):
    """Names the open rows that nothing will complete."""

    stream: str
    run: str | None = None
    """None for all runs."""
    first_step: int | None = None
    """Only rows of steps before this one; None for all."""


class OpenRows:
    """The open row of each run, from the events of its stream in their order. False if no row is open."""

    def __init__(self) -> None:
        self._rows: Final[dict[tuple[str, str], _OpenRow]] = {}
        """By stream and run; a run has one open row at most, since the row before is published first."""
        self._complete: Final[dict[tuple[str, str], tuple[int, dict[str, Any]]]] = {}
        """Likewise, step and metrics of the newest complete row of each run that logs in parts."""

    @property
    def have_parts(self) -> bool:
        """Whether rows are logged in parts, so that complete ones matter."""
        return bool(self._rows or self._complete)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def update(self, envelope: Envelope) -> None:
        """Add a part, remove a row that was published whole, or the rows of steps that a resumed training repeats."""
        event, key = envelope.event, (envelope.stream, envelope.run or "")
        if isinstance(event, Metrics):
            self._add_part(key, envelope, event)
        elif isinstance(event, StepEnd):
            row = self._rows.get(key)
            is_open_row = row is not None and row.step == event.step_idx
            if is_open_row:
                del self._rows[key]
            if is_open_row or key in self._complete:
                self._complete[key] = event.step_idx, event.metrics
        elif isinstance(event, TrainStart):
            self._remove_void(key, event.state.step)
        elif isinstance(event, RunEnd):
            self._complete.pop(key, None)

    def _add_part(self, key: tuple[str, str], envelope: Envelope, part: Metrics) -> None:
        row = self._rows.get(key)
        if row is not None and part.step_idx < row.step:
            return  # recorded late by another thread: it is in the row that was published before
        if row is None or row.step != part.step_idx:
            complete = self._complete.get(key)
            if complete is not None and complete[0] == part.step_idx and part.metrics.items() <= complete[1].items():
                return  # likewise, and no part of another step was
            row = self._rows[key] = _OpenRow(envelope, part.step_idx)
        row.metrics.update(part.metrics)
        row.last_part = envelope

    def _remove_void(self, key: tuple[str, str], first_step: Any) -> None:
        """Remove the rows of a run that its training makes anew, also those of an earlier process of this rank."""
        self._complete.pop(key, None)
        rank = layout.rank_of(key[0])
        for each in [*self._rows]:
            is_of_run = each[1] == key[1] and layout.rank_of(each[0]) == rank
            if is_of_run and type(first_step) is int and self._rows[each].step >= first_step:
                del self._rows[each]

    def restore(self, reader: JournalReader, stream: str, first: int, last: int) -> None:
        """Read the events of a stream from ``first`` to ``last`` again."""
        try:
            for record in reader.read(stream, first - 1):
                if record.sequence > last:
                    break
                if any(tag in record.payload for tag in _TAGS):
                    self.update(decode(record.payload))
        except (OSError, CodecError, JournalVersionError) as error:
            log().warning("courier.parts_unreadable", stream=stream, exc_info=error)

    def first_parts(self) -> dict[str, int]:
        """Return the sequence of the oldest part of an open row, by stream."""
        found: dict[str, int] = {}
        for (stream, _), row in self._rows.items():
            found[stream] = min(row.first_sequence, found.get(stream, row.first_sequence))
        return found

    def of(self, ended: EndedRows) -> list[MergedRow]:
        """Return the rows that have ended, each as a `StepEnd` in place of its last part."""
        return [self._rows[key].to_envelope() for key in self._keys_of(ended)]

    def remove(self, ended: EndedRows) -> None:
        """Remove these rows."""
        for key in self._keys_of(ended):
            del self._rows[key]

    def _keys_of(self, ended: EndedRows) -> list[tuple[str, str]]:
        stream, run, first_step = ended
        return [
            key
            for key, row in self._rows.items()
            if key[0] == stream and run in {None, key[1]} and (first_step is None or row.step < first_step)
        ]


class _OpenRow:
    def __init__(self, first_part: Envelope, step: int) -> None:
        self.step = step
        self.metrics: dict[str, Any] = {}
        self.first_sequence: Final = first_part.seq
        self.last_part = first_part

    def to_envelope(self) -> MergedRow:
        last, part = self.last_part, cast("Metrics", self.last_part.event)
        event = StepEnd(part.state, self.step, metrics=self.metrics)
        return MergedRow(last.stream, last.seq, last.time, event, last.run, last.rank, last.replaced)
