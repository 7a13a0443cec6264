"""Repairing a journal: damaged segments are quarantined, and rewritten with their intact records only.

Reading does not need a repair, because readers skip damage. A repair makes later reads faster and free of warnings, and
retains the damaged segment for inspection. Lost events stay lost, and stay missing in the sequences.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from evsys_bus.errors import JournalInUseError
from evsys_bus.journal import JournalReport, OsDisk, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.reader import SegmentScan
from evsys_bus.journal.stream_lock import read_stream_owner
from evsys_bus.journal.verify import StreamReport

_QUARANTINE_SUFFIX: Final = ".damaged"


class RepairedSegment(msgspec.Struct):
    """A repaired segment."""

    segment: Path
    events: int
    """Number of events in the rewritten segment."""
    dropped_bytes: int
    quarantined: Path
    """The original segment in quarantine."""


def damaged_streams(report: JournalReport) -> list[StreamReport]:
    """Return the streams that have damaged segments."""
    return [each for each in report.streams if each.corrupt_ranges]


def repair(directory: Path, streams: Iterable[StreamReport], *, dry_run: bool) -> list[RepairedSegment]:
    """Repair the damaged segments of these streams; with ``dry_run`` only return what would be done.

    No other process should read them at the same time: a reader inside a segment would lose its position.

    Raises:
        JournalInUseError: A process writes one of the streams; nothing was changed.
        OSError: The disk failed. Every segment is either unchanged or repaired.
    """
    disk = OsDisk()
    locks: list[int] = []
    try:
        for stream in streams:
            lock = disk.lock(f"{directory}/{stream.stream}/{layout.LOCK}")
            if lock is None:
                raise _in_use_error(directory, stream.stream) from BlockingIOError(errno.EWOULDBLOCK, "it is locked")
            locks.append(lock)
        segments = dict.fromkeys(Path(damage.segment) for stream in streams for damage in stream.corrupt_ranges)
        return [_repair_segment(disk, each, dry_run=dry_run) for each in segments]
    finally:
        for lock in locks:
            disk.close(lock)


def _repair_segment(disk: OsDisk, segment: Path, *, dry_run: bool) -> RepairedSegment:
    scan = SegmentScan(disk, str(segment))
    frames = [piece for piece in scan.frames() if isinstance(piece, Frame)]
    content = frame.pack_segment_header() + b"".join(
        frame.pack(each.sequence, bytes(each.payload), each.kind) for each in frames
    )
    before = segment.stat()
    events = sum(each.kind == frame.EVENT for each in frames)
    done = RepairedSegment(segment, events, before.st_size - len(content), _free_name(segment))
    if not dry_run:
        _quarantine(segment, done.quarantined)
        disk.replace(str(segment), content)
        os.utime(segment, ns=(before.st_atime_ns, before.st_mtime_ns))  # `retain` uses the file's age
    return done


def _quarantine(segment: Path, quarantined: Path) -> None:
    """Hard-link the segment, which takes no space; copy it where the file system has no hard links."""
    try:
        quarantined.hardlink_to(segment)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(segment, quarantined)


def _free_name(segment: Path) -> Path:
    number = 1
    while (
        candidate := segment.with_name(f"{segment.name}{_QUARANTINE_SUFFIX}{'' if number == 1 else f'-{number}'}")
    ).exists():
        number += 1
    return candidate


def _in_use_error(directory: Path, stream: str) -> JournalInUseError:
    writer = read_stream_owner(OsDisk(), str(directory), stream)
    by = "a process" if writer is None else f"process {writer.pid} on {writer.host}, since {writer.since},"
    return JournalInUseError(
        f"{by} writes {directory}/{stream}; nothing was repaired",
        why="a segment that is being written cannot be replaced",
        fix="repair it when that process has ended; until then it can be read as it is",
    )
