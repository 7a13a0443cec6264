"""`OutputPlaces`, `OutputClaim`: which follower of which run writes an output file or folder, now and on later days.

A hidden note says it: ``.<name>.run`` beside a file, ``.run`` in a folder. It holds the run, seen from there, behind a
zero byte the name of the follower, and an end of line. (0.1.0 wrote the run alone, for TensorBoard its whole path.)
While the output is written, the note is locked.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from evsys_adapters._runs import names_another, run_id
from evsys_bus.callback import Callback, callback_name
from evsys_bus.diagnostics import log
from evsys_bus.disk import current_disk
from evsys_bus.files import DamagedFileError, FileLock, read_file
from evsys_bus.savepoints import Mark, Savepoints

Refusal = Literal["second_run", "in_use", "second_follower"]
"""The output is another run's; or it is written now, by another process or follower; or another follower's, who is
followed still."""


class OutputClaim:
    """One output, for as long as the object lives: no other process writes it, and in this one no other follower.

    Args:
        follower: Its name.
        lock: Of the note; None where nobody is kept away.
    """

    _held: ClassVar["weakref.WeakValueDictionary[tuple[int, str], OutputClaim]"] = weakref.WeakValueDictionary()
    _guard: ClassVar = threading.Lock()

    def __init__(self, follower: str = "", lock: FileLock | None = None) -> None:
        self.follower = follower
        self._lock = lock

    @property
    def is_held(self) -> bool:
        """Whether it is this process's: not so in a child forked from the one that took it."""
        return self._lock is None or self._lock.is_held

    @classmethod
    def take(
        cls, note: Path, run: str, follower: str, is_followed: Callable[[str], bool] | None = None
    ) -> "OutputClaim | Refusal":
        """Claim the output for a follower, and write down that it is its.

        Args:
            note: The file beside the output, or in it; the folder is made if need be.
            run: As `owner_of` has it.
            follower: Its name.
            is_followed: Tells of another, whose output it was, whether it is still; None: it does not matter.

        Raises:
            OSError: The disk refuses it.
        """
        refusal = _refusal(note, run, follower, is_followed)
        if refusal is not None:
            return refusal
        with cls._guard:
            key = (id(current_disk()), os.path.realpath(note))
            held = cls._held.get(key)
            if held is not None and held.is_held:
                return held if held.follower == follower else "in_use"
            lock = FileLock.take(note)
            refusal = _refusal(note, run, follower, is_followed)  # since the look at it
            if refusal is not None:
                return refusal
            if lock is None:
                return "in_use"
            if writer_of(note, run) != follower:
                lock.write(_seen_from(note, run) + b"\0" + os.fsencode(follower) + b"\n")
            claim = cls._held[key] = cls(follower, lock)
        return claim


class OutputPlaces:
    """Where the output of one run may lie, for one callback.

    Does not keep the callback alive, whose end gives its output up.

    Args:
        callback: Who writes it.
        run: As `owner_of` has it.
        places: The file or folder; the next one where it is another run's.
        marks: Of the callback: what they name was its own.
        fix: How people give each an output of its own.
        folder: Whether it is a folder.
    """

    def __init__(
        self,
        callback: Callback,
        run: str,
        places: Sequence[Path],
        marks: Savepoints,
        fix: str,
        *,
        folder: bool = False,
    ) -> None:
        self.first = places[0]
        self._callback = weakref.ref(callback)
        self._kind = callback.name or type(callback).__name__
        self._follower = callback_name(callback)
        self._run = run
        self._places = places
        self._marks = marks
        self._fix = fix
        self._folder = folder

    def take(self) -> tuple[Path, OutputClaim]:
        """The place that was this follower's; else the first one that is nobody's who still writes there.

        Raises:
            OSError: The disk refuses it.
        """
        own = self._own()
        refused: Refusal | None = None
        for place in self._places:
            for each in chain([] if own is None else [own], [place], self._numbered(place)):
                claim = OutputClaim.take(self._note(each), self._run, self._follower, self._is_followed)
                if isinstance(claim, OutputClaim):
                    if refused is not None:
                        self._warn(refused, each)
                    return each, claim
                refused = refused or claim
                if claim == "second_run" and each is place and place is not self._places[-1]:
                    break  # the next place has a name of its own for this run
        raise AssertionError("there is always another number")

    def take_followed(self) -> tuple[Path, OutputClaim]:
        """As `take` where a courier delivers; else the first place, of which nobody is kept away.

        Raises:
            OSError: The disk refuses it.
        """
        if has_courier(self._callback()):
            return self.take()
        return self.first, OutputClaim()

    def _is_followed(self, name: str) -> bool:
        """Whether a follower of this name is on record where the callback is delivered to, and has not left."""
        asks = (getattr(each, "follows", None) for each in _attached(self._callback()))
        return any(callable(ask) and ask(name) for ask in asks)

    def _own(self) -> Path | None:
        """The place that was this follower's on an earlier day: as it says itself, else as the mark says."""
        there: list[Path] = []
        for place in self._places:
            for each in chain([place], self._numbered(place)):
                writer = writer_of(self._note(each), self._run)
                if writer == self._follower:
                    return each
                if writer is None and each is not place:
                    break
                there.append(each)
        marked = [Path(os.path.realpath(file)) for file in self._marks.files]
        return next((each for each in there if any(self._holds(each, file) for file in marked)), None)

    def _holds(self, place: Path, file: Path) -> bool:
        output = Path(os.path.realpath(place))
        return output in file.parents if self._folder else output == file

    def _note(self, place: Path) -> Path:
        return place / ".run" if self._folder else place.with_name(f".{place.name}.run")

    def _numbered(self, place: Path) -> Iterator[Path]:
        stem, suffix = (place.name, "") if self._folder else (place.stem, place.suffix)
        return (place.with_name(f"{stem}-{number}{suffix}") for number in count(2))

    def _warn(self, refused: Refusal, place: Path) -> None:
        fix = self._fix
        if refused != "second_run":
            fix = "have one process and one follower write the files of a run, or give each an output of its own"
        names = {"taken": str(self.first), "file": str(place)}
        log().warning(f"{self._kind}.{refused}", run=self._run, **names, fix=fix)


