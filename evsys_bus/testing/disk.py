"""An in-memory file system that fails, or stops the machine, at the call that a test chooses.

It models power cuts: a file's data and a directory's entries are durable only after a sync. Directories themselves, and
symbolic links, are durable immediately. It implements `evsys_bus.disk.Disk`, for a single thread.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, Literal, Protocol

from evsys_bus.disk import LOCK_FLAGS, replace_file

_SECTOR: Final = 512


class MachineStopped(BaseException):
    """The machine stopped in this call; every later call raises it too, until `SimulatedDisk.restart`."""


class WallClock(Protocol):
    """The clock for modification times, such as `ManualClock`."""

    def wall(self) -> float:
        """Return seconds since the epoch."""
        ...


class _File:
    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = b""
        self.modified = 0.0
        self.ignores_append = False
        """Whether a write goes to the position after the last one, not to the end of the file."""
        self.position = 0
        """Where the last write ended."""


_Entry = tuple[str, _File | None, str | None]
"""A change of a directory: a path, its new file or None, and the path from which the file was moved."""


class SimulatedDisk:
    """Files, open descriptors, and planned faults.

    Args:
        clock: Sets the modification times of files. Without it the test does, with `set_modified`.

    Attributes:
        calls: Number of calls so far; `fail` and `stop` use this numbering.
        room: How many bytes may still be written before the disk is full; None for no limit.
        process: Owner of the files that are opened from now on; see `end_process`.
        without_locks: Directories below which every lock is refused, as over NFS without its lock service.
        without_appends: Directories below which a write goes to the position after the last one, not to the end.
        without_hard_links: Directories below which a file cannot have a second name.
        unreadable: Directories that currently cannot be listed and whose files cannot be opened.
    """

    def __init__(self, clock: WallClock | None = None) -> None:
        self.calls = 0
        self.room: int | None = None
        self.process = 0
        self.without_locks: set[str] = set()
        self.without_appends: set[str] = set()
        self.without_hard_links: set[str] = set()
        self.unreadable: set[str] = set()
        self._clock = clock
        self._files: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}
        self._changes: dict[str, list[_Entry]] = {}
        """Changes of each directory since its last sync."""
        self._directories: set[str] = {"/"}
        self._open_files: dict[int, _File] = {}
        self._owners: dict[int, int] = {}
        self._locks: dict[int, _File] = {}
        self._next_descriptor = 3
        self._boots = 1
        self._stopped = False
        self._fault_at: int | None = None
        self._fault: Callable[[], None] = self._stop
        self._written_share = 0.0

    # -- for tests ----------------------------------------------------------------------------------------------------

    def fail(self, number: int, code: int = errno.EIO) -> None:
        """Make the call with this number (the first is 1) raise an OSError without any effect."""

        def fault() -> None:
            raise OSError(code, os.strerror(code))

        self._fault_at, self._fault, self._written_share = number, fault, 0.0

    def stop(self, number: int, share: float = 0.0) -> None:
        """Stop the machine in the call with this number; a write still stores this share of its bytes."""
        self._fault_at, self._fault, self._written_share = number, self._stop, share

    @property
    def stopped(self) -> bool:
        """Whether the machine has stopped."""
        return self._stopped

    def restart(
        self, ending: Literal["kill", "power"] = "kill", keep: float = 0.0, *, chance: random.Random | None = None
    ) -> None:
        """Continue with another process: after a kill all writes are there, after a power cut only what was synced.

        Args:
            ending: What ended the previous process.
            keep: After a power cut, the share of the unsynced bytes that are there nevertheless.
            chance: Instead of `keep`, chooses for each directory how many of its unsynced changes are there, in their
                order, and for each unsynced sector whether it is as before, as written, or zeros.
        """
        self._stopped, self._fault_at = False, None
        self._open_files.clear()
        self._owners.clear()
        self._locks.clear()
        if ending != "power":
            return
        self._boots += 1
        found = dict(self._durable)
        for changes in self._changes.values():
            for change in changes[: 0 if chance is None else chance.randint(0, len(changes))]:
                _apply_change(found, *change)
        self._changes.clear()
        self._files = found
        for file in {id(each): each for each in found.values()}.values():
            if chance is None:
                rest = bytes(file.data[len(file.durable) :])
                file.data = bytearray(file.durable + rest[: int(len(rest) * keep)])
            elif bytes(file.data) != file.durable:
                file.data = _tear(file.durable, bytes(file.data), chance)
            file.durable = bytes(file.data)
        self._durable = dict(found)

    def end_process(self, process: int) -> None:
        """Close the files of a process and release its locks, as if it was killed while others continue."""
        for file in [each for each, owner in self._owners.items() if owner == process]:
            self._close_descriptor(file)

    def paths(self) -> Iterator[str]:
        """Return the paths of all files."""
        return iter(sorted(self._files))

    def contents(self, path: str) -> bytearray:
        """Return the data of a file, to be inspected or damaged."""
        return self._files[path].data

    def put(self, path: str, data: bytes) -> None:
        """Create a file with its directory, or overwrite one in place; durable at once."""
        self._directories.update(_parents(path))
        file = self._files[path] = self._durable[path] = self._files.get(path) or _File()
        file.data[:], file.durable = data, data

    def take_away(self, path: str) -> None:
        """Remove a file, or a directory with everything in it; durable at once."""
        for each in [name for name in self._files if _is_below(name, {path})]:
            del self._files[each]
            self._durable.pop(each, None)
        self._directories = {each for each in self._directories if not _is_below(each, {path})}
        self._changes = {each: changes for each, changes in self._changes.items() if not _is_below(each, {path})}

    def set_modified(self, path: str, wall: float) -> None:
        """Set the modification time of a file."""
        self._lookup_file(path).modified = wall

    # -- the methods of Disk ------------------------------------------------------------------------------------------

    def make_directory(self, path: str, mode: int = 0o700) -> None:  # noqa: ARG002  # all files are one user's
        """Create the directory and its parents, for the owner only. It may exist, or be a link to the path."""
        path = self._start_call(path)
        for each in [path, *_parents(path)]:
            if each in self._files:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), each)
        self._directories.update([path, *_parents(path)])

    def open_append(self, path: str) -> int:
        """Create a file for the owner only and open it for appending. It must not exist."""
        path = self._start_call(path)
        if path in self._files:
            raise FileExistsError(errno.EEXIST, "exists", path)
        return self._open_descriptor(path)

    def open_new(self, path: str, mode: int = 0o600) -> int | None:  # noqa: ARG002  # all files are one user's
        """Create an empty file that is locked while it is open, to be renamed to another path later."""
        path = self._start_call(path)
        if path in self._directories or self._files.get(path) in self._locks.values():
            return None
        if path in self._files:
            self._change_entry(path, None)
        file = self._open_descriptor(path)
        self._locks[file] = self._open_files[file]
        return file

    def open_file(self, path: str, mode: int = 0o666) -> int:  # noqa: ARG002  # all files are one user's
        """Open the file for reading and appending. It is created if needed, with this mode minus the umask."""
        return self._open_descriptor(self._start_call(path))

    def open_read(self, path: str) -> int:
        """Open a regular file. Anything else is an immediate OSError; it never blocks."""
        path = self._start_call(path)
        self._lookup_file(path)
        return self._open_descriptor(path)

    def open_write(self, path: str) -> int:
        """Open an existing regular file, to overwrite or truncate it."""
        return self.open_read(path)

    def lock(self, path: str, mode: int = 0o600, flags: int = LOCK_FLAGS) -> int | None:  # noqa: ARG002  # one user's
        """Open the file, created if needed, and lock it while it stays open. None if another process has it locked."""
        path = self._start_call(path)
        if self._files.get(path) in self._locks.values():
            return None
        file = self._open_descriptor(path)
        if _is_below(path, self.without_locks):
            self._close_descriptor(file)
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        self._locks[file] = self._open_files[file]
        return file

    def is_locked(self, path: str) -> bool:
        """Whether the file is locked; False where the file system has no locks."""
        return self._files.get(self._start_call(path)) in self._locks.values()

    def write(self, file: int, data: bytes, /) -> int:
        """Write once. Returns how many bytes were written."""
        node = self._start_write(file, data)
        return self._write_at(node, data, node.position if node.ignores_append else len(node.data))

    def pwrite(self, file: int, data: bytes, offset: int, /) -> int:
        """Write once at an offset. The file must not be open for appending. Returns how many bytes were written."""
        return self._write_at(self._start_write(file, data, offset), data, offset)

    def truncate(self, file: int, size: int) -> None:
        """Truncate the file."""
        self._start_call()
        data = self._file_of(file).data
        self._release_space(len(data) - size)
        del data[size:]

    def length(self, file: int) -> int:
        """The length of the open file."""
        self._start_call()
        return len(self._file_of(file).data)

    def links(self, file: int) -> int:
        """How many names the open file has; 0 after it was removed."""
        self._start_call()
        node = self._file_of(file)
        return sum(each is node for each in self._files.values())

    def sync(self, file: int) -> None:
        """Sync the data of the open file to disk."""
        self._start_call()
        node = self._file_of(file)
        node.durable = bytes(node.data)

    def sync_path(self, path: str) -> None:
        """Sync the data of a file that is not open, or the entries of a directory."""
        path = self._start_call(path)
        if path in self._files:
            node = self._files[path]
            node.durable = bytes(node.data)
            return
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        self._changes.pop(path, None)
        self._durable = {name: file for name, file in self._durable.items() if _parent(name) != path}
        self._durable |= {name: file for name, file in self._files.items() if _parent(name) == path}

    def close(self, file: int) -> None:
        """Close the file; do nothing if its process has ended. A planned stop happens at the next call instead."""
        if file in self._open_files and not self._stopped:
            with suppress(MachineStopped):
                self._start_call()
                self._close_descriptor(file)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read up to ``size`` bytes from the offset; fewer only at the end of the file."""
        return bytes(self._lookup_file(self._start_call(path)).data[offset : offset + size])

    def pread(self, file: int, size: int, offset: int, /) -> bytes:
        """Read once from an open file; empty at its end."""
        self._start_call()
        return bytes(self._file_of(file).data[offset : offset + size])

    def is_at(self, path: str, file: int) -> bool:
        """Whether the open file is the one at this path."""
        return self._files.get(self._start_call(path)) is self._file_of(file)

    def names(self, path: str) -> list[str]:
        """The names in a directory, in no order."""
        path = self._start_call(path)
        self._refuse_unreadable(path)
        if path in self._files:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        entries = [*self._files, *self._directories]
        return [name.rpartition("/")[2] for name in entries if _parent(name) == path and name != path]

    def size(self, path: str) -> int:
        """The length of a file."""
        path = self._start_call(path)
        return 0 if path in self._directories else len(self._lookup_file(path).data)

    def modified(self, path: str) -> float:
        """When a file was last written, in seconds since the epoch."""
        return self._lookup_file(self._start_call(path)).modified

    def replace(self, path: str, data: bytes) -> None:
        """Replace the file by the same calls as the real disk, each of which may fail or be the last."""
        replace_file(path, data, make_folder=False, disk=self)

    def rename(self, path: str, to: str) -> None:
        """Rename a file, replacing an existing one. Both paths have the same parent."""
        path = self._start_call(path)
        if path in self._directories:
            self._rename_directory(path, to)
            return
        file = self._lookup_file(path)
        if to in self._directories:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), to)
        if self._files.get(to) is not file:  # POSIX: renaming between two names of one file does nothing
            self._change_entry(to, file, path)

    def hard_link(self, path: str, to: str) -> None:
        """Create a hard link, which must not exist; OSError where the file system has none."""
        path = self._start_call(path)
        if _is_below(path, self.without_hard_links):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)
        file = self._lookup_file(path)
        if to in self._files or to in self._directories:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to)
        self._change_entry(to, file)

    def resolve(self, path: str) -> str:
        """The path with all links resolved."""
        return self._start_call(path)

    def remove(self, path: str) -> None:
        """Remove the file."""
        path = self._start_call(path)
        self._lookup_file(path)
        self._change_entry(path, None)

    def boot(self) -> str:
        """Identifies the boot of the machine; empty if that is not known."""
        return f"boot {self._boots}"

    # -----------------------------------------------------------------------------------------------------------------

    def _start_call(self, path: str = "") -> str:
        """Count the call, raise its planned fault, and return the path."""
        if self._stopped:
            raise MachineStopped
        self.calls += 1
        if self.calls == self._fault_at:
            self._fault()
        return path

    def _stop(self) -> None:
        self._stopped = True
        raise MachineStopped

    def _open_descriptor(self, path: str) -> int:
        self._refuse_unreadable(path)
        if path in self._directories:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if _parent(path) not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        file: Final = self._next_descriptor
        self._next_descriptor += 1
        if path not in self._files:
            self._change_entry(path, _File())
        self._open_files[file] = self._files[path]
        self._owners[file] = self.process
        self._open_files[file].ignores_append = _is_below(path, self.without_appends)
        return file

    def _close_descriptor(self, file: int) -> None:
        for each in (self._open_files, self._owners, self._locks):
            each.pop(file, None)

    def _start_write(self, file: int, data: bytes, offset: int | None = None) -> _File:
        """Return the file to be written; if the machine stops here, a share of the bytes is written."""
        try:
            self._start_call()
        except MachineStopped:
            if file in self._open_files:
                node, part = self._open_files[file], data[: int(len(data) * self._written_share)]
                at = len(node.data) if offset is None else offset
                node.data[at : at + len(part)] = part
            raise
        return self._file_of(file)

    def _write_at(self, node: _File, data: bytes, offset: int) -> int:
        growth = max(0, offset + len(data) - len(node.data))
        if self.room is not None and growth > self.room:
            data = data[: len(data) - growth + self.room]
            if not data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            growth = self.room
        self._release_space(-growth)
        node.data += bytes(max(0, offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        node.position = offset + len(data)
        if self._clock is not None:
            node.modified = self._clock.wall()
        return len(data)

    def _change_entry(self, path: str, file: _File | None, moved_from: str | None = None) -> None:
        """Change the file of a path; durable once its directory was synced."""
        previous = self._files.get(path)
        change = (path, file, moved_from)
        _apply_change(self._files, *change)
        self._changes.setdefault(_parent(path), []).append(change)
        if previous is not None and not any(each is previous for each in self._files.values()):
            self._release_space(len(previous.data))

    def _rename_directory(self, path: str, to: str) -> None:
        """Move a directory with everything in it, durably."""
        if to in self._files:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), to)
        if any(each.startswith(f"{to}/") for each in [*self._files, *self._directories]):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), to)
        self._refuse_unreadable(path)

        def move(each: str) -> str:
            return f"{to}{each.removeprefix(path)}" if _is_below(each, {path}) else each

        self._directories = {move(each) for each in self._directories}
        self._files = {move(each): file for each, file in self._files.items()}
        self._durable = {move(each): file for each, file in self._durable.items()}
        self._changes = {
            move(folder): [(move(name), file, old and move(old)) for name, file, old in changes]
            for folder, changes in self._changes.items()
        }

    def _file_of(self, file: int) -> _File:
        if file not in self._open_files:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open_files[file]

    def _lookup_file(self, path: str) -> _File:
        self._refuse_unreadable(path)
        if path in self._directories:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self._files[path]

    def _refuse_unreadable(self, path: str) -> None:
        if self.unreadable and _is_below(path, self.unreadable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def _release_space(self, size: int) -> None:
        if self.room is not None:
            self.room += size


def _apply_change(files: dict[str, _File], path: str, file: _File | None, moved_from: str | None) -> None:
    if moved_from is not None:
        files.pop(moved_from, None)
    if file is None:
        files.pop(path, None)
    else:
        files[path] = file


def _tear(durable: bytes, written: bytes, chance: random.Random) -> bytearray:
    """Return possible contents of a file after a power cut, if it was not synced since it held ``durable``."""
    size = chance.choice((len(durable), len(written), chance.randint(*sorted((len(durable), len(written))))))
    result = bytearray(durable[:size].ljust(size, b"\0"))
    for begin in range(0, size, _SECTOR):
        end = min(size, begin + _SECTOR)
        sector = written[begin:end]
        if sector != bytes(result[begin:end]) and chance.randrange(2):
            result[begin : begin + len(sector)] = sector
    return result


def _is_below(path: str, directories: set[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in directories)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = _parent(path)
        yield path
