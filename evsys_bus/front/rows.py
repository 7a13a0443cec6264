"""Rows of metrics that are logged in parts: each part is recorded at once, the whole row once it is complete."""

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

from evsys_bus.bus import EventBus
from evsys_bus.codec import decode
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.open_rows import OpenRows
from evsys_bus.errors import EvsysBusError, TrainingError
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.journal import JournalReader, OsDisk, layout

MAX_PARTS: Final = 1_024
"""Parts of one row, after which it counts as complete; further parts of the same step are a row of their own."""
_RECENT_EVENTS: Final = 16
Row = dict[str, Any]
Rows = tuple[tuple[int, Row], ...]
"""Steps and their metrics."""


class OpenRow:
    """The row of a run that is not complete yet. May be used from any thread."""

    def __init__(self) -> None:
        self.step: int | None = None
        """The step of the row; None if there is no open row."""
        self._metrics: Row = {}
        self._parts = 0
        self.unpublished: Final[list[tuple[int, Row]]] = []
        """Complete rows that were returned; remove the first once one is published. Ctrl-C may come in between."""
        self._lock: Final = threading.RLock()  # a signal handler may log, too

    def add(self, step: int, part: Row, *, commit: bool) -> tuple[Rows, bool]:
        """Add a part; return the rows that are complete now, as steps and metrics, and whether the part is in them.

        A part of an earlier step than that of the open row is a row of its own: receivers merge rows of one step.
        """
        with self._lock:
            open_step = self.step
            if open_step == step:
                self._metrics.update(part)
                self._parts += 1
                if not commit and self._parts < MAX_PARTS:
                    return (), False
                self.step, commit, complete = None, True, ((step, self._metrics),)
            elif open_step is not None and step < open_step:
                commit, complete = True, ((step, part),)
            elif commit:
                self.step = None
                complete = ((step, part),) if open_step is None else ((open_step, self._metrics), (step, part))
            else:
                complete = () if open_step is None else ((open_step, self._metrics),)
                # A copy, because the part is published too: its event must not change when the next part is added.
                self.step, self._metrics, self._parts = step, {**part}, 1
            self.unpublished.extend(complete)
        return complete, commit

    def take_all(self) -> list[tuple[int, Row]]:
        """Return the rows that an interrupt has left unpublished, and the open row, which is complete now."""
        self.take()
        return [*self.unpublished]

    def take(self) -> Rows:
        """Return the open row, which is complete now, or nothing."""
        with self._lock:
            if self.step is None:
                return ()
            complete = ((self.step, self._metrics),)
            self.step = None
            self.unpublished.extend(complete)
        return complete


def to_row(metrics: Any) -> Row:
    """Return metrics as a row.

    Raises:
        TrainingError: They are no mapping.
    """
    if isinstance(metrics, Mapping):
        return dict(cast("Mapping[str, Any]", metrics))
    raise TrainingError(
        f"the metrics are {metrics!r:.80}, which is no mapping", fix='give numbers by name: run.log({"loss": 0.5})'
    )


def is_recorded(bus: EventBus, run: str, step: int) -> bool:
    """Return whether the row of a step is among the last events on record, after a publish that was interrupted."""
    journal = bus.health().journal
    if journal is None:
        return True  # nothing is recorded, and most of its hooks were called
    with suppress(OSError, EvsysBusError):
        for record in JournalReader(journal.directory).read(journal.stream, max(0, journal.recorded - _RECENT_EVENTS)):
            envelope = decode(record.payload)
            event = envelope.event
            if isinstance(event, StepEnd) and envelope.run == run and event.step_idx == step:
                return True
    return False


def rows_left_open(journal: str, rank: int, run_key: str) -> list[Envelope]:
    """Return the row that an earlier process has logged in parts when it was killed, as a `StepEnd`, if there is one.

    Couriers get it from the end of the stream; callbacks that run inline have not got it.
    """
    reader, rows = JournalReader(journal), OpenRows()
    streams = [each for each in reader.streams() if layout.rank_of(each) == rank]
    for stream in streams[-_STREAMS_READ:]:
        segments = layout.list_segments(OsDisk(), f"{journal}/{stream}")[-_STREAMS_READ:]
        if segments:
            rows.restore(reader, stream, segments[0].first_sequence, sys.maxsize)
    return [row for stream in streams for row in rows.of(stream) if row.run == run_key]


_STREAMS_READ: Final = 2
"""The newest streams, and segments of each: that of the killed process, and the one that has just started."""


class RowMerger:
    """Adds the open row of a run to a `StepEnd` of the same step that other code publishes, before other hooks."""

    def __init__(self, publish: Callable[[StepEnd], None]) -> None:
        self._publish: Final = publish
        self.rows: Final[dict[str, OpenRow]] = {}
        """The open row of each run, by run key."""
        self.last_row: Row | None = None
        """The metrics of the last `StepEnd` whose hooks were called."""
        self.own_row: Row | None = None
        """The metrics of a row that is complete: that of a `StepEnd` which the run itself publishes."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: object, metrics: Row) -> None:  # noqa: ARG002 # a hook
        """Merge; values of the event itself win."""
        self.last_row = metrics
        if metrics is self.own_row:
            return
        row = self.rows.get(getattr(state, "run_key", ""))
        if row is None or row.step is None or row.step > step_idx:
            return
        taken = row.take()
        del row.unpublished[:1]
        for step, parts in taken:
            if step != step_idx:  # of an earlier step, whose row was published before its last parts
                self._publish(StepEnd(state, step, TrainingBatch(), parts))
                return
            for name, value in parts.items():
                metrics.setdefault(name, value)
