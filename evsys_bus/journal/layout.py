"""The directory layout of a journal: paths and names, and how they are built and parsed.

journal/
  journal.json                      identifies the directory as a journal, with the format version and its id
  r0-000007-20260131T120000-5f3a91c2/
                                    a stream of rank 0, the seventh of that rank; one or more writers in succession
  c0-000001-20260131T120001-77d0e4b9/
                                    a stream of couriers: what was published about delivery
  s0-000001-20260131T120002-0c4be1a7/
                                    a stream of measurements: what a thread beside the loop has sampled
    000001-1.seg                    its first segment, whose first event has sequence 1
    000002-80412.seg                its second segment
    lock                            locked by the current writer, and names it
    reserve                         disk space reserved for the last events on a full disk
  cursors/
    csv_metrics.json                the position of an adapter in each stream
  couriers/
    csv_metrics.lock                locked by the courier that delivers to the adapter, and names it
    csv_metrics.spec.json           how to build the adapter again
    csv_metrics.state.json          the delivery status
    csv_metrics.dead.jsonl          events that will never be delivered, with the reason
"""

import errno
import functools
import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

import msgspec

from evsys_bus.disk import Disk, write_all
from evsys_bus.files import DECODE_ERRORS, load_file
from evsys_bus.location import short_digest

CURSORS: Final = "cursors"
COURIERS: Final = "couriers"
JOURNAL_FILE: Final = "journal.json"
LOCK: Final = "lock"
RESERVE: Final = "reserve"

FORMAT_VERSION: Final = 1

Family = Literal["r", "c", "s"]
"""Who writes the stream: a publishing process ("r"), a courier ("c") or a sampler beside the loop ("s")."""

DELIVERED_FAMILIES: Final[tuple[Family, ...]] = ("r", "s")
"""The streams that adapters are given."""

_STREAM_NAME: Final = re.compile(r"([rcs])([0-9]+)(?:-([0-9]{6,}))?-[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")
"""The name of a stream: family, rank, counter, start time (UTC), eight random digits. 0.1.0 wrote no counter."""
_MAX_TIMESTAMP: Final = 253402300799.0
"""The end of the year 9999."""
_SEGMENT_SUFFIX: Final = ".seg"
_CURSOR_SUFFIX: Final = ".json"


class SegmentName(NamedTuple):
    """The parsed name of a segment."""

    ordinal: int
    """Counts the segments of a stream from 1 without a gap. Retention removes the lowest first."""
    first_sequence: int
    """The sequence of its first event."""

    def __str__(self) -> str:
        return f"{self.ordinal:06d}-{self.first_sequence}{_SEGMENT_SUFFIX}"


class LockOwner(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"is_live": "live", "synced_ordinal": "synced"}
):
    """The owner that is recorded in a lock file."""

    pid: int
    host: str
    since: str
    """ISO 8601, for display."""
    boot: str = ""
    """Identifies the boot of the machine."""
    is_live: bool = True
    """Whether events may still come; False while a mirror has the stream open whose own writer is gone."""
    synced_ordinal: int = 0
    """The stream's segments up to this ordinal have been synced since the machine was started."""


class JournalFile(msgspec.Struct, frozen=True, rename={"format_version": "evsys_bus_journal"}):
    """The content of ``journal.json``."""

    format_version: int
    """The format version."""
    id: str = ""
    """Identifies the journal, wherever it is copied to. 0.1.0 wrote none."""


def is_journal(disk: Disk, directory: str) -> bool:
    """Whether a directory is a journal: it has a journal file or, if 0.1.0 wrote it, a stream."""
    return _load_journal_file(disk, directory) is not None or any(
        _is_stream(disk, f"{directory}/{name}") for name in list_streams(disk, directory)
    )


