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
from evsys_bus.journal.cursor import Cursors
from evsys_bus.journal.layout import Family, Owner
from evsys_bus.journal.place import place
from evsys_bus.journal.scanning import next_sequence_in
from evsys_bus.journal.signature import sign, signed


class Claim(msgspec.Struct):
    """A stream that this process may write, for as long as the lock file stays open."""

    stream: str
    lock: int | None
    """The open lock file. None where the file system has no locks; the stream is then new and is never continued."""
    ordinal: int = 0
    """The ordinal of the stream's last segment."""
    next_sequence: int = 1
    inherited: list[str] = []
    """Segments of the previous writer. They may not have been synced."""


def claim(disk: Disk, clock: Clock, directory: str, rank: int, family: Family = "r") -> Claim:
    """Lock the newest stream of the rank, or create and lock a new one.

    Raises:
        OSError: The directory cannot be written.
    """
    disk.make_directory(directory)
    _mark(disk, directory)
    older = layout.streams(disk, directory, rank, family)
    found = _continued(disk, clock, directory, older[-1]) if older else None
    if found is not None:
        return found
    stream = layout.new_stream(rank, clock.wall(), family, older)
    place(disk, directory, stream)
    return Claim(stream, hold(disk, clock, directory, stream))


def hold(disk: Disk, clock: Clock, directory: str, stream: str) -> int | None:
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
        sign(disk, clock, lock)
    return lock


def owner(disk: Disk, directory: str, stream: str) -> Owner | None:
    """The current or last writer of a stream."""
    return signed(disk, f"{directory}/{stream}/{layout.LOCK}")


def _mark(disk: Disk, directory: str) -> None:
    """Write the journal file. Without it the streams still identify the directory as a journal."""
    try:
        layout.mark_as_journal(disk, directory)
    except OSError as error:
        log().warning("journal.not_marked", directory=directory, exc_info=error)


def _continued(disk: Disk, clock: Clock, directory: str, stream: str) -> Claim | None:
    """Lock the stream if it is free and may be continued."""
    before = owner(disk, directory, stream)
    if before is None or not before.boot or (before.boot, before.host) != (disk.boot(), os.uname().nodename):
        return None
    folder = f"{directory}/{stream}"
    lock = None
    try:
        lock = disk.lock(f"{folder}/{layout.LOCK}")
        if lock is None:
            return None
        names = layout.segments(disk, folder)
        at_least = max(names[-1].first if names else 1, Cursors(directory, disk).furthest(stream) + 1)
        following = max(at_least, *(next_sequence_in(disk, folder, name) for name in names[-1:]), 1)
        sign(disk, clock, lock)
    except (OSError, JournalVersionError) as error:
        log().warning("journal.not_continued", stream=stream, exc_info=error)
        if lock is not None:
            disk.close(lock)
        return None
    inherited = [f"{folder}/{name}" for name in names]
    return Claim(stream, lock, names[-1].ordinal if names else 0, following, inherited)
