"""Files that survive full disks, kills and restarts, for the journal and for file adapters.

`replace_file`, `read_file` and `load_file` are for small files that are replaced as a whole. `AppendFile` writes a file
of lines, `Backlog` holds writes that the disk refused, and `FileLock` ensures a single writer. The adapter decides what
a line contains.
"""

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count, takewhile
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final, Self, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from evsys_bus.backlog import Backlog
from evsys_bus.diagnostics import log
from evsys_bus.disk import (
    BLOCK_BYTES,
    LOCK_FLAGS,
    NO_LOCKS_ERRNOS,
    NOT_A_FILE_ERRNOS,
    DamagedFileError,
    Disk,
    OsDisk,
    current_disk,
    open_binary,
    open_replacement,
    parent_folder,
    quarantine_names,
    read_file,
    replace_file,
    replace_file_by_blocks,
    use_disk,
    write_all,
)
from evsys_bus.savepoints import Savepoints, hidden_name
from evsys_bus.weak_items import WeakItems

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "DECODE_ERRORS",
    "AppendFile",
    "Backlog",
    "DamagedFileError",
    "FileLock",
    "create_file",
    "list_folder",
    "load_file",
    "lock_file",
    "open_binary",
    "read_file",
    "replace_file",
    "use_disk",
    "write_into_place",
]

_T = TypeVar("_T")
_MAX_WARNED: Final = 1024
_LOCK_POLL_SECONDS: Final = 0.01

DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, TypeError, LookupError, OverflowError, RecursionError)
"""What decoding a damaged file may raise. Invalid UTF-8 and deep nesting do not raise `DecodeError`."""

_warned: dict[tuple[str, str], None] = {}
"""Damaged files that were not moved, with the reason; only the newest ones."""


def load_file(
    path: str | os.PathLike[str],
    decode: Callable[[bytes], _T],
    *,
    quarantine: bool,
    max_bytes: int = 16 << 20,
    disk: Disk | None = None,
) -> _T | None:
    """Decode a small file. Returns None if it is missing or damaged, so that the caller writes it again.

    A file is damaged if it is not a regular file, empty, larger than ``max_bytes``, or if ``decode`` raises. This
    logs the warning ``file.damaged``.

    Args:
        path: The file.
        decode: Converts the bytes to a value. It raises ValueError for content that it does not know, such as a
            later version.
        quarantine: Whether to move a damaged file to ``<path>.damaged``, replacing an earlier one. True for the
            writer of the file; False for readers, which leave it.
        max_bytes: The maximum size.
        disk: The file system.

    Raises:
        OSError: It cannot be read now. This is not damage.
    """
    disk = current_disk() if disk is None else disk
    target = os.fspath(path)
    data: bytes | None = None
    try:
        data = read_file(target, max_bytes=max_bytes, disk=disk)
        if not data:
            raise DamagedFileError("it is empty")  # handled like any other damage below
        return decode(data)
    except FileNotFoundError:
        return None
    except DECODE_ERRORS as error:
        why = str(error) or type(error).__name__
    quarantine_path = _quarantine_file(disk, target, data) if quarantine else None
    if quarantine_path is not None:
        log().warning("file.damaged", file=target, why=why, aside=quarantine_path)
    elif (target, why) not in _warned:
        _warned[target, why] = None
        if len(_warned) > _MAX_WARNED:
            _warned.pop(next(iter(_warned)), None)
        log().warning("file.damaged", file=target, why=why)
    return None


def _quarantine_file(disk: Disk, target: str, data: bytes | None) -> str | None:
    """Move a damaged file out of the way. Returns None if it stays, or another process has replaced it meanwhile."""
    try:
        if data is not None and read_file(target, disk=disk) != data:
            return None
    except (OSError, DamagedFileError):
        return None
    for quarantine_path in quarantine_names(target):
        for _ in range(2):
            try:
                disk.rename(target, quarantine_path)
            except FileNotFoundError:
                return None
            except OSError:  # a directory does not take the place of a file, nor the other way round
                try:
                    disk.remove(quarantine_path)
                except OSError:
                    break
            else:
                return quarantine_path
    return None


