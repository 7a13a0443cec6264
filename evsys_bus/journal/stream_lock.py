"""Choosing and locking the stream of a new writer: the newest stream of its rank, or a new one.

Only the newest stream of a rank is continued, so that the order of streams stays the order in which they were written;
and only if the machine has not been restarted since. After a power cut the newest records of a stream may be lost
although they were delivered; their sequences must not be given to other events.

A new stream is created in the journal's directory or, if its file system is not suitable, on a local disk. Network file
systems may have no locks, or write appended data to the wrong offset. Then the stream and the couriers' lock files are
created in a local directory, and the journal gets symbolic links to them, so that every process on this machine uses
the same paths.

A lock file records its owner: the process that holds the lock, or held it last. Each owner appends a line and the last
complete one counts, so a kill during the write leaves the previous owner.
"""

import errno
import os
import time
from typing import Final, Literal
from uuid import uuid4

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.disk import Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import CursorStore
from evsys_bus.journal.layout import Family, LockOwner
from evsys_bus.journal.reader import read_next_sequence


class StreamLease(msgspec.Struct):
    """A stream that this process may write, for as long as the lock file stays open."""

    stream: str
    lock: int | None
    """The open lock file. None where the file system has no locks; the stream is then new and is never continued."""
    ordinal: int = 0
    """The ordinal of the stream's last segment."""
    next_sequence: int = 1
    inherited_segments: list[str] = []
    """Segments of the previous writer. They may not have been synced."""


def acquire_stream(disk: Disk, clock: Clock, directory: str, rank: int, family: Family = "r") -> StreamLease:
    """Lock the newest stream of the rank, or create and lock a new one.

    Raises:
        OSError: The directory cannot be written.
    """
    disk.make_directory(directory)
    _try_mark_as_journal(disk, directory)
    existing = layout.list_streams(disk, directory, rank, family)
    resumed = _try_resume(disk, clock, directory, existing[-1]) if existing else None
    if resumed is not None:
        return resumed
    stream = layout.new_stream_name(rank, clock.wall(), family, existing)
    create_stream_directory(disk, directory, stream)
    return StreamLease(stream, lock_stream(disk, clock, directory, stream))


def lock_stream(disk: Disk, clock: Clock, directory: str, stream: str) -> int | None:
    """Lock a stream that this process writes.

    Returns None where the file system has no locks, or another process has it.
    """
    path = f"{directory}/{stream}/{layout.LOCK}"
    try:
        lock = disk.lock(path)
    except OSError as error:
        log().warning("journal.not_lockable", path=path, exc_info=error)
        return None
    if lock is not None:
        write_owner(disk, clock, lock)
    return lock


def read_stream_owner(disk: Disk, directory: str, stream: str) -> LockOwner | None:
    """The current or last writer of a stream."""
    return read_owner(disk, f"{directory}/{stream}/{layout.LOCK}")


def _try_mark_as_journal(disk: Disk, directory: str) -> None:
    """Write the journal file. Without it the streams still identify the directory as a journal."""
    try:
        layout.mark_as_journal(disk, directory)
    except OSError as error:
        log().warning("journal.not_marked", directory=directory, exc_info=error)


def _try_resume(disk: Disk, clock: Clock, directory: str, stream: str) -> StreamLease | None:
    """Lock the stream if it is free and may be continued."""
    previous_owner = read_stream_owner(disk, directory, stream)
    if (
        previous_owner is None
        or not previous_owner.boot
        or (previous_owner.boot, previous_owner.host) != (disk.boot(), os.uname().nodename)
    ):
        return None
    folder = f"{directory}/{stream}"
    lock = None
    try:
        lock = disk.lock(f"{folder}/{layout.LOCK}")
        if lock is None:
            return None
        names = layout.list_segments(disk, folder)
        min_sequence = max(
            names[-1].first_sequence if names else 1, CursorStore(directory, disk).max_acknowledged_sequence(stream) + 1
        )
        next_sequence = max(min_sequence, *(read_next_sequence(disk, folder, name) for name in names[-1:]), 1)
        write_owner(disk, clock, lock)
    except (OSError, JournalVersionError) as error:
        log().warning("journal.not_continued", stream=stream, exc_info=error)
        if lock is not None:
            disk.close(lock)
        return None
    inherited_segments = [f"{folder}/{name}" for name in names]
    return StreamLease(stream, lock, names[-1].ordinal if names else 0, next_sequence, inherited_segments)


