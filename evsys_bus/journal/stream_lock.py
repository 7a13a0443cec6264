"""Choosing and locking the stream of a new writer: the newest stream of its rank, or a new one.

Only the newest stream of a rank is continued, so that the order of streams stays the order in which they were written;
and only if the machine has not been restarted since. After a power cut the newest records of a stream may be lost
although they were delivered; their sequences must not be given to other events.
"""

import os

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.disk import Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import CursorStore
from evsys_bus.journal.layout import Family, LockOwner
from evsys_bus.journal.lock_owner import read_owner, write_owner
from evsys_bus.journal.reader import read_next_sequence
from evsys_bus.journal.stream_directory import create_stream_directory


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
