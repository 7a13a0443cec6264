"""`RunLogs`: the log files of one run, and how rows replace earlier ones.

    <run>/logs/training/metrics.jsonl                        one row per step, in order of arrival
    <run>/logs/validation/metrics.jsonl, rollouts.jsonl      one row per (benchmark, step), and its predictions
    <run>/logs/test/metrics.jsonl, rollouts.jsonl            the same, for benchmarks that are not tagged ``val``
    <run>/logs/training/epochs.jsonl, rollouts.jsonl         one row per epoch; one per trajectory of a step
    <run>/logs/content.jsonl                                 one row per text, image, table or the like
    <run>/logs/alerts.jsonl                                  one row per alert
    <run>/logs/system_metrics.jsonl                          one row per sample of the machine
    <run>/data/training_data.jsonl                           the examples as they are rendered for training
    <run>/logs/hypothesis.md, conclusion.md                  what was expected, what came out
    <run>/logs/.run                                          the owner, see `evsys_adapters.output_files.output_lease`

Callers choose the content of rows, except for the keys ``step`` and ``benchmark``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from evsys_adapters.output_files.output_lease import OutputCandidates, OutputLease
from evsys_adapters.output_files.output_positions import TrackedOutput, assign, position_file_in, skip_matching_if_empty
from evsys_adapters.output_files.step_tracker import RowMatcher, StepTracker, keep_lines
from evsys_adapters.system_metrics import SystemMetrics
from evsys_bus.adapter import EventInfo
from evsys_bus.codec import json_line, to_builtins
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import AppendFile, Backlog
from evsys_bus.savepoints import Savepoints

Split = Literal["validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("validation", "test")
SYSTEM_METRICS: Final = SystemMetrics.hook.removeprefix("on_")
OtherKind = Literal["epochs", "rollouts", "content"]
Row = Mapping[str, Any]


class RowKey(msgspec.Struct, frozen=True):
    """The key of an eval's row and of its predictions."""

    step: int | None = None
    """0-based; None after training."""
    benchmark: str | None = None
    """None in training rows."""


_decode_deferred: Final = msgspec.msgpack.Decoder(
    tuple[RowKey, dict[str, Any], list[dict[str, Any]] | None, Split | None]
).decode
_decode_key: Final = msgspec.json.Decoder(RowKey).decode


