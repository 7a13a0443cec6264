"""Marks of inline callbacks: what they know of a run is recorded beside its checkpoints, and given back on a resume.

Two callbacks of the bus's own do it, the first and the last of its list:

    TrainStart at step s   first: rewinds each callback to its newest recorded mark at or before s; last: records all
    Checkpoint             last: records the marks of all
    Eval, BenchmarkEval    last: records those that changed

A mark is an event like any other, recorded right behind the one that it was taken after; no hook wants it. Nothing is
recorded where no inline callback keeps marks.
"""

import operator
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, SupportsFloat, SupportsIndex, TypeGuard, cast

import msgspec

from evsys_bus.callback import Callback, attribute, callback_name, isolate
from evsys_bus.codec import decode, to_plain
from evsys_bus.codec.foreign import without_surrogates
from evsys_bus.context import EvalResult, LogContext, LoopArtifacts, LoopState, ManifestRow, Prediction
from evsys_bus.delivery.receiver import Rewindable
from evsys_bus.diagnostics import log
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import Event
from evsys_bus.journal import Disk, JournalWriter, OsDisk, frame, layout
from evsys_bus.journal.frame import Frame, Run
from evsys_bus.journal.scanning import SegmentScan

READ_SECONDS: Final = 10.0
"""How long a resume looks for marks, newest first, before it goes on without those that it has not found."""


class BusCallbackMarks(Event, frozen=True):
    """What inline callbacks know of a run; recorded by the bus, for itself."""

    run: str
    """The run key."""
    folder: str
    """The run's directory: a journal may hold several runs of one key."""
    step: int
    """How many steps were done: the first one that the marks know nothing of."""
    marks: dict[str, Any]
    """By the name of the callback. Any: plain data of the callback's own."""


class RewindableByRun(Protocol):
    """An inline callback whose marks are told apart by run: resuming one run leaves what it knows of others alone."""

    def mark_run(self, run: Any) -> Any:
        """What is known of this run. Any: its `LoopState` or `LogContext`; plain data."""
        ...

    def rewind_run(self, run: Any, mark: Any, newest: Any) -> None:
        """Know of this run what the mark says. Any: its `LoopState`, the step to begin with in ``run.step``; marks.

        Args:
            run: About to train.
            mark: The newest at or before ``run.step``; None where there is none.
            newest: The newest of all, also behind that step: for what came late, of steps that will not run again.
        """
        ...


_TAG: Final = BusCallbackMarks.hook.removeprefix("on_").encode()
_FAILURES: Final = (OSError, JournalVersionError)


def with_marks(
    callbacks: Iterable[object], journal: JournalWriter | str | os.PathLike[str] | None, rank: int = 0
) -> tuple[object, ...]:
    """The callbacks, between the two that keep their marks; as they are if none keeps marks, or there is no journal.

    May be given what it returned, with callbacks added or removed: the two stay the same objects.

    Args:
        callbacks: The inline ones of a bus.
        journal: Where that bus records.
        rank: Of this process; its own streams are looked into first.
    """
    before = tuple(callbacks)
    given = tuple(each for each in before if not isinstance(each, _Rewinds | _Records))
    marked = _keep_marks(given)
    if journal is None or not marked:
        return given
    first = next((each for each in before if isinstance(each, _Rewinds)), None)
    last = next((each for each in before if isinstance(each, _Records)), None)
    if first is None or last is None:
        directory = journal.directory if isinstance(journal, JournalWriter) else os.fspath(journal)
        marks = _Marks(directory, rank)
        first, last = _Rewinds(marks), _Records(marks)
    last.marks.callbacks = marked
    return (first, *given, last)


def recorded_marks(
    directory: str, run: str, *, rank: int = 0, disk: Disk | None = None, seconds: float = READ_SECONDS
) -> Iterator[BusCallbackMarks]:
    """The marks of a run that a journal holds, newest first; what cannot be read is passed over, with a WARNING.

    Args:
        directory: The journal.
        run: The run key.
        rank: The streams of this rank come first, then those of others.
        disk: The file system.
        seconds: How long to read on.
    """
    disk = OsDisk() if disk is None else disk
    until = time.monotonic() + seconds
    try:
        streams = layout.streams(disk, directory)
    except OSError as error:
        log().warning("callback_marks.unreadable", journal=directory, error=str(error))
        return
    newest_first = streams[::-1]
    for stream in sorted(newest_first, key=lambda each: layout.rank_of(each) != rank):
        try:
            names = layout.segments(disk, f"{directory}/{stream}")
        except OSError as error:
            log().warning("callback_marks.unreadable", journal=directory, stream=stream, error=str(error))
            continue
        for name in reversed(names):
            payloads: list[bytes] = []
            try:
                events = _payloads(disk, f"{directory}/{stream}/{name}", name.first, until)
                payloads.extend(payload for payload in events if _TAG in payload)
            except _FAILURES as error:
                log().warning("callback_marks.unreadable", journal=directory, stream=stream, error=str(error))
            yield from filter(None, (_marks_in(payload, run) for payload in reversed(payloads)))
            if time.monotonic() >= until:
                log().warning("callback_marks.search_ended", journal=directory, run=run, after_seconds=seconds)
                return