def create_file(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o600, disk: Disk | None = None) -> bool:
    """Create a file atomically unless it exists. Returns whether this call created it; of several, only the first does.

    Where the file system has no hard links the last call replaces the file.
    """
    disk = current_disk() if disk is None else disk
    target = os.fspath(path)
    temporary_path = f"{target}.{token_hex(8)}.new"
    replace_file(temporary_path, data, mode=mode, disk=disk)
    try:
        disk.hard_link(temporary_path, target)
    except FileExistsError:
        return False
    except OSError:
        disk.rename(temporary_path, target)
    finally:
        with suppress(FileNotFoundError):
            disk.remove(temporary_path)
    disk.sync_path(parent_folder(target))
    return True


@contextmanager
def write_into_place(
    path: str | os.PathLike[str],
    *,
    mode: int = 0o666,
    follow_link: bool = True,
    make_folder: bool = True,
    disk: Disk | None = None,
) -> Generator[BinaryIO]:
    """A context manager that yields a file to write to, which replaces the one at the path when the block ends.

    It is synced then. If the block raises, nothing is replaced. A path that is not a regular file, such as
    ``/dev/stdout``, is written to directly. Raises OSError.
    """
    disk = current_disk() if disk is None else disk
    target = disk.resolve(os.fspath(path)) if follow_link else os.fspath(path)
    is_ordinary = os.path.isfile(target) or os.path.isdir(target) or not os.path.exists(target)  # noqa: PTH110, PTH112, PTH113  # as text
    if isinstance(disk, OsDisk) and not is_ordinary:
        with Path(target).open("wb") as file:
            yield file
        return
    replacement = open_replacement(target, mode=mode, make_folder=make_folder, disk=disk)
    with replacement as file, io.BufferedWriter(_RawWriter(disk, file), BLOCK_BYTES) as buffered:
        yield cast("BinaryIO", buffered)
        buffered.flush()
    disk.sync_path(parent_folder(target))


class _RawWriter(io.RawIOBase):
    def __init__(self, disk: Disk, file: int) -> None:
        self._disk = disk
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        return self._disk.write(self._file, bytes(data))


