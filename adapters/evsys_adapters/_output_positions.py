"""`TrackedOutput`, `PositionWriter`: which events an output has the rows of, written down beside it with every mark.

    .rows.csv.at                  beside a file
    logs/.at                      in a folder

So the output itself answers for each event whether it was handled, whatever became of the follower's cursor, and under
whatever name it is followed. The note holds the last event of each stream, how long the files were, and what their
writer knew of the run. It is on the medium before the cursor that belongs to the same mark: where the two differ, the
note is newer, and counts. Files that have changed in another way than by their writer make it void, and so does their
removal; outputs of 0.1.0 have none. Then rows are compared with those that come (`evsys_adapters._row_matcher`).
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from evsys_bus.adapter import EventInfo
from evsys_bus.disk import current_disk, open_binary, replace_file
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import load_file
from evsys_bus.journal.layout import stream_sort_key
from evsys_bus.savepoints import Mark, Savepoints

NEXT_STREAM: Final = "?"
"""Stands for the stream of the next event, where an output was begun before it had a note."""
_MAX_STREAMS: Final = 64
_TAIL_BYTES: Final = 4096

_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class Position(msgspec.Struct, omit_defaults=True):
    """Which events an output has the rows of."""

    output: str = ""
    """The file or folder."""
    number: int = 0
    """Of its last note; counts on whoever writes it."""
    handled: dict[str, int] = {}
    """The last event of each stream of the journal, by its sequence."""
    since: str = ""
    """Events of streams that were begun before this one are handled as well; empty: of none."""

    def has(self, event: EventInfo) -> bool:
        """Whether the event was handled."""
        last = self.handled.get(event.stream)
        return event.sequence <= last if last is not None else _is_older(event.stream, self.since)

    def add(self, event: EventInfo) -> None:
        """The event is handled."""
        self.handled[event.stream] = event.sequence
        if self.since == NEXT_STREAM:
            self.since = event.stream
        if len(self.handled) > _MAX_STREAMS:
            oldest, self.since = sorted(self.handled, key=stream_sort_key)[:2]
            del self.handled[oldest]


class _PositionRecord(msgspec.Struct):
    version: Literal[1]
    position: Position
    mark: Mark
    files: dict[str, tuple[int, str]]
    """Size and digest of the end of each file, by its path from the note."""
    state: msgspec.Raw
    """What the writer knew of the run."""


class TrackedOutput:
    """The output of one run, for one follower.

    Args:
        savepoints: Of the follower's files.
        position: As its mark has it; None where there is no mark.
        behind_courier: Whether a courier delivers, so that events come again after a crash.
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
        """Whether it is known which events it has the rows of: a start that is given again tells nothing then."""
        return bool(self.position.handled)

    def has(self, event: EventInfo) -> bool:
        """Whether nothing is to be done for the event, as its rows are there; else they are from now on."""
        if self.is_handled(event):
            return True
        self.add(event)
        return False

    def is_handled(self, event: EventInfo) -> bool:
        """Whether nothing is to be done for the event, as its rows are there."""
        return self.behind_courier and event.sequence > 0 and not event.carried and self.position.has(event)

    def add(self, event: EventInfo) -> None:
        """The rows of the event are there."""
        if self.behind_courier and event.sequence and not event.carried:
            self.position.add(event)

    def restore(self, path: Path, position_file: Path, others: Iterable[Path] = ()) -> bytes | None:
        """To be called with the place once it is claimed.

        Where its note is newer than the follower's mark, its files are made as they were at the note. What their writer
        knew then; None where the mark counts, or where nobody knows.

        Args:
            path: Where the output lies.
            position_file: Its note.
            others: Files that may have come to the output behind the note, which does not name them.

        Raises:
            OSError: The disk refuses it.
        """
        if not self.behind_courier:
            with suppress(OSError):  # what is written now is in no note
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
        self._last_written = (dict(self.position.handled), self.position.since, bytes(record.state), [*record.files])
        if not is_ours:
            self._last_written = (
                None  # the earlier versions that the next changes leave belong to this follower's marks
            )
            prepared = self.prepare_write(bytes(record.state), [position_file.parent / name for name in record.files])
            if prepared is not None:
                prepared(self._savepoints.last_mark)()
        return bytes(record.state)

    def prepare_write(self, state: bytes, files: Iterable[Path]) -> "Callable[[Mark], Callable[[], object]] | None":
        """What makes, once there is a mark, what writes a note of how the output is now; None where the last says it.

        Raises:
            OSError: A file cannot be read; nothing has changed.
        """
        position, position_file = self.position, self._position_file
        if position_file is None or not position.handled:
            return None
        names = {os.path.relpath(file, position_file.parent): str(file) for file in files}
        current = (dict(position.handled), position.since, state, [*names])
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


