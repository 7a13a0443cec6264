"""`JournalReader`: what a journal holds, read while it is written or years later.

Damage is set aside and counted, never fatal; a record that was read before is passed over; a record on its way is not
damage. A reader writes nothing.
"""

import os
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple, cast

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import frame, layout
from evsys_bus.journal.frame import Frame, Rest, Run
from evsys_bus.journal.layout import Family, SegmentName
from evsys_bus.journal.scanning import SegmentNames, SegmentScan


class Record(NamedTuple):
    """One event, still encoded."""

    sequence: int
    payload: bytes


class JournalReader:
    """The streams of a journal."""

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.directory: Final = os.fspath(directory)
        self._disk = OsDisk() if disk is None else disk

    def streams(self, family: Family = "r") -> list[str]:
        """Their names, the one that was begun first coming first. None where there is no journal."""
        return layout.streams(self._disk, self.directory, family=family)

    def is_live(self, stream: str) -> bool:
        """Whether a process has the stream open for writing."""
        return self._disk.is_locked(f"{self.directory}/{stream}/{layout.LOCK}")

    def read(self, stream: str, after: int = 0) -> Iterator[Record]:
        """The events behind sequence ``after``, up to what is there now.

        Raises:
            JournalVersionError: A newer version wrote them.
        """
        return self.tail(stream, after).poll()

    def tail(self, stream: str, after: int = 0, *, patience: int = 0) -> "Tail":
        """A place in the stream, to be polled.

        Args:
            stream: Its name.
            after: Give out what comes behind this sequence.
            patience: How often in a row a segment that is there and cannot be read raises OSError, before it is passed
                over, or, where none follows it, taken to have been read to its end.
        """
        return Tail(self._disk, f"{self.directory}/{stream}", after, patience)


class Tail:
    """A place in a stream."""

    def __init__(self, disk: Disk, folder: str, after: int = 0, patience: int = 0) -> None:
        self.last = after
        """The sequence of the last event given out."""
        self.damaged_bytes = 0
        self.torn_bytes = 0
        """Behind the last whole record of segments that are followed by another: writes cut short, as by a kill."""
        self.missing: list[tuple[int, int]] = []
        """The sequences, first and last, that should have been there."""
        self.unreadable: list[str] = []
        """Segments that could not be read, and were passed over."""
        self._disk = disk
        self._folder = folder
        self._expected = after + 1 if after else None  # never one that was given out: what numbers on from it is new
        self._names: Final = SegmentNames(disk, folder)
        self._at: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._suspect = -1
        """Where damage ended that was seen once."""
        self._patience = patience
        self._refusals = 0
        self._given: Run | None = None
        """Of which not all may have been taken."""

    def poll(self) -> Iterator[Record]:
        """What came since the last poll; a record counts as given out when the iterator hands it over.

        Raises:
            JournalVersionError: A newer version wrote what follows.
        """
        for first, payloads, _ in self.runs():
            for sequence, payload in enumerate(payloads, first):
                self.last = sequence
                yield Record(sequence, payload)

    def runs(self) -> Iterator[Run]:
        """As `poll`, for those who take many: what numbers on comes together.

        A run counts as given out when the next one is asked for.
        """
        if self._given is not None:  # somebody stopped in the middle of it
            first, payloads, carried = self._given
            taken = max(0, self.last + 1 - first)
            yield from self._give(Run(first + taken, payloads[taken:], carried))
        while True:
            if self._at is None:
                start = self._names.holding(self.last + 1)
                if start is None:
                    return
                self._enter(start)
            yield from self._drain(ended=False)
            following = self._names.after(cast("SegmentName", self._at))
            if following is None:
                return
            # The old one may have grown between the reading and the listing; now it grows no more.
            yield from self._drain(ended=True)
            self._enter(following)

    def _give(self, run: Run) -> Iterator[Run]:
        if run.payloads:
            self._given = run
            yield run
            self.last = run.first + len(run.payloads) - 1
        self._given = None

    def _enter(self, name: SegmentName) -> None:
        self._expect(name.first)
        self._at = name
        self._suspect = -1
        self._scan = SegmentScan(self._disk, f"{self._folder}/{name}")

    def _drain(self, *, ended: bool) -> Iterator[Run]:
        """The rest of the segment; ``ended``: nothing is added to it any more."""
        scan = self._scan
        assert scan is not None
        try:
            while not (yield from self._read_on(scan, ended=ended)):
                pass
        except JournalVersionError:
            raise
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)
            if not is_gone:
                self._refusals += 1
                if self._refusals < self._patience:
                    raise
            if not ended:
                return  # it may be for now only
            if is_gone:
                self._names.forget()
            if not is_gone or scan.offset:  # else its events are missing, and nothing more
                self.unreadable.append(scan.path)
        self._refusals = 0

    def _read_on(self, scan: SegmentScan, *, ended: bool) -> Generator[Run, None, bool]:
        """Give out what follows; False where the same place has to be read again."""
        for piece in scan.runs(self._expected or 1):
            if isinstance(piece, Run):
                self._expect(piece.first)
                self._expected = max(self._expected or 1, piece.first + len(piece.payloads))
                yield from self._give(piece)
            elif isinstance(piece, Frame):
                yield from self._give(self._single(piece))
            elif isinstance(piece, Rest):
                self.torn_bytes += piece.length if ended else 0
            elif ended or scan.offset == self._suspect:
                self.damaged_bytes += piece.length
            else:
                # Perhaps it was read while it was written. Damage is what is damage when it is read again.
                self._suspect = scan.offset
                scan.offset -= piece.length
                return False
        return True

    def _single(self, piece: Frame) -> Run:
        """The run of an event that stands alone; empty where it is none, or was given out."""
        if piece.kind == frame.CLOSED:
            self._expect(piece.sequence)
        if piece.kind == frame.EVENT:
            self._expect(piece.sequence)
            self._expected = max(self._expected or 1, piece.sequence + 1)
        new = piece.sequence > self.last and piece.kind in {frame.EVENT, frame.CARRIED}
        return Run(piece.sequence, [bytes(piece.payload)] if new else [], piece.kind == frame.CARRIED)

    def _expect(self, sequence: int) -> None:
        """All before this one has been given out, or is missing."""
        if self._expected is not None and sequence > self._expected:
            self.missing.append((self._expected, sequence - 1))
        self._expected = max(self._expected or sequence, sequence)
