"""Marks of inline callbacks: their state of a run, recorded in the journal and restored when the run resumes.

The bus adds two callbacks of its own for this, the first and the last of its list:

    TrainStart at step s   first: rewinds each callback to its newest recorded mark at or before s; last: records all
    Checkpoint             last: records all marks
    Eval, BenchmarkEval    last: records the marks that changed

A mark is an ordinary event, recorded right after the event that it was taken at; it calls no hook. Nothing is recorded
if no inline callback has marks.
"""

import operator
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, SupportsFloat, SupportsIndex, TypeGuard, cast

import msgspec

from evsys_bus.adapter import Rewindable
from evsys_bus.callback import Callback, callback_name, get_attribute, isolate
from evsys_bus.codec import decode, to_builtins
from evsys_bus.codec.normalize import escape_surrogates
from evsys_bus.context import EvalResult, LogContext, LoopArtifacts, LoopState, ManifestRow, Prediction
from evsys_bus.diagnostics import log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Event, event_tag
from evsys_bus.journal import Disk, JournalWriter, OsDisk, frame, layout
from evsys_bus.journal.frame import Frame, FrameRun
from evsys_bus.journal.reader import SegmentScan

MARK_SEARCH_SECONDS: Final = 10.0
"""How long a resume searches the journal for marks, newest first, before it continues without the missing ones."""


class BusCallbackMarks(Event, frozen=True):
    """The marks of inline callbacks for one run; recorded by the bus for its own use."""

    run: str
    """The run key."""
    folder: str
    """The run's directory; a journal may hold several runs with the same key."""
    step: int
    """Number of completed steps, which is the first step that the marks do not cover."""
    marks: dict[str, Any]
    """By callback name; plain data."""


class RewindableByRun(Protocol):
    """An inline callback with separate marks per run, so that resuming one run leaves the state of others alone."""

    def mark_run(self, run: Any) -> Any:
        """Return the state of this run as plain data.

        Args:
            run: Its `LoopState` or `LogContext`.
        """
        ...

    def rewind_run(self, run: Any, mark: Any, newest: Any) -> None:
        """Restore the state of this run from a mark.

        Args:
            run: The `LoopState` of the run that is about to train; ``run.step`` is its first step.
            mark: The newest mark at or before ``run.step``, or None.
            newest: The newest mark of all, possibly after that step: for results that arrived late, of steps that will
                not run again.
        """
        ...


_TAG: Final = event_tag(BusCallbackMarks).encode()
_READ_ERRORS: Final = (OSError, JournalVersionError)


def add_mark_callbacks(
    callbacks: Iterable[object], journal: JournalWriter | str | os.PathLike[str] | None, rank: int = 0
) -> tuple[object, ...]:
    """Return the callbacks with the two that record marks added; unchanged if there are no marks or no journal.

    The result may be passed in again with callbacks added or removed: the two recording callbacks are reused.

    Args:
        callbacks: The inline callbacks of a bus.
        journal: Where that bus records.
        rank: Rank of this process; its own streams are searched first.
    """
    all_callbacks = tuple(callbacks)
    user_callbacks = tuple(each for each in all_callbacks if not isinstance(each, _MarkRewinder | _MarkRecorder))
    rewindable = _rewindable_callbacks(user_callbacks)
    if journal is None or not rewindable:
        return user_callbacks
    rewinder = next((each for each in all_callbacks if isinstance(each, _MarkRewinder)), None)
    recorder = next((each for each in all_callbacks if isinstance(each, _MarkRecorder)), None)
    if rewinder is None or recorder is None:
        directory = journal.directory if isinstance(journal, JournalWriter) else os.fspath(journal)
        manager = _MarkManager(directory, rank)
        rewinder, recorder = _MarkRewinder(manager), _MarkRecorder(manager)
    recorder.manager.callbacks = rewindable
    return (rewinder, *user_callbacks, recorder)


