"""What a journal's directory holds, and how its names are made and read.

journal/
  r0-20260131T120000-5f3a91c2/      a stream: what one writer after another appended; rank 0
  c0-20260131T120001-77d0e4b9/      the same, of couriers: what delivery learnt
    000001-1.seg                    its first segment, whose first event has sequence 1
    000002-80412.seg                its second
    lock                            held by the live writer; says who that is
    reserve                         room for the last words on a full disk
  cursors/
    csv_metrics.json                how far one follower has got, by stream
  couriers/
    csv_metrics.lock                held by who delivers to it; says who that is
    csv_metrics.spec.json           how it is built again
    csv_metrics.state.json          how its delivery fares
    csv_metrics.dead.jsonl          events that it did not take, and never will, with the reason
"""

from typing import Final, Literal, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

import msgspec

from evsys_bus.journal.disk import Disk

CURSORS: Final = "cursors"
COURIERS: Final = "couriers"
LOCK: Final = "lock"
RESERVE: Final = "reserve"

Family = Literal["r", "c"]
"""Whose stream: a publishing process's, or a courier's."""

_SEGMENT_SUFFIX: Final = ".seg"
_CURSOR_SUFFIX: Final = ".json"


class SegmentName(NamedTuple):
    """The name of a segment, read."""

    ordinal: int
    """Counts the segments of a stream from 1 without a gap; retention takes from the front."""
    first: int
    """The sequence of its first event."""

    def __str__(self) -> str:
        return f"{self.ordinal:06d}-{self.first}{_SEGMENT_SUFFIX}"


class Owner(msgspec.Struct, frozen=True):
    """What a lock file says of the writer."""

    pid: int
    host: str
    since: str
    """ISO 8601, for people."""
    boot: str = ""
    """Names the time since the machine started."""


def new_stream(rank: int, wall: float, family: Family = "r") -> str:
    """A name that no other writer takes; those of one rank sort by age."""
    import time

    return f"{family}{rank}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(wall))}-{uuid4().hex[:8]}"


def streams(disk: Disk, directory: str, rank: int | None = None, family: Family = "r") -> list[str]:
    """The streams in a journal, oldest first; of one rank, or of all. None where there is no journal."""
    begin = family if rank is None else f"{family}{rank}-"
    try:
        names = disk.names(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name.startswith(begin) and name[1:2].isdigit())


def segments(disk: Disk, folder: str) -> list[SegmentName]:
    """The segments of a stream, in order."""
    try:
        names = disk.names(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in map(_segment, names) if name is not None)


def rank_of(stream: str) -> int:
    """The rank of a stream's writer."""
    return int(stream[1:].partition("-")[0])


def cursor_file(directory: str, follower: str) -> str:
    """Where a follower's cursor stands."""
    return f"{directory}/{CURSORS}/{quote(follower, safe='')}{_CURSOR_SUFFIX}"


def courier_file(directory: str, follower: str, what: Literal["lock", "spec.json", "state.json", "dead.jsonl"]) -> str:
    """Where something of a follower's courier stands."""
    return f"{directory}/{COURIERS}/{quote(follower, safe='')}.{what}"


def followers(disk: Disk, directory: str) -> list[str]:
    """Who has a cursor."""
    try:
        names = disk.names(f"{directory}/{CURSORS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(unquote(name.removesuffix(_CURSOR_SUFFIX)) for name in names if name.endswith(_CURSOR_SUFFIX))


def _segment(name: str) -> SegmentName | None:
    ordinal, _, first = name.removesuffix(_SEGMENT_SUFFIX).partition("-")
    if not name.endswith(_SEGMENT_SUFFIX) or not ordinal.isdecimal() or not first.isdecimal():
        return None
    return SegmentName(int(ordinal), int(first))
