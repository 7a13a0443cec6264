"""`verify`: checks the integrity of a journal by its checksums and sequences. Nothing is decoded or changed."""

import os

import msgspec

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.journal import layout
from evsys_bus.journal.reader import CorruptSegmentRange, JournalReader, TailReader


class StreamReport(
    msgspec.Struct,
    rename={
        "is_live": "live",
        "first_sequence": "first",
        "last_sequence": "last",
        "is_closed": "closed",
        "corrupt_ranges": "damaged",
        "missing_ranges": "missing",
        "unreadable_segments": "unreadable",
        "removed_events": "removed",
    },
):
    """The result for one stream."""

    stream: str
    is_live: bool
    """Whether a process is writing it."""
    segments: int = 0
    records: int = 0
    """Events, without repeats."""
    bytes: int = 0
    first_sequence: int | None = None
    """The sequence of the first event."""
    last_sequence: int | None = None
    """The sequence of the last event."""
    is_closed: bool = False
    """Whether the last writer closed it."""
    corrupt_ranges: list[CorruptSegmentRange] = []
    missing_ranges: list[tuple[int, int]] = []
    """Ranges of missing sequences, first and last."""
    torn_bytes: int = 0
    """Bytes after the last complete record of a segment: a write cut short, as by a kill. This is not damage."""
    unreadable_segments: list[str] = []
    """Segments that could not be read, with the reason."""
    removed_events: int = 0
    """Events in segments that retention removed from the front. This is not damage."""

    @property
    def is_intact(self) -> bool:
        """Whether no recorded event is known to be lost."""
        return not (self.corrupt_ranges or self.missing_ranges or self.unreadable_segments)


class JournalReport(msgspec.Struct):
    """The result for a journal."""

    directory: str
    streams: list[StreamReport]

    @property
    def is_intact(self) -> bool:
        """Whether every stream is intact."""
        return all(stream.is_intact for stream in self.streams)


def verify(directory: str | os.PathLike[str], disk: Disk | None = None) -> JournalReport:
    """Read a whole journal. A segment of a newer format counts as unreadable."""
    reader = JournalReader(directory, disk)
    file_system: Disk = OsDisk() if disk is None else disk
    return JournalReport(reader.directory, [_verify_stream(file_system, reader, stream) for stream in reader.streams()])


def _verify_stream(disk: Disk, reader: JournalReader, stream: str) -> StreamReport:
    is_live = reader.is_live(stream)
    folder = f"{reader.directory}/{stream}"
    removed_events = layout.count_removed_events(layout.list_segments(disk, folder))
    tail = TailReader(disk, folder, count_only=True, skip_newer_formats=True)
    for _ in tail.poll_runs(is_complete=not is_live):
        pass
    return StreamReport(
        stream,
        is_live,
        segments=tail.segments,
        records=tail.events,
        bytes=tail.bytes,
        first_sequence=tail.first_sequence,
        last_sequence=None if tail.first_sequence is None else tail.last_sequence,
        is_closed=tail.is_closed,
        corrupt_ranges=tail.corrupt_ranges,
        missing_ranges=tail.missing_ranges,
        torn_bytes=tail.torn_bytes,
        unreadable_segments=[f"{path.rpartition('/')[2]}: {error}" for path, error in tail.unreadable_segments.items()],
        removed_events=removed_events,
    )