def recorded_marks(
    directory: str, run: str, *, rank: int = 0, disk: Disk | None = None, seconds: float = MARK_SEARCH_SECONDS
) -> Iterator[BusCallbackMarks]:
    """Yield the recorded marks of a run, newest first; unreadable streams are skipped with a WARNING.

    Args:
        directory: The journal.
        run: The run key.
        rank: Streams of this rank come first, then the others.
        disk: The file system.
        seconds: Time limit for reading.
    """
    disk = OsDisk() if disk is None else disk
    deadline = time.monotonic() + seconds
    try:
        streams = layout.list_streams(disk, directory)
    except OSError as error:
        log().warning("callback_marks.unreadable", journal=directory, error=str(error))
        return
    newest_first = streams[::-1]
    for stream in sorted(newest_first, key=lambda each: layout.rank_of(each) != rank):
        try:
            names = layout.list_segments(disk, f"{directory}/{stream}")
        except OSError as error:
            log().warning("callback_marks.unreadable", journal=directory, stream=stream, error=str(error))
            continue
        for name in reversed(names):
            payloads: list[bytes] = []
            try:
                scanned = _read_payloads(disk, f"{directory}/{stream}/{name}", name.first_sequence, deadline)
                payloads.extend(payload for payload in scanned if _TAG in payload)
            except _READ_ERRORS as error:
                log().warning("callback_marks.unreadable", journal=directory, stream=stream, error=str(error))
            yield from filter(None, (_decode_marks(payload, run) for payload in reversed(payloads)))
            if time.monotonic() >= deadline:
                log().warning("callback_marks.search_ended", journal=directory, run=run, after_seconds=seconds)
                return


def _read_payloads(disk: Disk, path: str, first: int, deadline: float) -> Iterator[bytes]:
    for item in SegmentScan(disk, path).items(first):
        if isinstance(item, FrameRun):
            yield from item.payloads
            if time.monotonic() >= deadline:
                return
        elif isinstance(item, Frame) and item.kind in {frame.EVENT, frame.CARRIED}:
            yield bytes(item.payload)


def _decode_marks(payload: bytes, run: str) -> BusCallbackMarks | None:
    """Return the event without marks that were recorded incompletely, or None for any other event."""
    try:
        envelope = decode(payload)
    except CodecError:
        return None
    event = cast("object", envelope.event)
    if not isinstance(event, BusCallbackMarks) or envelope.run != run:
        return None
    # Decoding does not check the field types, and another version may have written the event.
    if type(event.step) is not int or type(event.folder) is not str or type(event.marks) is not dict:
        return None
    replaced_paths = [path for path in envelope.replaced if path.startswith("marks")]
    complete = {
        name: mark for name, mark in event.marks.items() if not any(f"marks.{name}" in path for path in replaced_paths)
    }
    return msgspec.structs.replace(event, marks=complete)


