"""`Marks`: going back to how files were when a courier last took note, whatever became of them since.

A mark holds the size of every open file; what was appended behind it is cut. What changes a file in any other way (a
cut, a new column, an eval that is replaced) first leaves the earlier version beside it, as a hard link
``.<name>.<id>-<life>-<number>-<size>.before``, and so does the first change of a file that the mark does not name. So
every file goes back to the byte. Until the first mark was taken nothing is kept: an inline callback pays nothing.

A *life* is what one object wrote. A life that ended in a crash is known by the mark that it was rewound to; what it
changed later in a file is undone when that file is next looked at, also by a later life.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Final, NamedTuple

import msgspec

from evsys_bus.diagnostics import log

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


class Marks:
    """The marks of one callback's files, which go by their absolute paths.

    One earlier mark stays good: that the last one is on record is known when the next is taken.
    """

    def __init__(self) -> None:
        self._last = Mark(token_hex(4), token_hex(4), 0, {}, {}, [])
        self._sizes: dict[str, int] = {}
        """Up to where a file's bytes belong to the last mark; 0 once the earlier version lies beside it."""
        self._open: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._settled: set[str] = set()
        self._kept: list[tuple[int, Path]] = []
        """Earlier versions, and the numbers of the marks that they belong to."""

    def take(self) -> Mark:
        """A new mark; the last one again if no file has changed. Raises OSError, and is then to be called again."""
        last = self._last
        for number, path in self._kept:
            if number < last.number:
                path.unlink(missing_ok=True)
        self._kept = [each for each in self._kept if each[0] == last.number]
        for file in self._changed:
            _sync(Path(file).resolve())
        if self._changed or not last.number:
            self._sizes = {file: _size(Path(file)) for file in self._open}
            kept = [str(path) for _, path in self._kept]
            self._last = Mark(last.id, last.life, last.number + 1, dict(self._sizes), last.ended, kept)
            self._changed = {}
        return self._last

    def rewind(self, mark: Mark) -> None:
        """Have the files as they were: now where the mark names them, others when they are first looked at."""
        ended = {**mark.ended, mark.life: mark.number}
        self._last = Mark(mark.id, token_hex(4), mark.number, mark.files, ended, mark.kept)
        for path in mark.kept:
            Path(path).unlink(missing_ok=True)
        self._sizes = dict(mark.files)
        self._open = dict.fromkeys(mark.files)
        for file in mark.files:
            self.settle(file)

    def settle(self, file: str) -> None:
        """Undo what a life that crashed did to the file behind its mark. To be called before it is first looked at."""
        if not self._last.number or file in self._settled:
            return
        target = Path(file).resolve()
        versions = sorted(_versions(target, self._last.id), key=lambda each: each.number)
        first = next((each for each in versions if each.number >= self._last.ended.get(each.life, 0)), None)
        for each in reversed(versions):  # a later one is a version of what is undone with the first
            if each is not first:
                each.path.unlink()
        size = self._last.files.get(file)
        if first is not None:
            _cut(first.path, first.size if size is None else size)
            first.path.replace(target)
            first.path.unlink(missing_ok=True)  # a link to the same file is not moved
        elif size is not None:
            _cut(target, size)
        self._settled.add(file)

    def appending(self, file: str) -> None:
        """To be called before rows are appended."""
        self._open[file] = self._changed[file] = None
        if self._last.number and file not in self._sizes:
            self._sizes[file] = self._keep(file)

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

    def _keep(self, file: str) -> int:
        """Leave the file as it is at the last mark beside it, and return how large it was then."""
        target, mark = Path(file).resolve(), self._last
        size = self._sizes.get(file, _size(target))
        beside = target.with_name(f".{target.name}.{mark.id}-{mark.life}-{mark.number}-{size}.before")
        target.parent.mkdir(parents=True, exist_ok=True)
        if (mark.number, beside) not in self._kept:
            _link(target, beside)
            self._kept.append((mark.number, beside))
        return size


class _Version(NamedTuple):
    path: Path
    life: str
    number: int
    size: int


def _versions(target: Path, mark_id: str) -> Iterator[_Version]:
    """What lies beside a file, of the marks with this id."""
    prefix = f".{target.name}."
    try:
        names = os.listdir(target.parent)  # noqa: PTH208  # names are all that is asked
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        found = _BEFORE.match(name, len(prefix) - 1) if name.startswith(prefix) else None
        if found is not None and found[1] == mark_id:
            yield _Version(target.with_name(name), found[2], int(found[3]), int(found[4]))


def _link(target: Path, beside: Path) -> None:
    try:
        os.link(target, beside)
    except FileNotFoundError:
        beside.touch()
    except OSError:  # a file system without links: a copy is as good, and dearer
        partial = beside.with_name(f"{beside.name}.new")
        shutil.copyfile(target, partial)
        partial.replace(beside)


def _cut(path: Path, size: int) -> None:
    there = _size(path)
    if there > size:
        os.truncate(path, size)
    elif there < size:
        log().warning("rewind.bytes_missing", file=str(path), at_the_mark=size, there=there)


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        try:
            fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed by somebody; it is made anew with the next row
            continue
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Course(msgspec.Struct, omit_defaults=True):
    """How far a run's training has got; tells a start that is told again from one that begins anew."""

    begun: bool = False
    """Whether rows have come, or are to come: what is run again has been cut."""
    first: int | None = None
    """The step at which training started; None while there is none."""
    largest: int | None = None
    """The largest step since."""
    rewound: bool = False
    """Nothing was heard of the run since it was rewound."""

    def starts(self, first_step: int) -> bool:
        """Training starts at this step; False if that was known already, from before the rewinding."""
        rewound, self.rewound = self.rewound, False
        if rewound and self.first is not None:
            due = self.first if self.largest is None else self.largest + 1
            if first_step >= due:  # else it is a resume
                return False
        self.begun, self.first, self.largest = True, first_step, None
        return True

    def steps(self, step: int) -> bool:
        """A step was seen; True if it is the first sign of a training."""
        news = not self.begun
        self.begun, self.rewound = True, False
        if self.largest is None or step > self.largest:
            self.largest = step
        return news

    def ends(self) -> None:
        """The training has ended."""
        self.first = self.largest = None
        self.rewound = False
