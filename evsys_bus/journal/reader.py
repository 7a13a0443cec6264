"""`JournalReader`: reads a journal, while it is being written or later.

Damaged bytes are skipped and counted, never fatal. Repeated records are skipped. An incomplete record at the end of a
live stream is not damage. A reader writes nothing.
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
    """An event, still encoded."""

    sequence: int
    payload: bytes


class JournalReader:
    """Reads the streams of a journal."""

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.directory: Final = os.fspath(directory)
        self._disk = OsDisk() if disk is None else disk

    def streams(self, family: Family = "r") -> list[str]:
        """List the streams in order; none where there is no journal."""
        return layout.streams(self._disk, self.directory, family=family)

    def is_live(self, stream: str) -> bool:
        """Whether a process has the stream open for writing."""
        return self._disk.is_locked(f"{self.directory}/{stream}/{layout.LOCK}")

    def read(self, stream: str, after: int = 0) -> Iterator[Record]:
        """Yield the events after sequence ``after`` that the stream has now.

        Raises:
            JournalVersionError: A newer version wrote them.
        """
        return self.tail(stream, after).poll()

    def tail(self, stream: str, after: int = 0, *, patience: int = 0) -> "Tail":
        """A reader of the stream to be polled for new events.

        Args:
            stream: Its name.
            after: Start after this sequence.
            patience: After how many failures in a row to read an existing segment it is skipped or, if it is the last
                one, treated as read. Earlier failures raise OSError.
        """
        return Tail(self._disk, f"{self.directory}/{stream}", after, patience)


class Tail:
    """Reads a stream incrementally, from a given sequence on."""

    def __init__(self, disk: Disk, folder: str, after: int = 0, patience: int = 0) -> None:
        self.last = after
        """The sequence of the last event returned."""
        self.damaged_bytes = 0
        self.torn_bytes = 0
        """Bytes after the last complete record of segments that have a successor: writes cut short, as by a kill."""
        self.missing: list[tuple[int, int]] = []
        """Ranges of missing sequences, first and last."""
        self.unreadable: list[str] = []
        """Segments that were skipped because they could not be read."""
        self._disk = disk
        self._folder = folder
        self._expected = after + 1 if after else None  # never one that was returned: a run that starts with it is new
        self._names: Final = SegmentNames(disk, folder)
        self._at: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._suspect = -1
        """Where damage ended that was seen once and must be read again."""
        self._patience = patience
        self._refusals = 0
        self._given: Run | None = None
        """The last run returned, which the caller may not have consumed completely."""

    def poll(self) -> Iterator[Record]:
        """Yield the events since the last poll. Each one counts as returned when the iterator yields it.

        Raises:
            JournalVersionError: A newer version wrote what follows.
        """
        for first, payloads, _ in self.runs():
            for sequence, payload in enumerate(payloads, first):
                self.last = sequence
                yield Record(sequence, payload)

    def runs(self) -> Iterator[Run]:
        """Yield the events since the last poll in runs of consecutive sequences, which is faster than `poll`.

        A run counts as returned when the next one is requested.
        """
        if self._given is not None:  # the caller stopped in the middle of it
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
            # The previous segment may have grown between the read and the listing. Now it is final.
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
        """Read the rest of the segment. ``ended``: nothing is appended to it any more."""
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
                return  # it may be temporary
            if is_gone:
                self._names.forget()
            if not is_gone or scan.offset:  # otherwise its events only count as missing
                self.unreadable.append(scan.path)
        self._refusals = 0

    def _read_on(self, scan: SegmentScan, *, ended: bool) -> Generator[Run, None, bool]:
        """Yield what follows. Returns False if the same bytes must be read again."""
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
                # It may have been read while it was being written. It counts as damage if it is there the second time.
                self._suspect = scan.offset
                scan.offset -= piece.length
                return False
        return True

    def _single(self, piece: Frame) -> Run:
        """The run of a single event; empty for other frames and for events that were returned before."""
        if piece.kind == frame.CLOSED:
            self._expect(piece.sequence)
        if piece.kind == frame.EVENT:
            self._expect(piece.sequence)
            self._expected = max(self._expected or 1, piece.sequence + 1)
        new = piece.sequence > self.last and piece.kind in {frame.EVENT, frame.CARRIED}
        return Run(piece.sequence, [bytes(piece.payload)] if new else [], piece.kind == frame.CARRIED)

    def _expect(self, sequence: int) -> None:
        """Record the sequences before this one that were not returned as missing."""
        if self._expected is not None and sequence > self._expected:
            self.missing.append((self._expected, sequence - 1))
        self._expected = max(self._expected or sequence, sequence)