_NOT_SUPPORTED_ERRNOS: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def create_stream_directory(disk: Disk, directory: str, stream: str) -> None:
    """Create the directory of a new stream.

    Raises:
        OSError: The journal's directory cannot be written; or its file system does not append correctly, and no local
            directory can take the stream either.
    """
    missing_feature = _find_missing_feature(disk, directory)
    if missing_feature is not None:
        for root in disk.local_directories():
            local_path = f"{root}/evsys-bus-{stream}"
            try:
                _create_on_local_disk(disk, directory, stream, root, local_path)
            except OSError as error:
                log().warning(
                    "journal.not_moved", directory=directory, to=local_path, lacks=missing_feature, exc_info=error
                )
            else:
                log().warning("journal.moved", directory=directory, to=local_path, lacks=missing_feature)
                return
    if missing_feature == "appends":
        raise OSError(errno.ENOTSUP, "its file system does not append, and no local directory can hold the journal")
    disk.make_directory(f"{directory}/{stream}")


def _create_on_local_disk(disk: Disk, directory: str, stream: str, root: str, local_path: str) -> None:
    disk.make_directory(root)
    missing_feature = _find_missing_feature(disk, root)
    if missing_feature is not None:
        raise OSError(errno.ENOTSUP, f"its file system lacks {missing_feature}", root)
    disk.make_directory(local_path)
    disk.sync_path(root)
    for name in (stream, layout.COURIERS):
        disk.make_directory(f"{local_path}/{name}")
        try:
            disk.link(f"{directory}/{name}", f"{local_path}/{name}")
        except FileExistsError:
            if name == stream:
                raise


def _find_missing_feature(disk: Disk, directory: str) -> Literal["locks", "appends"] | None:
    """What the file system of a directory does not support, tested with a small file."""
    path = f"{directory}/.trial-{uuid4().hex}"
    file = disk.open_append(path)
    try:
        if not _supports_append(disk, path, file):
            return "appends"
        return None if _supports_locks(disk, path) else "locks"
    finally:
        disk.close(file)
        disk.remove(path)


def _supports_append(disk: Disk, path: str, file: int) -> bool:
    """Whether a write goes to the end of the file, also after the file was truncated."""
    try:
        disk.write(file, b"ab")
        disk.truncate(file, 1)
        disk.write(file, b"c")
        return disk.read(path, 0, 4) == b"ac"
    except OSError as error:
        if error.errno in _NOT_SUPPORTED_ERRNOS:
            return False
        raise


def _supports_locks(disk: Disk, path: str) -> bool:
    try:
        lock = disk.lock(path)
    except OSError:
        return False
    if lock is not None:
        disk.close(lock)
    return lock is not None


_MAX_BYTES: Final = 4096


def write_owner(disk: Disk, clock: Clock, lock: int) -> None:
    """Record this process as the owner in an open lock file.

    Raises:
        OSError: The disk returned an error.
    """
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.wall()))
    disk.write(lock, b"\n" + _encode(LockOwner(os.getpid(), os.uname().nodename, since, disk.boot())))


def read_owner(disk: Disk, path: str) -> LockOwner | None:
    """The last owner recorded in the lock file; None if there is none or it cannot be read."""
    try:
        data = disk.read(path, max(0, disk.size(path) - _MAX_BYTES), _MAX_BYTES)
    except OSError:
        return None
    for line in reversed(data.split(b"\n")):
        try:
            return _decode(line)
        except DECODE_ERRORS:
            continue
    return None


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(LockOwner).decode