def _payloads(disk: Disk, path: str, first: int, until: float) -> Iterator[bytes]:
    for piece in SegmentScan(disk, path).runs(first):
        if isinstance(piece, Run):
            yield from piece.payloads
            if time.monotonic() >= until:
                return
        elif isinstance(piece, Frame) and piece.kind in {frame.EVENT, frame.CARRIED}:
            yield bytes(piece.payload)


def _marks_in(payload: bytes, run: str) -> BusCallbackMarks | None:
    """The event, without the marks that could not be recorded whole; None if it is another one."""
    try:
        envelope = decode(payload)
    except CodecError:
        return None
    event = cast("object", envelope.event)
    if not isinstance(event, BusCallbackMarks) or envelope.run != run:
        return None
    # What is read is kept as it was written, and another version may have written it.
    if type(event.step) is not int or type(event.folder) is not str or type(event.marks) is not dict:
        return None
    cut = [path for path in envelope.replaced if path.startswith("marks")]
    whole = {name: mark for name, mark in event.marks.items() if not any(f"marks.{name}" in path for path in cut)}
    return msgspec.structs.replace(event, marks=whole)


class _Marks:
    """The callbacks of one bus that keep marks, and what was recorded of them."""

    def __init__(self, directory: str, rank: int) -> None:
        self.callbacks: Mapping[str, object] = {}
        """By the names under which their marks are recorded."""
        self._directory: Final = directory
        self._rank: Final = rank
        self._training: Final[dict[tuple[str, str], int]] = {}
        """The runs between TrainStart and TrainEnd, and how many steps of each were done."""
        self._recorded: Final[dict[tuple[str, str], dict[str, bytes]]] = {}
        """What was recorded last of the runs that train, by callback, encoded."""
        self._known: Final[set[tuple[str, str]]] = set()
        """The runs of which something was recorded here."""

    def rewind(self, state: LoopState) -> None:
        """Give the callbacks back what was recorded of this run at or before the step that it begins with."""
        run, step = _run_of(state), _whole(attribute(state, "step"))
        if run is None or step is None or (step == 0 and run not in self._known):
            return  # at the first step of a run that is new here, nothing is known
        leave: BaseException | None = None
        for name, (mark, newest) in self._found(run, step).items():
            callback = self.callbacks[name]
            try:
                if _is_by_run(callback):
                    callback.rewind_run(state, mark, newest)
                elif mark is not None and _is_whole(callback):
                    self._rewind_all(callback, mark, run)
            except BaseException as error:
                leave = isolate(callback, "rewind", error) or leave
        if leave is not None:
            raise leave

    def taken(self, handle: object, step: int | None, *, changed_only: bool) -> BusCallbackMarks | None:
        """The marks, now; None if none is to be recorded.

        Args:
            handle: The run's state or context.
            step: The last one that was done, where that is known.
            changed_only: Leave out those that were recorded before.
        """
        run = _run_of(handle)
        if run is None:
            return None
        done = self._training.get(run, 0) if step is None else step + 1
        if run in self._training:
            self._training[run] = done
        self._known.add(run)
        recorded = self._recorded.setdefault(run, {})
        marks: dict[str, Any] = {}
        leave: BaseException | None = None
        for name, callback in self.callbacks.items():
            try:
                mark = _mark_of(callback, handle)
                encoded = msgspec.msgpack.encode(mark)
            except BaseException as error:
                leave = isolate(callback, "mark", error) or leave
                continue
            if not changed_only or recorded.get(name) != encoded:
                recorded[name], marks[name] = encoded, mark
        if leave is not None:
            raise leave
        return BusCallbackMarks(run[0], without_surrogates(run[1]), done, marks) if marks else None

    def begin(self, state: LoopState) -> None:
        """The run trains."""
        run = _run_of(state)
        if run is not None:
            self._training[run] = _whole(attribute(state, "step")) or 0

    def end(self, state: LoopState) -> None:
        """It does no more."""
        run = _run_of(state) or ("", "")
        self._training.pop(run, None)
        self._recorded.pop(run, None)

    def _rewind_all(self, callback: Rewindable, mark: Any, run: tuple[str, str]) -> None:
        """Any: plain data."""
        others = [key for key, folder in self._training if (key, folder) != run]
        if others:
            log().warning(
                "callback.not_rewound",
                callback=callback_name(callback),
                run=run[0],
                why=f"its mark is of all runs, and {others[0]} is training",
                fix="give it mark_run(run) and rewind_run(run, mark, newest), which are of one run",
            )
            return
        callback.rewind(mark)

    def _found(self, run: tuple[str, str], step: int) -> dict[str, tuple[Any, Any]]:
        """Of each callback the newest mark at or before the step, and the newest of all. Any: plain data."""
        key, folder = run[0], without_surrogates(run[1])
        # Those of the same directory, else those of the same key: a run may have been moved.
        here: dict[str, list[Any]] = {}
        elsewhere: dict[str, list[Any]] = {}
        for each in recorded_marks(self._directory, key, rank=self._rank):
            for name in each.marks.keys() & self.callbacks.keys():
                found = (here if each.folder == folder else elsewhere).setdefault(name, [None, each.marks[name]])
                if found[0] is None and each.step <= step:
                    found[0] = each.marks[name]
            if all(name in here and here[name][0] is not None for name in self.callbacks):
                break
        return {name: (mark, newest) for name, (mark, newest) in {**elsewhere, **here}.items()}


