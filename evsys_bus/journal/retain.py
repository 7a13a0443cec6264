"""Which segments may go: those that are old enough, or too many, and that every follower is done with.

A follower that was taken out of the config is waited for a day longer. From then on what it has not had goes with the
segments, and becomes dead letters of its: counted, and said. Nothing else would ever move its cursor.
"""

import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Final

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.journal import layout
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.cursor import Cursors, Place
from evsys_bus.journal.disk import Disk
from evsys_bus.journal.layout import SegmentName

LEFT_SECONDS: Final = 86_400.0
"""How long one that is not followed any more is waited for."""


class Retain(msgspec.Struct, frozen=True):
    """How much of a stream to keep; what is None sets no bound."""

    max_bytes: int | None = None
    """Older segments go while the stream is larger."""
    max_age_seconds: float | None = None
    """Segments go that were last written longer ago."""


def prune(disk: Disk, clock: Clock, directory: str, stream: str, retain: Retain) -> list[SegmentName]:
    """Remove the segments of a stream that may go, oldest first, never the newest one; which ones went.

    The cursors are read from their files, so they are durable before anything is unlinked. Nothing goes while one of
    the followers that have left is delivered to, by ``evsys-bus sync``.
    """
    folder = f"{directory}/{stream}"
    names = layout.segments(disk, folder)
    sizes = {name: disk.size(f"{folder}/{name}") for name in names}
    cursors = Cursors(directory, disk)
    served = cursors.served(stream)
    left = {name: at for name, at in served.items() if at is not None and clock.wall() - at > LEFT_SECONDS}
    places = [cursors.load(name).place(stream).sequence for name in served if name not in left]
    total = sum(sizes.values())
    going: list[SegmentName] = []
    up_to = 0
    for name, following in pairwise(names):
        path = f"{folder}/{name}"
        too_many = retain.max_bytes is not None and total > retain.max_bytes
        too_old = retain.max_age_seconds is not None and clock.wall() - disk.modified(path) > retain.max_age_seconds
        last = following.first - 1
        if any(place < last for place in places) or not (too_many or too_old):
            break
        total -= sizes[name]
        going.append(name)
        up_to = last
    if not going or not _pass_over(disk, clock, directory, stream, up_to, left):
        return []
    for name in going:
        disk.remove(f"{folder}/{name}")
    return going


def _pass_over(disk: Disk, clock: Clock, directory: str, stream: str, up_to: int, left: dict[str, float]) -> bool:
    """Have what these have not had, up to there, count as dead.

    For none of them, and False, where somebody delivers to one of them after all: then nothing goes.
    """
    cursors = Cursors(directory, disk)
    with ExitStack() as locks:
        for follower in left:
            lock = disk.lock(layout.courier_file(directory, follower, "lock"))
            if lock is None:
                return False
            locks.callback(disk.close, lock)
        for follower, cursor in [(each, cursors.read(each)) for each in left]:  # all are read before one is moved
            place = cursor.place(stream)
            events = up_to - place.sequence
            if events <= 0:
                continue
            when = time.strftime("%Y-%m-%d", time.gmtime(left[follower]))
            why = f"{events} events up to this one went with their segments: it was taken out of the config on {when}"
            letter = _Letter(stream, up_to, clock.wall(), why)
            _append(disk, layout.courier_file(directory, follower, "dead.jsonl"), letter)
            cursor.streams[stream] = Place(up_to, place.delivered, place.dead + events)
            cursors.save(follower, cursor)
            log().warning("journal.left_events_removed", follower=follower, stream=stream, events=events, up_to=up_to)
    return True


class _Letter(msgspec.Struct, frozen=True):
    """A line of a dead-letter file, for many events."""

    stream: str
    seq: int
    at: float
    why: str


def _append(disk: Disk, path: str, letter: _Letter) -> None:
    file = disk.lock(path)  # of all ways to open, the one that opens to append whether it is there or not
    if file is None:
        raise BlockingIOError(f"{path} is locked by another process")
    try:
        disk.write(file, msgspec.json.encode(letter) + b"\n")
        disk.sync(file)
    finally:
        disk.close(file)
