"""Open runs: the start events of everything that is open at a position in a stream, and the contexts of open runs.

A rebuilt adapter receives these start events again. Each segment begins with the start events of what was open then, so
only one segment has to be read.
"""

import sys
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from evsys_bus.attached import Learnt
from evsys_bus.codec import RunContexts, decode
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import (
    BenchmarkEval,
    Envelope,
    ExperimentEnd,
    ExperimentStart,
    GroupStart,
    RunEnd,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
)
from evsys_bus.journal import Disk, JournalReader, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.scanning import SegmentScan

_BOUNDARIES: Final[frozenset[type]] = frozenset(
    {ExperimentStart, GroupStart, RunStart, TrainStart, TrainEnd, RunEnd, ExperimentEnd}
)
"""A batch ends after one of these, so that the cursor can be right after it."""
_OF_A_CONTEXT: Final[frozenset[type]] = frozenset(
    {ExperimentStart, GroupStart, RunStart, BenchmarkEval, RunEnd, ExperimentEnd, Learnt}
)
"""Events that have a ``ctx`` or change one."""

_SEEMS_ONE: Final = (b"_start", b"n_end", b"t_end", b"learnt", b"\xa7context")
"""Endings of the relevant event tags, and the key of a context in a state; searched before decoding. A payload that
contains one by chance is decoded in vain."""

Opening: TypeAlias = tuple[type, str, str | None]
"""Identifies what is open: type of the start event, output directory of the experiment, name of the run or group."""


