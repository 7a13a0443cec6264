"""The file system interface of the journal and the file adapters, the real implementation, and helpers for small files.

Tests use a simulated disk instead (`evsys_bus.testing.SimulatedDisk`), which returns errors or stops the machine at a
chosen call.
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

BLOCK_BYTES: Final = 1 << 16
NOT_A_FILE_ERRNOS: Final = frozenset({errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENXIO})
NO_LOCKS_ERRNOS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF})
"""Errors of a lock where the file system has none; NFS returns EBADF for what is open for reading only."""
LOCK_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT
"""How a lock file is opened."""


class DamagedFileError(ValueError):
    """The content of a path is damaged: not a regular file, too large, empty, or not decodable."""


class Disk(Protocol):
    """The file system operations in use. Paths are text. Methods raise OSError as the real file system does."""

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        """Create the directory and its parents, for the owner only. It may exist, or be a link to the path."""
        ...

    def open_append(self, path: str) -> int:
        """Create a file for the owner only and open it for appending. It must not exist."""
        ...

    def open_new(self, path: str, mode: int = 0o600) -> int | None:
        """Create an empty file that is locked while it is open, to be renamed to another path later.

        A file that a killed process left is removed. Returns None while another process writes there.
        """
        ...

    def open_read(self, path: str) -> int:
        """Open a regular file. Anything else is an immediate OSError; it never blocks."""
        ...

    def open_file(self, path: str, mode: int = 0o666) -> int:
        """Open the file for reading and appending. It is created if needed, with this mode minus the umask."""
        ...

    def open_write(self, path: str) -> int:
        """Open an existing regular file, to overwrite or truncate it."""
        ...

    def lock(self, path: str, mode: int = 0o600, flags: int = LOCK_FLAGS) -> int | None:
        """Open the file and lock it while it stays open. None if it is locked through another descriptor.

        ``flags`` are those of `os.open`; by default the file is created if needed.
        """
        ...

    def is_locked(self, path: str) -> bool:
        """Whether the file is locked; False where the file system has no locks."""
        ...

    def write(self, file: int, data: bytes, /) -> int:
        """Write once. Returns how many bytes were written."""
        ...

    def pwrite(self, file: int, data: bytes, offset: int, /) -> int:
        """Write once at an offset. The file must not be open for appending. Returns how many bytes were written."""
        ...

    def truncate(self, file: int, size: int) -> None:
        """Truncate the file."""
        ...

    def length(self, file: int) -> int:
        """The length of the open file."""
        ...

    def links(self, file: int) -> int:
        """How many names the open file has; 0 after it was removed."""
        ...

    def sync(self, file: int) -> None:
        """Sync the data of the open file to disk."""
        ...

    def sync_path(self, path: str) -> None:
        """Sync the data of a file that is not open, or the entries of a directory."""
        ...

    def close(self, file: int) -> None:
        """Close the file."""
        ...

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read up to ``size`` bytes from the offset; fewer only at the end of the file."""
        ...

    def pread(self, file: int, size: int, offset: int, /) -> bytes:
        """Read once from an open file; empty at its end."""
        ...

    def is_at(self, path: str, file: int) -> bool:
        """Whether the open file is the one at this path."""
        ...

    def names(self, path: str) -> Iterable[str]:
        """The names in a directory, in no order."""
        ...

    def size(self, path: str) -> int:
        """The length of a file."""
        ...

    def modified(self, path: str) -> float:
        """When a file was last written, in seconds since the epoch."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Replace the content of the file atomically. It is synced when this returns. The folder must exist."""
        ...

    def rename(self, path: str, to: str) -> None:
        """Rename a file, replacing an existing one. Both paths have the same parent."""
        ...

    def hard_link(self, path: str, to: str) -> None:
        """Create a hard link, which must not exist; OSError where the file system has none."""
        ...

    def resolve(self, path: str) -> str:
        """The path with all links resolved."""
        ...

    def remove(self, path: str) -> None:
        """Remove the file."""
        ...

    def boot(self) -> str:
        """Identifies the boot of the machine; empty if that is not known."""
        ...


