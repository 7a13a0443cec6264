"""The newest records of a stream first, read from the ends of its segments: what is shown of a journal of any size.

Damage is passed over. Who must know of it verifies the journal.
"""

from collections.abc import Iterator
from typing import Final

from evsys_bus.journal import Disk, Record, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.scanning import SegmentScan

_WINDOW_BYTES: Final = 1 << 20


def newest_first(disk: Disk, directory: str, stream: str) -> Iterator[Record]:
    """The events of a stream, from the last one that is whole back to the first.

    Raises:
        JournalVersionError: A newer version wrote them.
    """
    folder = f"{directory}/{stream}"
    names = layout.segments(disk, folder)
    above: int | None = None
    for name in reversed(names):
        for each in frames_backwards(disk, f"{folder}/{name}"):
            # Only the oldest segment there is gives out the starts it carries: the others repeat them.
            if each.kind != frame.EVENT and (each.kind != frame.CARRIED or name != names[0]):
                continue
            if above is None or each.sequence < above:
                above = each.sequence
                yield Record(each.sequence, bytes(each.payload))


def frames_backwards(disk: Disk, path: str) -> Iterator[Frame]:
    """The whole frames of one segment, last one first, of all kinds.

    Raises:
        JournalVersionError: A newer version wrote it.
    """
    next(SegmentScan(disk, path).pieces(), None)  # it is the one who knows versions
    end, window = disk.size(path), _WINDOW_BYTES
    while end > 0:
        start = max(0, end - window)
        # It begins in the middle of a frame, which the scan takes for damage and passes over.
        frames = [piece for piece in frame.scan(disk.read(path, start, end - start)) if isinstance(piece, Frame)]
        yield from reversed(frames)
        if start == 0:
            return
        if frames:
            end, window = start + frames[0].end - len(frames[0].payload) - frame.HEADER_BYTES, _WINDOW_BYTES
        else:
            window *= 2  # a record, or damage, that is larger
