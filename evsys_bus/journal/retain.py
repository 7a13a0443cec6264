"""Which segments may go: those that are old enough, or too many, and that every follower is done with."""

from itertools import pairwise

import msgspec

from evsys_bus.journal import layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import Cursors
from evsys_bus.journal.disk import Disk


class Retain(msgspec.Struct, frozen=True):
    """How much of a stream to keep; what is None sets no bound."""

    max_bytes: int | None = None
    """Older segments go while the stream is larger."""
    max_age_seconds: float | None = None
    """Segments go that were last written longer ago."""


def prune(disk: Disk, clock: Clock, directory: str, stream: str, retain: Retain) -> int:
    """Remove the segments of a stream that may go, oldest first, never the newest one; how many went.

    The cursors are read from their files, so they are durable before anything is unlinked.
    """
    folder = f"{directory}/{stream}"
    names = layout.segments(disk, folder)
    sizes = {name: disk.size(f"{folder}/{name}") for name in names}
    passed = Cursors(directory, disk).passed(stream)
    total = sum(sizes.values())
    gone = 0
    for name, following in pairwise(names):
        path = f"{folder}/{name}"
        too_many = retain.max_bytes is not None and total > retain.max_bytes
        too_old = retain.max_age_seconds is not None and clock.wall() - disk.modified(path) > retain.max_age_seconds
        in_use = passed is not None and passed < following.first - 1
        if in_use or not (too_many or too_old):
            break
        disk.remove(path)
        total -= sizes[name]
        gone += 1
    return gone