class OsDisk:
    """The real file system."""

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        """Create the directory and its parents."""
        # Not `Path.resolve`: for a link to itself that raises RuntimeError before Python 3.13, and not OSError.
        Path(os.path.realpath(path)).mkdir(mode=mode, parents=True, exist_ok=True)

    def open_append(self, path: str) -> int:
        """Create a file and open it for appending."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open_new(self, path: str, mode: int = 0o600) -> int | None:
        """Create an empty, locked file. An existing link or FIFO is removed, not followed; a directory stays."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for _ in range(3):  # another process may remove the file before it is locked
            try:
                file = os.open(path, flags, mode)
            except FileExistsError:
                if not _remove_abandoned(path):
                    return None
                continue
            if _try_flock(file) and self.is_at(path, file):
                return file
            os.close(file)
        return None

    def open_read(self, path: str) -> int:
        """Open a regular file for reading."""
        return open_regular(path, os.O_RDONLY)

    def open_file(self, path: str, mode: int = 0o666) -> int:
        """Open or create a file for reading and appending."""
        return open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)

    def open_write(self, path: str) -> int:
        """Open an existing file for reading and writing."""
        return open_regular(path, os.O_RDWR)

    def lock(self, path: str, mode: int = 0o600, flags: int = LOCK_FLAGS) -> int | None:
        """Lock a file with ``flock``, so that the lock ends with the process, however it ends."""
        file = open_regular(path, flags, mode)
        is_locked = False
        try:
            is_locked = _flock(file)
        finally:
            if not is_locked:
                os.close(file)
        return file if is_locked else None

    def is_locked(self, path: str) -> bool:
        """Whether the file is locked. Takes a shared lock for an instant."""
        try:
            file = open_regular(path, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in NOT_A_FILE_ERRNOS:
                return False
            raise
        try:
            return not _try_flock(file, shared=True)
        finally:
            os.close(file)

    write = staticmethod(os.write)  # the hot path: no frame of Python around it

    pwrite = staticmethod(os.pwrite)

    def truncate(self, file: int, size: int) -> None:
        """Truncate the open file."""
        os.ftruncate(file, size)

    def length(self, file: int) -> int:
        """The length of the open file."""
        return os.fstat(file).st_size

    def links(self, file: int) -> int:
        """How many names the open file has."""
        return os.fstat(file).st_nlink

    def sync(self, file: int) -> None:
        """Sync the data of the open file."""
        _sync(file)

    def sync_path(self, path: str) -> None:
        """Sync a file that is not open, or a directory."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def close(self, file: int) -> None:
        """Close the file."""
        os.close(file)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read up to ``size`` bytes from the offset."""
        file = self.open_read(path)
        try:
            return read_fully(self, file, size, offset)
        finally:
            os.close(file)

    pread = staticmethod(os.pread)

    def is_at(self, path: str, file: int) -> bool:
        """Whether the open file is the one at this path."""
        try:
            return os.path.samestat(Path(path).stat(), os.fstat(file))
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                return False
            raise

    def names(self, path: str) -> Iterable[str]:
        """The names in a directory."""
        return os.listdir(path)  # noqa: PTH208  # as text; a Path of each costs more than the call

    def size(self, path: str) -> int:
        """The length of a file."""
        return os.stat(path).st_size  # noqa: PTH116  # as text; a Path costs more than the call

    def modified(self, path: str) -> float:
        """When the file was last written, in seconds since the epoch."""
        return os.stat(path).st_mtime  # noqa: PTH116  # as text

    def replace(self, path: str, data: bytes) -> None:
        """Replace the content of the file atomically."""
        replace_file(path, data, make_folder=False, disk=self)

    def rename(self, path: str, to: str) -> None:
        """Rename a file."""
        os.rename(path, to)  # noqa: PTH104  # as text

    def hard_link(self, path: str, to: str) -> None:
        """Create a hard link."""
        os.link(path, to)  # as text

    def resolve(self, path: str) -> str:
        """The path with all links resolved, but not a file's own link if another user made it."""
        if is_foreign_link(path):
            return os.path.join(os.path.realpath(parent_folder(path)), os.path.basename(path))  # noqa: PTH118, PTH119  # as text
        return os.path.realpath(path)

    def remove(self, path: str) -> None:
        """Remove the file."""
        Path(path).unlink()

    def boot(self) -> str:
        """The boot id that Linux provides; empty on other systems."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
        except OSError:
            return ""


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def _flock(file: int, *, shared: bool = False) -> bool:
    """Lock the file. Returns False if it is locked through another descriptor; OSError if there are no locks here."""
    import fcntl  # POSIX only

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_flock(file: int, *, shared: bool = False) -> bool:
    """Lock the file if there are locks here. Returns False only if it is locked through another descriptor."""
    try:
        return _flock(file, shared=shared)
    except OSError:
        return True


def _remove_abandoned(path: str) -> bool:
    """Remove a file that no process writes any more. Returns whether the path is free."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:  # a link, or nothing that can be opened; a directory cannot be unlinked
        return _try_unlink(path)
    try:
        if _try_flock(file):  # while this process has the lock, no other one renames or removes it
            try:
                is_same = os.path.samestat(os.lstat(path), os.fstat(file))
            except FileNotFoundError:
                return True
            return _try_unlink(path) if is_same else True
        return False
    finally:
        os.close(file)


def _try_unlink(path: str) -> bool:
    try:
        os.unlink(path)  # noqa: PTH108  # as text
    except OSError:
        return not os.path.lexists(path)
    return True


def read_fully(disk: Disk, file: int, size: int, offset: int) -> bytes:
    """Read up to ``size`` bytes of an open file from the offset; fewer only at its end."""
    data = disk.pread(file, size, offset)
    while len(data) < size and (more := disk.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


_current_disk: Disk = OsDisk()


def current_disk() -> Disk:
    """The disk that is used if none is given: the real one, or that of `use_disk`."""
    return _current_disk


@contextmanager
def use_disk(disk: Disk) -> Generator[None]:
    """Use this disk by default within the block, in every thread. For tests."""
    global _current_disk  # noqa: PLW0603  # one per process
    previous, _current_disk = _current_disk, disk
    try:
        yield
    finally:
        _current_disk = previous


def replace_file(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    mode: int = 0o600,
    follow_link: bool = False,
    make_folder: bool = True,
    disk: Disk | None = None,
) -> None:
    """Replace the content of a file atomically. It is synced when this returns.

    The data is written to ``<path>.new``, which is then renamed, so that a kill, a full disk or a power cut leaves the
    previous version. Two processes that replace the same file do not mix their data.

    Args:
        path: The file. A symbolic link there is replaced by a file; a directory there is moved to ``<path>.damaged``.
        data: The new content.
        mode: Its permissions minus the umask; use 0o666 for files that users read.
        follow_link: Whether to replace the target of a symbolic link at the path, and leave the link.
        make_folder: Whether to create the parent folder if it is missing.
        disk: The file system.

    Raises:
        OSError: The new content may not be synced; the file has the previous or the new version, each complete.
    """
    disk = _current_disk if disk is None else disk
    target = disk.resolve(os.fspath(path)) if follow_link else os.fspath(path)
    with open_replacement(target, mode=mode, disk=disk, make_folder=make_folder, displace_directory=True) as file:
        write_all(disk, file, data)
    disk.sync_path(parent_folder(target))


def replace_file_by_blocks(
    target: str,
    blocks: Iterable[bytes],
    *,
    mode: int,
    disk: Disk,
    temporary_path: str | None = None,
    before_rename: Callable[[], object] | None = None,
) -> int:
    """Replace the content of a file atomically by an iterable of blocks. Returns the new size.

    Unlike `replace_file` it does not sync the folder. On OSError the file is unchanged. The path must not be a link.

    Args:
        target: The file.
        blocks: The new content.
        mode: Its permissions minus the umask.
        disk: The file system.
        temporary_path: Where the data is written first.
        before_rename: Called after the data was synced and before the rename.
    """
    size = 0
    with open_replacement(
        target, mode=mode, disk=disk, temporary_path=temporary_path, before_rename=before_rename
    ) as file:
        for block in blocks:
            size += len(block)
            write_all(disk, file, block)
    return size


@contextmanager
def open_replacement(
    target: str,
    *,
    mode: int,
    disk: Disk,
    temporary_path: str | None = None,
    make_folder: bool = True,
    displace_directory: bool = False,
    before_rename: Callable[[], object] | None = None,
) -> Generator[int]:
    """A context manager that yields an open file, which replaces the one at the path when the block ends.

    With ``displace_directory`` a directory at the path is moved to ``<path>.damaged``. See `replace_file_by_blocks` for
    the others.
    """
    temporary_path = f"{target}.new" if temporary_path is None else temporary_path
    try:
        temporary_path, file = _open_temporary(disk, target, temporary_path, mode)
    except FileNotFoundError:
        if not make_folder:
            raise
        disk.make_directory(parent_folder(target), 0o777 if mode & 0o077 else 0o700)
        temporary_path, file = _open_temporary(disk, target, temporary_path, mode)
    is_renamed = False
    try:
        yield file
        disk.sync(file)
        if before_rename is not None:
            before_rename()
        try:
            disk.rename(temporary_path, target)
        except IsADirectoryError:
            if not displace_directory:
                raise
            for quarantine_path in quarantine_names(target):  # the directory is not ours
                with suppress(OSError):
                    disk.rename(target, quarantine_path)
                    break
            disk.rename(temporary_path, target)
        is_renamed = True
    finally:
        if not is_renamed:
            with suppress(OSError):  # the next replacement of the file removes it
                disk.remove(temporary_path)
        disk.close(file)


def quarantine_names(target: str) -> Iterator[str]:
    """Names for a damaged file that is quarantined, to be tried in order."""
    yield f"{target}.damaged"
    yield from (f"{target}.damaged.{number}" for number in range(1, 10))


def write_all(disk: Disk, file: int, data: bytes) -> None:
    """Write all data, by as many calls as needed."""
    while data:
        data = data[disk.write(file, data) :]


def read_file(path: str | os.PathLike[str], *, max_bytes: int = 16 << 20, disk: Disk | None = None) -> bytes:
    """Read a whole small file.

    Raises:
        DamagedFileError: It is not a regular file (a directory, FIFO or link to itself) or exceeds ``max_bytes``.
        OSError: It is missing (FileNotFoundError), or cannot be read now.
    """
    disk = _current_disk if disk is None else disk
    try:
        file = disk.open_read(os.fspath(path))
    except OSError as error:
        if error.errno in NOT_A_FILE_ERRNOS:
            raise DamagedFileError(error.strerror) from error
        raise
    try:
        data = read_fully(disk, file, min(disk.length(file), max_bytes) + 1, 0)
    finally:
        disk.close(file)
    if len(data) > max_bytes:
        msg = f"it is larger than {max_bytes:,} bytes"
        raise DamagedFileError(msg)
    return data


def open_binary(path: str | os.PathLike[str], disk: Disk | None = None) -> BinaryIO:
    """Open a regular file for buffered reading. Raises OSError."""
    disk = _current_disk if disk is None else disk
    return cast("BinaryIO", io.BufferedReader(_RawReader(disk, disk.open_read(os.fspath(path))), BLOCK_BYTES))


class _RawReader(io.RawIOBase):
    def __init__(self, disk: Disk, file: int) -> None:
        self._disk = disk
        self._file: int | None = file
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if self._file is None:
            raise ValueError("closed")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset}
        self._offset = offset + (base[whence] if whence in base else self._disk.length(self._file))
        return self._offset

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self._file is None:
            raise ValueError("closed")
        view = memoryview(buffer)
        data = self._disk.pread(self._file, len(view), self._offset)
        view[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            self._disk.close(file)
        super().close()


def _open_temporary(disk: Disk, target: str, temporary_path: str, mode: int) -> tuple[str, int]:
    """Create the temporary file, with a unique name if another process is replacing the file too."""
    for each in (temporary_path, f"{target}.{token_hex(8)}.new"):
        file = disk.open_new(each, mode)
        if file is not None:
            return each, file
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), temporary_path)


def parent_folder(path: str) -> str:
    """The parent folder of a path."""
    return os.path.dirname(path) or "."  # noqa: PTH120  # as text


def is_foreign_link(path: str) -> bool:
    """Whether the path is a link that another user made, other than root: it may point to a file of this user."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode) and found.st_uid not in {0, os.geteuid()}


def open_regular(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file of the real file system, or with ``O_DIRECTORY`` a directory.

    Anything else is an immediate OSError; it never blocks. A file to write is not opened through another user's link.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC
    if flags & (os.O_WRONLY | os.O_RDWR) and is_foreign_link(path):
        raise PermissionError(errno.EPERM, "another user's link, which is not followed", path)
    file = os.open(path, flags, mode)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind) or flags & os.O_DIRECTORY:
        return file
    os.close(file)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.ENODEV, "not a regular file", path)
