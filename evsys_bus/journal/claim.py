"""Which stream a new writer may write: one that a dead writer of the same rank left, or a new one.

Only the newest stream of a rank is continued, so that what is written later never stands before what was written
earlier; and only in the boot in which it was written. After a power cut the newest records of a stream may be gone
although followers have had them; their sequences must not be given to other events.
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
    """A stream that is this process's to write, for as long as the lock's file stays open."""

    stream: str
    lock: int | None
    """None where the file system has no locks; the stream is then a new one, and nobody continues it."""
    ordinal: int = 0
    """Of the stream's last segment."""
    next_sequence: int = 1
    inherited: list[str] = []
    """The segments that were there: how much of them is on the medium, only their dead writer knew."""


def claim(disk: Disk, clock: Clock, directory: str, rank: int, family: Family = "r") -> Claim:
    """Lock a stream.

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
    """Lock a stream that is this process's already; None where the file system has no locks, or it was taken."""
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
    """Who writes the stream, or wrote it last."""
    return signed(disk, f"{directory}/{stream}/{layout.LOCK}")


def _mark(disk: Disk, directory: str) -> None:
    """Have the directory say that it is a journal; where it cannot, its streams say so."""
    try:
        layout.mark_as_journal(disk, directory)
    except OSError as error:
        log().warning("journal.not_marked", directory=directory, exc_info=error)


def _continued(disk: Disk, clock: Clock, directory: str, stream: str) -> Claim | None:
    """The stream, if it is free and may be continued."""
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
