"""The file system, as the journal and the file adapters see it: a small protocol, the real one, and small files.

Tests put a simulated disk in its place (`evsys_bus.testing.SimulatedDisk`), which fails, or stops the machine, at the
call they name.
"""

import errno
import io
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK: Final = 1 << 16
NOT_A_FILE: Final = frozenset({errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENXIO})
NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class DamagedFileError(ValueError):
    """What stands at a path is not what was written there: no file, too large, empty, or not to be decoded."""


class Disk(Protocol):
    """What is asked of a file system. Paths are text; every method raises OSError as the real one does."""

    def make_directory(self, path: str, mode: int = 0o700) -> None:
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

    def open_new(self, path: str, mode: int = 0o600) -> int | None:
        """A new, empty file to be moved into place, locked while it is open.

        What a process that was killed left there is removed; None while another one writes there.
        """
        ...

    def open_read(self, path: str) -> int:
        """Open a regular file. Anything else is an OSError at once; nothing is waited for."""
        ...

    def open_file(self, path: str, mode: int = 0o666) -> int:
        """Open the file, made if need be with this mode less the umask, to read it and to write to its end."""
        ...

    def open_write(self, path: str) -> int:
        """Open a regular file that exists, to overwrite bytes or to cut it."""
        ...

    def lock(self, path: str, mode: int = 0o600) -> int | None:
        """Open the file, made if need be, and lock it for as long as it stays open; None where another one holds it."""
        ...

    def is_locked(self, path: str) -> bool:
        """Whether someone holds the lock of this file; no, where the file system has no locks."""
        ...

    def write(self, file: int, data: bytes, /) -> int:
        """One write; how many bytes it took."""
        ...

    def pwrite(self, file: int, data: bytes, offset: int, /) -> int:
        """One write in place, for which the file is not open to append; how many bytes it took."""
        ...

    def truncate(self, file: int, size: int) -> None:
        """Cut the file."""
        ...

    def length(self, file: int) -> int:
        """How long the open file is."""
        ...

    def links(self, file: int) -> int:
        """How many names the open file has; 0 once it was removed."""
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

    def pread(self, file: int, size: int, offset: int, /) -> bytes:
        """One read of an open file; nothing at its end."""
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
        """Have the file hold just this, whole or not at all, on the medium when this returns. The folder must exist."""
        ...

    def rename(self, path: str, to: str) -> None:
        """Move it, in place of what is there; both have the same parent."""
        ...

    def hard_link(self, path: str, to: str) -> None:
        """Give the file a second name, which must not exist; OSError where the file system has no such links."""
        ...

    def resolve(self, path: str) -> str:
        """Where a path leads, over all links."""
        ...

    def remove(self, path: str) -> None:
        """Unlink it."""
        ...

    def boot(self) -> str:
        """Names the time since the machine started; empty where that is not known."""
        ...


class OsDisk:
    """The real file system."""

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        """As `Disk`."""
        # Not `Path.resolve`: for a link to itself that raises RuntimeError before Python 3.13, and not OSError.
        Path(os.path.realpath(path)).mkdir(mode=mode, parents=True, exist_ok=True)

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

    def open_new(self, path: str, mode: int = 0o600) -> int | None:
        """As `Disk`; a link or FIFO that stands there is removed, not followed; a directory is left."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for _ in range(3):  # another process may remove the file between its making and its lock
            try:
                file = os.open(path, flags, mode)
            except FileExistsError:
                if not _remove_left(path):
                    return None
                continue
            if _locked(file) and self.is_at(path, file):
                return file
            os.close(file)
        return None

    def open_read(self, path: str) -> int:
        """As `Disk`."""
        return open_regular(path, os.O_RDONLY)

    def open_file(self, path: str, mode: int = 0o666) -> int:
        """As `Disk`."""
        return open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)

    def open_write(self, path: str) -> int:
        """As `Disk`."""
        return open_regular(path, os.O_RDWR)

    def lock(self, path: str, mode: int = 0o600) -> int | None:
        """As `Disk`; by ``flock``, so that the lock ends with the process, however it ends."""
        import fcntl  # POSIX only

        file = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)
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
            file = open_regular(path, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in NOT_A_FILE:
                return False
            raise
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

    pwrite = staticmethod(os.pwrite)

    def truncate(self, file: int, size: int) -> None:
        """As `Disk`."""
        os.ftruncate(file, size)

    def length(self, file: int) -> int:
        """As `Disk`."""
        return os.fstat(file).st_size

    def links(self, file: int) -> int:
        """As `Disk`."""
        return os.fstat(file).st_nlink

    def sync(self, file: int) -> None:
        """As `Disk`."""
        _sync(file)

    def sync_path(self, path: str) -> None:
        """As `Disk`."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def close(self, file: int) -> None:
        """As `Disk`."""
        os.close(file)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """As `Disk`."""
        file = self.open_read(path)
        try:
            return _read(self, file, size, offset)
        finally:
            os.close(file)

    pread = staticmethod(os.pread)

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
        return os.listdir(path)  # noqa: PTH208  # as text; a Path of each costs more than the call

    def size(self, path: str) -> int:
        """As `Disk`."""
        return Path(path).stat().st_size

    def modified(self, path: str) -> float:
        """As `Disk`."""
        return Path(path).stat().st_mtime

    def replace(self, path: str, data: bytes) -> None:
        """As `Disk`."""
        replace_file(path, data, make_folder=False, disk=self)

    def rename(self, path: str, to: str) -> None:
        """As `Disk`."""
        os.rename(path, to)  # noqa: PTH104  # as text

    def hard_link(self, path: str, to: str) -> None:
        """As `Disk`."""
        os.link(path, to)  # as text

    def resolve(self, path: str) -> str:
        """As `Disk`."""
        return os.path.realpath(path)

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


