"""What a journal's directory holds, and how its names are made and read.

journal/
  journal.json                      says that this is a journal, and of which version
  r0-000007-20260131T120000-5f3a91c2/
                                    a stream: what one writer after another appended; rank 0, the seventh of that rank
  c0-000001-20260131T120001-77d0e4b9/
                                    the same, of couriers: what delivery learnt
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

import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

import msgspec

from evsys_bus.disk import Disk
from evsys_bus.files import load_file

CURSORS: Final = "cursors"
COURIERS: Final = "couriers"
JOURNAL_FILE: Final = "journal.json"
LOCK: Final = "lock"
RESERVE: Final = "reserve"

FORMAT_VERSION: Final = 1

Family = Literal["r", "c"]
"""Whose stream: a publishing process's, or a courier's."""

_STREAM: Final = re.compile(r"([rc])([0-9]+)(?:-([0-9]{6,}))?-[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")
"""The name of a stream: family, rank, counter, when it was begun (UTC), eight random digits. 0.1.0 wrote no counter."""
_LAST_SECOND: Final = 253402300799.0
"""Of the year 9999."""
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


class JournalFile(msgspec.Struct, frozen=True):
    """What ``journal.json`` says."""

    evsys_bus_journal: int
    """The version of the format."""


def is_journal(disk: Disk, directory: str) -> bool:
    """Whether a directory is a journal: it says so itself, or, where 0.1.0 wrote it, holds a stream."""
    return _says_so(disk, directory) or any(
        _is_stream(disk, f"{directory}/{name}") for name in streams(disk, directory)
    )


def mark_as_journal(disk: Disk, directory: str) -> None:
    """Have a directory say that it is a journal.

    Raises:
        OSError: It cannot be written.
    """
    if not _says_so(disk, directory, set_aside=True):
        disk.replace(f"{directory}/{JOURNAL_FILE}", msgspec.json.encode(JournalFile(FORMAT_VERSION)) + b"\n")


def order_of(stream: str) -> tuple[int, str]:
    """What to sort streams by, the one that was begun first coming first; clocks have no part in it.

    The counter in the name decides. Streams of 0.1.0 have none: they come first, in the order of their names.
    """
    found = _STREAM.fullmatch(stream)
    return (int(found[3] or 0) if found is not None else 0, stream)


def new_stream(rank: int, wall: float, family: Family = "r", older: Iterable[str] = ()) -> str:
    """A name that no other writer takes, and that comes behind those of the older streams (`order_of`).

    Args:
        rank: Of its writer.
        wall: What the clock says; for people.
        family: Whose stream it is.
        older: The streams of that rank and family that are there.
    """
    counter = 1 + max((order_of(each)[0] for each in older), default=0)
    begun = time.strftime("%Y%m%dT%H%M%S", time.gmtime(min(max(wall, 0.0), _LAST_SECOND)))
    return f"{family}{rank}-{counter:06d}-{begun}-{uuid4().hex[:8]}"


def streams(disk: Disk, directory: str, rank: int | None = None, family: Family | None = "r") -> list[str]:
    """The streams in a journal, in their order; of one rank and family, or of all. None where there is no journal."""
    try:
        names = disk.names(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [each for each in map(_STREAM.fullmatch, names) if each is not None]
    chosen = (each[0] for each in found if family in {None, each[1]} and rank in {None, int(each[2])})
    return sorted(chosen, key=order_of)


def segments(disk: Disk, folder: str) -> list[SegmentName]:
    """The segments of a stream, in order: all that are there when this is called, and none without those before it.

    A folder that is listed while files are made in it may show a later one of them and not an earlier one.
    """
    names = _listed(disk, folder)
    if not names or names[-1].ordinal - names[0].ordinal < len(names):
        return names
    last, names = names[-1], _listed(disk, folder)  # all before that one are there by now, or were removed
    for place in range(max(1, bisect_right(names, last)), len(names)):
        if names[place].ordinal > names[place - 1].ordinal + 1:
            return names[:place]
    return names


def _listed(disk: Disk, folder: str) -> list[SegmentName]:
    try:
        names = disk.names(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in map(_segment, names) if name is not None)


def removed_in_front(names: Sequence[SegmentName]) -> int:
    """How many events were in segments that stood before these, as `retain` removes them."""
    return names[0].first - 1 if names and names[0].ordinal > 1 else 0


def rank_of(stream: str) -> int:
    """The rank of a stream's writer."""
    return int(stream[1:].partition("-")[0])


def cursor_file(directory: str, follower: str) -> str:
    """Where a follower's cursor stands."""
    return f"{directory}/{CURSORS}/{quote(follower, safe='', errors='surrogateescape')}{_CURSOR_SUFFIX}"


def courier_file(directory: str, follower: str, what: Literal["lock", "spec.json", "state.json", "dead.jsonl"]) -> str:
    """Where something of a follower's courier stands."""
    return f"{directory}/{COURIERS}/{quote(follower, safe='', errors='surrogateescape')}.{what}"


def followers(disk: Disk, directory: str) -> list[str]:
    """Who has a cursor."""
    try:
        names = disk.names(f"{directory}/{CURSORS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(follower_of(name.removesuffix(_CURSOR_SUFFIX)) for name in names if name.endswith(_CURSOR_SUFFIX))


def follower_of(name: str) -> str:
    """The follower whose files are called so, but for their endings."""
    return unquote(name, errors="surrogateescape")


def _segment(name: str) -> SegmentName | None:
    ordinal, _, first = name.removesuffix(_SEGMENT_SUFFIX).partition("-")
    if not name.endswith(_SEGMENT_SUFFIX) or not ordinal.isdecimal() or not first.isdecimal():
        return None
    return SegmentName(int(ordinal), int(first))


def _says_so(disk: Disk, directory: str, *, set_aside: bool = False) -> bool:
    path = f"{directory}/{JOURNAL_FILE}"
    try:
        found = load_file(path, _journal_file, set_aside=set_aside, most_bytes=_MOST_BYTES, disk=disk)
    except OSError:
        return False
    return found is not None and found.evsys_bus_journal > 0


def _is_stream(disk: Disk, folder: str) -> bool:
    """Whether a folder that is called as streams are is one."""
    try:
        return any(name == LOCK or _segment(name) is not None for name in disk.names(folder))
    except NotADirectoryError:
        return False
    except OSError:
        return True  # a link to where it stands on another machine, say


_MOST_BYTES: Final = 4096
_journal_file: Final = msgspec.json.Decoder(JournalFile).decode
