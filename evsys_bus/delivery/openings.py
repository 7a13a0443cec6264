"""What is open at a place in a stream: the start events that an adapter is given that was built anew, and the contexts.

Each segment begins with the starts of what was open then, so one segment is all that is read.
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
"""A batch ends with one of these, so that a cursor can stand right behind it."""
_OF_A_CONTEXT: Final[frozenset[type]] = frozenset(
    {ExperimentStart, GroupStart, RunStart, BenchmarkEval, RunEnd, ExperimentEnd, Learnt}
)
"""Those with a ``ctx``, or with something for one."""

_SEEMS_ONE: Final = (b"_start", b"n_end", b"t_end", b"learnt", b"\xa7context")
"""What the tags of what matters end with, and the key of a context in a state; a payload that holds one by chance is
decoded in vain."""

Opening: TypeAlias = tuple[type, str, str | None]
"""What is open: the type of its start event, the directory of the experiment, and the name of the run or group."""


class Contexts:
    """The contexts of one stream. What a receiver writes into one reaches those that come later, as inline.

    Args:
        heard: The extras that couriers have learnt, by run; they stand in the context of a run from its start. Any:
            plain values.

    Attributes:
        of_run: Of the runs that are open, by key; what `decode` gives to detached states.
    """

    def __init__(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        self.of_run: Final = RunContexts(self._inherit)
        self._heard: Final = heard
        self._experiment: LogContext | None = None

    def heed(self, envelope: Envelope) -> bool:
        """Let its context know what was written into earlier ones, and them what it says; whether a batch ends here."""
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
        """Let a new context know what is known of the experiment and the run."""
        if self._experiment is not None:
            _take_over(ctx, self._experiment)
        if run is not None:
            _add(ctx, self._heard.get(run, {}))

    def learn(self, learnt: Learnt) -> None:
        """Let the context of a run that is open know it; those that come later get it from there."""
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
    """The start events of what is open in a stream behind this sequence, in order; where none can be read, none.

    Args:
        disk: The file system.
        folder: The stream's.
        sequence: At least 1.
        contexts: Learn what they say.
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
    """Have each training of these starts begin at the first step that the stream still gives for its run.

    An adapter that cuts what it wrote at ``state.step`` then cuts only what comes again; where no step comes, nothing.

    Args:
        starts: Of trainings and others; changed in place.
        reader: Of the journal.
        stream: Whose events are delivered behind the starts.
        after: The sequence behind which they begin.
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
"""The tag of the event; a payload that holds it by chance is decoded in vain."""
_MOST_BYTES_AHEAD: Final = 256 << 20
"""How much of a stream is read to find the first steps of its runs."""


def _open_or_close(found: dict[Opening, Envelope], contexts: Contexts, payload: bytes) -> None:
    try:
        envelope = decode(payload, contexts.of_run)
    except CodecError:
        return  # it became a dead letter when it was its turn
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
