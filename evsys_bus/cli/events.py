"""The events and streams of a journal, for commands: in one order and filtered, newest first, and as facts for people.

Streams of different ranks are merged by time. Of one rank, a stream without a live writer comes before all streams that
were started after it, even if clocks disagree: a resumed run follows the run that it resumes.

Events may come from journals of other programs and versions, so the types of their fields are not trusted.
"""

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec

from evsys_bus.adapter import DeliveryChanged, HookTimes, RunAnnotated
from evsys_bus.cli.output.formatting import format_duration, pluralize
from evsys_bus.cli.output.screen import Screen
from evsys_bus.codec import decode
from evsys_bus.context import LogContext, detached
from evsys_bus.errors import CodecError
from evsys_bus.events import (
    BenchmarkEval,
    Checkpoint,
    Envelope,
    Eval,
    Event,
    ExperimentEnd,
    GroupStart,
    RunEnd,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    event_tag,
)
from evsys_bus.journal import Disk, JournalReader, OsDisk, Record, TailReader, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.layout import Family, LockOwner
from evsys_bus.journal.reader import SegmentScan, read_frames_newest_first, read_newest_first
from evsys_bus.journal.stream_lock import read_stream_owner
from evsys_bus.reading import describe_damage


class EventFilter(msgspec.Struct, frozen=True):
    """Selects events; an empty or None field matches everything."""

    types: frozenset[str] = frozenset()
    run: str | None = None
    metric: re.Pattern[str] | None = None
    """Matches events with a metric whose name contains this pattern."""
    since: float | None = None
    """Seconds since the epoch."""

    def may_match(self, payload: bytes) -> bool:
        """Return False for most events that do not match, without decoding: payloads contain texts verbatim."""
        if self.types and not any(each.encode() in payload for each in self.types):
            return False
        return self.run is None or self.run.encode(errors="replace") in payload

    def matches(self, envelope: Envelope) -> bool:
        """Return whether the event matches."""
        if self.since is not None and envelope.time < self.since:
            return False
        if self.run is not None and envelope.run != self.run:
            return False
        if self.types and type_of(envelope.event) not in self.types:
            return False
        if not self.types and isinstance(envelope.event, DeliveryChanged | HookTimes):  # shown by name alone
            return False
        return self.metric is None or any(map(self.metric.search, metrics_of(envelope.event)))


