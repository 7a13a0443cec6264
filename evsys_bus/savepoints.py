"""`Savepoints`: restores files after a crash to their state at the last mark.

A mark holds the size of every open file; what was appended later is cut off. Any other change of a file (a cut, a new
column, a replaced eval, a rename) first saves the previous version beside it, as a hard link named
``.<name>.<id>-<life>-<number>-<size>.before`` (with the name as `hidden_name` returns it). So does the first change of
a file that the mark does not contain. Thus every file is restored to the byte. Before the first mark nothing is saved,
so an inline callback has no cost.

A *life* is what one object wrote. After a crash the mark records to which number each earlier life was rewound. What
such a life changed after that in a file is undone when the file is next used, also by a later life.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Final, NamedTuple

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.disk import BLOCK, Disk, current_disk, open_binary, parent_of, replace_by_blocks

_BEFORE: Final = re.compile(r"\.([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)\.before$")


class Mark(msgspec.Struct, frozen=True):
    """The state of some files, as plain data."""

    id: str
    """Identifies the adapter: the same for all its marks."""
    life: str
    number: int
    """Increases over all lives."""
    files: dict[str, int]
    """The size of each open file, by absolute path."""
    ended: dict[str, int]
    """Earlier lives, with the number of the mark to which each was rewound."""
    kept: list[str]
    """Previous versions of files, to be removed once this mark is durable."""


class Savepoints:
    """The marks of the files of one callback, which are identified by absolute path.

    The mark before the last one also stays valid: only the next `take` shows that the last one was stored.

    Args:
        disk: The file system; by default the real one (`evsys_bus.files.use_disk`).
    """

    def __init__(self, *, disk: Disk | None = None) -> None:
        self._disk: Final = current_disk() if disk is None else disk
        self._last = Mark(token_hex(4), token_hex(4), 0, {}, {}, [])
        self._sizes: dict[str, int] = {}
        """How many bytes of each file belong to the last mark; 0 once its previous version is saved."""
        self._open: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._settled: set[str] = set()
        self._kept: list[tuple[int, str]] = []
        """Previous versions, with the numbers of their marks."""

    @property
    def files(self) -> list[str]:
        """The files in the last mark."""
        return [*self._last.files]

    def take(self) -> Mark:
        """Create a mark, or return the last one if no file has changed. After an OSError call it again."""
        last = self._last
        for number, path in self._kept:
            if number < last.number:
                self._remove(path)
        self._kept = [each for each in self._kept if each[0] == last.number]
        for file in self._changed:
            self._sync(self._disk.resolve(file))
        if self._changed or not last.number:
            self._sizes = {file: self._size(file) for file in self._open}
            kept = [path for _, path in self._kept]
            self._last = Mark(last.id, last.life, last.number + 1, dict(self._sizes), last.ended, kept)
            self._changed = {}
        return self._last

    def rewind(self, mark: Mark) -> None:
        """Restore the files of the mark now, and others when they are next used."""
        ended = {**mark.ended, mark.life: mark.number}
        self._last = Mark(mark.id, token_hex(4), mark.number, mark.files, ended, mark.kept)
        for path in mark.kept:
            self._remove(path)
        self._sizes = dict(mark.files)
        self._open = dict.fromkeys(mark.files)
        for file in mark.files:
            self.settle(file)

    def settle(self, file: str) -> None:
        """Undo what a crashed life did to the file after its mark. Call it before the file is first used."""
        if self._last.number and file not in self._settled:
            self._restore(file, self._last)

    @property
    def last(self) -> Mark:
        """The last mark, or the one that was rewound to."""
        return self._last

    def join(self, mark: Mark, others: Iterable[str] = ()) -> bool:
        """Restore the files of this mark, and these others, whatever mark was rewound to before.

        Returns whether the mark belongs to this adapter, possibly from now on. If not, the files are tracked anew.
        """
        last = self._last
        files = dict.fromkeys([*mark.files, *others])
        for file in files:
            self._restore(file, mark)
        if last.number and mark.id != last.id:
            for file in files:
                self._sizes.pop(file, None)
            return False
        ended = {**last.ended, **mark.ended}
        ended[mark.life] = max(mark.number, ended.get(mark.life, 0))
        sizes = {**last.files, **mark.files}
        self._last = Mark(mark.id, last.life, max(last.number, mark.number), sizes, ended, last.kept)
        self._sizes.update(mark.files)
        return True

    def version(self, file: str, mark: Mark) -> str:
        """The path of the version that `join` would restore."""
        target = self._disk.resolve(file)
        _, first = self._undone(target, mark)
        return target if first is None else first.path

    def _restore(self, file: str, mark: Mark) -> None:
        target = self._disk.resolve(file)
        versions, first = self._undone(target, mark)
        for each in reversed(versions):  # later ones are versions of a state that is undone with the first
            if each is not first:
                self._disk.remove(each.path)
        size = mark.files.get(file)
        if first is not None:
            self._cut(first.path, first.size if size is None else min(first.size, size))
            self._disk.rename(first.path, target)
            self._remove(first.path)  # renaming a link to the same file does nothing
        elif size is not None:
            self._cut(target, size)
        self._settled.add(file)

    def _undone(self, target: str, mark: Mark) -> "tuple[list[_Version], _Version | None]":
        """The saved versions of a file, and the one it had at the mark; None if that is the current one."""
        versions = sorted(self._versions(target, mark.id), key=lambda each: each.number)
        ended = {**mark.ended, mark.life: mark.number}
        return versions, next((each for each in versions if each.number >= ended.get(each.life, 0)), None)

    def appending(self, file: str, size: int) -> None:
        """Call before rows are appended, with the size of the file; it is smaller if somebody replaced the file."""
        self._open[file] = self._changed[file] = None
        if self._last.number and size < self._sizes.get(file, size + 1):
            self._sizes[file] = self._keep(file, size)

    def protects(self, file: str, start: int) -> bool:
        """Whether the bytes from ``start`` on must not be changed in place."""
        return self._last.number > 0 and start < self._sizes.get(file, start + 1)

    def replacing(self, file: str) -> None:
        """Call before the file is replaced."""
        self._open[file] = self._changed[file] = None
        if self._last.number and self._sizes.get(file) != 0:
            self._keep(file)

    def replaced(self, file: str) -> None:
        """Call after the file was replaced."""
        self._sizes[file] = 0

    def closed(self, file: str) -> None:
        """Call when the file is closed, so that later marks do not contain it."""
        self._open.pop(file, None)

    def _keep(self, file: str, size: int | None = None) -> int:
        """Save the file in its state at the last mark, and return its size then."""
        target, mark = self._disk.resolve(file), self._last
        if size is None:
            size = self._sizes.get(file, self._size(target))
        folder, _, name = target.rpartition("/")
        beside = f"{folder}/{hidden_name(name)}.{mark.id}-{mark.life}-{mark.number}-{size}.before"
        if (mark.number, beside) not in self._kept:
            self._link(target, beside)
            self._disk.sync_path(folder or "/")  # before any part of the change can reach the disk
            self._kept.append((mark.number, beside))
        return size

    def _versions(self, target: str, follower: str) -> "Iterator[_Version]":
        """The saved versions of a file for marks with this id."""
        folder, _, name = target.rpartition("/")
        prefixes = {f"{hidden_name(name)}.", f".{name}."}  # 0.1.0 wrote the second
        for each in _names(self._disk, folder):
            found = _BEFORE.search(each)
            if found is not None and found[1] == follower and each[: found.start() + 1] in prefixes:
                yield _Version(f"{folder}/{each}", found[2], int(found[3]), int(found[4]))

    def _link(self, target: str, beside: str) -> None:
        try:
            self._disk.hard_link(target, beside)
        except FileExistsError:  # from an earlier attempt that failed after this
            return
        except FileNotFoundError:
            replace_by_blocks(beside, [], mode=0o666, disk=self._disk)
        except OSError:  # a file system without hard links: a copy costs more and is as good
            with open_binary(target, self._disk) as file:
                replace_by_blocks(beside, iter(partial(file.read, BLOCK), b""), mode=0o666, disk=self._disk)

    def _cut(self, path: str, size: int) -> None:
        there = self._size(path)
        if there > size:
            file = self._disk.open_write(path)
            try:
                self._disk.truncate(file, size)
                self._disk.sync(file)
            finally:
                self._disk.close(file)
        elif there < size:
            log().warning("rewind.bytes_missing", file=path, at_the_mark=size, there=there)

    def _sync(self, path: str) -> None:
        for each in (path, parent_of(path)):
            try:
                self._disk.sync_path(each)
            except FileNotFoundError:  # it was removed; the next row creates it again
                continue

    def _size(self, path: str) -> int:
        try:
            return self._disk.size(path)
        except FileNotFoundError:
            return 0

    def _remove(self, path: str) -> None:
        try:
            self._disk.remove(path)
        except FileNotFoundError:
            return


class _Version(NamedTuple):
    path: str
    life: str
    number: int
    size: int


def hidden_name(name: str) -> str:
    """A hidden name for a file beside this one. It avoids ``tfevents``, because TensorBoard reads all such files."""
    return f".{name.replace('tfevents', 'tf-events')}"


def names_beside(folder: Path, disk: Disk | None = None) -> set[str]:
    """The names of files that have a saved version in the folder, for any mark."""
    names = _names(current_disk() if disk is None else disk, str(folder))
    found = [name[: match.start()] for name in names if (match := _BEFORE.search(name))]
    return {name.removeprefix(".").replace("tf-events", "tfevents") for name in found}


def _names(disk: Disk, folder: str) -> list[str]:
    try:
        return [*disk.names(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