def local_substitute(directory: str) -> str:
    """Return where a journal is whose own file system cannot hold one: in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # noqa: PTH117 # strings, as in the whole module
        state = os.path.expanduser("~/.local/state")  # noqa: PTH111
    name = os.path.basename(os.path.dirname(directory))  # noqa: PTH119, PTH120
    return f"{state}/evsys-bus/journals/{name}-{short_digest(directory)}"


def mark_as_journal(disk: Disk, directory: str) -> str:
    """Write the journal file if it is missing or has no id. Returns the id; processes that do it at once agree on it.

    Raises:
        OSError: It cannot be written.
    """
    path = f"{directory}/{JOURNAL_FILE}"
    for _ in range(_MARK_ATTEMPTS):
        found = _load_journal_file(disk, directory, quarantine=True)
        if found is not None and (found.id or found.format_version > FORMAT_VERSION):
            return found.id
        temporary_path = f"{path}.new"
        file = disk.open_new(temporary_path)
        if file is None:  # another process is writing it
            time.sleep(_MARK_PAUSE_SECONDS)
            continue
        try:
            found = _load_journal_file(disk, directory)  # again, because only one process at a time comes here
            if found is not None and found.id:
                disk.remove(temporary_path)
                return found.id
            new = JournalFile(FORMAT_VERSION, str(uuid4()))
            write_all(disk, file, msgspec.json.encode(new) + b"\n")
            disk.sync(file)
            disk.rename(temporary_path, path)
        finally:
            disk.close(file)
        disk.sync_path(directory)
        return new.id
    raise OSError(errno.EAGAIN, "another process has been writing it for too long", path)


def read_journal_id(disk: Disk, directory: str) -> str:
    """The id of a journal; empty if it has none yet."""
    found = _load_journal_file(disk, directory)
    return "" if found is None else found.id


_MARK_ATTEMPTS: Final = 250
_MARK_PAUSE_SECONDS: Final = 0.02


def is_stream_name(name: str) -> bool:
    """Whether a text is the name of a stream."""
    return _STREAM_NAME.fullmatch(name) is not None


def stream_sort_key(stream: str) -> tuple[int, str]:
    """The sort key of a stream, by which earlier streams come first. Clocks play no part in it.

    Streams are ordered by the counter in their names. Streams of 0.1.0 have none: they come first, ordered by name.
    """
    found = _STREAM_NAME.fullmatch(stream)
    return (int(found[3] or 0) if found is not None else 0, stream)


def new_stream_name(rank: int, wall: float, family: Family = "r", existing: Iterable[str] = ()) -> str:
    """A unique name for a new stream, which sorts after the existing ones (`stream_sort_key`).

    Args:
        rank: The rank of the writer.
        wall: The wall time, for display.
        family: Who writes the stream.
        existing: The existing streams of that rank and family.
    """
    counter = 1 + max((stream_sort_key(each)[0] for each in existing), default=0)
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime(min(max(wall, 0.0), _MAX_TIMESTAMP)))
    return f"{family}{rank}-{counter:06d}-{started}-{uuid4().hex[:8]}"


def list_streams(disk: Disk, directory: str, rank: int | None = None, family: Family | None = "r") -> list[str]:
    """List the streams of a journal in order, of one rank and family or of all; none where there is no journal."""
    try:
        names = disk.names(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [parts for parts in map(_parse_stream_name, names) if parts is not None]
    selected = (
        (order, name)
        for name, own_family, own_rank, order in found
        if (family is None or family == own_family) and (rank is None or rank == own_rank)
    )
    return [stream for _, stream in sorted(selected)]


def list_streams_of(disk: Disk, directory: str, families: Sequence[Family]) -> list[str]:
    """List the streams of several families, one family after the other."""
    if len(families) == 1:
        return list_streams(disk, directory, family=families[0])
    by_family: dict[str, list[str]] = {family: [] for family in families}
    for stream in list_streams(disk, directory, family=None):
        by_family.get(stream[0], []).append(stream)
    return [stream for streams in by_family.values() for stream in streams]


@functools.lru_cache(maxsize=8_192)
def _parse_stream_name(name: str) -> tuple[str, str, int, int] | None:
    """Return name, family, rank and order, as `stream_sort_key`; cached: followers list the same names often."""
    parts = _STREAM_NAME.fullmatch(name)
    return None if parts is None else (name, parts[1], int(parts[2]), int(parts[3] or 0))


def list_segments(disk: Disk, folder: str) -> list[SegmentName]:
    """List the segments of a stream in order, without those after a gap.

    A folder that is listed while files are created in it may show a later file and miss an earlier one.
    """
    names = _read_segment_names(disk, folder)
    if not names or names[-1].ordinal - names[0].ordinal < len(names):
        return names
    last, names = names[-1], _read_segment_names(disk, folder)  # all earlier ones are listed by now, or were removed
    for index in range(max(1, bisect_right(names, last)), len(names)):
        if names[index].ordinal > names[index - 1].ordinal + 1:
            return names[:index]
    return names


def _read_segment_names(disk: Disk, folder: str) -> list[SegmentName]:
    try:
        names = disk.names(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in map(_parse_segment_name, names) if name is not None)


def count_removed_events(names: Sequence[SegmentName]) -> int:
    """How many events were in segments that retention removed before these."""
    return names[0].first_sequence - 1 if names and names[0].ordinal > 1 else 0


def rank_of(stream: str) -> int:
    """The rank of a stream's writer."""
    return int(stream[1:].partition("-")[0])