class EventReader:
    """Reads a journal from a position in each of its streams, at first the beginning.

    Args:
        directory: The journal.
        event_filter: The filter.
        disk: The file system.
        include_annotations: Include the couriers' streams, which hold the annotations of runs.
    """

    def __init__(
        self, directory: Path, event_filter: EventFilter, disk: Disk | None = None, *, include_annotations: bool = False
    ) -> None:
        self.undecodable_records = 0
        """Number of intact records that could not be decoded."""
        self._disk = OsDisk() if disk is None else disk
        self._reader = JournalReader(directory, self._disk)
        self._filter = event_filter
        self._families: tuple[Family, ...] = ("r", "s", "c") if include_annotations else ("r", "s")
        self._tails: dict[str, TailReader] = {}
        self._missing: list[tuple[int, int]] = []

    def latest(self, count: int) -> list[Envelope]:
        """Return the last ``count`` events, oldest first, and move to the end."""
        merged = list(
            self._merge_streams({stream: self._latest_of_stream(stream, count) for stream in self._streams()})
        )
        return merged[-count:] if count else []

    def seek(self, since: float) -> None:
        """Move to the first segments that may hold events since this time."""
        for stream in self._streams():
            self._tails[stream] = self._reader.tail(stream, self._sequence_before(stream, since))

    def poll(self) -> Iterator[Envelope]:
        """Yield the events from the position to the current end; exhaust the iterator to move there.

        Raises:
            JournalVersionError: A newer version of evsys-bus wrote the next segment.
        """
        streams = self._streams()
        for stream in streams:
            if stream not in self._tails:
                self._tails[stream] = self._reader.tail(stream)
        return self._merge_streams({stream: self._decode_matching(self._tails[stream].poll()) for stream in streams})

    def last_sequences(self) -> dict[str, int]:
        """Return the sequence of the last event that was read, by stream."""
        return {stream: tail.last_sequence for stream, tail in self._tails.items()}

    def report_problems(self, screen: Screen) -> None:
        """Print to stderr which events are missing, bytes damaged and files unreadable of what was read, if any."""
        parts = describe_damage(self._tails.values(), self.undecodable_records, self._missing)
        if parts:
            screen.note(f"{', '.join(parts)}; see: evsys-bus journal verify {self._reader.directory}")

    def _streams(self) -> list[str]:
        return [stream for family in self._families for stream in self._reader.streams(family)]

    def _merge_streams(self, events: Mapping[str, Iterable[Envelope]]) -> Iterator[Envelope]:
        """Merge the events of streams; each stream is in order."""
        ranks: dict[tuple[str, int], list[str]] = {}
        for stream in events:
            ranks.setdefault((stream[0], layout.rank_of(stream)), []).append(stream)
        return _merge_by_time(self._merge_rank(streams, events) for streams in ranks.values())

    def _merge_rank(self, streams: Sequence[str], events: Mapping[str, Iterable[Envelope]]) -> Iterator[Envelope]:
        for at, stream in enumerate(streams, start=1):
            if streams[at:] and self._reader.is_live(stream):  # it is written at the same time as the others
                yield from _merge_by_time([events[stream], self._merge_rank(streams[at:], events)])
                return
            yield from events[stream]

    def _latest_of_stream(self, stream: str, count: int) -> list[Envelope]:
        """Return the last matching events of one stream, oldest first."""
        records = read_newest_first(self._disk, self._reader.directory, stream)
        newest = next(records, None)
        self._tails[stream] = self._reader.tail(stream, 0 if newest is None else newest.sequence)
        if newest is None or not count:
            return []
        found = itertools.islice(self._filter_newest_first(itertools.chain([newest], records)), count)
        return list(found)[::-1]

    def _filter_newest_first(self, records: Iterable[Record]) -> Iterator[Envelope]:
        since, previous_sequence = self._filter.since, None
        for record in records:
            if previous_sequence is not None and previous_sequence > record.sequence + 1:
                self._missing.append((record.sequence + 1, previous_sequence - 1))
            previous_sequence = record.sequence
            if since is None and not self._filter.may_match(record.payload):
                continue
            envelope = self._decode_record(record)
            if envelope is None:
                continue
            if since is not None and envelope.time < since:
                return
            if self._filter.matches(envelope):
                yield envelope

    def _decode_matching(self, records: Iterable[Record]) -> Iterator[Envelope]:
        for record in records:
            if self._filter.may_match(record.payload):
                envelope = self._decode_record(record)
                if envelope is not None and self._filter.matches(envelope):
                    yield envelope

    def _decode_record(self, record: Record) -> Envelope | None:
        try:
            return decode(record.payload, _CONTEXTS)
        except CodecError:
            self.undecodable_records += 1
            return None

    def _sequence_before(self, stream: str, since: float) -> int:
        """Return the sequence before the first segment to read; 0 for all segments."""
        names = layout.list_segments(self._disk, f"{self._reader.directory}/{stream}")
        for name in reversed(names[1:]):
            scan = SegmentScan(self._disk, f"{self._reader.directory}/{stream}/{name}")
            events = (each for each in scan.frames() if isinstance(each, Frame) and each.kind == frame.EVENT)
            first = next(events, None)
            envelope = None if first is None else self._decode_record(Record(first.sequence, bytes(first.payload)))
            if envelope is not None and envelope.time < since:
                return name.first_sequence - 1
        return 0


class _RunKeyContexts(dict[str, LogContext]):
    """Maps every run key to a context that has only this key, so that a decoded state names its run."""

    def __contains__(self, run: object) -> bool:
        return isinstance(run, str)

    def __getitem__(self, run: str) -> LogContext:
        return detached(LogContext, {"run_key": run})


_CONTEXTS: Final = _RunKeyContexts()


def _merge_by_time(streams: Iterable[Iterable[Envelope]]) -> Iterator[Envelope]:
    """Merge by time; the order within a stream remains even if its clock jumped."""
    for _, envelope in heapq.merge(*map(_with_times, streams), key=itemgetter(0)):
        yield envelope


def _with_times(envelopes: Iterable[Envelope]) -> Iterator[tuple[float, Envelope]]:
    latest = 0.0
    for envelope in envelopes:
        latest = max(latest, envelope.time)
        yield latest, envelope


def type_of(event: Event | UnknownEvent) -> str:
    """Return the type of an event as journals record it: ``step_end``."""
    return event.type if isinstance(event, UnknownEvent) else event_tag(type(event))


def step_of(event: Event | UnknownEvent) -> int | None:
    """Return the 0-based train step of an event; None if it has none."""
    if isinstance(event, Checkpoint):
        step = getattr(event.row, "batch", None)
    else:
        fields = fields_of(event)
        step = fields.get("step_idx", fields.get("step", fields.get("batch") if "checkpoint" in fields else None))
    return step if isinstance(step, int) else None


def metrics_of(event: Event | UnknownEvent) -> dict[str, Any]:
    """Return the metrics of an event; those of an eval or a benchmark have its name as prefix: ``val/acc``."""
    if isinstance(event, Eval):
        return _prefix_names(event.eval_name, event.metrics)
    if isinstance(event, BenchmarkEval):
        return _prefix_names(getattr(event.eval_result, "name", None), getattr(event.eval_result, "metrics", None))
    if isinstance(event, RunEnd):
        return _entries(getattr(event.run_result, "metrics", None))
    if isinstance(event, UnknownEvent):
        return _entries(event.fields.get("metrics"))
    return _entries(getattr(event, "metrics", None))


