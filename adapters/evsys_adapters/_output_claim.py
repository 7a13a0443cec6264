"""`OutputPlaces`, `OutputClaim`: which adapter and run own an output file or folder, now and in later processes.

A hidden owner file records it: ``.<name>.run`` beside a file, ``.run`` in a folder. It holds the run's path relative to
it, a zero byte, the adapter's name and a line end. (0.1.0 wrote only the run, for TensorBoard as an absolute path.)
While the output is written, the owner file is locked.
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
"""Why an output cannot be used: it belongs to another run; another process or adapter is writing it now; or it
belongs to another adapter that is still subscribed."""


class OutputClaim:
    """Exclusive use of one output while the object lives, against other processes and other adapters of this one.

    Args:
        follower: The adapter's name.
        lock: Lock of the owner file; None if the output is not exclusive.
    """

    _held: ClassVar["weakref.WeakValueDictionary[tuple[int, str], OutputClaim]"] = weakref.WeakValueDictionary()
    _guard: ClassVar = threading.Lock()

    def __init__(self, follower: str = "", lock: FileLock | None = None) -> None:
        self.follower = follower
        self._lock = lock

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lease; False in a child forked from the process that acquired it."""
        return self._lock is None or self._lock.is_held

    @classmethod
    def take(
        cls, note: Path, run: str, follower: str, is_followed: Callable[[str], bool] | None = None
    ) -> "OutputClaim | Refusal":
        """Acquire the output for an adapter, and record the adapter as its owner.

        Args:
            note: The owner file beside or in the output; its folder is created if needed.
            run: The result of `owner_of`.
            follower: The adapter's name.
            is_followed: Whether the adapter with this name is still subscribed; None skips the check.

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
            refusal = _refusal(note, run, follower, is_followed)  # it may have changed since the first check
            if refusal is not None:
                return refusal
            if lock is None:
                return "in_use"
            if writer_of(note, run) != follower:
                lock.write(_seen_from(note, run) + b"\0" + os.fsencode(follower) + b"\n")
            claim = cls._held[key] = cls(follower, lock)
        return claim


class OutputPlaces:
    """The candidate paths for one run's output of one callback.

    Does not keep the callback alive; the lease ends with it.

    Args:
        callback: The writer.
        run: The result of `owner_of`.
        places: The file or folder, then alternatives in case it belongs to another run.
        marks: The callback's savepoints; files that they name were its own.
        fix: How users give each run an output of its own.
        folder: Whether the output is a folder.
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
        """Acquire the path that this adapter used before, else the first one without an active owner.

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
                    break  # the next candidate has a distinct name for this run
        raise AssertionError("there is always another number")

    def take_followed(self) -> tuple[Path, OutputClaim]:
        """Acquire a path if a courier delivers to the callback; otherwise return the first path without a lock.

        Raises:
            OSError: The disk refuses it.
        """
        if has_courier(self._callback()):
            return self.take()
        return self.first, OutputClaim()

    def _is_followed(self, name: str) -> bool:
        """Whether an adapter of this name is subscribed to the same journal."""
        asks = (getattr(each, "follows", None) for each in _attached(self._callback()))
        return any(callable(ask) and ask(name) for ask in asks)

    def _own(self) -> Path | None:
        """Find the path that this adapter used before, by its owner file or else by the mark."""
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
            fix = "let only one process and one adapter write the files of a run, or give each its own output"
        names = {"taken": str(self.first), "file": str(place)}
        log().warning(f"{self._kind}.{refused}", run=self._run, **names, fix=fix)


def has_courier(callback: Callback | None) -> bool:
    """Whether a courier delivers to the callback, so that events may be delivered twice."""
    return any(getattr(each, "has_courier", False) for each in _attached(callback))


def without_others(mark: Mark, callback: Callback) -> Mark:
    """Drop the files from the mark that another adapter has continued since; their earlier state is obsolete."""
    follower = callback_name(callback)
    files = {file: size for file, size in mark.files.items() if _follower_at(Path(file)) in {"", follower}}
    return mark if len(files) == len(mark.files) else msgspec.structs.replace(mark, files=files)


def owner_of(handle: object) -> str:
    """Return the run's folder with symbolic links resolved."""
    return os.path.realpath(run_id(handle).replace("\0", "\\0"))  # a key may contain a zero byte, which no path may


def writer_of(note: Path, run: str) -> str | None:
    """Return the adapter that owns the output; empty if only the run is recorded, None if it is not the run's."""
    said = _read(note)
    words, _, follower = said.removesuffix(b"\n").partition(b"\0")
    if words not in _names_of(note, run):
        return None
    return os.fsdecode(follower) if said.endswith(b"\n") else ""


def _follower_at(file: Path) -> str:
    """Return the adapter named by the owner file of a file or of its folders; empty if there is none."""
    for note in (file.with_name(f".{file.name}.run"), file.parent / ".run", file.parent.parent / ".run"):
        said = _read(note)
        follower = said.removesuffix(b"\n").partition(b"\0")[2]
        if said.endswith(b"\n") and follower:
            return os.fsdecode(follower)
    return ""


def is_of_run(folder: Path, run: str) -> bool:
    """Whether the folder belongs to this run; a folder without owner is assigned to it."""
    note = folder / ".run"
    if not _is_other(note, run) and writer_of(note, run) is None:
        try:
            lock = FileLock.take(note)
            if lock is not None and writer_of(note, run) is None and not _is_other(note, run):
                lock.write(_seen_from(note, run) + b"\n")
        except OSError:  # a disk that refuses this refuses rows as well, which are buffered
            pass
    return not _is_other(note, run)


def seen_from(output: Path, run: str) -> str:
    """Return the run's path relative to the folder of the output: unchanged after both were moved together."""
    return os.path.relpath(run, os.path.realpath(output.parent))


def _seen_from(output: Path, run: str) -> bytes:
    return seen_from(output, run).encode(errors="surrogateescape")


def _names_of(note: Path, run: str) -> tuple[bytes, bytes]:
    """Return the names of the run in an owner file; the second form is the one that 0.1.0 wrote for TensorBoard."""
    return _seen_from(note, run), run.encode(errors="surrogateescape")


def _is_other(note: Path, run: str) -> bool:
    """Whether the output belongs to another run; a damaged owner file counts as nobody's."""
    said = _read(note)
    return all(names_another(said, name, note.parent) for name in _names_of(note, run))


def _refusal(note: Path, run: str, follower: str, is_followed: Callable[[str], bool] | None) -> Refusal | None:
    """Return why the adapter must not write the output, apart from current locks."""
    if _is_other(note, run):
        return "second_run"
    writer = writer_of(note, run)
    if writer and writer != follower and is_followed is not None and is_followed(writer):
        return "second_follower"
    return None


def _attached(callback: Callback | None) -> Sequence[object]:
    return () if callback is None else callback.evsys_attached


def _read(note: Path) -> bytes:
    """Return the content of the owner file; empty if it is missing or not a regular file."""
    try:
        return read_file(note)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        return b""