def has_courier(callback: Callback | None) -> bool:
    """Whether a courier delivers to the callback: events may come that it was given before."""
    return any(getattr(each, "has_courier", False) for each in _attached(callback))


def without_others(mark: Mark, callback: Callback) -> Mark:
    """The mark, but for files that another follower has gone on with since: how they were is of no use any more."""
    follower = callback_name(callback)
    files = {file: size for file, size in mark.files.items() if _follower_at(Path(file)) in {"", follower}}
    return mark if len(files) == len(mark.files) else msgspec.structs.replace(mark, files=files)


def owner_of(handle: object) -> str:
    """The run's folder, the same through whatever links it is reached."""
    return os.path.realpath(run_id(handle).replace("\0", "\\0"))  # a key may hold what no path can


def writer_of(note: Path, run: str) -> str | None:
    """The follower whose output it is; empty where it is the run's and no follower is named; None where it is not."""
    said = _read(note)
    words, _, follower = said.removesuffix(b"\n").partition(b"\0")
    if words not in _names_of(note, run):
        return None
    return os.fsdecode(follower) if said.endswith(b"\n") else ""


def _follower_at(file: Path) -> str:
    """The follower that the note of a file names, or of the folders that it may lie in; empty where none does."""
    for note in (file.with_name(f".{file.name}.run"), file.parent / ".run", file.parent.parent / ".run"):
        said = _read(note)
        follower = said.removesuffix(b"\n").partition(b"\0")[2]
        if said.endswith(b"\n") and follower:
            return os.fsdecode(follower)
    return ""


def is_of_run(folder: Path, run: str) -> bool:
    """Whether the folder is this run's, now or since an earlier day; one that is nobody's is this run's from now on."""
    note = folder / ".run"
    if not _is_other(note, run) and writer_of(note, run) is None:
        try:
            lock = FileLock.take(note)
            if lock is not None and writer_of(note, run) is None and not _is_other(note, run):
                lock.write(_seen_from(note, run) + b"\n")
        except OSError:  # a disk that refuses this refuses rows as well, which wait
            pass
    return not _is_other(note, run)


def seen_from(output: Path, run: str) -> str:
    """The run relative to the folder of the output or its note: the same after both were moved together."""
    return os.path.relpath(run, os.path.realpath(output.parent))


def _seen_from(output: Path, run: str) -> bytes:
    return seen_from(output, run).encode(errors="surrogateescape")


def _names_of(note: Path, run: str) -> tuple[bytes, bytes]:
    """What the run is called in a note; the second as 0.1.0 called it for TensorBoard."""
    return _seen_from(note, run), run.encode(errors="surrogateescape")


def _is_other(note: Path, run: str) -> bool:
    """Whether the output is another run's; what a full disk or a power cut left of a note is nobody's."""
    said = _read(note)
    return all(names_another(said, name, note.parent) for name in _names_of(note, run))


def _refusal(note: Path, run: str, follower: str, is_followed: Callable[[str], bool] | None) -> Refusal | None:
    """Why the follower must not write the output, whoever writes it now."""
    if _is_other(note, run):
        return "second_run"
    writer = writer_of(note, run)
    if writer and writer != follower and is_followed is not None and is_followed(writer):
        return "second_follower"
    return None


def _attached(callback: Callback | None) -> Sequence[object]:
    return () if callback is None else callback.evsys_attached


def _read(note: Path) -> bytes:
    """What is written down; empty where nothing is, or what is no file."""
    try:
        return read_file(note)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        return b""
