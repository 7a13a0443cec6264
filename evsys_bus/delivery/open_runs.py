"""Open runs: the start events of everything that is open at a position in a stream, and the contexts of open runs.

A rebuilt adapter receives these start events again. Each segment begins with the start events of what was open then, so
only one segment has to be read. `RunAnnotations` are the `RunAnnotated` events that couriers have written to their own
streams of a journal; they are added to the contexts of the delivered events. No cursor covers them: a new courier reads
them again.
"""

import sys
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from evsys_bus.adapter import RunAnnotated
from evsys_bus.codec import RunContexts, decode
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import (
    Alert,
    BenchmarkEval,
    ConfigUpdate,
    Envelope,
    Environment,
    ExperimentEnd,
    ExperimentStart,
    GroupStart,
    Metrics,
    RunEnd,
    RunStart,
    StepEnd,
    Summary,
    TrainData,
    TrainEnd,
    TrainStart,
    event_tag,
)
from evsys_bus.journal import Clock, Disk, JournalReader, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.open_starts import OpenKey, OpenStarts, may_be_boundary, read_boundary
from evsys_bus.journal.reader import SegmentScan

POLL_SECONDS: Final = 0.2
"""Time between two reads of the couriers' streams."""
MAX_IDLE_SECONDS: Final = 60.0
"""The longest such pause for a stream that has no writer and is not the newest; each pause is four times as long."""

_EVENT_TAG: Final = event_tag(RunAnnotated).encode()
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
            each for each in (decode_annotation(record.payload) for record in self._tail.poll()) if each is not None
        ]
        if can_idle and self._tail.last_sequence == before:
            self._idle_seconds = min(4 * self._idle_seconds, MAX_IDLE_SECONDS)
            self._idle_until = now + self._idle_seconds
        return annotations


def decode_annotation(payload: bytes) -> RunAnnotated | None:
    """Return the annotation in the payload of a record; None if it is another event, or cannot be decoded."""
    if _EVENT_TAG not in payload:
        return None
    try:
        event = decode(payload).event
    except CodecError:
        return None
    # Another version may have written it, so the types of its fields are checked.
    return event if isinstance(event, RunAnnotated) and type(event.run) is str and type(event.extras) is dict else None


_BATCH_BOUNDARIES: Final[frozenset[type]] = frozenset(
    {ExperimentStart, GroupStart, RunStart, TrainStart, TrainEnd, RunEnd, ExperimentEnd}
)
"""A batch ends after one of these, so that the cursor can be right after it."""
_CONTEXT_EVENTS: Final[frozenset[type]] = frozenset(
    {
        *(ExperimentStart, GroupStart, RunStart, BenchmarkEval, RunEnd, ExperimentEnd, RunAnnotated),
        *(ConfigUpdate, Environment, Summary, Alert, TrainData),
    }
)
"""Events that have a ``ctx`` or change one."""

OpenRunKey: TypeAlias = OpenKey
"""Identifies what is open."""


class StreamContexts:
    """The contexts of one stream. Values that a receiver writes into one are copied to later ones, as for inline hooks.

    Args:
        annotations: Annotations of runs by couriers; they are in the context of a run from its start.
        has_parts: Whether a row of the stream is open at the cursor.

    Attributes:
        by_run: Contexts of the open runs, by run key; `decode` attaches them to detached states.
        has_parts: Whether rows of the stream were logged in parts, so that its last one may be incomplete.
    """

    def __init__(self, annotations: Mapping[str, Mapping[str, Any]], *, has_parts: bool = False) -> None:
        self.has_parts = has_parts
        self.by_run: Final = RunContexts(self._inherit)
        self._annotations: Final = annotations
        self._experiment_context: LogContext | None = None

    def update(self, envelope: Envelope) -> bool:
        """Update contexts from the event, and its own context from earlier ones; return whether a batch ends here."""
        kind = type(envelope.event)
        if kind is Metrics:
            self.has_parts = True
        elif kind in _CONTEXT_EVENTS:
            self._update_contexts(envelope)
        return kind in _BATCH_BOUNDARIES

    def _update_contexts(self, envelope: Envelope) -> None:
        if isinstance(envelope.event, RunAnnotated):
            self.annotate(envelope.event)
            return
        event: Any = envelope.event  # Any: an event with a ctx
        ctx, run = event.ctx, envelope.run
        if not isinstance(ctx, LogContext):
            return
        root = str(ctx.output_dir)
        known = self.by_run.lookup(run, root)
        if known is None:
            self._inherit(run, ctx)
        else:
            if isinstance(event, ConfigUpdate):
                _add_extras(known, ctx.extras)
            _copy_ids_and_extras(ctx, known)
        if isinstance(event, ExperimentEnd):
            self._experiment_context = None
            self.by_run.clear()
        elif isinstance(event, RunEnd):
            self.by_run.remove(run or "", root)
        elif isinstance(event, RunStart) and run is not None:
            self.by_run.add(run, root, ctx)
        elif run is None:
            self._experiment_context = ctx

    def _inherit(self, run: str | None, ctx: LogContext) -> None:
        """Copy values of the experiment and annotations of the run into a new context."""
        if self._experiment_context is not None:
            _copy_ids_and_extras(ctx, self._experiment_context)
        if run is not None:
            _add_extras(ctx, self._annotations.get(run, {}))

    def annotate(self, annotation: RunAnnotated) -> None:
        """Add an annotation to the context of its run, if the run is open; later contexts copy it from there."""
        ctx = self.by_run.get(annotation.run)
        if ctx is not None:
            _add_extras(ctx, annotation.extras)


