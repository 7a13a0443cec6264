"""`Savepoints`: going back to how files were when a courier last took note, whatever became of them since.

A mark holds the size of every open file; what was appended behind it is cut. What changes a file in any other way (a
cut, a new column, an eval that is replaced, another name) first leaves the earlier version beside it, as a hard link
``.<name>.<id>-<life>-<number>-<size>.before`` (the name as `hidden_name` has it), and so does the first change of a
file that the mark does not name. So every file goes back to the byte. Until the first mark was taken nothing is kept:
an inline callback pays nothing.

A *life* is what one object wrote. A life that ended in a crash is known by the mark that it was rewound to; what it
changed later in a file is undone when that file is next looked at, also by a later life.
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
    """How far some files have got, as plain data."""

    id: str
    """The same for all marks of one follower."""
    life: str
    number: int
    """Counts on over all lives."""
    files: dict[str, int]
    """Sizes, by absolute path, of the files that were open."""
    ended: dict[str, int]
    """Earlier lives, and the number of the mark to which each was rewound."""
    kept: list[str]
    """Earlier versions of files that nobody needs once this mark is on record."""


class Savepoints:
    """The marks of one callback's files, which go by their absolute paths.

    One earlier mark stays good: that the last one is on record is known when the next is taken. ``disk`` is where the
    files lie: the real file system, unless a test names another (`evsys_bus.files.use_disk`).
    """

    def __init__(self, *, disk: Disk | None = None) -> None:
        self._disk: Final = current_disk() if disk is None else disk
        self._last = Mark(token_hex(4), token_hex(4), 0, {}, {}, [])
        self._sizes: dict[str, int] = {}
        """Up to where a file's bytes belong to the last mark; 0 once the earlier version lies beside it."""
        self._open: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._settled: set[str] = set()
        self._kept: list[tuple[int, str]] = []
        """Earlier versions, and the numbers of the marks that they belong to."""

    @property
    def files(self) -> list[str]:
        """The files that the last mark names."""
        return [*self._last.files]

    def take(self) -> Mark:
        """A new mark; the last one again if no file has changed. Raises OSError, and is then to be called again."""
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
        """Have the files as they were: now where the mark names them, others when they are first looked at."""
        ended = {**mark.ended, mark.life: mark.number}
        self._last = Mark(mark.id, token_hex(4), mark.number, mark.files, ended, mark.kept)
        for path in mark.kept:
            self._remove(path)
        self._sizes = dict(mark.files)
        self._open = dict.fromkeys(mark.files)
        for file in mark.files:
            self.settle(file)

    def settle(self, file: str) -> None:
        """Undo what a life that crashed did to the file behind its mark. To be called before it is first looked at."""
        if self._last.number and file not in self._settled:
            self._restore(file, self._last)

    @property
    def last(self) -> Mark:
        """The last mark, or the one that this was rewound to."""
        return self._last

    def join(self, mark: Mark, others: Iterable[str] = ()) -> bool:
        """Have the files that this mark names, and these others, as they were then, whatever mark this was rewound to.

        Whether the mark is of this follower, or this is one from now on; else the files are looked after from here on.
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
        """Which file `join` makes this one of."""
        target = self._disk.resolve(file)
        _, first = self._undone(target, mark)
        return target if first is None else first.path

    def _restore(self, file: str, mark: Mark) -> None:
        target = self._disk.resolve(file)
        versions, first = self._undone(target, mark)
        for each in reversed(versions):  # a later one is a version of what is undone with the first
            if each is not first:
                self._disk.remove(each.path)
        size = mark.files.get(file)
        if first is not None:
            self._cut(first.path, first.size if size is None else min(first.size, size))
            self._disk.rename(first.path, target)
            self._remove(first.path)  # a link to the same file is not moved
        elif size is not None:
            self._cut(target, size)
        self._settled.add(file)

    def _undone(self, target: str, mark: Mark) -> "tuple[list[_Version], _Version | None]":
        """The earlier versions of a file, and the one that it was at the mark, or before; None if it is that still."""
        versions = sorted(self._versions(target, mark.id), key=lambda each: each.number)
        ended = {**mark.ended, mark.life: mark.number}
        return versions, next((each for each in versions if each.number >= ended.get(each.life, 0)), None)

    def appending(self, file: str, size: int) -> None:
        """To be called before rows are appended, with the size of the file; somebody may have removed what it was."""
        self._open[file] = self._changed[file] = None
        if self._last.number and size < self._sizes.get(file, size + 1):
            self._sizes[file] = self._keep(file, size)

    def protects(self, file: str, start: int) -> bool:
        """Whether the bytes from ``start`` on may not be changed in place."""
        return self._last.number > 0 and start < self._sizes.get(file, start + 1)

    def replacing(self, file: str) -> None:
        """To be called before another version takes the file's place."""
        self._open[file] = self._changed[file] = None
        if self._last.number and self._sizes.get(file) != 0:
            self._keep(file)

    def replaced(self, file: str) -> None:
        """To be called when it has."""
        self._sizes[file] = 0

    def closed(self, file: str) -> None:
        """The file is not expected to change soon, and need not be named."""
        self._open.pop(file, None)

    def _keep(self, file: str, size: int | None = None) -> int:
        """Leave the file as it is at the last mark beside it, and return how large it was then."""
        target, mark = self._disk.resolve(file), self._last
        if size is None:
            size = self._sizes.get(file, self._size(target))
        folder, _, name = target.rpartition("/")
        beside = f"{folder}/{hidden_name(name)}.{mark.id}-{mark.life}-{mark.number}-{size}.before"
        if (mark.number, beside) not in self._kept:
            self._link(target, beside)
            self._disk.sync_path(folder or "/")  # before anything of the change may be on the medium
            self._kept.append((mark.number, beside))
        return size

    def _versions(self, target: str, follower: str) -> "Iterator[_Version]":
        """What lies beside a file, of the marks with this id."""
        folder, _, name = target.rpartition("/")
        prefixes = {f"{hidden_name(name)}.", f".{name}."}  # the second as 0.1.0 wrote it
        for each in _names(self._disk, folder):
            found = _BEFORE.search(each)
            if found is not None and found[1] == follower and each[: found.start() + 1] in prefixes:
                yield _Version(f"{folder}/{each}", found[2], int(found[3]), int(found[4]))

    def _link(self, target: str, beside: str) -> None:
        try:
            self._disk.hard_link(target, beside)
        except FileExistsError:  # of an earlier try, which failed behind this
            return
        except FileNotFoundError:
            replace_by_blocks(beside, [], mode=0o666, disk=self._disk)
        except OSError:  # a file system without links: a copy is as good, and dearer
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
            except FileNotFoundError:  # removed by somebody; it is made anew with the next row
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
    """What a file beside this one is called that nobody else is to read: TensorBoard reads all ``tfevents``."""
    return f".{name.replace('tfevents', 'tf-events')}"


def names_beside(folder: Path, disk: Disk | None = None) -> set[str]:
    """The names of files of which an earlier version lies in the folder, whosever marks it belongs to."""
    names = _names(current_disk() if disk is None else disk, str(folder))
    found = [name[: match.start()] for name in names if (match := _BEFORE.search(name))]
    return {name.removeprefix(".").replace("tf-events", "tfevents") for name in found}


def _names(disk: Disk, folder: str) -> list[str]:
    try:
        return [*disk.names(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
