"""Choosing and locking the stream of a new writer: the newest stream of its rank, or a new one.

Only the newest stream of a rank is continued, so that the order of streams stays the order in which they were written;
and only if the machine has not been restarted since. After a power cut the newest records of a stream may be lost
although they were delivered; their sequences must not be given to other events.

Network file systems may have no locks, or write appended data to the wrong offset. There no stream is created.

A lock file records its owner: the process that holds the lock, or held it last. Each owner appends a line and the last
complete one counts, so a kill during the write leaves the previous owner.
"""

import errno
import os
import time
from typing import Final
from uuid import uuid4

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.disk import NO_LOCKS_ERRNOS, Disk
from evsys_bus.errors import JournalOpenError, JournalVersionError
from evsys_bus.journal import layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import CursorStore
from evsys_bus.journal.layout import Family, LockOwner, read_owner
from evsys_bus.journal.open_starts import OpenStarts, StartRecord, restore_open_starts
from evsys_bus.journal.segment import read_next_sequence


class StreamLease(msgspec.Struct):
    """A stream that this process may write, for as long as the lock file stays open."""

    stream: str
    lock: int | None
    """The open lock file; None before the stream is locked and after it was released."""
    ordinal: int = 0
    """The ordinal of the stream's last segment."""
    next_sequence: int = 1
    inherited_segments: list[str] = []
    """Segments of previous writers. They may not have been synced."""
    inherited_ordinal: int = 0
    """The ordinal of the last one of them."""
    journal_id: str = ""
    """The id of the journal; empty if it could not be written."""
    is_live: bool = True
    """Whether the writer has declared that events may still come."""
    open_starts: OpenStarts[StartRecord] = msgspec.field(default_factory=OpenStarts[StartRecord])
    """What is open in a stream that was opened by its name."""


def acquire_stream(disk: Disk, clock: Clock, directory: str, rank: int, family: Family = "r") -> StreamLease:
    """Lock the newest stream of the rank, or create and lock a new one.

    Raises:
        JournalOpenError: The file system has no locks, or does not append.
        OSError: The directory cannot be written.
    """
    disk.make_directory(directory)
    existing = layout.list_streams(disk, directory, rank, family)
    resumed = _try_resume(disk, clock, directory, existing[-1]) if existing else None
    if resumed is not None:
        resumed.journal_id = _try_mark_as_journal(disk, directory)
        return resumed
    stream = layout.new_stream_name(rank, clock.wall(), family, existing)
    return _create_stream(disk, clock, directory, stream)


def acquire_named_stream(disk: Disk, clock: Clock, directory: str, stream: str) -> StreamLease:
    """Lock the stream of this name, whichever process and boot wrote it, or create it. Everything in it is synced.

    Raises:
        JournalOpenError: It is no name of a stream, or another process has the stream open; or the file system has no
            locks, or does not append.
        JournalVersionError: A newer version wrote it.
        OSError: The directory cannot be written or read.
    """
    if not layout.is_stream_name(stream):
        raise JournalOpenError(f"{stream!r:.80} is not the name of a stream", fix="give a name as streams() lists them")
    disk.make_directory(directory)
    folder = f"{directory}/{stream}"
    if stream not in layout.list_streams(disk, directory, family=None):
        return _create_stream(disk, clock, directory, stream, is_mirror=True)
    previous_owner = read_stream_owner(disk, directory, stream)
    lock = _lock_stream(disk, directory, stream)
    is_opened = False
    try:
        names = layout.list_segments(disk, folder)
        next_sequence = max(
            names[-1].first_sequence if names else 1,
            *(read_next_sequence(disk, folder, name) for name in names[-1:]),
            1,
        )
        for path in (*(f"{folder}/{name}" for name in names), folder):
            disk.sync_path(path)
        is_live = previous_owner is None or previous_owner.is_live
        write_owner(disk, clock, lock, is_mirror=True, is_live=is_live)
        open_starts = restore_open_starts(disk, folder, names)
        journal_id = _try_mark_as_journal(disk, directory)
        is_opened = True
    finally:
        if not is_opened:
            disk.close(lock)
    ordinal = names[-1].ordinal if names else 0
    return StreamLease(
        stream, lock, ordinal, next_sequence, journal_id=journal_id, is_live=is_live, open_starts=open_starts
    )


