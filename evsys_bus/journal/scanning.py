"""Reading a stream segment by segment, in chunks, with memory use independent of the file size."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from evsys_bus.disk import Disk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import Damage, Frame, Rest, Run, scan
from evsys_bus.journal.layout import SegmentName

_CHUNK_BYTES: Final = 1 << 20
_Taken = TypeVar("_Taken")


class SegmentNames:
    """Iterates over the segments of a stream. The folder is listed again only when the known names are used up.

    Args:
        disk: The file system.
        folder: The stream's folder.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk: Final = disk
        self._folder: Final = folder
        self._ahead: deque[SegmentName] = deque()

    def holding(self, sequence: int) -> SegmentName | None:
        """The segment that contains this sequence, or the first one after it; None if there is none."""
        names = layout.segments(self._disk, self._folder)
        at = max((place for place, name in enumerate(names) if name.first <= sequence), default=0)
        self._ahead = deque(names[at + 1 :])
        return names[at] if names else None

    def after(self, name: SegmentName) -> SegmentName | None:
        """The next segment, or None if there is none yet. A segment that has a successor is final."""
        while self._ahead and self._ahead[0] <= name:
            self._ahead.popleft()
        if not self._ahead:
            self._ahead.extend(each for each in layout.segments(self._disk, self._folder) if each > name)
        return self._ahead[0] if self._ahead else None

    def forget(self) -> None:
        """List the folder again on the next call, because segments were removed."""
        self._ahead.clear()


class SegmentScan:
    """A position in a segment."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.path = path
        self.offset = 0
        """The offset after the last item returned. What follows was not read or is incomplete."""
        self._disk = disk

    def pieces(self) -> Iterator[Frame | Damage | Rest]:
        """Yield what follows, up to the current end of the file.

        Only the last item can be a `Rest`; it is read again later.

        Raises:
            JournalVersionError: A newer version wrote it.
            OSError: It cannot be read.
        """
        for buffer, start, at_end in self._chunks():
            base = self.offset - start
            for piece in scan(buffer, start):
                if not isinstance(piece, Rest):
                    self.offset = base + piece.end
                    yield piece
                elif at_end:
                    yield piece

    def runs(self, expected: int) -> Iterator[Frame | Damage | Rest | Run]:
        """Yield what follows, with events of consecutive sequences from ``expected`` on combined into runs."""

        def take(buffer: bytes, start: int, number: int) -> tuple[Run | None, int, int]:
            run, place, following = frame.take(buffer, start, number)
            return run if run.payloads else None, place, following

        return self._walk(expected, take)

    def count(self, expected: int) -> Iterator[Frame | Damage | Rest | int]:
        """Yield what follows; for events of consecutive sequences from ``expected`` on, only the next sequence."""

        def take(buffer: bytes, start: int, number: int) -> tuple[int | None, int, int]:
            place, following = frame.pass_over(buffer, start, number)
            return following if following != number else None, place, following

        return self._walk(expected, take)

    def _walk(
        self, expected: int, take: Callable[[bytes, int, int], tuple[_Taken | None, int, int]]
    ) -> Iterator[Frame | Damage | Rest | _Taken]:
        """Yield the runs of events and the items between them.

        Args:
            expected: The next expected sequence.
            take: Reads a run: given a buffer, an offset and the expected sequence, returns a result or None, the offset
                after the run and the next expected sequence.
        """
        for buffer, place, at_end in self._chunks():
            base = self.offset - place
            while True:
                taken, place, expected = take(buffer, place, expected)  # noqa: PLW2901 # advances the position
                self.offset = base + place
                if taken is not None:
                    yield taken
                piece = next(scan(buffer, place), None)
                if piece is None:
                    break
                if isinstance(piece, Rest):
                    if at_end:
                        yield piece
                    break
                place = piece.end  # noqa: PLW2901 # as above
                self.offset = base + place
                if isinstance(piece, Frame) and piece.kind == frame.EVENT and piece.sequence >= expected:
                    expected = piece.sequence + 1
                yield piece

    def _chunks(self) -> Iterator[tuple[bytes, int, bool]]:
        """Yield buffers from the offset on, the start position in each, and whether it reaches the end of the file."""
        size = _CHUNK_BYTES
        while True:
            base = self.offset
            buffer = self._disk.read(self.path, base, size)
            at_end = len(buffer) < size
            start = self._behind_head(buffer) if base == 0 else 0
            self.offset = base + start
            yield buffer, start, at_end
            if at_end:
                return
            # A record or a damaged range is larger than the buffer: read more.
            size = size * 2 if self.offset == base else _CHUNK_BYTES

    def _behind_head(self, buffer: bytes) -> int:
        version = frame.version_in(buffer)
        if version is None:
            return 0  # cut or damaged: frames are found by their mark
        if version > frame.VERSION:
            raise JournalVersionError(
                f"{self.path} has format {version}; this version reads up to {frame.VERSION}",
                fix="upgrade evsys-bus where you read this journal",
            )
        return frame.HEAD_BYTES


def next_sequence_in(disk: Disk, folder: str, name: SegmentName) -> int:
    """The sequence after the last complete event of a segment; 0 if it has none."""
    following = 0
    for piece in SegmentScan(disk, f"{folder}/{name}").count(name.first):
        if isinstance(piece, int):
            following = piece
        elif isinstance(piece, Frame) and piece.kind == frame.EVENT:
            following = max(following, piece.sequence + 1)
    return following