def _copy_ids_and_extras(ctx: LogContext, source: LogContext) -> None:
    for part in ("ids", "extras"):
        setattr(ctx, part, {**getattr(ctx, part, {}), **getattr(source, part, {})})


def _add_extras(ctx: LogContext, extras: Mapping[str, Any]) -> None:
    if extras:
        ctx.extras = {**getattr(ctx, "extras", {}), **extras}


def open_runs_at(disk: Disk, folder: str, sequence: int, contexts: StreamContexts) -> dict[OpenRunKey, Envelope]:
    """The start events of everything that is open after this sequence, in order; empty if the stream cannot be read.

    Args:
        disk: The file system.
        folder: Directory of the stream.
        sequence: At least 1.
        contexts: Updated with these events.
    """
    found = OpenStarts[Envelope]()
    try:
        names = layout.list_segments(disk, folder)
        segment = next(
            (name for name in reversed(names) if name.first_sequence <= sequence + 1), names[0] if names else None
        )
        for item in () if segment is None else SegmentScan(disk, f"{folder}/{segment}").frames():
            if not isinstance(item, Frame) or item.kind not in {frame.EVENT, frame.CARRIED}:
                continue
            if item.sequence > sequence:
                break
            payload = bytes(item.payload)
            if may_be_boundary(payload) or _EVENT_TAG in payload:  # else decoding it would be in vain
                _track_open_runs(found, contexts, payload)
    except (OSError, JournalVersionError) as error:
        log().warning("courier.starts_unreadable", stream=folder, exc_info=error)
    return {key: envelope for key, envelope in found.items() if key.kind != "context"}


def set_first_steps(starts: list[Envelope], reader: JournalReader, stream: str, after: int) -> None:
    """Set ``state.step`` of each TrainStart to the first step that the stream still has for its run.

    An adapter that truncates its files at ``state.step`` then removes only rows that are delivered again; nothing if
    there is no such step.

    Args:
        starts: Start events; changed in place.
        reader: Reader of the journal.
        stream: The stream whose events are delivered after the starts.
        after: The events after this sequence are delivered.
    """
    requested = {each.run for each in starts if isinstance(each.event, TrainStart)}
    first_steps: dict[str | None, int] = {}
    remaining_bytes = _MAX_BYTES_AHEAD
    try:
        for record in reader.read(stream, after) if requested else ():
            remaining_bytes -= len(record.payload)
            if len(first_steps) == len(requested) or remaining_bytes < 0:
                break
            if _STEP_TAG in record.payload:
                _record_first_step(record.payload, requested, first_steps)
    except (OSError, JournalVersionError) as error:
        log().warning("courier.starts_unreadable", stream=stream, exc_info=error)
    for each in starts:
        if isinstance(each.event, TrainStart):
            each.event.state.step = first_steps.get(each.run, sys.maxsize)


def _record_first_step(payload: bytes, requested: set[str | None], first_steps: dict[str | None, int]) -> None:
    try:
        envelope = decode(payload)
    except CodecError:
        return
    event, run = envelope.event, envelope.run
    if isinstance(event, StepEnd) and run in requested and run not in first_steps and type(event.step_idx) is int:
        first_steps[run] = event.step_idx


_STEP_TAG: Final = event_tag(StepEnd).encode()
"""The tag of the event, searched before decoding; a payload that contains it by chance is decoded in vain."""
_MAX_BYTES_AHEAD: Final = 256 << 20
"""How many bytes of a stream are read to find the first steps of its runs."""


def _track_open_runs(found: OpenStarts[Envelope], contexts: StreamContexts, payload: bytes) -> None:
    try:
        envelope = decode(payload, contexts.by_run)
    except CodecError:
        return  # it became a dead letter when it was delivered
    contexts.update(envelope)
    boundary = read_boundary(payload)
    if boundary is not None:
        found.update(boundary, envelope)