def _create_stream(disk: Disk, clock: Clock, directory: str, stream: str, *, is_mirror: bool = False) -> StreamLease:
    check_file_system(disk, directory)
    journal_id = _try_mark_as_journal(disk, directory)
    disk.make_directory(f"{directory}/{stream}")
    lock = _lock_stream(disk, directory, stream)
    write_owner(disk, clock, lock, is_mirror=is_mirror)
    return StreamLease(stream, lock, journal_id=journal_id)


def _lock_stream(disk: Disk, directory: str, stream: str) -> int:
    lock = disk.lock(f"{directory}/{stream}/{layout.LOCK}")
    if lock is not None:
        return lock
    owner = read_stream_owner(disk, directory, stream)
    holder = "another process" if owner is None else f"process {owner.pid} on {owner.host}, since {owner.since},"
    raise JournalOpenError(
        f"{holder} has the stream {stream} of {directory} open", fix="let it finish, or end it; a stream has one writer"
    )


def read_stream_owner(disk: Disk, directory: str, stream: str) -> LockOwner | None:
    """The current or last writer of a stream."""
    return read_owner(disk, f"{directory}/{stream}/{layout.LOCK}")


def _try_mark_as_journal(disk: Disk, directory: str) -> str:
    """Write the journal file and return the id. Without it the streams still identify the directory as a journal."""
    try:
        return layout.mark_as_journal(disk, directory)
    except OSError as error:
        log().warning("journal.not_marked", directory=directory, exc_info=error)
        return ""


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
        write_owner(disk, clock, lock, synced_ordinal=previous_owner.synced_ordinal)
    except (OSError, JournalVersionError) as error:
        log().warning("journal.not_continued", stream=stream, exc_info=error)
        if lock is not None:
            disk.close(lock)
        return None
    inherited_segments = [f"{folder}/{name}" for name in names if name.ordinal > previous_owner.synced_ordinal]
    ordinal = names[-1].ordinal if names else 0
    return StreamLease(stream, lock, ordinal, next_sequence, inherited_segments, ordinal)


def record_inherited_synced(disk: Disk, directory: str, lease: StreamLease) -> None:
    """Record in the lock file that the inherited segments have been synced, so that the next writer need not do it.

    Raises:
        OSError: The disk returned an error.
    """
    owner = read_stream_owner(disk, directory, lease.stream)
    if owner is not None and lease.lock is not None:
        disk.write(lease.lock, b"\n" + _encode(msgspec.structs.replace(owner, synced_ordinal=lease.inherited_ordinal)))


_NOT_SUPPORTED_ERRNOS: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def check_file_system(disk: Disk, directory: str) -> None:
    """Test with a small file whether the file system of a directory has what a stream needs.

    Raises:
        JournalOpenError: It has no locks, or does not append.
        OSError: The directory cannot be written.
    """
    path = f"{directory}/.trial-{uuid4().hex}"
    file = disk.open_append(path)
    try:
        if not _supports_append(disk, path, file):
            missing = "does not append at the end of a file"
        elif not _supports_locks(disk, path):
            missing = "has no locks"
        else:
            return
    finally:
        disk.close(file)
        disk.remove(path)
    raise JournalOpenError(
        f"the journal {directory} cannot be there: its file system {missing}",
        why="two processes could write one stream, or records could overwrite each other",
        fix="give a directory on a local disk, for example EventBus(callbacks, journal=DIRECTORY)",
    )


def _supports_append(disk: Disk, path: str, file: int) -> bool:
    """Whether a write is made at the end of the file, also after the file was truncated."""
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
    except OSError as error:
        if error.errno in NO_LOCKS_ERRNOS:
            return False
        raise
    if lock is not None:
        disk.close(lock)
    return lock is not None


def write_owner(
    disk: Disk, clock: Clock, lock: int, *, is_mirror: bool = False, is_live: bool = True, synced_ordinal: int = 0
) -> None:
    """Record this process as the owner in an open lock file.

    Args:
        disk: The file system.
        clock: The clocks.
        lock: The open lock file.
        is_mirror: Whether the stream was opened by its name. Without a boot in the note, no bus continues it.
        is_live: Whether events may still come.
        synced_ordinal: The last segment that is known to have been synced.

    Raises:
        OSError: The disk returned an error.
    """
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.wall()))
    boot = "" if is_mirror else disk.boot()
    owner = LockOwner(os.getpid(), os.uname().nodename, since, boot, is_live, synced_ordinal)
    disk.write(lock, b"\n" + _encode(owner))


_encode: Final = msgspec.json.Encoder().encode
