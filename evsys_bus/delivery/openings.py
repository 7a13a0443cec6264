"""What is open at a place in a stream: the start events that an adapter is given that was built anew, and the contexts.

Each segment begins with the starts of what was open then, so one segment is all that is read.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from evsys_bus.attached import Learnt
from evsys_bus.codec import decode
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
    TrainEnd,
    TrainStart,
)
from evsys_bus.journal import Disk, frame, layout
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

_SEEMS_ONE: Final = (b"_start", b"n_end", b"t_end", b"learnt")
"""What the tags of what matters end with; a payload that holds it by chance is decoded in vain."""

Opening: TypeAlias = tuple[type, str | None]
"""What is open: the type of its start event, and the name of the run or group."""


class Contexts:
    """The contexts of one stream. What a receiver writes into one reaches those that come later, as inline.

    Args:
        heard: The extras that couriers have learnt, by run; they stand in the context of a run from its start. Any:
            plain values.

    Attributes:
        of_run: Of the runs that are open, by key; what `decode` gives to detached states.
    """

    def __init__(self, heard: Mapping[str, Mapping[str, Any]]) -> None:
        self.of_run: Final[dict[str, LogContext]] = {}
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
        own = None if run is None else self.of_run.get(run)
        earlier = self._experiment if own is None else own
        if earlier is not None:
            for part in ("ids", "extras"):
                setattr(ctx, part, {**getattr(ctx, part, {}), **getattr(earlier, part, {})})
        if own is None and run is not None:
            _add(ctx, self._heard.get(run, {}))
        if isinstance(event, ExperimentEnd):
            self._experiment = None
            self.of_run.clear()
        elif isinstance(event, RunEnd):
            self.of_run.pop(run or "", None)
        elif isinstance(event, RunStart) and run is not None:
            self.of_run[run] = ctx
        elif run is None:
            self._experiment = ctx

    def learn(self, learnt: Learnt) -> None:
        """Let the context of a run that is open know it; those that come later get it from there."""
        ctx = self.of_run.get(learnt.run)
        if ctx is not None:
            _add(ctx, learnt.extras)


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


def _open_or_close(found: dict[Opening, Envelope], contexts: Contexts, payload: bytes) -> None:
    try:
        envelope = decode(payload, contexts.of_run)
    except CodecError:
        return  # it became a dead letter when it was its turn
    event, run = envelope.event, envelope.run
    contexts.heed(envelope)
    if isinstance(event, ExperimentStart | GroupStart | RunStart | TrainStart):
        key = (type(event), event.group_name if isinstance(event, GroupStart) else run)
        found.pop(key, None)
        found[key] = envelope
    elif isinstance(event, TrainEnd):
        found.pop((TrainStart, run), None)
    elif isinstance(event, RunEnd):
        found.pop((TrainStart, run), None)
        found.pop((RunStart, run), None)
    elif isinstance(event, ExperimentEnd):
        found.clear()
