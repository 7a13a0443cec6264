"""Verified copies from a store: a file appears only once it is complete and correct; an interrupted copy is resumed.

    .<name>.<32 hexadecimal digits>.partial     an incomplete copy; the digits are a digest of content and file name

A process holds the lock of the copy that it writes. If another process holds it, or locks are not supported, a separate
copy is started.
"""

import errno
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Final

from anyio import to_thread

from evsys_adapters.checkpoints.store import DamagedError, ProgressCallback, Stored, check_content
from evsys_bus.disk import OsDisk
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import FileLock

MAX_BLOCKING_BYTES: Final = 4 << 20
"""Bytes read or hashed in one thread call; a cancellation waits for at most that."""
_PARTIAL: Final = re.compile(r"\..*\.[0-9a-f]{32}\.partial", re.DOTALL)
_SHOWN_BYTES: Final = 100
"""Maximum length of the original name in that of a partial file."""


class HashingWriter:
    """Writes content into an open file, or nowhere, and computes its digest. Its methods block.

    Args:
        file: The file's descriptor.
        where: Description of the target for errors about a full disk.
        max_size: Maximum size; more is an error.
    """

    def __init__(self, file: int | None = None, where: object = None, max_size: int | None = None) -> None:
        self.size = 0
        """Bytes so far."""
        self._max_size: Final = max_size
        self._file: Final = file
        self._where: Final = where
        self._digest: Final = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        """Add the next bytes; if that fails, they were not added and may be added again.

        Raises:
            DamagedError: The maximum size is exceeded.
            RetryLaterError: The disk is full.
        """
        if self._max_size is not None and self.size + len(chunk) > self._max_size:
            raise DamagedError(
                f"received more than {self._max_size} bytes",
                fix="fetch again; if that does not help, fetch another checkpoint",
            )
        if self._file is not None:
            written = 0
            with full_disk_as_retry(self._where), memoryview(chunk) as view:
                while written < len(chunk):
                    written += os.pwrite(self._file, view[written:], self.size + written)
        self._digest.update(chunk)
        self.size += len(chunk)

    def read_existing(self, max_size: int) -> bool:
        """Read the next chunk of existing content, up to ``max_size`` bytes in total; returns whether there was one."""
        assert self._file is not None
        chunk = os.pread(self._file, min(MAX_BLOCKING_BYTES, max_size - self.size), self.size)
        self._digest.update(chunk)
        self.size += len(chunk)
        return bool(chunk)

    def finish(self) -> None:
        """Truncate the file to the written size and sync it."""
        assert self._file is not None
        with full_disk_as_retry(self._where):
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)

    def as_stored(self, key: str) -> Stored:
        """Return size and digest of the content as the object ``key``."""
        return Stored(key, self.size, self._digest.hexdigest())


async def copy_into(
    path: Path,
    remote: Stored,
    expected: Stored | None,
    where: str,
    on_progress: ProgressCallback | None,
    read: Callable[[HashingWriter], Awaitable[None]],
) -> Stored:
    """Copy an object to the path. An interrupted earlier copy is resumed if the content's digest is known.

    Args:
        path: The target.
        remote: The object as listed by the store; no more than its size is read.
        expected: The expected size and digest, if known.
        where: Description of the store.
        on_progress: Called with the progress while existing content is read again.
        read: Adds the missing content.

    Raises:
        DamagedError: The content differs; the partial copy is removed.
        DeliveryError, OSError: Raised by ``read``; the partial copy remains.
    """
    while True:
        with _open_partial(path, remote.sha256 or (expected and expected.sha256)) as (file, partial):
            writer = HashingWriter(file, path.parent, remote.size)
            while await to_thread.run_sync(writer.read_existing, remote.size):
                if on_progress is not None:
                    on_progress(writer.size, remote.size)
            resumed_size = writer.size
            if resumed_size < remote.size or not resumed_size:
                try:
                    await read(writer)
                except DamagedError:
                    partial.unlink()
                    raise
            await to_thread.run_sync(writer.finish)
            actual = writer.as_stored(remote.key)
            try:
                check_content(actual, remote, where)
                check_content(actual, expected, where)
            except DamagedError:
                partial.unlink()
                if not resumed_size:
                    raise
                continue  # the resumed part may have been torn
            await to_thread.run_sync(move_into_place, partial, path)
            return actual


def partial_of(path: Path, sha256: str) -> Path:
    """Return the path of the partial copy to this path of the content with this digest."""
    digits = hashlib.sha256(os.fsencode(path.name) + b"\0" + sha256.encode()).hexdigest()[:32]
    return partial_path(path, digits)


def is_partial(path: Path) -> bool:
    """Whether the path has the name of a partial copy."""
    return _PARTIAL.fullmatch(path.name) is not None


def remove_partials(folder: Path, exclude: Collection[Path] = ()) -> None:
    """Remove partial copies below the folder that no process is writing, except for these files."""
    for partial in folder.rglob(".*.partial"):
        if partial not in exclude and _PARTIAL.fullmatch(partial.name):
            lock = _lock_partial(partial)
            if lock is not None:
                with lock, suppress(OSError):  # a leftover file does no harm
                    partial.unlink()


@contextmanager
def _open_partial(path: Path, sha256: str | None) -> Generator[tuple[int, Path]]:
    """Open a partial copy for the path; it is removed on exit unless it can be resumed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path, token_hex(16)) if sha256 is None else partial_of(path, sha256)
    lock, is_resumable = _lock_partial(partial, os.O_CREAT), sha256 is not None
    if lock is None:
        partial, is_resumable = partial_path(path, token_hex(16)), False
        lock = _lock_partial(partial, os.O_CREAT)
    try:
        if lock is not None:
            with lock:
                yield lock.fileno(), partial
        else:  # locks are not supported here
            with partial.open("x+b", buffering=0) as file:
                yield file.fileno(), partial
    finally:
        if not is_resumable:
            partial.unlink(missing_ok=True)  # it was moved into place, unless the copy failed


def partial_path(path: Path, digits: str) -> Path:
    """Return the temporary name with these digits beside the path."""
    shown = path.name.encode(errors="ignore")[:_SHOWN_BYTES].decode(errors="ignore")
    return path.with_name(f".{shown}.{digits}.partial")


def _lock_partial(partial: Path, create: int = 0) -> FileLock | None:
    """Open and lock the file; None if another copy holds it, it cannot be opened, or locks are not supported."""
    lock = None
    with suppress(OSError):
        lock = FileLock.acquire_exclusive(partial, flags=os.O_RDWR | os.O_NOFOLLOW | create, disk=OsDisk())
        if lock is not None and not lock.is_held and not partial.stat(follow_symlinks=False).st_size:
            partial.unlink()  # just created
    return lock if lock is not None and lock.is_held else None


CHUNK_BYTES: Final = 1 << 20
_DISK_FULL_ERRORS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def full_disk_as_retry(where: object) -> Generator[None]:
    """Convert a full disk in the block to an error that names the place.

    Raises:
        RetryLaterError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL_ERRORS:
            raise
        raise RetryLaterError(f"no room in {where}: {error.strerror}; it resumes once there is space") from error


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a synced file to its final path, and fsync the directory."""
    disk = OsDisk()
    disk.rename(str(partial), str(path))
    disk.sync_path(str(path.parent))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