def facts_of(event: Event | UnknownEvent, run: str | None) -> list[str]:  # noqa: PLR0911 # one for each type
    """Return further facts of an event as short texts; ``run`` is left out, because it is shown elsewhere."""
    match event:
        case StepEnd() | Eval():
            return []
        case GroupStart():
            return [str(event.group_name)]
        case TrainStart():
            steps = getattr(event.state, "num_steps", None)
            return [f"of {pluralize(steps, 'step')}"] if isinstance(steps, int) else []
        case Checkpoint():
            return _to_lines(
                getattr(event.row, "name", None),
                getattr(event.row, "state_path", None) or getattr(event.row, "sampler_path", None),
            )
        case BenchmarkEval():
            rows = len(event.predictions) if isinstance(event.predictions, list) else 0  # pyright: ignore[reportUnnecessaryIsInstance] # what was read may be anything
            return [pluralize(rows, "prediction")] if rows else []
        case TrainEnd():
            seconds = getattr(event.artifacts, "train_seconds", None)
            took_text = f"after {format_duration(seconds)}" if isinstance(seconds, int | float) else None
            error = getattr(event.state, "error", None)
            return _to_lines(took_text, None if error is None else f"failed: {error}")
        case RunEnd():
            return _to_lines(getattr(event.run_result, "status", None), getattr(event.run_result, "error", None))
        case ExperimentEnd():
            best = getattr(event.result, "best_arm", None)
            return _to_lines(getattr(event.result, "status", None), f"best arm {best}" if best else None)
        case RunAnnotated():
            return _scalars(event.extras)
        case _:
            fields = fields_of(event)
            shown_elsewhere = {"run": run, "batch": step_of(event)}
            return _scalars(
                {name: value for name, value in fields.items() if shown_elsewhere.get(name) != value or value is None}
            )


def fields_of(event: Event | UnknownEvent) -> Mapping[str, Any]:
    """Return the fields of an event by name, also of a type that this process does not know."""
    if isinstance(event, UnknownEvent):
        return event.fields
    return {name: getattr(event, name, None) for name in event.__struct_fields__}


def _scalars(fields: Mapping[str, object]) -> list[str]:
    return [
        f"{name} {value}"
        for name, value in fields.items()
        if isinstance(value, str | int | float) and name not in {"step", "step_idx"}
    ]


def _to_lines(*facts: object) -> list[str]:
    return [" ".join(str(fact).split()) for fact in facts if fact is not None]


def _prefix_names(name: object, metrics: object) -> dict[str, Any]:
    return {f"{name}/{metric}": value for metric, value in _entries(metrics).items()}


def _entries(metrics: object) -> dict[str, Any]:
    return (
        {str(name): value for name, value in cast("dict[object, Any]", metrics).items()}
        if isinstance(metrics, dict)
        else {}
    )


class StreamState(msgspec.Struct):
    """The state of one stream."""

    stream: str
    state: Literal["live", "closed", "dead"]
    owner: LockOwner | None
    """The current or last writer."""
    segments: int
    bytes: int
    first: int | None
    """The sequence of the oldest retained event; None if there is no event."""
    last: int | None
    last_time: float | None
    """When the last event was published."""


def read_stream_states(directory: Path) -> list[StreamState]:
    """Read the state of every stream.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    reader = JournalReader(directory)
    return [_read_stream_state(reader, stream) for stream in reader.streams(*layout.DELIVERED_FAMILIES)]


def _read_stream_state(reader: JournalReader, stream: str) -> StreamState:
    disk = OsDisk()
    folder = f"{reader.directory}/{stream}"
    live = reader.is_live(stream)
    names = layout.list_segments(disk, folder)
    # A writer that closes a stream without events only removes its reserve file, which a kill leaves behind.
    closed = not names and _has_no_reserve(disk, folder)
    for name in names[-1:]:
        newest = next(read_frames_newest_first(disk, f"{folder}/{name}"), None)
        closed = newest is not None and newest.kind == frame.CLOSED
    last = next(read_newest_first(disk, reader.directory, stream), None)
    last_time = None
    if last is not None:
        try:
            last_time = decode(last.payload).time
        except CodecError:
            pass  # intact but not decodable: its sequence is still known
    return StreamState(
        stream=stream,
        state="live" if live else "closed" if closed else "dead",
        owner=read_stream_owner(disk, reader.directory, stream),
        segments=len(names),
        bytes=sum(disk.size(f"{folder}/{name}") for name in names),
        first=None if last is None else names[0].first_sequence,
        last=None if last is None else last.sequence,
        last_time=last_time,
    )


def _has_no_reserve(disk: OsDisk, folder: str) -> bool:
    try:
        return layout.RESERVE not in disk.names(folder)
    except FileNotFoundError:  # the stream's directory is missing
        return False
