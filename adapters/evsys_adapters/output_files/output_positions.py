"""`TrackedOutput`, `OutputRuns`: a note beside each output of the events whose rows it contains.

    .rows.csv.at                  beside a file
    logs/.at                      in a folder

An output with a note shows for each event whether it was handled, even if the adapter lost its cursor or has a new
name. The note contains the last event of each stream, the sizes of the files, and the writer's state of the run. It is
written with every mark, and synced before the cursor of that mark is saved: if the two differ, the note is the newer
one and is used. It is invalid if anything but its writer has changed or removed the files. Outputs of 0.1.0 have none.
Without a valid note, delivered rows are compared with existing ones (`evsys_adapters.output_files.step_tracker`).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import msgspec

from evsys_adapters.output_files.output_lease import has_courier, without_foreign_files
from evsys_adapters.output_files.step_tracker import StepTracker
from evsys_bus.adapter import EventInfo
from evsys_bus.callback import Callback
from evsys_bus.disk import current_disk, open_binary, replace_file
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import load_file
from evsys_bus.journal.layout import stream_sort_key
from evsys_bus.savepoints import Mark, Savepoints

_NEXT_STREAM: Final = "?"
"""Placeholder for the stream of the next event, if the output is older than its note."""
_MAX_STREAMS: Final = 64
_TAIL_BYTES: Final = 4096

_StructT = TypeVar("_StructT", bound=msgspec.Struct)
StateT = TypeVar("StateT")
_StateT_co = TypeVar("_StateT_co", covariant=True)


class Position(msgspec.Struct, omit_defaults=True):
    """The events whose rows an output contains."""

    output: str = ""
    """The file or folder."""
    number: int = 0
    """Number of its last note; every note has a greater one, whichever adapter writes it."""
    handled: dict[str, int] = {}
    """Sequence number of the last handled event of each stream."""
    merged: dict[str, int] = {}
    """Likewise of the last handled row that was made of its parts, see `EventInfo.merged`."""
    since: str = ""
    """All events of streams older than this one are handled as well; empty if there are none."""

    def has(self, event: EventInfo) -> bool:
        """Whether the event was handled."""
        last = (self.merged if event.merged else self.handled).get(event.stream)
        if last is not None:
            return event.sequence <= last
        if event.merged and event.stream in self.handled:
            return False
        if self.since in {"", _NEXT_STREAM}:
            return False
        start, start_since = (each.rsplit("-", 2)[-2:-1] for each in (event.stream, self.since))
        # A new journal counts its starts from one again.
        return stream_sort_key(event.stream) < stream_sort_key(self.since) and start <= start_since

    def add(self, event: EventInfo) -> None:
        """Record that the event is handled."""
        sequence = event.sequence
        if event.merged:
            self.merged[event.stream] = sequence
            sequence = max(sequence, self.handled.get(event.stream, 0))
        self.handled[event.stream] = sequence
        if self.since == _NEXT_STREAM:
            self.since = event.stream
        if len(self.handled) > _MAX_STREAMS:
            oldest, self.since = sorted(self.handled, key=stream_sort_key)[:2]
            del self.handled[oldest]
            self.merged.pop(oldest, None)


class _PositionRecord(msgspec.Struct):
    version: Literal[1]
    position: Position
    mark: Mark
    files: dict[str, tuple[int, str]]
    """Size and digest of the end of each file, by path relative to the note."""
    state: msgspec.Raw
    """The writer's state of the run."""


