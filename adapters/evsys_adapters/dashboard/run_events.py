"""The events of a run, page by page and newest first, and what has come since: for the page that shows them live.

They come from the run's journal where this machine has it, which has all of them. Otherwise they are what the database
keeps of them: evals, checkpoints, contents, alerts and other events, but no steps, of which it keeps the numbers only.

Events are identified by their stream and sequence. A position is the sequence of one event for each stream; what a
client sends as a position is looked up, and never part of a path.
"""

import heapq
import math
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, cast

from evsys_adapters.common.hook_arguments import fields as fields_in
from evsys_adapters.dashboard.pages import Json
from evsys_adapters.dashboard.records import RunRecord
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.values import MAX_NAME_CHARS
from evsys_bus.adapter import DeliveryChanged, HookTimes
from evsys_bus.cli.events import facts_of, fields_of, metrics_of, step_of, type_of
from evsys_bus.codec import decode, to_builtins
from evsys_bus.context import LogContext
from evsys_bus.disk import OsDisk
from evsys_bus.errors import CodecError
from evsys_bus.events import Envelope, LoopState
from evsys_bus.filters import parse_filter
from evsys_bus.journal import JournalReader, frame, layout
from evsys_bus.journal.layout import Family
from evsys_bus.journal.reader import read_frames_newest_first
from evsys_bus.reading import locate_journal

PAGE_ROWS: Final = 100
_MAX_SECONDS: Final = 0.3
"""Of one search; then the answer has what was found, and the position to continue from."""
_FAMILIES: Final[tuple[Family, ...]] = ("r", "s", "c")
_STORED: Final = "stored"
"""The name of the stream of what the database keeps; no stream of a journal is called so."""
_MAX_STORED: Final = 2_000
"""Of each type, the newest ones."""
_MAX_TEXT: Final = 2_000
_MAX_BYTES: Final = 20_000
"""Of a field."""
_MAX_ITEMS: Final = 50
_MAX_DEPTH: Final = 6
_MAX_METRICS: Final = 12
_MAX_FACTS: Final = 8
_MAX_FACT: Final = 200

Position: TypeAlias = Mapping[str, int]
"""The sequence of one event of each stream."""


class RunEvent(NamedTuple):
    """An event as the page shows it."""

    stream: str
    sequence: int
    time: float
    rank: int
    type: str
    step: int | None
    facts: list[str]
    """Short texts about it."""
    metrics: Json
    fields: Json
    """All of it but the state of the loop."""
    is_report: bool = False
    """Whether it is a courier's report of its own work, which is shown only on request."""

    @property
    def texts(self) -> list[str]:
        """The texts that words and regular expressions of a filter are searched in."""
        return [
            self.type,
            *self.facts,
            *self.metrics,
            *(each for each in self.fields.values() if isinstance(each, str)),
        ]

    def field(self, name: str) -> object:
        """Return a fact of the event, one of its metrics, or one of its fields."""
        own = {"type": self.type, "step": self.step, "rank": self.rank, "stream": self.stream, "seq": self.sequence}
        if name in own:
            return own[name]
        if name == "age":
            return max(0.0, clock.time() - self.time)
        return self.metrics[name] if name in self.metrics else self.fields.get(name)


_Item: TypeAlias = tuple[int, RunEvent | None]
"""The sequence of an event, and the event; None for one of another run."""


class EventStream(Protocol):
    """The events of one stream."""

    def newest_first(self, before: int | None) -> Iterator[_Item]:
        """Yield the events before a sequence, or all."""
        ...

    def since(self, after: int) -> Iterator[_Item]:
        """Yield the events after a sequence, oldest first."""
        ...


class EventSource(NamedTuple):
    """Where the events of a run are read."""

    kind: Literal["journal", "database"]
    path: str | None
    """The journal."""
    streams: Callable[[], Mapping[str, EventStream]]
    """Returns the streams that there are now."""


def journal_source(key: str, path: str | None) -> EventSource | None:
    """Return the journal of a run that is recorded in ``path``; None if this machine does not have it.

    Args:
        key: The run, as its events name it.
        path: Its directory, as it was recorded.
    """
    try:
        location = locate_journal(Path(path)) if path and Path(path).is_absolute() else None
    except (OSError, ValueError):  # no path of this system
        return None
    if location is None:
        return None
    reader, is_shared = JournalReader(location.directory), location.run is not None

    def streams() -> dict[str, EventStream]:
        return {name: _JournalStream(reader, name, key, is_shared=is_shared) for name in reader.streams(*_FAMILIES)}

    return EventSource("journal", str(location.directory), streams)