class AppendFile:
    """A file of complete lines with one writer.

    Nothing is opened before the first call, and by default the folder is created when needed. The file stays open
    between writes, because closing costs a round trip on network file systems; a file that was removed meanwhile is
    created again. An incomplete last line, torn by a kill, is cut off when the file is opened. Where no mark names the
    file, everything after zeros that a power cut left is cut off as well; if there is data behind the zeros, a copy is
    saved beside the file. Every method may raise OSError.

    Args:
        path: The file.
        savepoints: If given, the file is restored to the state at the last mark after a crash.
        make_folder: Whether a missing folder is created, and not an error.
        disk: The file system; by default the real one (`use_disk`).
    """

    def __init__(
        self, path: Path, savepoints: Savepoints | None = None, *, make_folder: bool = True, disk: Disk | None = None
    ) -> None:
        self.path = path
        self._make_folder: Final = make_folder
        self._disk: Final = current_disk() if disk is None else disk
        self._key = os.path.abspath(path)  # noqa: PTH100  # the path that the marks use
        self._savepoints = Savepoints(disk=self._disk) if savepoints is None else savepoints
        self._is_recovered = False
        self._fd: int | None = None
        self._torn_at: int | None = None
        """The start of a failed write that is partly still in the file."""

    def recover(self) -> None:
        """Undo what a crashed process wrote after its last mark. Every method calls it before it uses the file."""
        if not self._is_recovered:
            self._savepoints.recover(self._key)
            if self._key not in self._savepoints.files:  # otherwise the mark has its size
                self._repair_after_power_cut()
            self._is_recovered = True
        if self._fd is not None and self._torn_at is not None:
            self._roll_back(self._fd, self._torn_at)

    def append(self, lines: bytes, *, header: bytes = b"") -> int:
        """Append complete lines by one write: all of them, or none and OSError.

        ``header`` is written first if the file is empty. Returns the size of the file before.
        """
        fd = self._open()
        size = self._disk.length(fd)
        self._savepoints.before_append(self._key, size)
        rest = lines if size else header + lines
        try:
            while rest:
                rest = rest[self._disk.write(fd, rest) :]
        finally:
            if rest:
                self._roll_back(fd, size)
        return size

    def replace_tail(self, start: int, lines: bytes) -> None:
        """Replace the last lines, from byte ``start`` on, by ``lines``, in one write.

        Shorter lines are padded with spaces. On OSError the old lines are lost, and the file ends at ``start``.
        """
        fd = self._open()
        size = self._disk.length(fd)
        lines = lines[:-1].ljust(size - start - 1) + b"\n"
        if self._savepoints.is_protected(self._key, start):
            self.rewrite(chain(self._read_head(start), [lines]))
            return
        self._savepoints.before_append(self._key, size)
        file, offset, rest = self._disk.open_write(str(self.path)), start, lines
        try:
            while rest:
                written = self._disk.pwrite(file, rest, offset)
                offset, rest = offset + written, rest[written:]
        finally:
            self._disk.close(file)
            if rest:
                self._roll_back(fd, start)

    def lines(self) -> Iterator[bytes]:
        """Yield every complete line with its newline; none if there is no file."""
        self.recover()
        try:
            file = open_binary(self.path, self._disk)
        except FileNotFoundError:
            return
        with file:
            yield from (line for line in file if line.endswith(b"\n"))

    def rewrite(self, lines: Iterable[bytes]) -> int:
        """Replace the whole file atomically and return its new size. On an error it is unchanged."""
        self._close_file()
        self.recover()
        return self._replace(self._disk.resolve(str(self.path)), lines)  # a link stays a link

    def size(self) -> int:
        """The size in bytes; 0 if there is no file."""
        self.recover()
        try:
            return self._disk.size(str(self.path))
        except FileNotFoundError:
            return 0

    def first_line(self) -> bytes:
        """The first line, complete or torn; empty if there is no file."""
        self.recover()
        try:
            with open_binary(self.path, self._disk) as file:
                return file.readline()
        except FileNotFoundError:
            return b""

    def quarantine(self) -> Path | None:
        """Rename the file to ``<name>.<number>.set-aside``, with the first free number. None if there is no file."""
        self._close_file()
        target = self._disk.resolve(str(self.path))
        try:
            existing = set(self._disk.names(parent_folder(target)))
            name = target.rpartition("/")[2]
            quarantine_name = next(
                each for number in count(1) if (each := f"{name}.{number}.set-aside") not in existing
            )
            self._disk.rename(target, f"{parent_folder(target)}/{quarantine_name}")
        except FileNotFoundError:
            return None
        return Path(parent_folder(target), quarantine_name)

    def filter_lines(self, predicate: Callable[[bytes], bool]) -> None:
        """Remove the lines for which ``predicate`` is false. The file is rewritten only if there are any."""
        if not all(map(predicate, self.lines())):
            self.rewrite(filter(predicate, self.lines()))

    def close(self) -> None:
        """Close the file. The next write opens it again."""
        self._close_file()
        self._savepoints.after_close(self._key)

    def _replace(self, target: str, blocks: Iterable[bytes]) -> int:
        folder, _, name = target.rpartition("/")
        size = replace_file_by_blocks(
            target,
            _join_blocks(blocks),
            mode=0o666,
            disk=self._disk,
            temporary_path=f"{folder}/{hidden_name(name)}.new",
            before_rename=partial(self._savepoints.before_replace, self._key),
        )
        self._savepoints.after_replace(self._key)
        return size

    def _close_file(self) -> None:
        """Close the file, after removing the rest of a failed write."""
        if self._fd is not None:
            self.recover()
            self._discard_descriptor()

    def _discard_descriptor(self) -> None:
        fd, self._fd, self._torn_at = self._fd, None, None
        if fd is not None:
            self._disk.close(fd)

    def _roll_back(self, fd: int, size: int) -> None:
        """Remove what a failed write left. If that fails too, it is tried again before the next use of the file."""
        self._torn_at = size
        self._disk.truncate(fd, size)
        self._torn_at = None

    def _open(self) -> int:
        if self._fd is not None and self._disk.links(self._fd):
            self.recover()
            return self._fd
        self._discard_descriptor()  # it was removed
        self.recover()
        path = str(self.path)
        try:
            fd = self._disk.open_file(path)
        except FileNotFoundError:
            if not self._make_folder:
                raise
            self._disk.make_directory(parent_folder(path), 0o777)
            fd = self._disk.open_file(path)
        try:
            self._truncate_torn_end(fd)
        except OSError:
            self._disk.close(fd)
            raise
        self._fd = fd
        return fd

    def _repair_after_power_cut(self) -> None:
        """Cut the file where a power cut left zeros. What is behind them is delivered again; a copy of it is saved."""
        target = self._disk.resolve(str(self.path))
        try:
            with open_binary(target, self._disk) as file:
                intact_bytes = sum(map(len, takewhile(lambda line: b"\0" not in line, file)))
                file.seek(intact_bytes)
                has_data_behind = file.readline() and file.read(1)
        except FileNotFoundError:
            return
        if intact_bytes < (size := self._disk.size(target)):
            quarantine_path = f"{target}.{token_hex(4)}.set-aside" if has_data_behind else None
            if quarantine_path is not None:
                replace_file_by_blocks(quarantine_path, self._read_head(size), mode=0o666, disk=self._disk)
            self._replace(target, self._read_head(intact_bytes))
            log().warning("file.torn", file=str(self.path), kept_bytes=intact_bytes, aside=quarantine_path)

    def _truncate_torn_end(self, fd: int) -> None:
        """Remove an incomplete last line; subclasses with other records override it."""
        size = start = self._disk.length(fd)
        newline = -1
        while start and newline < 0:
            end, start = start, max(0, start - BLOCK_BYTES)
            newline = self._disk.pread(fd, end - start, start).rfind(b"\n")
        intact_bytes = start + newline + 1
        if intact_bytes < size:
            self._disk.truncate(fd, intact_bytes)

    def _read_head(self, size: int) -> Iterator[bytes]:
        """Yield the first bytes of the file."""
        with open_binary(self.path, self._disk) as file:
            while size and (block := file.read(min(size, BLOCK_BYTES))):
                size -= len(block)
                yield block