def cursor_path(directory: str, adapter: str) -> str:
    """The path of an adapter's cursor."""
    return f"{directory}/{CURSORS}/{quote(adapter, safe='', errors='surrogateescape')}{_CURSOR_SUFFIX}"


def courier_path(directory: str, adapter: str, suffix: Literal["lock", "spec.json", "state.json", "dead.jsonl"]) -> str:
    """The path of a courier file of an adapter."""
    return f"{directory}/{COURIERS}/{quote(adapter, safe='', errors='surrogateescape')}.{suffix}"


def list_adapters(disk: Disk, directory: str) -> list[str]:
    """The names of all adapters that have a cursor."""
    try:
        names = disk.names(f"{directory}/{CURSORS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        decode_adapter_name(name.removesuffix(_CURSOR_SUFFIX)) for name in names if name.endswith(_CURSOR_SUFFIX)
    )


def decode_adapter_name(name: str) -> str:
    """The name of an adapter, decoded from its file name without the suffix."""
    return unquote(name, errors="surrogateescape")


def read_owner(disk: Disk, path: str) -> LockOwner | None:
    """The last owner recorded in the lock file; None if there is none or it cannot be read."""
    try:
        data = disk.read(path, max(0, disk.size(path) - _MAX_BYTES), _MAX_BYTES)
    except OSError:
        return None
    for line in reversed(data.split(b"\n")):
        try:
            return _decode_owner(line)
        except DECODE_ERRORS:
            continue
    return None


def _parse_segment_name(name: str) -> SegmentName | None:
    ordinal, _, first_sequence = name.removesuffix(_SEGMENT_SUFFIX).partition("-")
    if not name.endswith(_SEGMENT_SUFFIX) or not ordinal.isdecimal() or not first_sequence.isdecimal():
        return None
    return SegmentName(int(ordinal), int(first_sequence))


def _load_journal_file(disk: Disk, directory: str, *, quarantine: bool = False) -> JournalFile | None:
    path = f"{directory}/{JOURNAL_FILE}"
    try:
        found = load_file(path, _decode_journal_file, quarantine=quarantine, max_bytes=_MAX_BYTES, disk=disk)
    except OSError:
        return None
    return found if found is not None and found.format_version > 0 else None


def _is_stream(disk: Disk, folder: str) -> bool:
    """Whether a folder with the name of a stream is one."""
    try:
        return any(name == LOCK or _parse_segment_name(name) is not None for name in disk.names(folder))
    except NotADirectoryError:
        return False
    except OSError:
        return True  # for example a link to a folder of another machine


_MAX_BYTES: Final = 4096
_decode_owner: Final = msgspec.json.Decoder(LockOwner).decode
_decode_journal_file: Final = msgspec.json.Decoder(JournalFile).decode