def _locked(file: int) -> bool:
    """Whether no other process has locked the file, or it has no locks."""
    import fcntl  # POSIX only

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_left(path: str) -> bool:
    """Remove what nobody writes any more; whether the path is free."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:  # a link, or nothing that can be opened; a directory cannot be unlinked
        return _unlinked(path)
    try:
        if _locked(file):  # while it is ours, nobody else moves or removes it
            try:
                same = os.path.samestat(os.lstat(path), os.fstat(file))
            except FileNotFoundError:
                return True
            return _unlinked(path) if same else True
        return False
    finally:
        os.close(file)


def _unlinked(path: str) -> bool:
    try:
        os.unlink(path)  # noqa: PTH108  # as text
    except OSError:
        return not os.path.lexists(path)
    return True


def _read(disk: Disk, file: int, size: int, offset: int) -> bytes:
    data = disk.pread(file, size, offset)
    while len(data) < size and (more := disk.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


_current: Disk = OsDisk()


def current_disk() -> Disk:
    """Where files are written for which no disk is named: the real one, unless `use_disk` names another."""
    return _current


@contextmanager
def use_disk(disk: Disk) -> Generator[None]:
    """Have the file adapters that are made within write to this disk, in every thread: for tests."""
    global _current  # noqa: PLW0603  # one for the process
    before, _current = _current, disk
    try:
        yield
    finally:
        _current = before


def replace_file(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    mode: int = 0o600,
    follow_link: bool = False,
    make_folder: bool = True,
    disk: Disk | None = None,
) -> None:
    """Have the file hold just this, whole or not at all, on the medium when this returns.

    The data is written beside (``<path>.new``) and moved into place, so that a kill, a full disk or a power cut leaves
    the earlier version. Two processes that replace one file do not mix their data.

    Args:
        path: The file. A symbolic link there is replaced by a file; a directory there is moved to ``<path>.damaged``.
        data: All that it is to hold.
        mode: Its permissions, less the umask; what users read is 0o666.
        follow_link: Whether to replace the file that a symbolic link at the path leads to, and keep the link.
        make_folder: Whether to make the folder that it lies in, if need be.
        disk: The file system.

    Raises:
        OSError: It may not be on the medium; the file holds the earlier version or this one, as a whole.
    """
    disk = _current if disk is None else disk
    place = disk.resolve(os.fspath(path)) if follow_link else os.fspath(path)
    with replacing(place, mode=mode, disk=disk, make_folder=make_folder, displace=True) as file:
        write_all(disk, file, data)
    disk.sync_path(parent_of(place))


def replace_by_blocks(
    place: str,
    blocks: Iterable[bytes],
    *,
    mode: int,
    disk: Disk,
    beside: str | None = None,
    moving: Callable[[], object] | None = None,
) -> int:
    """As `replace_file`, but for a last sync of the folder: on OSError the file is as it was. Returns its new size.

    The path leads over no link, the data is written to ``beside`` first, and ``moving`` is called when it is on the
    medium and about to take the file's place.
    """
    size = 0
    with replacing(place, mode=mode, disk=disk, beside=beside, moving=moving) as file:
        for block in blocks:
            size += len(block)
            write_all(disk, file, block)
    return size


@contextmanager
def replacing(
    place: str,
    *,
    mode: int,
    disk: Disk,
    beside: str | None = None,
    make_folder: bool = True,
    displace: bool = False,
    moving: Callable[[], object] | None = None,
) -> Generator[int]:
    """As `replace_by_blocks`, for a block of code that writes to the file which it is given, open.

    With ``displace`` a directory that stands in the file's place is moved to ``<path>.damaged``.
    """
    beside = f"{place}.new" if beside is None else beside
    try:
        beside, file = _open_beside(disk, place, beside, mode)
    except FileNotFoundError:
        if not make_folder:
            raise
        disk.make_directory(parent_of(place), 0o777 if mode & 0o077 else 0o700)
        beside, file = _open_beside(disk, place, beside, mode)
    moved = False
    try:
        yield file
        disk.sync(file)
        if moving is not None:
            moving()
        try:
            disk.rename(beside, place)
        except IsADirectoryError:
            if not displace:
                raise
            _displace(disk, place)
            disk.rename(beside, place)
        moved = True
    finally:
        if not moved:
            _try_to_remove(disk, beside)
        disk.close(file)


def _displace(disk: Disk, place: str) -> None:
    """Have a directory, which is nothing of ours, make room; it is kept."""
    for aside in damaged_names(place):
        with suppress(OSError):
            disk.rename(place, aside)
            return


def damaged_names(place: str) -> Iterator[str]:
    """What a damaged file is called once it is set aside: the first name whose place it can take."""
    yield f"{place}.damaged"
    yield from (f"{place}.damaged.{number}" for number in range(1, 10))


def write_all(disk: Disk, file: int, data: bytes) -> None:
    """Write in as many turns as it takes."""
    while data:
        data = data[disk.write(file, data) :]


def read_file(path: str | os.PathLike[str], *, most_bytes: int = 16 << 20, disk: Disk | None = None) -> bytes:
    """All that a small file holds.

    Raises:
        DamagedFileError: It is no regular file (a directory, a FIFO, a link to itself), or larger than ``most_bytes``.
        OSError: It is missing (FileNotFoundError), or cannot be read now.
    """
    disk = _current if disk is None else disk
    try:
        file = disk.open_read(os.fspath(path))
    except OSError as error:
        if error.errno in NOT_A_FILE:
            raise DamagedFileError(error.strerror) from error
        raise
    try:
        data = _read(disk, file, min(disk.length(file), most_bytes) + 1, 0)
    finally:
        disk.close(file)
    if len(data) > most_bytes:
        msg = f"it is larger than {most_bytes:,} bytes"
        raise DamagedFileError(msg)
    return data


def open_binary(path: str | os.PathLike[str], disk: Disk | None = None) -> BinaryIO:
    """A regular file to be read from its beginning, buffered, line by line or otherwise. Raises OSError."""
    disk = _current if disk is None else disk
    return cast("BinaryIO", io.BufferedReader(_Reading(disk, disk.open_read(os.fspath(path))), BLOCK))


class _Reading(io.RawIOBase):
    def __init__(self, disk: Disk, file: int) -> None:
        self._disk = disk
        self._file: int | None = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if self._file is None:
            raise ValueError("closed")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}
        self._at = offset + (base[whence] if whence in base else self._disk.length(self._file))
        return self._at

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self._file is None:
            raise ValueError("closed")
        view = memoryview(buffer)
        data = self._disk.pread(self._file, len(view), self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            self._disk.close(file)
        super().close()


def _open_beside(disk: Disk, place: str, beside: str, mode: int) -> tuple[str, int]:
    """A new file beside the one to be replaced, under a name of its own while another process replaces it too."""
    for each in (beside, f"{place}.{token_hex(8)}.new"):
        file = disk.open_new(each, mode)
        if file is not None:
            return each, file
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), beside)


def _try_to_remove(disk: Disk, path: str) -> None:
    try:
        disk.remove(path)
    except OSError:
        return  # the next one that replaces the file does


def parent_of(path: str) -> str:
    """The folder of a path."""
    return os.path.dirname(path) or "."  # noqa: PTH120  # as text


def open_regular(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file of the real file system; what else stands there is an OSError, and is not waited for."""
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    os.close(file)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.ENODEV, "not a regular file", path)