class _JournalStream:
    """The events of one run in a stream of a journal."""

    def __init__(self, reader: JournalReader, stream: str, key: str, *, is_shared: bool) -> None:
        self._reader: Final = reader
        self._disk: Final = OsDisk()
        self._stream: Final = stream
        self._key: Final = key
        self._is_shared: Final = is_shared

    def newest_first(self, before: int | None) -> Iterator[_Item]:
        folder = f"{self._reader.directory}/{self._stream}"
        names = layout.list_segments(self._disk, folder)
        last = before
        for name in reversed(names):
            if last is not None and name.first_sequence >= last:
                continue
            for each in read_frames_newest_first(self._disk, f"{folder}/{name}"):
                # Carried events count in the oldest segment only; the later ones repeat them.
                is_event = each.kind == frame.EVENT or (each.kind == frame.CARRIED and name == names[0])
                if is_event and (last is None or each.sequence < last):
                    last = each.sequence
                    yield self._decode(each.sequence, bytes(each.payload))

    def since(self, after: int) -> Iterator[_Item]:
        return (self._decode(*each) for each in self._reader.read(self._stream, after))

    def _decode(self, sequence: int, payload: bytes) -> _Item:
        try:
            envelope = decode(payload)
        except CodecError:
            return sequence, None
        is_own = envelope.run == self._key or (envelope.run is None and not self._is_shared)
        return sequence, _event(self._stream, sequence, envelope) if is_own else None


def stored_source(store: Store, run: RunRecord) -> EventSource:
    """Return what the database keeps of the events of a run; to be read on the store's thread."""
    return EventSource("database", None, lambda: {_STORED: _StoredStream(store, run)})


class _StoredStream:
    """What the database keeps of a run's events; their sequences are made of their times."""

    def __init__(self, store: Store, run: RunRecord) -> None:
        self._events: Final[list[RunEvent]] = []
        sequence = 0
        for time, tag, step, fields in sorted(_stored_events(store, run), key=lambda each: each[:2]):
            sequence = max(sequence + 1, int(time * 1e6))
            shown = {
                name: value for name, value in fields.items() if name not in {"time", "step"} and value is not None
            }
            facts = [f"{name} {value}" for name, value in shown.items() if isinstance(value, str | int | float)]
            self._events.append(
                RunEvent(
                    *(_STORED, sequence, time, run.rank, tag, step, [each[:_MAX_FACT] for each in facts[:_MAX_FACTS]]),
                    *(_numbers(fields_in(fields.get("metrics"))), _bounded(shown)),
                )
            )

    def newest_first(self, before: int | None) -> Iterator[_Item]:
        return ((each.sequence, each) for each in reversed(self._events) if before is None or each.sequence < before)

    def since(self, after: int) -> Iterator[_Item]:
        return ((each.sequence, each) for each in self._events if each.sequence > after)


def _stored_events(store: Store, run: RunRecord) -> Iterator[tuple[float, str, int | None, Json]]:
    """Yield the time, type, step and fields of what the database keeps."""
    details = store.catalogue.details
    for row in store.catalogue.evals.of_run(run.id)[-_MAX_STORED:]:
        yield row.time, row.kind, row.step, {"name": row.name, **row.body}
    for kind, found in (
        ("checkpoint", details.checkpoints(run.id)),
        ("content", details.contents(run.id, _MAX_STORED)),
    ):
        for each in found[-_MAX_STORED:]:
            yield each["time"], kind, each["step"], each
    for alert in details.alerts([run.id], _MAX_STORED):
        yield alert.time, "alert", None, {"title": alert.title, "text": alert.text, "level": alert.level}
    for tag in details.event_counts(run.id):
        for each in details.kept_events(run.id, tag, _MAX_STORED):
            yield each["time"], tag, _step_in(each["fields"]), each["fields"]
    if run.started is not None:
        yield run.started, "run_start", None, {}
    if run.ended is not None:
        yield run.ended, "run_end", None, {"status": run.status, "error": run.error}


def _step_in(fields: Mapping[str, Any]) -> int | None:
    """Return the step that the fields of an event have; None if they have none."""
    step = fields.get("step_idx", fields.get("step"))
    return step if isinstance(step, int) else None


def parse_selection(text: str) -> Callable[[RunEvent], bool]:
    """Return the test of a filter; see `evsys_bus.filters`.

    Couriers' reports of their own work are left out unless the filter names types.

    Raises:
        ValueError: It cannot be parsed; the message says why.
    """
    condition = parse_filter(text)
    with_reports = "type:" in text
    return lambda event: (with_reports or not event.is_report) and condition.matches(event)