def _join_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Combine lines into blocks, to make fewer write calls."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def list_folder(folder: str | os.PathLike[str], *, disk: Disk | None = None) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder. Raises OSError if it cannot be listed now."""
    try:
        return sorted((current_disk() if disk is None else disk).names(os.fspath(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def lock_file(path: str, *, mode: int = 0o600, disk: Disk) -> int | None:
    """Lock a file as `Disk.lock` does, and create its folder if needed. What is not a file is quarantined."""
    has_made_folder = False
    for is_last_attempt in (False, False, True):
        try:
            return disk.lock(path, mode)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            if is_last_attempt or not (is_missing or error.errno in NOT_A_FILE_ERRNOS):
                raise
            if is_missing and not has_made_folder:
                has_made_folder = True
                disk.make_directory(parent_folder(path), 0o777 if mode & 0o077 else 0o700)
            else:  # no file, or a link to nothing
                quarantine_path = _quarantine_file(disk, path, None)
                log().warning("file.damaged", file=path, why=error.strerror, aside=quarantine_path)
    raise AssertionError("the third try returns or raises")


class FileLock:
    """A lock between processes, held until it is released or no longer referenced. It is a context manager.

    It ends with the process, however that ends, and a forked child does not have it. The locked file may contain a
    note, such as the name of the owner, which `write` replaces and `read_file` reads.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[int, str], "FileLock"]] = WeakValueDictionary()
    _all: ClassVar["WeakItems[FileLock]"] = WeakItems()
    _guard: ClassVar = threading.RLock()  # reentrant: a signal handler that publishes may interrupt `acquire`

    def __init__(self, fd: int | None, disk: Disk) -> None:
        self._fd = fd
        self._disk = disk
        self._all.add(self)

    @classmethod
    def acquire(cls, path: Path, *, disk: Disk | None = None) -> "FileLock | None":
        """Lock the file, created if needed, for this process. Returns None while another process has the lock.

        Acquired again in the same process, it is the same lock. What is not a file is quarantined, with a warning.
        Where the file system has no locks, every process gets one, with a warning. Raises OSError.
        """
        disk = current_disk() if disk is None else disk
        key = (id(disk), disk.resolve(str(path)))
        with cls._guard:
            lock = cls._shared.get(key)
            if lock is not None and lock.is_open:
                return lock
            try:
                fd = _lock_at_path(str(path), partial(lock_file, str(path), mode=0o666, disk=disk), disk)
            except OSError as error:
                if error.errno not in NO_LOCKS_ERRNOS:
                    raise
                log().warning("file.not_locked", file=str(path), error=str(error))
                fd = disk.open_file(str(path))
            if fd is None:
                return cls._shared.get(key)  # another thread of this process may have it by now
            lock = cls._shared[key] = cls(fd, disk)
            return lock

    @classmethod
    def acquire_exclusive(
        cls, path: Path, *, flags: int = LOCK_FLAGS, timeout_seconds: float = 0.0, disk: Disk | None = None
    ) -> "FileLock | None":
        """Lock the file for the caller alone, also within this process.

        Returns None if another held it all the time. Where the file system has no locks, the result is not held
        (`is_held`).

        Args:
            path: The file, or with ``O_DIRECTORY`` a directory.
            flags: How it is opened (see `os.open`); by default it is created if needed.
            timeout_seconds: How long to wait, by polling, while another holds the lock.
            disk: The file system.

        Raises:
            OSError: It cannot be opened.
        """
        disk = current_disk() if disk is None else disk
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                fd = _lock_at_path(str(path), partial(disk.lock, str(path), 0o666, flags), disk)
            except OSError as error:
                if error.errno not in NO_LOCKS_ERRNOS:
                    raise
                return cls(None, disk)
            if fd is not None:
                return cls(fd, disk)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_LOCK_POLL_SECONDS)

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock. False in a child forked from the one that took it."""
        return self._fd is not None

    def fileno(self) -> int:
        """The descriptor of the locked file. Raises OSError if the lock is not held."""
        if self._fd is None:
            raise OSError(errno.EBADF, "the lock is not held")
        return self._fd

    def write(self, note: bytes, *, sync: bool = True) -> None:
        """Replace the content of the locked file, and sync it by default. A power cut may leave a part of it."""
        fd = self.fileno()
        self._disk.truncate(fd, 0)
        write_all(self._disk, fd, note)
        if sync:
            self._disk.sync(fd)

    @classmethod
    def after_fork(cls) -> None:
        """Release all locks in a forked child, so that it does not hold them after its parent has ended."""
        cls._guard = threading.RLock()
        for lock in list(cls._all):
            lock.release()
        cls._shared = WeakValueDictionary()

    def release(self) -> None:
        """Release the lock now."""
        fd, self._fd = self._fd, None
        if fd is not None:
            self._disk.close(fd)

    @property
    def is_open(self) -> bool:
        """Whether the descriptor is valid. It is not after the end of a simulated process."""
        try:
            return self._fd is not None and self._disk.links(self._fd) >= 0
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(OSError):
            self.release()


def _lock_at_path(path: str, lock: Callable[[], int | None], disk: Disk) -> int | None:
    """Lock the file that is at the path once it is locked: another process may replace it after it was opened."""
    for _ in range(3):
        fd, is_at_path = lock(), False
        if fd is None:
            break
        try:
            is_at_path = disk.is_at(path, fd)
        finally:
            if not is_at_path:
                disk.close(fd)
        if is_at_path:
            return fd
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FileLock.after_fork)