class PositionWriter:
    """Takes the marks of a follower's files, and writes the notes of its outputs."""

    def __init__(self, savepoints: Savepoints) -> None:
        self._savepoints = savepoints
        self._pending: list[Callable[[], object]] = []

    def take(self, outputs: Iterable[tuple[TrackedOutput, bytes, Iterable[Path]]]) -> Mark:
        """A mark, once the notes of these outputs, with what is known of them, and with their files, are written.

        Raises:
            OSError: The disk refuses it; to be called again.
        """
        self._write()  # before another mark is taken: one earlier version is kept
        prepared = [output.prepare_write(state, files) for output, state, files in outputs]
        mark = self._savepoints.take()
        self._pending = [each(mark) for each in prepared if each is not None]
        self._write()
        return mark

    def _write(self) -> None:
        while self._pending:
            self._pending[0]()
            del self._pending[0]


def is_empty(files: Iterable[Path]) -> bool:
    """Whether none of them has anything in it.

    Raises:
        RetryLaterError: That cannot be learnt now.
    """
    try:
        return not any(_size(str(file)) for file in files)
    except OSError as error:
        raise RetryLaterError(f"the output cannot be looked at: {error}") from error


def position_file_of(file: Path) -> Path:
    """Where the note of an output lies that is a file."""
    return file.with_name(f".{file.name}.at")


def position_file_in(folder: Path) -> Path:
    """Where the note of an output lies that is a folder."""
    return folder / ".at"


def without_newer(mark: Mark, positions: Iterable[Position], position_file_for: Callable[[Path], Path]) -> Mark:
    """Return the mark without the files of outputs whose note is newer; `TrackedOutput.restore` restores those.

    Raises:
        OSError: A note cannot be read now.
    """
    newer: set[str] = set()
    for each in positions:
        if not each.output:
            continue
        position_file = position_file_for(Path(each.output))
        record = _read_record(position_file)
        if (
            record is not None
            and record.position.number > each.number
            and _is_whole(record, position_file, Savepoints())
        ):
            newer.update(_mark_from(record, position_file).files)
            folder = Path(os.path.abspath(each.output))  # noqa: PTH100 # as the marks call it
            newer.update(file for file in mark.files if Path(file).parent == folder)  # it had another name since
    if newer.isdisjoint(mark.files):
        return mark
    return msgspec.structs.replace(mark, files={file: at for file, at in mark.files.items() if file not in newer})


def assign(struct: _StructT, other: _StructT) -> None:
    """Have a struct, which others hold on to, hold what another one holds."""
    for name in struct.__struct_fields__:
        setattr(struct, name, getattr(other, name))


def _read_record(position_file: Path) -> _PositionRecord | None:
    return load_file(position_file, msgspec.json.Decoder(_PositionRecord).decode, quarantine=False)


def _mark_from(record: _PositionRecord, position_file: Path) -> Mark:
    files = {os.path.abspath(position_file.parent / name): size for name, (size, _) in record.files.items()}  # noqa: PTH100
    return msgspec.structs.replace(record.mark, files=files)


def _is_whole(record: _PositionRecord, position_file: Path, savepoints: Savepoints) -> bool:
    """Whether the files are as the note says, or can be made so.

    Of several, some may be gone: what was in a file that a person removes does not come again by itself.
    """
    mark = _mark_from(record, position_file)
    missing = 0
    for name, (size, digest) in record.files.items():
        path = savepoints.path_at_mark(os.path.abspath(position_file.parent / name), mark)  # noqa: PTH100
        there = _size(path)
        if size and not there:
            missing += 1
        elif there < size or _tail(path, size) != digest:
            return False
    return not missing or missing < sum(size > 0 for size, _ in record.files.values())


def _size(path: str) -> int:
    try:
        return current_disk().size(path)
    except FileNotFoundError:
        return 0


def _tail(path: str, size: int) -> str:
    """A digest of the last bytes of the first ``size`` ones."""
    if not size:
        return ""
    start = max(0, size - _TAIL_BYTES)
    with open_binary(path, current_disk()) as file:
        file.seek(start)
        return blake2b(file.read(size - start), digest_size=16).hexdigest()


def _is_older(stream: str, since: str) -> bool:
    """Whether a stream was begun before another, in the same journal: in a new one counters begin anew."""
    if since in {"", NEXT_STREAM}:
        return False
    start, start_since = (each.rsplit("-", 2)[-2:-1] for each in (stream, since))
    return stream_sort_key(stream) < stream_sort_key(since) and start <= start_since
