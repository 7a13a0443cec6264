"""Rows of metrics that are logged in parts: each part is recorded at once, the whole row once it is complete."""

import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import get_ident
from typing import Any, Final, cast

import msgspec

from evsys_bus.bus import EventBus
from evsys_bus.codec import decode
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.open_rows import OpenRows
from evsys_bus.errors import EvsysBusError, TrainingError
from evsys_bus.events import Envelope, Metrics, StepEnd, event_tag
from evsys_bus.journal import JournalReader, JournalWriter, OsDisk, layout
from evsys_bus.tasks import HOOK_FILENAME_PREFIX

MAX_PARTS: Final = 1_024
"""Parts of one row, after which it counts as complete; further parts of the same step are a row of their own."""
_STEP_END: Final = event_tag(StepEnd).encode()
NO_BATCH: Final = TrainingBatch()
Row = dict[str, Any]


class LoggedRow(msgspec.Struct, eq=False):
    """A row that was logged and is not known to be published yet."""

    step: int
    metrics: Row
    """Replaced and never changed when a part comes, because that of the first part was published, too."""
    sequence: int
    """The next one of the journal when the row began; it is on record behind it, or not at all."""
    parts: int = 1
    completed_by: int = 0
    """The thread that has completed it and publishes it; 0 while it is open."""
    is_called: bool = False
    """Whether its hooks were called, the first of them at least."""