class _MarkManager:
    """Takes, records and restores the marks of one bus's callbacks."""

    def __init__(self, directory: str, rank: int) -> None:
        self.callbacks: Mapping[str, object] = {}
        """By the name under which their marks are recorded."""
        self._directory: Final = directory
        self._rank: Final = rank
        self._steps_done: Final[dict[tuple[str, str], int]] = {}
        """Runs between TrainStart and TrainEnd, and the number of completed steps of each."""
        self._last_recorded: Final[dict[tuple[str, str], dict[str, bytes]]] = {}
        """The encoded marks recorded last for each run in training, by callback."""
        self._seen_runs: Final[set[tuple[str, str]]] = set()
        """Runs for which this process has recorded marks."""

    def rewind(self, state: LoopState) -> None:
        """Restore each callback from the marks recorded at or before the run's first step."""
        run, step = _run_key_and_directory(state), _as_int(get_attribute(state, "step"))
        if run is None or step is None or (step == 0 and run not in self._seen_runs):
            return  # a new run at step 0 has no marks
        exit_error: BaseException | None = None
        for name, (mark, newest) in self._lookup_marks(run, step).items():
            callback = self.callbacks[name]
            try:
                if _is_rewindable_by_run(callback):
                    callback.rewind_run(state, mark, newest)
                elif mark is not None and _is_rewindable(callback):
                    self._rewind_all_runs(callback, mark, run)
            except BaseException as error:
                exit_error = isolate(callback, "rewind", error) or exit_error
        if exit_error is not None:
            raise exit_error

    def collect(self, handle: object, step: int | None, *, changed_only: bool) -> BusCallbackMarks | None:
        """Take the marks and return the event to record, or None if there is nothing to record.

        Args:
            handle: The run's state or context.
            step: The last completed step, or None if unknown.
            changed_only: Omit marks equal to those recorded last.
        """
        run = _run_key_and_directory(handle)
        if run is None:
            return None
        steps_done = self._steps_done.get(run, 0) if step is None else step + 1
        if run in self._steps_done:
            self._steps_done[run] = steps_done
        self._seen_runs.add(run)
        recorded = self._last_recorded.setdefault(run, {})
        marks: dict[str, Any] = {}
        exit_error: BaseException | None = None
        for name, callback in self.callbacks.items():
            try:
                mark = _take_mark(callback, handle)
                encoded = msgspec.msgpack.encode(mark)
            except BaseException as error:
                exit_error = isolate(callback, "mark", error) or exit_error
                continue
            if not changed_only or recorded.get(name) != encoded:
                recorded[name], marks[name] = encoded, mark
        if exit_error is not None:
            raise exit_error
        return BusCallbackMarks(run[0], escape_surrogates(run[1]), steps_done, marks) if marks else None

    def start_run(self, state: LoopState) -> None:
        """Start tracking a run."""
        run = _run_key_and_directory(state)
        if run is not None:
            self._steps_done[run] = _as_int(get_attribute(state, "step")) or 0

    def end_run(self, state: LoopState) -> None:
        """Stop tracking a run."""
        run = _run_key_and_directory(state) or ("", "")
        self._steps_done.pop(run, None)
        self._last_recorded.pop(run, None)

    def _rewind_all_runs(self, callback: Rewindable, mark: Any, run: tuple[str, str]) -> None:
        other_runs = [key for key, folder in self._steps_done if (key, folder) != run]
        if other_runs:
            log().warning(
                "callback.not_rewound",
                callback=callback_name(callback),
                run=run[0],
                why=f"its mark is of all runs, and {other_runs[0]} is training",
                fix="give it mark_run(run) and rewind_run(run, mark, newest), which are of one run",
            )
            return
        callback.rewind(mark)

    def _lookup_marks(self, run: tuple[str, str], step: int) -> dict[str, tuple[Any, Any]]:
        """Return for each callback the newest mark at or before the step, and the newest mark of all."""
        key, folder = run[0], escape_surrogates(run[1])
        # Prefer marks of the same directory, then those of the same key: a run may have been moved.
        same_directory: dict[str, list[Any]] = {}
        same_key: dict[str, list[Any]] = {}
        for each in recorded_marks(self._directory, key, rank=self._rank):
            for name in each.marks.keys() & self.callbacks.keys():
                entry = (same_directory if each.folder == folder else same_key).setdefault(
                    name, [None, each.marks[name]]
                )
                if entry[0] is None and each.step <= step:
                    entry[0] = each.marks[name]
            if all(name in same_directory and same_directory[name][0] is not None for name in self.callbacks):
                break
        return {name: (mark, newest) for name, (mark, newest) in {**same_key, **same_directory}.items()}


class _MarkRewinder(Callback):
    """The first callback: restores the others before their hooks receive the TrainStart."""

    spec_name = "callback_marks"

    def __init__(self, manager: _MarkManager) -> None:
        self.manager = manager

    def on_train_start(self, state: LoopState) -> None:
        """Restore the marks."""
        self.manager.rewind(state)


