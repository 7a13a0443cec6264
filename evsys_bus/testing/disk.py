"""A file system in memory that fails, or stops the machine, at the call that a test names.

It knows what a power cut knows: a file's data and a directory's entries are on the medium only once they were synced.
Directories themselves are taken to be durable when made. It serves `evsys_bus.journal.Disk`, and one thread.
"""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Final, Literal


class MachineStopped(BaseException):
    """The machine stopped in this call; every later call stops as well, until `SimulatedDisk.restart`."""


class _File:
    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = b""
        self.modified = 0.0
        self.astray = False
        """Whether a write goes behind the last one, not to the end."""
        self.position = 0
        """Where the last one ended."""


class SimulatedDisk:
    """Files, their open descriptors, and faults to come.

    Attributes:
        calls: How many calls were made so far; `fail` counts them from here.
        room: How many bytes may still be written before the disk is full; None for no bound.
        without_locks: Directories below which every lock is refused, as over NFS without its lock service.
        without_appends: Directories below which a write goes behind the last one, wherever the file ends.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.room: int | None = None
        self.without_locks: set[str] = set()
        self.without_appends: set[str] = set()
        self._links: dict[str, str] = {}
        self._files: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}
        self._directories: set[str] = {"/"}
        self._open: dict[int, _File] = {}
        self._locks: dict[int, str] = {}
        self._next = 3
        self._boots = 1
        self._stopped = False
        self._fault_at: int | None = None
        self._fault: Callable[[], None] = self._stop
        self._share = 0.0

    # -- what tests do to it ------------------------------------------------------------------------------------------

    def fail(self, number: int, code: int = errno.EIO) -> None:
        """Let the call of this number (the first is 1) raise an OSError, and do nothing."""

        def fault() -> None:
            raise OSError(code, os.strerror(code))

        self._fault_at, self._fault, self._share = number, fault, 0.0

    def stop(self, number: int, share: float = 0.0) -> None:
        """Let the machine stop in the call of this number; a write still puts this share of its bytes."""
        self._fault_at, self._fault, self._share = number, self._stop, share

    def restart(self, ending: Literal["kill", "power"] = "kill", keep: float = 0.0) -> None:
        """Go on with another process: after a kill all that was written is there, after a power cut what was synced.

        Args:
            ending: What ended the process before.
            keep: After a power cut, the share of the bytes that were not synced and are there nevertheless.
        """
        self._stopped, self._fault_at = False, None
        self._open.clear()
        self._locks.clear()
        if ending == "power":
            self._boots += 1
            self._files = dict(self._durable)
            for file in self._files.values():
                rest = bytes(file.data[len(file.durable) :])
                file.data = bytearray(file.durable + rest[: int(len(rest) * keep)])

    def paths(self) -> Iterator[str]:
        """All files."""
        return iter(sorted(self._files))

    def contents(self, path: str) -> bytearray:
        """What a file holds, to be looked at or damaged."""
        return self._files[path].data

    def take_away(self, path: str) -> None:
        """Remove a directory, with all that is in it."""
        for each in [name for name in self._files if name.startswith(f"{path}/")]:
            del self._files[each]
        self._directories = {each for each in self._directories if not _below(each, {path})}
        self._links = {each: target for each, target in self._links.items() if not _below(each, {path})}

    # -- what the journal asks of it ----------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        """As `Disk`."""
        path = self._call(path)
        while path not in self._directories:
            self._directories.add(path)
            path = _parent(path)

    def link(self, path: str, target: str) -> None:
        """As `Disk`."""
        self._call()
        if path in self._links or path in self._directories:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._links[path] = target

    def local_directories(self) -> list[str]:
        """As `Disk`."""
        return ["/local/state", "/local/temporary"]

    def open_append(self, path: str) -> int:
        """As `Disk`."""
        path = self._call(path)
        if path in self._files:
            raise FileExistsError(errno.EEXIST, "exists", path)
        return self._opened(path)

    def lock(self, path: str) -> int | None:
        """As `Disk`."""
        path = self._call(path)
        if path in self._locks.values():
            return None
        file = self._opened(path)
        if _below(path, self.without_locks):
            del self._open[file]
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        self._locks[file] = path
        return file

    def is_locked(self, path: str) -> bool:
        """As `Disk`."""
        return self._call(path) in self._locks.values()

    def write(self, file: int, data: bytes, /) -> int:
        """As `Disk`."""
        kept = data
        try:
            self._call()
        except MachineStopped:
            self._file(file).data += data[: int(len(data) * self._share)]
            raise
        if self.room is not None:
            kept = data[: self.room]
            if not kept and data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(kept)
        one = self._file(file)
        begin = one.position if one.astray else len(one.data)
        one.data += bytes(max(0, begin - len(one.data)))
        one.data[begin : begin + len(kept)] = kept
        one.position = begin + len(kept)
        return len(kept)

    def truncate(self, file: int, size: int) -> None:
        """As `Disk`."""
        self._call()
        data = self._file(file).data
        self._give_back(len(data) - size)
        del data[size:]

    def length(self, file: int) -> int:
        """As `Disk`."""
        self._call()
        return len(self._file(file).data)

    def sync(self, file: int) -> None:
        """As `Disk`."""
        self._call()
        one = self._file(file)
        one.durable = bytes(one.data)

    def sync_path(self, path: str) -> None:
        """As `Disk`."""
        path = self._call(path)
        if path in self._files:
            self._files[path].durable = bytes(self._files[path].data)
            return
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        self._durable = {name: file for name, file in self._durable.items() if _parent(name) != path}
        self._durable |= {name: file for name, file in self._files.items() if _parent(name) == path}

    def close(self, file: int) -> None:
        """As `Disk`."""
        self._call()
        self._open.pop(file, None)
        self._locks.pop(file, None)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """As `Disk`."""
        return bytes(self._at(self._call(path)).data[offset : offset + size])

    def is_at(self, path: str, file: int) -> bool:
        """As `Disk`."""
        return self._files.get(self._call(path)) is self._file(file)

    def names(self, path: str) -> list[str]:
        """As `Disk`."""
        path = self._call(path)
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        entries = [*self._files, *self._directories, *self._links]
        return [name.rpartition("/")[2] for name in entries if _parent(name) == path and name != path]

    def size(self, path: str) -> int:
        """As `Disk`."""
        return len(self._at(self._call(path)).data)

    def modified(self, path: str) -> float:
        """As `Disk`; set by the test, through ``set_modified``."""
        return self._at(self._call(path)).modified

    def set_modified(self, path: str, wall: float) -> None:
        """Let the file have been written last at this time."""
        self._at(path).modified = wall

    def replace(self, path: str, data: bytes) -> None:
        """As `Disk`."""
        path = self._call(path)
        file = _File()
        file.data, file.durable = bytearray(data), data
        self._files[path] = self._durable[path] = file

    def remove(self, path: str) -> None:
        """As `Disk`."""
        path = self._call(path)
        self._give_back(len(self._at(path).data))
        del self._files[path]

    def boot(self) -> str:
        """As `Disk`."""
        return f"boot {self._boots}"

    # -----------------------------------------------------------------------------------------------------------------

    def _call(self, path: str = "") -> str:
        """Count the call, let it fail if it is its turn, and say where the path leads."""
        if self._stopped:
            raise MachineStopped
        self.calls += 1
        if self.calls == self._fault_at:
            self._fault()
        link = next((each for each in self._links if _below(path, {each})), None)
        return path if link is None else f"{self._links[link]}{path.removeprefix(link)}"

    def _stop(self) -> None:
        self._stopped = True
        raise MachineStopped

    def _opened(self, path: str) -> int:
        if _parent(path) not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        file: Final = self._next
        self._next += 1
        self._open[file] = self._files.setdefault(path, _File())
        self._open[file].astray = _below(path, self.without_appends)
        return file

    def _file(self, file: int) -> _File:
        if file not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open[file]

    def _at(self, path: str) -> _File:
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self._files[path]

    def _give_back(self, size: int) -> None:
        if self.room is not None:
            self.room += size


def _below(path: str, directories: set[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in directories)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"