class UnpublishedRows:
    """The rows of a run, in order, until they are published. The last may be open: not complete yet.

    May be used from any thread. Ctrl-C may come between any two statements: the list is right after each of them, and a
    row leaves it only after it was published. So one that is left in it may be on record.
    """

    def __init__(self) -> None:
        self.writer: JournalWriter | None = None
        """That of the journal on which the rows are recorded."""
        self.is_merged = False
        """Whether a `RowMerger` has the open row."""
        self._rows: Final[list[LoggedRow]] = []
        self._lock: Final = threading.RLock()  # a signal handler may log, too

    def open_row(self) -> LoggedRow | None:
        """Return the row that is not complete yet."""
        rows = self._rows
        return rows[-1] if rows and not rows[-1].completed_by else None

    def add(self, step: int, part: Row, *, commit: bool, after_left: bool = False) -> tuple[LoggedRow, ...] | None:
        """Add a part; return the rows that are complete by it, the one of the part itself last.

        A part of an earlier step than that of the open row is a row of its own: receivers merge rows of one step.

        Returns None without adding anything if there are complete rows, see `left`, or if this is the first part of a
        row and nothing merges it yet; unless with ``after_left``.
        """
        with self._lock:
            rows = self._rows
            open_row = rows[-1] if rows else None
            if (
                not commit
                and open_row is not None
                and open_row.step < step
                and len(rows) == 1
                and not open_row.completed_by
            ):
                # The usual call: the first part of the next row.
                open_row.completed_by = get_ident()
                writer = self.writer
                rows.append(LoggedRow(step, part, 0 if writer is None else writer.next_sequence))
                return (open_row,)
            if not after_left and (
                not (commit or self.is_merged) if open_row is None else open_row.completed_by or open_row is not rows[0]
            ):
                return None
            if open_row is not None and open_row.completed_by:
                open_row = None
            complete: tuple[LoggedRow, ...] = ()
            if open_row is not None and open_row.step <= step:
                is_same_row = open_row.step == step
                if is_same_row:
                    open_row.metrics = {**open_row.metrics, **part}
                    open_row.parts += 1
                    if not commit and open_row.parts < MAX_PARTS:
                        return ()
                open_row.completed_by = get_ident()
                complete, open_row = (open_row,), None
                if is_same_row:
                    return complete
            writer = self.writer
            sequence = 0 if writer is None else writer.next_sequence
            if open_row is None and not commit:
                rows.append(LoggedRow(step, part, sequence))
                return complete
            row = LoggedRow(step, part, sequence, 1, get_ident())
            if open_row is None:
                rows.append(row)
            else:
                rows.insert(len(rows) - 1, row)
        return (*complete, row)

    def take(self) -> tuple[LoggedRow, ...]:
        """Return the open row, which is complete now, or nothing; remove it once it is published."""
        with self._lock:
            row = self.open_row()
            if row is None:
                return ()
            row.completed_by = get_ident()
        return (row,)

    def merge_open_row(self, metrics: Row) -> None:
        """Add the open row to metrics of the same step that are published; their own values win."""
        with self._lock:
            row = self.open_row()
            if row is not None:
                metrics.update({**row.metrics, **metrics})
                self.remove(row)

    def are_left(self) -> bool:
        """Return whether there are complete rows: left by an interrupt, or being published further up or elsewhere."""
        rows = self._rows
        return len(rows) > 1 or (len(rows) == 1 and rows[0].completed_by != 0)

    def left(self, *, of_all_threads: bool = False) -> list[LoggedRow]:
        """Return the complete rows that this thread publishes, or those of all threads."""
        thread = get_ident()
        return [
            each for each in tuple(self._rows) if each.completed_by == thread or (each.completed_by and of_all_threads)
        ]

    def is_on_record(self, row: LoggedRow, run: str) -> bool:
        """Return whether a row of this run whose publish was interrupted is on record."""
        if self.writer is None:
            return False
        with suppress(OSError, EvsysBusError):
            for record in JournalReader(self.writer.directory).read(self.writer.stream, row.sequence - 1):
                if _STEP_END not in record.payload:
                    continue
                envelope = decode(record.payload)
                event = envelope.event
                if isinstance(event, StepEnd) and envelope.run == run and event.step_idx == row.step:
                    metrics: Any = event.metrics
                    if row.metrics.keys() <= metrics.keys():
                        return True
        return False

    def find(self, metrics: Row) -> LoggedRow | None:
        """Return the row with this very dict."""
        return next((each for each in tuple(self._rows) if each.metrics is metrics), None)

    def keep(self, row: LoggedRow) -> None:
        """Have a complete row in the list although it may have been removed already."""
        with self._lock:
            if row not in self._rows:
                self._rows.insert(0, row)

    def remove(self, row: LoggedRow) -> None:
        """Remove a row that was published."""
        try:  # `suppress` is slow
            self._rows.remove(row)
        except ValueError:
            pass  # a signal handler that logs has removed it


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
    """Adds the open row of a run to a `StepEnd` of the same step that other code publishes, before other hooks.

    And marks the rows that a run itself publishes: from then on their hooks are called.
    """

    def __init__(self, publish: Callable[[StepEnd], None]) -> None:
        self._publish: Final = publish
        self.rows: Final[dict[str, UnpublishedRows]] = {}
        """The rows of each run, by run key."""
        self.own_row = LoggedRow(0, {}, 0)
        """The row that a run publishes now."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: object, metrics: Row) -> None:  # noqa: ARG002 # a hook
        """Mark, or merge; values of the event itself win."""
        own_row = self.own_row
        if own_row.metrics is metrics:
            own_row.is_called = True
            return
        rows = self.rows.get(getattr(state, "run_key", ""))
        if rows is None:
            return
        row = rows.find(metrics)
        if row is not None:  # another thread publishes a row, too
            row.is_called = True
            return
        row = rows.open_row()
        if row is None or row.step > step_idx:
            return
        if row.step == step_idx:
            rows.merge_open_row(metrics)
            return
        for each in rows.take():  # of an earlier step, whose row was published before its last parts
            self._publish(StepEnd(state, each.step, TrainingBatch(), each.metrics))
            rows.remove(each)


class RowPublisher:
    """Publishes the rows of a run. Ctrl-C may come between any two statements; the next call completes what it left."""

    def __init__(self, bus: EventBus, state: LoopState, rows: UnpublishedRows) -> None:
        self._bus: Final = bus
        self._state: Final = state
        self._rows: Final = rows
        self._merger = RowMerger(bus.publish)
        self.last_metrics: Row = {}
        """Those of the newest row."""

    def _add_merger(self) -> None:
        bus = self._bus
        if bus.row_merger is None:
            bus.add_first(self._merger)
            bus.row_merger = self._merger
        self._merger = bus.row_merger
        self._merger.rows[self._state.run_key] = self._rows
        self._rows.is_merged = True

    def add_after_left(self, step: int, part: Row, *, commit: bool) -> tuple[LoggedRow, ...] | None:
        """Publish what an interrupt has left and add a part, see `UnpublishedRows.add`; None if a left row has it."""
        if not (commit or self._rows.is_merged):
            self._add_merger()
        if self.publish_left(step, part):
            return None
        return self._rows.add(step, part, commit=commit, after_left=True)

    def publish_open(self) -> None:
        """Publish the open row, which is complete."""
        if self._rows.are_left():
            self.publish_left()
        for row in self._rows.take():
            self.publish(row)

    def publish(self, row: LoggedRow, next_part: Metrics | None = None) -> None:
        """Publish a complete row and then, if given, the first part of the next one."""
        if row.is_called:  # a signal handler that logs has published it
            if next_part is not None:
                self._bus.publish(next_part)
            return
        self.last_metrics = metrics = row.metrics
        event = StepEnd(self._state, row.step, NO_BATCH, metrics)
        self._merger.own_row = row
        try:
            if next_part is None:
                self._bus.publish(event)
            else:
                self._bus.publish_row(event, next_part)
            self._rows.remove(row)
        except BaseException as error:  # raised again; the row is left, see `publish_left`
            row.is_called = row.is_called or self._bus.were_hooks_called(error)
            self._rows.keep(row)
            raise

    def publish_left(
        self, step: int | None = None, part: Mapping[str, Any] | None = None, *, of_all_threads: bool = False
    ) -> bool:
        """Publish the rows that an interrupt has left; return whether they have this part of a step, or have it now."""
        if self._is_publishing():
            return False
        has_part = False
        for row in self._rows.left(of_all_threads=of_all_threads):
            is_on_record = self._rows.is_on_record(row, self._state.run_key)
            if is_on_record or row.is_called:
                # The call that was interrupted is repeated, after its row was published.
                has_part = has_part or (part is not None and row.step == step and part.items() <= row.metrics.items())
                if not is_on_record:
                    self._bus.record(StepEnd(self._state, row.step, NO_BATCH, row.metrics))
                self._rows.remove(row)
            else:
                if part is not None and row.step == step:
                    row.metrics = {**row.metrics, **part}
                    has_part = True
                self.publish(row)
                row.is_called = True
        return has_part

    def _is_publishing(self) -> bool:
        """Return whether this was called by a hook, or by a signal handler, while this thread publishes."""
        publishing = RowPublisher.publish.__code__, RowPublisher.publish_left.__code__
        stack = [frame.f_code for frame, _ in traceback.walk_stack(inspect.currentframe())]
        return any(each in publishing or each.co_filename.startswith(HOOK_FILENAME_PREFIX) for each in stack[2:])