class Contexts:
    """The contexts of one stream. Values that a receiver writes into one are copied to later ones, as for inline hooks.

    Args:
        heard: Annotations of runs by couriers; they are in the context of a run from its start.

    Attributes:
        of_run: Contexts of the open runs, by run key; `decode` attaches them to detached states.
    """

    def __init__(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        self.of_run: Final = RunContexts(self._inherit)
        self._heard: Final = heard
        self._experiment: LogContext | None = None

    def heed(self, envelope: Envelope) -> bool:
        """Update contexts from the event, and its own context from earlier ones; return whether a batch ends here."""
        kind = type(envelope.event)
        if kind in _OF_A_CONTEXT:
            self._share(envelope)
        return kind in _BOUNDARIES

    def _share(self, envelope: Envelope) -> None:
        if isinstance(envelope.event, Learnt):
            self.learn(envelope.event)
            return
        event: Any = envelope.event  # Any: an event with a ctx
        ctx, run = event.ctx, envelope.run
        if not isinstance(ctx, LogContext):
            return
        root = str(ctx.output_dir)
        own = self.of_run.of(run, root)
        if own is None:
            self._inherit(run, ctx)
        else:
            _take_over(ctx, own)
        if isinstance(event, ExperimentEnd):
            self._experiment = None
            self.of_run.clear()
        elif isinstance(event, RunEnd):
            self.of_run.drop(run or "", root)
        elif isinstance(event, RunStart) and run is not None:
            self.of_run.put(run, root, ctx)
        elif run is None:
            self._experiment = ctx

    def _inherit(self, run: str | None, ctx: LogContext) -> None:
        """Copy values of the experiment and annotations of the run into a new context."""
        if self._experiment is not None:
            _take_over(ctx, self._experiment)
        if run is not None:
            _add(ctx, self._heard.get(run, {}))

    def learn(self, learnt: Learnt) -> None:
        """Add an annotation to the context of its run, if the run is open; later contexts copy it from there."""
        ctx = self.of_run.get(learnt.run)
        if ctx is not None:
            _add(ctx, learnt.extras)


def _take_over(ctx: LogContext, earlier: LogContext) -> None:
    for part in ("ids", "extras"):
        setattr(ctx, part, {**getattr(ctx, part, {}), **getattr(earlier, part, {})})


def _add(ctx: LogContext, extras: Mapping[str, Any]) -> None:
    if extras:
        ctx.extras = {**getattr(ctx, "extras", {}), **extras}


def open_at(disk: Disk, folder: str, sequence: int, contexts: Contexts) -> dict[Opening, Envelope]:
    """The start events of everything that is open after this sequence, in order; empty if the stream cannot be read.

    Args:
        disk: The file system.
        folder: Directory of the stream.
        sequence: At least 1.
        contexts: Updated with these events.
    """
    found: dict[Opening, Envelope] = {}
    try:
        names = layout.segments(disk, folder)
        at = next((name for name in reversed(names) if name.first <= sequence + 1), names[0] if names else None)
        for piece in () if at is None else SegmentScan(disk, f"{folder}/{at}").pieces():
            if not isinstance(piece, Frame) or piece.kind not in {frame.EVENT, frame.CARRIED}:
                continue
            if piece.sequence > sequence:
                break
            payload = bytes(piece.payload)
            if any(tag in payload for tag in _SEEMS_ONE):
                _open_or_close(found, contexts, payload)
    except (OSError, JournalVersionError) as error:
        log().warning("courier.starts_unreadable", stream=folder, exc_info=error)
    return found


def begin_at_what_comes(starts: list[Envelope], reader: JournalReader, stream: str, after: int) -> None:
    """Set ``state.step`` of each TrainStart to the first step that the stream still has for its run.

    An adapter that truncates its files at ``state.step`` then removes only rows that are delivered again; nothing if
    there is no such step.

    Args:
        starts: Start events; changed in place.
        reader: Reader of the journal.
        stream: The stream whose events are delivered after the starts.
        after: The events after this sequence are delivered.
    """
    wanted = {each.run for each in starts if isinstance(each.event, TrainStart)}
    first: dict[str | None, int] = {}
    left = _MOST_BYTES_AHEAD
    try:
        for record in reader.read(stream, after) if wanted else ():
            left -= len(record.payload)
            if len(first) == len(wanted) or left < 0:
                break
            if _STEP in record.payload:
                _note_step(record.payload, wanted, first)
    except (OSError, JournalVersionError) as error:
        log().warning("courier.starts_unreadable", stream=stream, exc_info=error)
    for each in starts:
        if isinstance(each.event, TrainStart):
            each.event.state.step = first.get(each.run, sys.maxsize)


def _note_step(payload: bytes, wanted: set[str | None], first: dict[str | None, int]) -> None:
    try:
        envelope = decode(payload)
    except CodecError:
        return
    event, run = envelope.event, envelope.run
    if isinstance(event, StepEnd) and run in wanted and run not in first and type(event.step_idx) is int:
        first[run] = event.step_idx


_STEP: Final = StepEnd.hook.removeprefix("on_").encode()
"""The tag of the event, searched before decoding; a payload that contains it by chance is decoded in vain."""
_MOST_BYTES_AHEAD: Final = 256 << 20
"""How many bytes of a stream are read to find the first steps of its runs."""


def _open_or_close(found: dict[Opening, Envelope], contexts: Contexts, payload: bytes) -> None:
    try:
        envelope = decode(payload, contexts.of_run)
    except CodecError:
        return  # it became a dead letter when it was delivered
    event, run = envelope.event, envelope.run
    contexts.heed(envelope)
    handle: Any = getattr(event, "ctx", None) or getattr(getattr(event, "state", None), "ctx", None)
    root = str(getattr(handle, "output_dir", ""))
    if isinstance(event, ExperimentStart | GroupStart | RunStart | TrainStart):
        key = (type(event), root, event.group_name if isinstance(event, GroupStart) else run)
        found.pop(key, None)
        found[key] = envelope
    elif isinstance(event, TrainEnd):
        found.pop((TrainStart, root, run), None)
    elif isinstance(event, RunEnd):
        found.pop((TrainStart, root, run), None)
        found.pop((RunStart, root, run), None)
    elif isinstance(event, ExperimentEnd):
        found.clear()
