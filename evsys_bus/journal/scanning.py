"""Reading a stream: one segment after another, each in pieces, in memory that does not grow with the file."""

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
    """The names of a stream's segments, in order. The folder is listed only when the names from before are used up.

    Args:
        disk: The file system.
        folder: The stream's.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk: Final = disk
        self._folder: Final = folder
        self._ahead: deque[SegmentName] = deque()

    def holding(self, sequence: int) -> SegmentName | None:
        """The segment that holds this event, or the first one behind it; None where there is none."""
        names = layout.segments(self._disk, self._folder)
        at = max((place for place, name in enumerate(names) if name.first <= sequence), default=0)
        self._ahead = deque(names[at + 1 :])
        return names[at] if names else None

    def after(self, name: SegmentName) -> SegmentName | None:
        """The segment that follows, which ends this one; None where there is none yet."""
        while self._ahead and self._ahead[0] <= name:
            self._ahead.popleft()
        if not self._ahead:
            self._ahead.extend(each for each in layout.segments(self._disk, self._folder) if each > name)
        return self._ahead[0] if self._ahead else None

    def forget(self) -> None:
        """List the folder again before the next answer: segments were removed."""
        self._ahead.clear()


class SegmentScan:
    """A place in a segment."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.path = path
        self.offset = 0
        """Behind the last piece that was given out; what follows was not read, or is not whole yet."""
        self._disk = disk

    def pieces(self) -> Iterator[Frame | Damage | Rest]:
        """What follows, up to the end that the file has now. Only the last piece can be a `Rest`; it stays unread.

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
        """As `pieces`, but events that number on from ``expected`` come as runs."""

        def take(buffer: bytes, start: int, number: int) -> tuple[Run | None, int, int]:
            run, place, following = frame.take(buffer, start, number)
            return run if run.payloads else None, place, following

        return self._walk(expected, take)

    def count(self, expected: int) -> Iterator[Frame | Damage | Rest | int]:
        """As `pieces`, but whole events that number on from ``expected`` are given out as one sequence to come."""

        def take(buffer: bytes, start: int, number: int) -> tuple[int | None, int, int]:
            place, following = frame.pass_over(buffer, start, number)
            return following if following != number else None, place, following

        return self._walk(expected, take)

    def _walk(
        self, expected: int, take: Callable[[bytes, int, int], tuple[_Taken | None, int, int]]
    ) -> Iterator[Frame | Damage | Rest | _Taken]:
        """What is taken of the events that number on, and the pieces between.

        Args:
            expected: The sequence of the event to come.
            take: Given bytes, a place in them and the sequence to come: what it takes, and both behind that.
        """
        for buffer, place, at_end in self._chunks():
            base = self.offset - place
            while True:
                taken, place, expected = take(buffer, place, expected)  # noqa: PLW2901 # it moves on
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
        """Bytes from the offset on, where to start in them, and whether they reach the end of the file."""
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
            # A record, or damage, that is larger than what was read: read more of it.
            size = size * 2 if self.offset == base else _CHUNK_BYTES

    def _behind_head(self, buffer: bytes) -> int:
        version = frame.version_in(buffer)
        if version is None:
            return 0  # cut or damaged: whatever follows is found by its mark
        if version > frame.VERSION:
            raise JournalVersionError(
                f"{self.path} has format {version}; this version reads up to {frame.VERSION}",
                fix="upgrade evsys-bus where you read this journal",
            )
        return frame.HEAD_BYTES


def next_sequence_in(disk: Disk, folder: str, name: SegmentName) -> int:
    """The sequence behind the last whole event of a segment; 0 where it has none."""
    following = 0
    for piece in SegmentScan(disk, f"{folder}/{name}").count(name.first):
        if isinstance(piece, int):
            following = piece
        elif isinstance(piece, Frame) and piece.kind == frame.EVENT:
            following = max(following, piece.sequence + 1)
    return following
