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
from evsys_bus.disk import BLOCK_BYTES, Disk, current_disk, open_binary, parent_folder, replace_file_by_blocks

_VERSION_SUFFIX: Final = re.compile(r"\.([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)\.before$")


class Mark(
    msgspec.Struct, frozen=True, rename={"session": "life", "ended_sessions": "ended", "previous_versions": "kept"}
):
    """The state of some files, as plain data."""

    id: str
    """Identifies the adapter: the same for all its marks."""
    session: str
    number: int
    """Increases over all lives."""
    files: dict[str, int]
    """The size of each open file, by absolute path."""
    ended_sessions: dict[str, int]
    """Earlier lives, with the number of the mark to which each was rewound."""
    previous_versions: list[str]
    """Previous versions of files, to be removed once this mark is durable."""


class Savepoints:
    """The marks of the files of one callback, which are identified by absolute path.

    The mark before the last one also stays valid: only the next `take` shows that the last one was stored.

    Args:
        disk: The file system; by default the real one (`evsys_bus.files.use_disk`).
    """

    def __init__(self, *, disk: Disk | None = None) -> None:
        self._disk: Final = current_disk() if disk is None else disk
        self._last_mark = Mark(token_hex(4), token_hex(4), 0, {}, {}, [])
        self._marked_sizes: dict[str, int] = {}
        """How many bytes of each file belong to the last mark; 0 once its previous version is saved."""
        self._open_files: dict[str, None] = {}
        self._changed_files: dict[str, None] = {}
        self._recovered: set[str] = set()
        self._rewound_sessions: dict[str, int] = {}
        """Ended sessions, with the number of the mark in each to which this one was rewound."""
        self._previous_versions: list[tuple[int, str]] = []
        """Previous versions, with the numbers of their marks."""

    @property
    def files(self) -> list[str]:
        """The files in the last mark."""
        return [*self._last_mark.files]

    def take(self) -> Mark:
        """Create a mark, or return the last one if no file has changed. After an OSError call it again."""
        last_mark = self._last_mark
        for number, path in self._previous_versions:
            if number < last_mark.number:
                self._remove(path)
        self._previous_versions = [each for each in self._previous_versions if each[0] == last_mark.number]
        for file in self._changed_files:
            path = self._disk.resolve(file)
            for each in (path, parent_folder(path)):
                try:
                    self._disk.sync_path(each)
                except FileNotFoundError:  # it was removed; the next row creates it again
                    continue
        if self._changed_files or not last_mark.number:
            self._marked_sizes = {file: self._size(file) for file in self._open_files}
            previous_versions = [path for _, path in self._previous_versions]
            self._last_mark = Mark(
                last_mark.id,
                last_mark.session,
                last_mark.number + 1,
                dict(self._marked_sizes),
                last_mark.ended_sessions,
                previous_versions,
            )
            self._changed_files = {}
        return self._last_mark

    def rewind(self, mark: Mark) -> None:
        """Restore the files of the mark now, and others when they are next used."""
        ended_sessions = self._rewound_sessions = {**mark.ended_sessions, mark.session: mark.number}
        self._last_mark = Mark(mark.id, token_hex(4), mark.number, mark.files, ended_sessions, mark.previous_versions)
        for path in mark.previous_versions:
            self._remove(path)
        self._marked_sizes = dict(mark.files)
        self._open_files = dict.fromkeys(mark.files)
        for file in mark.files:
            self.recover(file)

    def recover(self, file: str) -> None:
        """Undo what a crashed life did to the file after its mark. Call it before the file is first used."""
        if self._last_mark.number and file not in self._recovered:
            self._restore(file, self._last_mark)

    @property
    def last_mark(self) -> Mark:
        """The last mark, or the one that was rewound to."""
        return self._last_mark

    def adopt(self, mark: Mark, others: Iterable[str] = ()) -> bool:
        """Restore the files of this mark, and these others, whatever mark was rewound to before.

        Returns whether the mark belongs to this adapter, possibly from now on. If not, tracking the files starts again.
        """
        last_mark = self._last_mark
        files = dict.fromkeys([*mark.files, *others])
        for file in files:
            self._restore(file, mark)
        if last_mark.number and mark.id != last_mark.id:
            for file in files:
                self._marked_sizes.pop(file, None)
            return False
        ended_sessions = {**last_mark.ended_sessions, **mark.ended_sessions}
        ended_sessions[mark.session] = max(mark.number, ended_sessions.get(mark.session, 0))
        ended_sessions |= self._rewound_sessions  # other files are still to be restored to that mark
        sizes = {**last_mark.files, **mark.files}
        self._last_mark = Mark(
            mark.id,
            last_mark.session,
            max(last_mark.number, mark.number),
            sizes,
            ended_sessions,
            last_mark.previous_versions,
        )
        self._marked_sizes.update(mark.files)
        return True

    def path_at_mark(self, file: str, mark: Mark) -> str:
        """The path of the version that `adopt` would restore."""
        target = self._disk.resolve(file)
        _, at_mark = self._find_versions(target, mark)
        return target if at_mark is None else at_mark.path

    def _restore(self, file: str, mark: Mark) -> None:
        target = self._disk.resolve(file)
        versions, at_mark = self._find_versions(target, mark)
        for each in reversed(versions):  # later ones are versions of a state that is undone with the first
            if each is not at_mark:
                self._disk.remove(each.path)
        size = mark.files.get(file)
        if at_mark is not None:
            self._truncate(at_mark.path, at_mark.size if size is None else min(at_mark.size, size))
            self._disk.rename(at_mark.path, target)
            self._remove(at_mark.path)  # renaming a link to the same file does nothing
        elif size is not None:
            self._truncate(target, size)
        if versions:
            self._disk.sync_path(parent_folder(target))  # the next life would restore one that a power cut brings back
        self._recovered.add(file)

    def _find_versions(self, target: str, mark: Mark) -> "tuple[list[_FileVersion], _FileVersion | None]":
        """The saved versions of a file, and the one it had at the mark; None if that is the current one."""
        versions = sorted(self._list_versions(target, mark.id), key=lambda each: each.number)
        ended_sessions = {**mark.ended_sessions, mark.session: mark.number}
        return versions, next((each for each in versions if each.number >= ended_sessions.get(each.session, 0)), None)

    def before_append(self, file: str, size: int) -> None:
        """Call before rows are appended, with the size of the file; it is smaller if the file was replaced."""
        self._open_files[file] = self._changed_files[file] = None
        if self._last_mark.number and size < self._marked_sizes.get(file, size + 1):
            self._marked_sizes[file] = self._preserve(file, size)

    def is_protected(self, file: str, start: int) -> bool:
        """Whether the bytes from ``start`` on must not be changed in place."""
        return self._last_mark.number > 0 and start < self._marked_sizes.get(file, start + 1)

    def before_replace(self, file: str) -> None:
        """Call before the file is replaced."""
        self._open_files[file] = self._changed_files[file] = None
        if self._last_mark.number and self._marked_sizes.get(file) != 0:
            self._preserve(file)

    def after_replace(self, file: str) -> None:
        """Call after the file was replaced."""
        self._marked_sizes[file] = 0

    def after_close(self, file: str) -> None:
        """Call when the file is closed, so that later marks do not contain it."""
        self._open_files.pop(file, None)

    def _preserve(self, file: str, size: int | None = None) -> int:
        """Save the file in its state at the last mark, and return its size then."""
        target, mark = self._disk.resolve(file), self._last_mark
        if size is None:
            size = self._marked_sizes.get(file, self._size(target))
        folder, _, name = target.rpartition("/")
        version_path = f"{folder}/{hidden_name(name)}.{mark.id}-{mark.session}-{mark.number}-{size}.before"
        if (mark.number, version_path) not in self._previous_versions:
            self._link_or_copy(target, version_path)
            self._disk.sync_path(folder or "/")  # before any part of the change can reach the disk
            self._previous_versions.append((mark.number, version_path))
        return size

    def _list_versions(self, target: str, mark_id: str) -> "Iterator[_FileVersion]":
        """The saved versions of a file for marks with this id."""
        folder, _, name = target.rpartition("/")
        prefixes = {f"{hidden_name(name)}.", f".{name}."}  # 0.1.0 wrote the second
        for each in _list_names(self._disk, folder):
            found = _VERSION_SUFFIX.search(each)
            if found is not None and found[1] == mark_id and each[: found.start() + 1] in prefixes:
                yield _FileVersion(f"{folder}/{each}", found[2], int(found[3]), int(found[4]))

    def _link_or_copy(self, target: str, version_path: str) -> None:
        try:
            self._disk.hard_link(target, version_path)
        except FileExistsError:  # from an earlier attempt that failed after this
            return
        except FileNotFoundError:
            replace_file_by_blocks(version_path, [], mode=0o666, disk=self._disk)
        except OSError:  # a file system without hard links: a copy costs more and is as good
            with open_binary(target, self._disk) as file:
                replace_file_by_blocks(
                    version_path, iter(partial(file.read, BLOCK_BYTES), b""), mode=0o666, disk=self._disk
                )

    def _truncate(self, path: str, size: int) -> None:
        actual_size = self._size(path)
        if actual_size > size:
            file = self._disk.open_write(path)
            try:
                self._disk.truncate(file, size)
                self._disk.sync(file)
            finally:
                self._disk.close(file)
        elif actual_size < size:
            log().warning("rewind.bytes_missing", file=path, at_the_mark=size, there=actual_size)

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


class _FileVersion(NamedTuple):
    path: str
    session: str
    number: int
    size: int


def hidden_name(name: str) -> str:
    """A hidden name for a file beside this one. It avoids ``tfevents``, because TensorBoard reads all such files."""
    return f".{name.replace('tfevents', 'tf-events')}"


def names_with_versions(folder: Path, disk: Disk | None = None) -> set[str]:
    """The names of files that have a saved version in the folder, for any mark."""
    names = _list_names(current_disk() if disk is None else disk, str(folder))
    found = [name[: match.start()] for name in names if (match := _VERSION_SUFFIX.search(name))]
    return {name.removeprefix(".").replace("tf-events", "tfevents") for name in found}


def _list_names(disk: Disk, folder: str) -> list[str]:
    try:
        return [*disk.names(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