class _Rewinds(Callback):
    """Stands first: rewinds the others before a hook of theirs sees the TrainStart."""

    spec_name = "callback_marks"

    def __init__(self, marks: _Marks) -> None:
        self.marks = marks

    def on_train_start(self, state: LoopState) -> None:
        """Rewind."""
        self.marks.rewind(state)


class _Records(Callback):
    """Stands last: has recorded what the others know once they have seen an event."""

    spec_name = "callback_marks"

    def __init__(self, marks: _Marks) -> None:
        self.marks = marks

    def on_train_start(self, state: LoopState) -> None:
        """Record all: what an earlier attempt recorded behind this step counts no more."""
        self.marks.begin(state)
        step = _whole(attribute(state, "step"))
        self._record(state, None if step is None else step - 1, changed_only=False)

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Record all: a resume begins behind a checkpoint."""
        # 0 is what a row says that was given no step.
        step = _whole(attribute(row, "batch")) or _whole(attribute(state, "step"))
        self._record(state, step, changed_only=False)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Record what changed."""
        del eval_name, metrics
        steps = [step for step in (_whole(attribute(state, "step")), _whole(step_idx)) if step is not None]
        self._record(state, max(steps, default=None), changed_only=True)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Record what changed."""
        del eval_result, predictions, step  # it may be of an older step than others that were marked
        self._record(ctx, None, changed_only=True)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """The run trains no more."""
        del artifacts
        self.marks.end(state)

    def _record(self, handle: object, step: int | None, *, changed_only: bool) -> None:
        event = self.marks.taken(handle, step, changed_only=changed_only)
        if event is not None:
            self.publish(event)


def _keep_marks(callbacks: Iterable[object]) -> dict[str, object]:
    """Those that keep marks, by names of their own."""
    marked: dict[str, object] = {}
    for callback in callbacks:
        # Of files, say: for a courier, which gives again what is cut. Inline nothing comes again.
        if isinstance(callback, type) or attribute(callback, "marks_inline") is False:
            continue
        if _is_by_run(callback) or _is_whole(callback):
            name = callback_name(callback)
            same = sum(each == name or each.startswith(f"{name}#") for each in marked)
            marked[f"{name}#{same + 1}" if same else name] = callback
    return marked


def _mark_of(callback: object, handle: object) -> Any:
    """A copy of the mark. Any: plain data.

    Raises:
        TypeError: It is not plain data.
    """
    mark = callback.mark_run(handle) if _is_by_run(callback) else cast("Rewindable", callback).mark()
    plain, replaced = to_plain(mark)
    if replaced:
        raise TypeError(f"a mark is plain data; this one would be recorded with replacements: {replaced}")
    return plain


def _is_by_run(callback: object) -> TypeGuard[RewindableByRun]:
    return _has(callback, "mark_run", "rewind_run")


def _is_whole(callback: object) -> TypeGuard[Rewindable]:
    return _has(callback, "mark", "rewind")


def _has(callback: object, *methods: str) -> bool:
    """Looked up in the class: an instance may answer to every name."""
    return all(callable(attribute(type(callback), method)) for method in methods)


def _run_of(handle: object) -> tuple[str, str] | None:
    """The key and the directory of a run, the same for its state and its context; None if it has neither."""
    is_state = attribute(handle, "step") is not None
    ctx = attribute(handle, "ctx") if is_state else handle
    key = attribute(ctx, "run_key")
    try:
        folder = cast("str", os.fspath(attribute(ctx if type(key) is str else handle, "output_dir")))
        # By text: a Path costs ten times as much.
        return (key, os.path.join(folder, key)) if type(key) is str else (os.path.basename(folder), folder)  # noqa: PTH118, PTH119
    except TypeError:
        return None


def _whole(step: object) -> int | None:
    """A step as an int; None if it is none."""
    try:
        if isinstance(step, SupportsIndex):
            return operator.index(step)
        number = float(step) if isinstance(step, SupportsFloat) else float("nan")
        return int(number) if number.is_integer() else None
    except Exception:  # a tensor of several values
        return None