def read_before(source: EventSource, before: Position, is_selected: Callable[[RunEvent], bool]) -> Json:
    """Return a page of the newest events before a position, newest first.

    Args:
        source: Where to read.
        before: `next` of the page before; empty for the first page.
        is_selected: Which events to return.

    Returns:
        ``rows``; ``next``, None at the end; ``searched``, the number of events that were looked at; and of the first
        page ``newest``, the position from which `read_since` continues.
    """
    newest: dict[str, int] = {}
    merged: list[Iterator[tuple[float, int, RunEvent | None, str]]] = []
    for name, stream in source.streams().items():
        events = stream.newest_first(before.get(name))
        first = next(events, None)
        newest[name] = 0 if first is None else first[0]
        merged.append(_by_time(name, chain([] if first is None else [first], events)))
    position = dict(before)
    rows: list[RunEvent] = []
    searched, end, is_over = 0, clock.monotonic() + _MAX_SECONDS, True
    for _, sequence, event, name in heapq.merge(*merged, key=lambda each: -each[0]):
        searched += 1
        position[name] = sequence
        if event is not None and is_selected(event):
            rows.append(event)
        if len(rows) >= PAGE_ROWS or clock.monotonic() > end:
            is_over = False
            break
    found = {"rows": [_row(each) for each in rows], "next": None if is_over else position, "searched": searched}
    return found if before else {**found, "newest": newest}


def read_since(source: EventSource, after: Position, is_selected: Callable[[RunEvent], bool]) -> Json:
    """Return the events after a position, newest first.

    Args:
        source: Where to read.
        after: ``newest`` of the answer before. Streams that it lacks have started since, and are read from their
            beginning.
        is_selected: Which events to return.

    Returns:
        ``rows``; ``newest``; ``searched``; and ``more``, whether there were too many for one answer.
    """
    rows: list[RunEvent] = []
    newest = dict(after)
    searched, end, more = 0, clock.monotonic() + _MAX_SECONDS, False
    for name, stream in source.streams().items():
        newest.setdefault(name, 0)
        for sequence, event in stream.since(newest[name]):
            searched += 1
            newest[name] = sequence
            if event is not None and is_selected(event):
                rows.append(event)
            if len(rows) >= PAGE_ROWS or clock.monotonic() > end:
                more = True
                break
    rows.sort(key=lambda each: each.time)
    return {"rows": [_row(each) for each in reversed(rows)], "newest": newest, "searched": searched, "more": more}


def _by_time(name: str, events: Iterable[_Item]) -> Iterator[tuple[float, int, RunEvent | None, str]]:
    """Yield the events of a stream with times that do not increase: the order in it remains if its clock jumped."""
    earliest = float("inf")
    for sequence, event in events:
        earliest = earliest if event is None else min(earliest, event.time)
        yield earliest, sequence, event, name


def _event(stream: str, sequence: int, envelope: Envelope) -> RunEvent:
    event = envelope.event
    found = {
        name: value
        for name, value in fields_of(event).items()
        if value is not None and not isinstance(value, LoopState | LogContext)
    }
    return RunEvent(
        *(stream, sequence, envelope.time, envelope.rank, type_of(event)[:MAX_NAME_CHARS], step_of(event)),
        [each[:_MAX_FACT] for each in facts_of(event, envelope.run)[:_MAX_FACTS]],
        _numbers(metrics_of(event)),
        _bounded({str(name): to_builtins(value, max_bytes=_MAX_BYTES)[0] for name, value in found.items()}),
        isinstance(event, DeliveryChanged | HookTimes),
    )


def _row(event: RunEvent) -> Json:
    return {name: value for name, value in event._asdict().items() if name != "is_report"}


def _numbers(metrics: Mapping[str, Any]) -> Json:
    return {
        name: _bounded(value) for name, value in islice(metrics.items(), _MAX_METRICS) if isinstance(value, int | float)
    }


def _bounded(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON has it, numbers that are not finite as text, without the ends of long texts and lists."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        entries = cast("dict[object, Any]", value)
        shown = {str(name)[:_MAX_FACT]: _bounded(each, depth + 1) for name, each in islice(entries.items(), _MAX_ITEMS)}
        return shown | ({"…": f"{len(entries) - _MAX_ITEMS} more"} if len(entries) > _MAX_ITEMS else {})
    if isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        items = cast("Sequence[Any]", value)
        rest = [f"… {len(items) - _MAX_ITEMS} more"] if len(items) > _MAX_ITEMS else []
        return [*(_bounded(each, depth + 1) for each in items[:_MAX_ITEMS]), *rest]
    text = str(cast("object", value))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