class TrackedOutput:
    """The output of one run, written by one adapter.

    Args:
        savepoints: The adapter's savepoints.
        position: The position from its mark; None without a mark.
        behind_courier: Whether a courier delivers, so that events are repeated after a crash.
    """

    def __init__(
        self, savepoints: Savepoints, position: Position | None = None, *, behind_courier: bool = True
    ) -> None:
        self.position = Position() if position is None else position
        self.behind_courier = behind_courier
        self._savepoints = savepoints
        self._position_file: Path | None = None
        self._last_written: object = None

    @property
    def is_known(self) -> bool:
        """Whether it is known which events are in the output, so that a repeated start carries no information."""
        return bool(self.position.handled)

    def has(self, event: EventInfo) -> bool:
        """Whether the event's rows are in the output already; if not, record that they are from now on."""
        if self.is_handled(event):
            return True
        self.add(event)
        return False

    def is_handled(self, event: EventInfo) -> bool:
        """Whether the event's rows are in the output already."""
        return self.behind_courier and event.sequence > 0 and not event.carried and self.position.has(event)

    def add(self, event: EventInfo) -> None:
        """Record that the event's rows are in the output."""
        if self.behind_courier and event.sequence and not event.carried:
            self.position.add(event)

    def restore(self, path: Path, position_file: Path, others: Iterable[Path] = ()) -> bytes | None:
        """Restore the files to their state at the note, if that is newer than the adapter's mark.

        Call it once the output is acquired. Returns the writer's state at the note; None if the mark is newer, or if
        there is no valid note.

        Args:
            path: The output.
            position_file: Its note.
            others: Files that may have been added to the output after the note, which does not name them.

        Raises:
            OSError: The disk refuses it.
        """
        if not self.behind_courier:
            with suppress(OSError):  # rows written now are not recorded in a note
                current_disk().remove(str(position_file))
            return None
        position, self._position_file = self.position, position_file
        if position.output != str(path):
            position.output, position.number = str(path), 0
        record = _read_record(position_file)
        if record is None or record.position.number <= position.number:
            return None
        if not _is_whole(record, position_file, self._savepoints):
            position.number = record.position.number
            return None
        mark = _mark_from(record, position_file)
        is_ours = self._savepoints.adopt(mark, [os.path.abspath(each) for each in others])  # noqa: PTH100
        self.position = record.position
        self.position.output = str(path)
        self._last_written = self._content(bytes(record.state), record.files)
        if not is_ours:
            self._last_written = None  # earlier versions that the next changes create belong to this adapter's marks
            prepared = self.prepare_write(bytes(record.state), [position_file.parent / name for name in record.files])
            if prepared is not None:
                prepared(self._savepoints.last_mark)()
        return bytes(record.state)

    def _content(self, state: bytes, names: Iterable[str]) -> object:
        position = self.position
        return dict(position.handled), dict(position.merged), position.since, state, [*names]

    def prepare_write(self, state: bytes, files: Iterable[Path]) -> "Callable[[Mark], Callable[[], object]] | None":
        """Prepare a note of the output's current state; None if the last note is up to date.

        Returns a function that receives the mark and returns the function that writes the note.

        Raises:
            OSError: A file cannot be read; nothing has changed.
        """
        position, position_file = self.position, self._position_file
        if position_file is None or not position.handled:
            return None
        names = {os.path.relpath(file, position_file.parent): str(file) for file in files}
        current = self._content(state, names)
        if current == self._last_written:
            return None
        file_ends: dict[str, tuple[int, str]] = {}
        for name, file in names.items():
            size = _size(file)
            file_ends[name] = (size, _tail(file, size))

        def with_mark(mark: Mark) -> Callable[[], object]:
            position.number += 1
            self._last_written = current
            bare_mark = msgspec.structs.replace(mark, files={}, previous_versions=[])
            data = msgspec.json.encode(_PositionRecord(1, position, bare_mark, file_ends, msgspec.Raw(state))) + b"\n"
            return lambda: replace_file(position_file, data, mode=0o666)

        return with_mark


class OutputRun(Protocol[_StateT_co]):
    """A run whose output an adapter writes."""

    @property
    def output(self) -> TrackedOutput:
        """Which events the output contains."""
        ...

    @property
    def state(self) -> _StateT_co:
        """What marks have of the run."""
        ...

    def files(self) -> list[Path]:
        """Return the current paths of its files."""
        ...

    def settle(self) -> None:
        """Write buffered rows; raises OSError if the disk refuses them, or if rows were dropped."""
        ...

    def check_written(self) -> None:
        """Raise OSError if a row is not in its file."""
        ...


RunT = TypeVar("RunT", bound=OutputRun[Any])


