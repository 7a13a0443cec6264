"""The file system, as the journal sees it: a small protocol, and the real one.

Tests put a simulated disk in its place (`evsys_bus.testing.SimulatedDisk`), which fails, or stops the machine, at the
call they name.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol


class Disk(Protocol):
    """What the journal asks of a file system. Paths are text; every method raises OSError as the real one does."""

    def make_directory(self, path: str) -> None:
        """Make it, for the owner alone, and its parents; it may exist, or be a link to where it is to be made."""
        ...

    def link(self, path: str, target: str) -> None:
        """Have the path lead to a directory elsewhere. It must not exist."""
        ...

    def local_directories(self) -> Iterable[str]:
        """Where on this machine a journal may stand that cannot stand where it should; the best one first."""
        ...

    def open_append(self, path: str) -> int:
        """A new file, for the owner alone, whose every write goes to its end. It must not exist."""
        ...

    def lock(self, path: str) -> int | None:
        """Open the file, made if need be, and lock it for as long as it stays open; None where another one holds it."""
        ...

    def is_locked(self, path: str) -> bool:
        """Whether someone holds the lock of this file; no, where the file system has no locks."""
        ...

    def write(self, file: int, data: bytes, /) -> int:
        """One write; how many bytes it took."""
        ...

    def truncate(self, file: int, size: int) -> None:
        """Cut the file."""
        ...

    def length(self, file: int) -> int:
        """How long the open file is."""
        ...

    def sync(self, file: int) -> None:
        """Have the data on the medium."""
        ...

    def sync_path(self, path: str) -> None:
        """Have the data of a file on the medium that is not open, or the entries of a directory."""
        ...

    def close(self, file: int) -> None:
        """Close it."""
        ...

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from there; fewer only at the end of the file."""
        ...

    def is_at(self, path: str, file: int) -> bool:
        """Whether the open file is the one that stands at this path."""
        ...

    def names(self, path: str) -> Iterable[str]:
        """What stands in a directory, in no order."""
        ...

    def size(self, path: str) -> int:
        """The length of a file."""
        ...

    def modified(self, path: str) -> float:
        """When a file was last written, in seconds since the epoch."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Have the file hold just this, whole or not at all, on the medium when this returns."""
        ...

    def remove(self, path: str) -> None:
        """Unlink it."""
        ...

    def boot(self) -> str:
        """Names the time since the machine started; empty where that is not known."""
        ...


class OsDisk:
    """The real file system."""

    def make_directory(self, path: str) -> None:
        """As `Disk`."""
        Path(path).resolve().mkdir(mode=0o700, parents=True, exist_ok=True)

    def link(self, path: str, target: str) -> None:
        """As `Disk`; a symbolic link."""
        Path(path).symlink_to(target, target_is_directory=True)

    def local_directories(self) -> Iterable[str]:
        """As `Disk`: the user's state, which outlives a restart of the machine, then the temporary directory."""
        import tempfile  # seldom needed

        home = os.environ.get("HOME", "")
        for state in (os.environ.get("XDG_STATE_HOME", ""), f"{home}/.local/state"):
            if Path(state).is_absolute():
                yield f"{state}/evsys-bus"
                break
        yield tempfile.gettempdir()

    def open_append(self, path: str) -> int:
        """As `Disk`."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def lock(self, path: str) -> int | None:
        """As `Disk`; by ``flock``, so that the lock ends with the process, however it ends."""
        import fcntl  # POSIX only

        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            os.close(file)
            raise
        return file

    def is_locked(self, path: str) -> bool:
        """As `Disk`; takes a shared lock for an instant."""
        import fcntl  # POSIX only

        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # as `lock` said when it was tried
        finally:
            os.close(file)
        return False

    write = staticmethod(os.write)  # the hot path: no frame of Python around it

    def truncate(self, file: int, size: int) -> None:
        """As `Disk`."""
        os.ftruncate(file, size)

    def length(self, file: int) -> int:
        """As `Disk`."""
        return os.fstat(file).st_size

    def sync(self, file: int) -> None:
        """As `Disk`."""
        _sync(file)

    def sync_path(self, path: str) -> None:
        """As `Disk`."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def close(self, file: int) -> None:
        """As `Disk`."""
        os.close(file)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """As `Disk`."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more
            return data
        finally:
            os.close(file)

    def is_at(self, path: str, file: int) -> bool:
        """As `Disk`."""
        try:
            return os.path.samestat(Path(path).stat(), os.fstat(file))
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                return False
            raise

    def names(self, path: str) -> Iterable[str]:
        """As `Disk`."""
        return [each.name for each in Path(path).iterdir()]

    def size(self, path: str) -> int:
        """As `Disk`."""
        return Path(path).stat().st_size

    def modified(self, path: str) -> float:
        """As `Disk`."""
        return Path(path).stat().st_mtime

    def replace(self, path: str, data: bytes) -> None:
        """As `Disk`."""
        beside = f"{path}.new"
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            _sync(file)
        finally:
            os.close(file)
        moved = Path(beside).rename(path)
        self.sync_path(str(moved.parent))

    def remove(self, path: str) -> None:
        """As `Disk`."""
        Path(path).unlink()

    def boot(self) -> str:
        """As `Disk`; Linux tells."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
        except OSError:
            return ""


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
