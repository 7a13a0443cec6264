"""Reading a stream newest record first, from the ends of its segments, so that the cost does not grow with its size.

Damaged bytes are skipped without a report; `evsys_bus.journal.verify` reports them.
"""

from collections.abc import Iterator
from typing import Final

from evsys_bus.journal import Disk, Record, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.scanning import SegmentScan

_WINDOW_BYTES: Final = 1 << 20


def read_newest_first(disk: Disk, directory: str, stream: str) -> Iterator[Record]:
    """Yield the intact events of a stream, newest first.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote them.
    """
    folder = f"{directory}/{stream}"
    names = layout.list_segments(disk, folder)
    previous_sequence: int | None = None
    for name in reversed(names):
        for each in read_frames_newest_first(disk, f"{folder}/{name}"):
            # Carried start events count in the oldest segment only; the later segments repeat them.
            if each.kind != frame.EVENT and (each.kind != frame.CARRIED or name != names[0]):
                continue
            if previous_sequence is None or each.sequence < previous_sequence:
                previous_sequence = each.sequence
                yield Record(each.sequence, bytes(each.payload))


def read_frames_newest_first(disk: Disk, path: str) -> Iterator[Frame]:
    """Yield the intact frames of one segment, newest first, of all kinds.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    next(SegmentScan(disk, path).frames(), None)  # checks the format version
    end, window = disk.size(path), _WINDOW_BYTES
    while end > 0:
        start = max(0, end - window)
        # The window may begin in the middle of a frame, which the scan treats as damage and skips.
        frames = [piece for piece in frame.scan(disk.read(path, start, end - start)) if isinstance(piece, Frame)]
        yield from reversed(frames)
        if start == 0:
            return
        if frames:
            end, window = start + frames[0].end - len(frames[0].payload) - frame.FRAME_HEADER_BYTES, _WINDOW_BYTES
        else:
            window *= 2  # a record, or a damaged range, is larger than the window