class OutputRuns(Generic[RunT, StateT]):
    """The runs of an adapter, and their part of its marks.

    It holds no reference to the adapter: one that is dropped releases its files at once.

    Args:
        position_file_for: Returns the path of the note of an output.
        tracker_of: Returns the tracker in a run's state.
    """

    def __init__(self, position_file_for: Callable[[Path], Path], tracker_of: Callable[[StateT], StepTracker]) -> None:
        self.savepoints = Savepoints()
        self.open: dict[str, RunT] = {}
        self.ended: dict[str, RunT] = {}
        """Runs whose experiment has ended since the last mark."""
        self.rewound: dict[str, tuple[StateT, Position]] = {}
        """Runs without an event since the mark."""
        self._position_file_for = position_file_for
        self._tracker_of = tracker_of
        self._has_mark = False
        self._pending_notes: list[Callable[[], object]] = []

    def may_repeat(self, callback: Callback) -> bool:
        """Whether rows of a new run may be in its output already, because a courier may have lost its cursor."""
        return not self._has_mark and has_courier(callback)

    def written(self) -> list[RunT]:
        """Return the runs whose outputs were written since the last mark."""
        return [*self.ended.values(), *self.open.values()]

    def check_written(self, callback: Callback) -> None:
        """Check that the disk has all rows, unless a courier retries.

        Raises:
            OSError: The disk has refused rows, which are lost.
        """
        if not has_courier(callback):
            for run in self.written():
                run.check_written()

    def take_mark(self, encode: Callable[[StateT], bytes]) -> tuple[Mark, dict[str, StateT], dict[str, Position]]:
        """Sync all rows, write the notes, and return the mark of the files, and the states and positions of the runs.

        Args:
            encode: Encodes the state of a run as JSON, for the note of its output.

        Raises:
            OSError: Rows could not be written because the disk refuses them, or were dropped.
        """
        written = self.written()
        for run in written:
            run.settle()
        self._write_notes()  # before the next mark is taken: only one earlier version is retained
        prepared = [run.output.prepare_write(encode(run.state), run.files()) for run in written]
        files = self.savepoints.take()
        self._pending_notes = [each(files) for each in prepared if each is not None]
        self._write_notes()
        self.ended = {}
        known = self.rewound | {key: (run.state, run.output.position) for key, run in self.open.items()}
        states = {key: state for key, (state, _) in known.items()}
        return files, states, {key: position for key, (_, position) in known.items()}

    def rewind(
        self, callback: Callback, files: Mark, states: Mapping[str, StateT], positions: Mapping[str, Position]
    ) -> None:
        """Restore the files to their state at the mark, and the progress of the runs in them.

        Files that another adapter has continued since stay as they are. Those of outputs whose note is newer than the
        mark are left to `TrackedOutput.restore`.

        Raises:
            OSError: A note cannot be read now, or a file cannot be cut.
        """
        runs: dict[str, tuple[StateT, Position]] = {}
        for key, state in states.items():
            position = positions.get(key) or Position()
            if self._tracker_of(state).has_started and not position.handled:
                position.since = _NEXT_STREAM
            runs[key] = (state, position)
        own_files = without_foreign_files(files, callback)
        newer: set[str] = set()
        for _, each in runs.values():
            if not each.output:
                continue
            position_file = self._position_file_for(Path(each.output))
            record = _read_record(position_file)
            if (
                record is not None
                and record.position.number > each.number
                and _is_whole(record, position_file, Savepoints())
            ):
                newer.update(_mark_from(record, position_file).files)
                folder = Path(os.path.abspath(each.output))  # noqa: PTH100 # the form that marks use
                newer.update(file for file in own_files if Path(file).parent == folder)  # renamed since
        remaining = {file: size for file, size in own_files.items() if file not in newer}
        self.savepoints.rewind(msgspec.structs.replace(files, files=remaining))
        self._has_mark = True
        for state, position in runs.values():
            tracker = self._tracker_of(state)
            tracker.rewound = True
            if len(own_files) < len(files.files) and not position.handled:
                tracker.position_unknown = True
        self.rewound |= runs

    def known_state(self, key: str) -> tuple[StateT, Position] | tuple[None, None]:
        """Return the state and position of a run that is not open, if it has any."""
        run = self.ended.get(key)
        return self.rewound.get(key, (None, None)) if run is None else (run.state, run.output.position)

    def add(self, key: str, run: RunT) -> RunT:
        """Add an open run, in place of what is known of it."""
        self.open[key] = run
        self.rewound.pop(key, None)
        self.ended.pop(key, None)
        return run

    def _write_notes(self) -> None:
        while self._pending_notes:
            self._pending_notes[0]()
            del self._pending_notes[0]


def skip_matching_if_empty(tracker: StepTracker, files: Iterable[Path]) -> None:
    """Skip the matching of rows if all of the files are empty or missing.

    Raises:
        RetryLaterError: The disk cannot be read now.
    """
    try:
        tracker.position_unknown = tracker.position_unknown and any(_size(str(file)) for file in files)
    except OSError as error:
        raise RetryLaterError(f"the output cannot be read: {error}") from error


def position_file_of(file: Path) -> Path:
    """Return the path of the note of an output that is a file."""
    return file.with_name(f".{file.name}.at")


def position_file_in(folder: Path) -> Path:
    """Return the path of the note of an output that is a folder."""
    return folder / ".at"


def assign(struct: _StructT, other: _StructT) -> None:
    """Copy all fields of ``other`` to a struct that is referenced elsewhere."""
    for name in struct.__struct_fields__:
        setattr(struct, name, getattr(other, name))


def _read_record(position_file: Path) -> _PositionRecord | None:
    return load_file(position_file, msgspec.json.Decoder(_PositionRecord).decode, quarantine=False)


def _mark_from(record: _PositionRecord, position_file: Path) -> Mark:
    files = {os.path.abspath(position_file.parent / name): size for name, (size, _) in record.files.items()}  # noqa: PTH100
    return msgspec.structs.replace(record.mark, files=files)


def _is_whole(record: _PositionRecord, position_file: Path, savepoints: Savepoints) -> bool:
    """Whether the files match the note, or can be restored to it.

    If there are several, some may be missing: the rows of a file that a person removed are not written again.
    """
    mark = _mark_from(record, position_file)
    missing = 0
    for name, (size, digest) in record.files.items():
        path = savepoints.path_at_mark(os.path.abspath(position_file.parent / name), mark)  # noqa: PTH100
        actual_size = _size(path)
        if size and not actual_size:
            missing += 1
        elif actual_size < size or _tail(path, size) != digest:
            return False
    return not missing or missing < sum(size > 0 for size, _ in record.files.values())


def _size(path: str) -> int:
    try:
        return current_disk().size(path)
    except FileNotFoundError:
        return 0


def _tail(path: str, size: int) -> str:
    """Return a digest of the end of the first ``size`` bytes."""
    if not size:
        return ""
    start = max(0, size - _TAIL_BYTES)
    with open_binary(path, current_disk()) as file:
        file.seek(start)
        return blake2b(file.read(size - start), digest_size=16).hexdigest()
