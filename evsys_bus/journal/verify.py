"""`verify`: checks the integrity of a journal by its checksums and sequences. Nothing is decoded or changed."""

import os

import msgspec

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import Damage, Frame
from evsys_bus.journal.reader import JournalReader
from evsys_bus.journal.scanning import SegmentScan


class DamagedRange(msgspec.Struct, frozen=True):
    """Bytes that are not a valid record, followed by valid records."""

    segment: str
    offset: int
    length: int


class StreamReport(msgspec.Struct):
    """The result for one stream."""

    stream: str
    live: bool
    """Whether a process is writing it."""
    segments: int = 0
    records: int = 0
    """Events, without repeats."""
    bytes: int = 0
    first: int | None = None
    """The sequence of the first event."""
    last: int | None = None
    """The sequence of the last event."""
    closed: bool = False
    """Whether the last writer closed it."""
    damaged: list[DamagedRange] = []
    missing: list[tuple[int, int]] = []
    """Ranges of missing sequences, first and last."""
    torn_bytes: int = 0
    """Bytes after the last complete record of a segment: a write cut short, as by a kill. This is not damage."""
    unreadable: list[str] = []
    """Segments that could not be read, with the reason."""
    removed: int = 0
    """Events in segments that retention removed from the front. This is not damage."""

    @property
    def whole(self) -> bool:
        """Whether no recorded event is known to be lost."""
        return not (self.damaged or self.missing or self.unreadable)


class Report(msgspec.Struct):
    """The result for a journal."""

    directory: str
    streams: list[StreamReport]

    @property
    def whole(self) -> bool:
        """Whether every stream is intact."""
        return all(stream.whole for stream in self.streams)


def verify(directory: str | os.PathLike[str], disk: Disk | None = None) -> Report:
    """Read a whole journal. A segment of a newer format counts as unreadable."""
    reader = JournalReader(directory, disk)
    on: Disk = OsDisk() if disk is None else disk
    return Report(reader.directory, [_stream(on, reader, stream) for stream in reader.streams()])


def _stream(disk: Disk, reader: JournalReader, stream: str) -> StreamReport:
    report = StreamReport(stream, reader.is_live(stream))
    folder = f"{reader.directory}/{stream}"
    names = layout.segments(disk, folder)
    expected = names[0].first if names else 1
    report.removed = layout.removed_in_front(names)
    for name in names:
        expected = _miss(report, expected, name.first)
        try:
            expected = _segment(disk, f"{folder}/{name}", expected, report, growing=report.live and name == names[-1])
        except (OSError, JournalVersionError) as error:
            report.unreadable.append(f"{name}: {error}")
    return report


def _segment(disk: Disk, path: str, expected: int, report: StreamReport, *, growing: bool) -> int:
    report.segments += 1
    report.closed = False
    scan = SegmentScan(disk, path)
    for piece in scan.count(expected):
        if isinstance(piece, int):
            expected = _counted(report, expected, piece)
        elif isinstance(piece, Frame):
            if piece.kind == frame.EVENT and piece.sequence >= expected:
                expected = _counted(report, _miss(report, expected, piece.sequence), piece.sequence + 1)
            elif piece.kind == frame.CLOSED:
                expected = _miss(report, expected, piece.sequence)
                report.closed = True
        elif isinstance(piece, Damage):
            report.damaged.append(DamagedRange(path, scan.offset - piece.length, piece.length))
        elif not growing:
            report.torn_bytes += piece.length
    report.bytes += scan.offset
    return expected


def _counted(report: StreamReport, expected: int, following: int) -> int:
    report.records += following - expected
    report.first = expected if report.first is None else report.first
    report.last = following - 1
    return following


def _miss(report: StreamReport, expected: int, sequence: int) -> int:
    if sequence > expected:
        report.missing.append((expected, sequence - 1))
    return max(expected, sequence)
