"""`verify`: checks the integrity of a journal by its checksums and sequences. Nothing is decoded or changed."""

import os

import msgspec

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import CorruptRange, Frame
from evsys_bus.journal.reader import JournalReader
from evsys_bus.journal.scanning import SegmentScan


class CorruptSegmentRange(msgspec.Struct, frozen=True):
    """Bytes that are not a valid record, followed by valid records."""

    segment: str
    offset: int
    length: int


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
    report = StreamReport(stream, reader.is_live(stream))
    folder = f"{reader.directory}/{stream}"
    names = layout.list_segments(disk, folder)
    expected_sequence = names[0].first_sequence if names else 1
    report.removed_events = layout.count_removed_events(names)
    for name in names:
        expected_sequence = _record_missing(report, expected_sequence, name.first_sequence)
        try:
            expected_sequence = _verify_segment(
                disk, f"{folder}/{name}", expected_sequence, report, is_growing=report.is_live and name == names[-1]
            )
        except (OSError, JournalVersionError) as error:
            report.unreadable_segments.append(f"{name}: {error}")
    return report


def _verify_segment(disk: Disk, path: str, expected_sequence: int, report: StreamReport, *, is_growing: bool) -> int:
    report.segments += 1
    report.is_closed = False
    scan = SegmentScan(disk, path)
    for item in scan.count_events(expected_sequence):
        if isinstance(item, int):
            expected_sequence = _count_events(report, expected_sequence, item)
        elif isinstance(item, Frame):
            if item.kind == frame.EVENT and item.sequence >= expected_sequence:
                expected_sequence = _count_events(
                    report, _record_missing(report, expected_sequence, item.sequence), item.sequence + 1
                )
            elif item.kind == frame.CLOSED:
                expected_sequence = _record_missing(report, expected_sequence, item.sequence)
                report.is_closed = True
        elif isinstance(item, CorruptRange):
            report.corrupt_ranges.append(CorruptSegmentRange(path, scan.offset - item.length, item.length))
        elif not is_growing:
            report.torn_bytes += item.length
    report.bytes += scan.offset
    return expected_sequence


def _count_events(report: StreamReport, expected_sequence: int, next_sequence: int) -> int:
    report.records += next_sequence - expected_sequence
    report.first_sequence = expected_sequence if report.first_sequence is None else report.first_sequence
    report.last_sequence = next_sequence - 1
    return next_sequence


def _record_missing(report: StreamReport, expected_sequence: int, sequence: int) -> int:
    if sequence > expected_sequence:
        report.missing_ranges.append((expected_sequence, sequence - 1))
    return max(expected_sequence, sequence)