class _MarkRecorder(Callback):
    """The last callback: records the marks after all others have handled an event."""

    spec_name = "callback_marks"

    def __init__(self, manager: _MarkManager) -> None:
        self.manager = manager

    def on_train_start(self, state: LoopState) -> None:
        """Record all marks; those that an earlier attempt recorded after this step no longer count."""
        self.manager.start_run(state)
        step = _as_int(get_attribute(state, "step"))
        self._record(state, None if step is None else step - 1, changed_only=False)

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Record all marks, because a resume starts from a checkpoint."""
        # 0 is also the default of a row that was given no step.
        step = _as_int(get_attribute(row, "batch")) or _as_int(get_attribute(state, "step"))
        self._record(state, step, changed_only=False)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Record the marks that changed."""
        del eval_name, metrics
        steps = [step for step in (_as_int(get_attribute(state, "step")), _as_int(step_idx)) if step is not None]
        self._record(state, max(steps, default=None), changed_only=True)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Record the marks that changed."""
        del eval_result, predictions, step  # its step may be older than that of earlier marks
        self._record(ctx, None, changed_only=True)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Stop tracking the run."""
        del artifacts
        self.manager.end_run(state)

    def _record(self, handle: object, step: int | None, *, changed_only: bool) -> None:
        event = self.manager.collect(handle, step, changed_only=changed_only)
        if event is not None:
            self.publish(event)


def _rewindable_callbacks(callbacks: Iterable[object]) -> dict[str, object]:
    """Return the callbacks with marks, by unique names."""
    rewindable: dict[str, object] = {}
    for callback in callbacks:
        # Marks of files, for example, are for a courier, which delivers truncated rows again. Inline callbacks get
        # nothing twice.
        if isinstance(callback, type) or get_attribute(callback, "marks_inline") is False:
            continue
        if _is_rewindable_by_run(callback) or _is_rewindable(callback):
            name = callback_name(callback)
            duplicates = sum(each == name or each.startswith(f"{name}#") for each in rewindable)
            rewindable[f"{name}#{duplicates + 1}" if duplicates else name] = callback
    return rewindable


def _take_mark(callback: object, handle: object) -> Any:
    """Return a copy of the callback's mark as plain data.

    Raises:
        TypeError: The mark is not plain data.
    """
    mark = callback.mark_run(handle) if _is_rewindable_by_run(callback) else cast("Rewindable", callback).mark()
    plain, replaced = to_builtins(mark)
    if replaced:
        raise TypeError(f"a mark is plain data; this one would be recorded with replacements: {replaced}")
    return plain


def _is_rewindable_by_run(callback: object) -> TypeGuard[RewindableByRun]:
    return _has_methods(callback, "mark_run", "rewind_run")


def _is_rewindable(callback: object) -> TypeGuard[Rewindable]:
    return _has_methods(callback, "mark", "rewind")


def _has_methods(callback: object, *methods: str) -> bool:
    """Check the class, because an instance may define ``__getattr__``."""
    return all(callable(get_attribute(type(callback), method)) for method in methods)


def _run_key_and_directory(handle: object) -> tuple[str, str] | None:
    """Return key and directory of a run, equal for its state and its context; None if it has neither."""
    is_state = get_attribute(handle, "step") is not None
    ctx = get_attribute(handle, "ctx") if is_state else handle
    key = get_attribute(ctx, "run_key")
    try:
        folder = cast("str", os.fspath(get_attribute(ctx if type(key) is str else handle, "output_dir")))
        # os.path, because a Path costs ten times as much.
        return (key, os.path.join(folder, key)) if type(key) is str else (os.path.basename(folder), folder)  # noqa: PTH118, PTH119
    except TypeError:
        return None


def _as_int(step: object) -> int | None:
    """Return a step as an int, or None if it is not a whole number."""
    try:
        if isinstance(step, SupportsIndex):
            return operator.index(step)
        number = float(step) if isinstance(step, SupportsFloat) else float("nan")
        return int(number) if number.is_integer() else None
    except Exception:  # a tensor of several values
        return None