def _key_of(line: bytes) -> RowKey:
    """Return the key of a row; an empty one for a foreign line, which is left alone."""
    try:
        return _decode_key(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return RowKey()


class StepRows:
    """A file of rows that belong to steps. Refused writes wait in `backlog` for a retry.

    Args:
        acquire_folder: Returns the folder ``logs``; called for each row, may raise OSError.
        path: Path of the file if the first candidate folder is used.
        savepoints: The callback's savepoints.
    """

    def __init__(self, acquire_folder: Callable[[], Path], path: Path, savepoints: Savepoints) -> None:
        self._acquire_folder = acquire_folder
        self._name = Path(path.parent.name, path.name)
        self._savepoints = savepoints
        self._open_file: AppendFile | None = None
        self.backlog = Backlog(str(path))

    def add(self, row: Row) -> None:
        """Add one row."""
        line = json_line(row) + b"\n"
        self.backlog.write(lambda: self._file.append(line), len(line))

    def cut(self, first_step: int, *, except_keys: frozenset[RowKey] = frozenset(), row: Row | None = None) -> None:
        """Drop the rows from that step on, except for the evals in ``except_keys``.

        With ``row``, everything before the last row equal to it remains.
        """
        last_line = None if row is None else json_line(row) + b"\n"
        self.backlog.write(partial(self._cut, first_step, except_keys, last_line), 0)

    def flush(self) -> None:
        """Retry refused writes, and close the file until the next row."""
        self.backlog.flush()
        if self._open_file is not None:
            self._open_file.close()

    def path_in(self, logs: Path) -> Path:
        """Return the path of the file, given the folder ``logs``."""
        return logs / self._name

    @property
    def _file(self) -> AppendFile:
        """The open file; raises OSError if its folder cannot be determined now."""
        path = self.path_in(self._acquire_folder())
        if self._open_file is None or self._open_file.path != path:
            self._open_file = AppendFile(path, self._savepoints)
            self.forget_contents()
        return self._open_file

    def forget_contents(self) -> None:
        """Forget what is known of the file's content, because another file is used now."""

    def _cut(self, first_step: int, except_keys: frozenset[RowKey], last_line: bytes | None) -> None:
        keep_until = 0
        if last_line is not None:
            keep_until = max((number for number, line in enumerate(self._file.lines()) if line == last_line), default=0)

        def should_keep(number: int, line: bytes) -> bool:
            key = _key_of(line)
            return number < keep_until or key.step is None or key.step < first_step or key in except_keys

        keep_lines(self._file, should_keep)


class OtherRows(StepRows):
    """A file of rows beside those of metrics, such as those of content; their steps may be null."""

    def add_lines(self, lines: bytes, *, may_repeat: bool) -> None:
        """Add rows, given as lines; those that may be delivered again only if they are not in the file."""

        def write() -> None:
            existing = set(self._file.lines()) if may_repeat else set[bytes]()
            added = b"".join(line for line in lines.splitlines(keepends=True) if line not in existing)
            if added:
                self._file.append(added)

        self.backlog.write(write, len(lines))


class LogRows(OtherRows):
    """Such a file directly in the folder ``logs``."""

    def path_in(self, logs: Path) -> Path:
        """See `StepRows.path_in`."""
        return logs / self._name.name


class DataRows(StepRows):
    """The file of training data, beside the folder ``logs``; it is written as a whole."""

    def path_in(self, logs: Path) -> Path:
        """See `StepRows.path_in`; the folder is ``data-2`` beside ``logs-2``."""
        return logs.with_name(logs.name.replace("logs", "data", 1)) / self._name.name

    def put_all(self, rows: Iterable[Row]) -> None:
        """Replace the content of the file."""
        lines = [json_line(row) + b"\n" for row in rows]

        def write() -> None:
            if [*self._file.lines()] != lines:
                self._file.rewrite(lines)

        self.backlog.write(write, sum(map(len, lines)))


class TrainingRows(StepRows):
    """A file of training rows, which may be delivered again over existing ones."""

    def __init__(
        self, acquire_folder: Callable[[], Path], path: Path, savepoints: Savepoints, tracker: StepTracker
    ) -> None:
        super().__init__(acquire_folder, path, savepoints)
        self.matcher = RowMatcher(tracker)
        self._tracker = tracker

    def add_unless_present(
        self, step: int, row: Row, on_start_applied: Callable[[int], object], on_row_found: Callable[[], object]
    ) -> None:
        """Append a row unless it is in the file.

        Calls ``on_start_applied`` if a pending start has to be applied, and ``on_row_found`` if it was before. They
        must not raise OSError.
        """
        line = json_line(row) + b"\n"
        self.backlog.write(partial(self._add_unless_present, step, line, on_start_applied, on_row_found), len(line))

    def rows(self) -> Iterator[tuple[int, int | None]]:
        """See `evsys_adapters.output_files.step_tracker.RowFile.rows`."""
        for line in self._file.lines():
            yield hash(line), _key_of(line).step

    def keep_rows(self, should_keep: Callable[[int, int | None], bool]) -> int:
        """See `evsys_adapters.output_files.step_tracker.RowFile.keep_rows`."""
        return sum(keep_lines(self._file, lambda number, line: should_keep(number, _key_of(line).step)))

    def flush(self) -> None:
        """Retry refused writes, and close the file until the next row."""
        super().flush()
        self.matcher.invalidate()

    def forget_contents(self) -> None:
        """See `StepRows.forget_contents`."""
        self.matcher.invalidate()

    def drop_from_step(self, first_step: int) -> None:
        """See `evsys_adapters.output_files.step_tracker.RowFile.drop_from_step`."""
        self._cut(first_step, frozenset(), None)

    def _add_unless_present(
        self, step: int, line: bytes, on_start_applied: Callable[[int], object], on_row_found: Callable[[], object]
    ) -> None:
        first = self._tracker.pending_start
        is_present = self.matcher.is_present(self, hash(line), step)
        if first is not None and not is_present and not self._tracker.is_matching:
            on_start_applied(first)
        elif is_present:
            on_row_found()
        if not is_present:
            self._file.append(line)
            self.matcher.count_appended()
        self._tracker.record_step()


class EvalRows(StepRows):
    """A file with one block of rows per eval; a repeated eval replaces its block."""

    def __init__(self, acquire_folder: Callable[[], Path], path: Path, savepoints: Savepoints) -> None:
        super().__init__(acquire_folder, path, savepoints)
        self._cached_keys: set[RowKey] | None = None
        """Keys of the evals in the file; None until it was read."""
        self._last_block: tuple[RowKey, int] | None = None
        """The last eval in the file and the offset of its block, if this object wrote it."""

    def put(self, key: RowKey, rows: Iterable[Row]) -> None:
        """Write the rows of an eval in place of its earlier ones; an empty ``rows`` removes them."""
        block = b"".join(json_line(row) + b"\n" for row in rows)
        self.backlog.write(partial(self._put, key, block), len(block))

    def has_benchmark(self, benchmark: str) -> bool:
        """Whether the file has rows of this benchmark from during the training."""
        try:
            return any(key.benchmark == benchmark and key.step is not None for key in self._keys())
        except OSError:
            return False

    def forget_contents(self) -> None:
        """See `StepRows.forget_contents`."""
        self._cached_keys = self._last_block = None

    def has(self, key: RowKey) -> bool:
        """Whether the file has rows of this eval."""
        try:
            return key in self._keys()
        except OSError:
            return False

    def _keys(self) -> set[RowKey]:
        file = self._file
        if self._cached_keys is None:
            self._cached_keys = {_key_of(line) for line in file.lines()}
        return self._cached_keys

    def _put(self, key: RowKey, block: bytes) -> None:
        known = self._keys()
        if key not in known:
            if block:
                self._last_block = (key, self._file.append(block))
                known.add(key)
        elif self._last_block is not None and self._last_block[0] == key and block:
            self._file.replace_tail(self._last_block[1], block)
        else:
            others = (line for line in self._file.lines() if _key_of(line) != key)
            size = self._file.rewrite(chain(others, [block]))
            self._last_block = (key, size - len(block)) if block else None
            if not block:
                known.discard(key)

    def _cut(self, first_step: int, except_keys: frozenset[RowKey], last_line: bytes | None) -> None:
        super()._cut(first_step, except_keys, last_line)
        self._cached_keys = self._last_block = None


class RunLogsState(
    msgspec.Struct,
    omit_defaults=True,
    rename={"tracker": "course", "new_evals": "fresh", "unconfirmed_evals": "doubtful", "deferred_evals": "held"},
):
    """State of a run that is not in its files."""

    tracker: StepTracker = msgspec.field(default_factory=StepTracker)
    splits: dict[str, Split] = {}
    """The split of each eval name that occurred during training."""
    new_evals: list[RowKey] = []
    """Evals from before the first known step, or from a replay that were not in the file."""
    unconfirmed_evals: list[RowKey] = []
    """Evals of a replay from before the last start."""
    deferred_evals: list[bytes] = []
    """Evals after a pending start, encoded; the next training row decides whether the start was applied."""
    deferred_rows: list[tuple[OtherKind, bytes]] = []
    """Other rows after a pending start, as lines."""
    page_values: bytes = b""
    """The `PageValues`, encoded: a mark is JSON, which has no NaN."""
    last_step: int = 0
    """The largest trained step."""
    last_sample: tuple[str, int] = ("", 0)
    """Stream and sequence number of the last sample of the machine."""


class PageValues(msgspec.Struct):
    """What was set during a run, for its pages."""

    summary: dict[str, Any] = {}
    """The newest values of the run as a whole."""
    config: dict[str, Any] = {}
    """All changes of the configuration so far."""


class RunLogs:
    """The log files of one run; nothing is created before the first row.

    Args:
        logs: The folder ``logs`` of the run.
        savepoints: The callback's savepoints.
        state: State of the run that is not in its files.
        output: Which events the files already contain.
    """

    def __init__(
        self,
        logs: Path,
        savepoints: Savepoints | None = None,
        state: RunLogsState | None = None,
        output: TrackedOutput | None = None,
    ) -> None:
        savepoints = savepoints or Savepoints()
        self.logs = logs
        self.output = TrackedOutput(savepoints, behind_courier=False) if output is None else output
        self.candidates: OutputCandidates | None = None
        """Candidate folders and their owner; None while the run is known from a mark only."""
        self.state = RunLogsState() if state is None else state
        self._lease: OutputLease | None = None
        self._loaded_state: bytes | None = None
        self._training = TrainingRows(
            self.acquire_folder, logs / "training" / "metrics.jsonl", savepoints, self.state.tracker
        )
        self._evals, self._rollouts = (
            {split: EvalRows(self.acquire_folder, logs / split / name, savepoints) for split in SPLITS}
            for name in ("metrics.jsonl", "rollouts.jsonl")
        )
        self._epochs, self._training_rollouts = (
            OtherRows(self.acquire_folder, logs / "training" / name, savepoints)
            for name in ("epochs.jsonl", "rollouts.jsonl")
        )
        self._content = LogRows(self.acquire_folder, logs / "content.jsonl", savepoints)
        self._alerts = LogRows(self.acquire_folder, logs / "alerts.jsonl", savepoints)
        self._data = DataRows(self.acquire_folder, logs / "training_data.jsonl", savepoints)
        self._samples = LogRows(self.acquire_folder, logs / f"{SYSTEM_METRICS}.jsonl", savepoints)
        self._step_files: list[StepRows] = [
            self._training,
            *self._evals.values(),
            *self._rollouts.values(),
            self._epochs,
            self._training_rollouts,
            self._content,
            self._alerts,
        ]
        """The files from which rows of steps that are run again are cut."""
        self._files = [*self._step_files, self._data, self._samples]

    def acquire_folder(self) -> Path:
        """Return the folder, acquired for this adapter.

        Raises:
            OSError: The disk refuses it.
        """
        if self.candidates is not None and not self._has_lease:
            self.logs, lease = self.candidates.acquire_if_followed()
            self._loaded_state = self.output.restore(self.logs, position_file_in(self.logs))
            self._lease = lease
        return self.logs

    def load_state(self) -> bytes | None:
        """Acquire the folder, to find out which rows exist; returns the state stored beside it where that is newer.

        Raises:
            RetryLaterError: The disk refuses it.
        """
        if self.output.behind_courier and not self._has_lease:
            try:
                self.acquire_folder()
                skip_matching_if_empty(self.state.tracker, self._step_paths())
            except OSError as error:
                raise RetryLaterError(f"{self.logs} cannot be read: {error}") from error
        known, self._loaded_state = self._loaded_state, None
        return known

    def restore(self, state: RunLogsState) -> None:
        """Replace the state of the run by this one."""
        assign(self.state.tracker, state.tracker)
        state.tracker = self.state.tracker
        assign(self.state, state)
        for each in self._files:
            each.forget_contents()

    def paths(self) -> list[Path]:
        """The current paths of the files."""
        return [each.path_in(self.logs) for each in self._files]

    def _step_paths(self) -> list[Path]:
        return [each.path_in(self.logs) for each in self._step_files]

    @property
    def _has_lease(self) -> bool:
        return self._lease is not None and self._lease.is_held

    def release(self) -> None:
        """Release the folder for other adapters; the next row acquires it again."""
        self._lease = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.logs.parent

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return sum(each.backlog.pending for each in self._files)

    def resume(self) -> None:
        """The run's start event is repeated: rows that follow may be in the files."""
        if self.state.tracker.is_matching:
            self._training.backlog.write(lambda: (self._training.matcher.resume(), self._mark_unconfirmed()), 0)
        elif not self.output.is_known:
            self.state.tracker.resume()
            skip_matching_if_empty(self.state.tracker, self._step_paths())

    def begin(self, first_step: int) -> None:
        """Drop the rows from that step on: it is run again."""

        def start() -> None:
            is_void = self._training.matcher.start_training(first_step)  # if not, the next row decides
            self._mark_unconfirmed()
            if is_void:
                self._cut(first_step)

        if self.state.tracker.is_matching:
            self._training.backlog.write(start, 0)
        elif self.state.tracker.start_training():
            self._cut(first_step)

    def add_step(self, step: int, row: Row) -> None:
        """Add a training row. Without `begin`, the first step acts as the start, but earlier evals remain."""
        row = {"step": step, **row}
        self.state.last_step = max(self.state.last_step, step)
        if self.state.tracker.is_matching:
            self._training.add_unless_present(step, row, self._apply_start, self._confirm_start)
            return
        if self.state.tracker.record_step():
            self._training.cut(step, row=row)
            for each in self._step_files[1:]:
                each.cut(step, except_keys=frozenset(self.state.new_evals))
        self._training.add(row)

    def add_epoch(self, step: int, row: Row) -> None:
        """Add the metrics of an epoch, which has ended after this step or later."""
        at_step = max(step, self.state.last_step)
        self._add_lines("epochs", at_step, json_line({"step": at_step, **row}) + b"\n")

    def add_rollouts(self, step: int, rows: Iterable[Row]) -> None:
        """Add the trajectories of a step."""
        self._add_lines("rollouts", step, b"".join(json_line({"step": step, **row}) + b"\n" for row in rows))

    def add_content(self, step: int | None, row: Row) -> None:
        """Add the description of a content; without a step, only if it is not in the file."""
        self._add_lines("content", step, json_line(row) + b"\n")

    def add_alert(self, row: Row) -> None:
        """Add an alert."""
        self._alerts.add_lines(json_line(row) + b"\n", may_repeat=self.state.tracker.is_matching)

    def add_sample(self, event: EventInfo, row: Row) -> None:
        """Add a sample of the machine, unless it is in the file. Steps that are run again void none."""
        # Not by `output`: samples are in a stream of their own, whose order with the training is not known.
        stream, last = self.state.last_sample
        if event.sequence and event.stream == stream and event.sequence <= last:
            return
        self.state.last_sample = (event.stream, event.sequence)
        self._samples.add_lines(json_line(row) + b"\n", may_repeat=self.state.tracker.is_matching)

    def put_data(self, rows: Iterable[Row]) -> None:
        """Write the training data in place of earlier ones."""
        self._data.put_all(rows)

    def page_values(self) -> PageValues:
        """Return what was set during the run."""
        encoded = self.state.page_values
        return msgspec.msgpack.decode(encoded, type=PageValues) if encoded else PageValues()

    def set_page_values(self, summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Add values of the run as a whole, and changes of the configuration."""
        known = self.page_values()
        known = PageValues({**known.summary, **summary}, {**known.config, **config})
        self.state.page_values = msgspec.msgpack.encode(known)

    def _add_lines(self, kind: OtherKind, step: int | None, lines: bytes) -> None:
        tracker = self.state.tracker
        if tracker.pending_start is not None and step is not None:
            self.state.deferred_rows.append((kind, lines))
        else:
            self._other(kind).add_lines(lines, may_repeat=tracker.is_matching or step is None)

    def _other(self, kind: OtherKind) -> OtherRows:
        return {"epochs": self._epochs, "rollouts": self._training_rollouts, "content": self._content}[kind]

    def end_training(self) -> None:
        """Write the rows that wait for their step, at the end of the training."""
        self.state.tracker.rewound = False
        self._put_deferred(keep_existing=False)

    def put_eval(self, key: RowKey, row: Row, rollouts: Iterable[Row] | None, split: Split | None) -> None:
        """Write the row of an eval, and its predictions.

        ``rollouts`` and ``split`` are None if only the metrics are known: predictions remain, and the row goes to the
        split of earlier evals with that name, or else to validation.
        """
        tracker = self.state.tracker
        if tracker.pending_start is not None and key.step is not None:
            deferred = [key, row, None if rollouts is None else [*rollouts], split]
            self.state.deferred_evals.append(msgspec.msgpack.encode(to_builtins(deferred)[0]))
        else:
            self._put_eval(key, row, rollouts, split, keep_existing=tracker.is_matching)

    def _put_eval(
        self, key: RowKey, row: Row, rollouts: Iterable[Row] | None, split: Split | None, *, keep_existing: bool
    ) -> None:
        state = self.state
        if keep_existing and key not in state.new_evals and key not in state.unconfirmed_evals:
            if any(each.has(key) for each in self._evals.values()):
                return
            state.new_evals.append(key)
        elif not state.tracker.has_started:
            state.new_evals.append(key)
        name = str(key.benchmark)
        previous_split = self.state.splits.get(name) or (
            "test" if self._evals["test"].has_benchmark(name) else "validation"
        )
        split = split or previous_split
        if key.step is not None:
            self.state.splits[name] = split
        if split != previous_split:
            self._evals[previous_split].put(key, ())
            self._rollouts[previous_split].put(key, ())
        if rollouts is not None:
            self._rollouts[split].put(key, rollouts)
        self._evals[split].put(key, [row])

    def _cut(self, first_step: int) -> None:
        self.state.new_evals = []
        self.state.last_step = max(0, min(self.state.last_step, first_step - 1))
        for each in self._step_files:
            each.cut(first_step)

    def _mark_unconfirmed(self) -> None:
        """A start arrived during a replay: evals written before it may be void."""
        if self.state.tracker.is_matching:
            self.state.unconfirmed_evals += self.state.new_evals
            self.state.new_evals = []

    def _apply_start(self, first_step: int) -> None:
        """Apply a pending start to the eval files; the training rows were cut already."""
        for each in self._step_files[1:]:
            each.cut(first_step)
        self._put_deferred(keep_existing=False)
        self.state.new_evals, self.state.unconfirmed_evals = [], []

    def _confirm_start(self) -> None:
        """A training row is in the file, so the last start was applied before: evals new since are void."""
        unconfirmed, self.state.unconfirmed_evals = self.state.unconfirmed_evals, []
        for key in unconfirmed:
            for split in SPLITS:
                self._evals[split].put(key, ())
                self._rollouts[split].put(key, ())
        self._put_deferred(keep_existing=True)
        if not self.state.tracker.is_matching:
            self.state.new_evals = []

    def _put_deferred(self, *, keep_existing: bool) -> None:
        deferred, self.state.deferred_evals = self.state.deferred_evals, []
        for each in deferred:
            key, row, rollouts, split = _decode_deferred(each)
            self._put_eval(key, row, rollouts, split, keep_existing=keep_existing)
        rows, self.state.deferred_rows = self.state.deferred_rows, []
        for kind, lines in rows:
            self._other(kind).add_lines(lines, may_repeat=keep_existing)

    def settle(self) -> None:
        """Retry refused writes; raises OSError if the disk still refuses, or if rows were dropped."""
        for each in self._files:
            each.backlog.drain()

    def check_written(self) -> None:
        """Raises OSError if a row is not in its file."""
        for each in self._files:
            each.backlog.check_written()

    def flush(self) -> None:
        """Retry refused writes, and close the files until the next row."""
        for each in self._files:
            each.flush()
