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
from evsys_bus.journal.frame import Frame, FrameRun, IncompleteTail
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
        return layout.list_streams(self._disk, self.directory, family=family)

    def is_live(self, stream: str) -> bool:
        """Whether a process has the stream open for writing."""
        return self._disk.is_locked(f"{self.directory}/{stream}/{layout.LOCK}")

    def read(self, stream: str, after: int = 0) -> Iterator[Record]:
        """Yield the events after sequence ``after`` that the stream has now.

        Raises:
            JournalVersionError: A newer version wrote them.
        """
        return self.tail(stream, after).poll()

    def tail(self, stream: str, after: int = 0, *, patience: int = 0) -> "TailReader":
        """A reader of the stream to be polled for new events.

        Args:
            stream: Its name.
            after: Start after this sequence.
            patience: After how many failures in a row to read an existing segment it is skipped or, if it is the last
                one, treated as read. Earlier failures raise OSError.
        """
        return TailReader(self._disk, f"{self.directory}/{stream}", after, patience)


class TailReader:
    """Reads a stream incrementally, from a given sequence on."""

    def __init__(self, disk: Disk, folder: str, after: int = 0, patience: int = 0) -> None:
        self.last_sequence = after
        """The sequence of the last event returned."""
        self.corrupt_bytes = 0
        self.torn_bytes = 0
        """Bytes after the last complete record of segments that have a successor: writes cut short, as by a kill."""
        self.missing_ranges: list[tuple[int, int]] = []
        """Ranges of missing sequences, first and last."""
        self.unreadable_segments: list[str] = []
        """Segments that were skipped because they could not be read."""
        self._disk = disk
        self._folder = folder
        self._expected_sequence = (
            after + 1 if after else None
        )  # never one that was returned: a run that starts with it is new
        self._segment_names: Final = SegmentNames(disk, folder)
        self._segment: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._unconfirmed_end = -1
        """Where damage ended that was seen once and must be read again."""
        self._patience = patience
        self._read_failures = 0
        self._current_run: FrameRun | None = None
        """The last run returned, which the caller may not have consumed completely."""

    def poll(self) -> Iterator[Record]:
        """Yield the events since the last poll. Each one counts as returned when the iterator yields it.

        Raises:
            JournalVersionError: A newer version wrote what follows.
        """
        for first_sequence, payloads, _ in self.poll_runs():
            for sequence, payload in enumerate(payloads, first_sequence):
                self.last_sequence = sequence
                yield Record(sequence, payload)

    def poll_runs(self) -> Iterator[FrameRun]:
        """Yield the events since the last poll in runs of consecutive sequences, which is faster than `poll`.

        A run counts as returned when the next one is requested.
        """
        if self._current_run is not None:  # the caller stopped in the middle of it
            first_sequence, payloads, is_carried = self._current_run
            consumed = max(0, self.last_sequence + 1 - first_sequence)
            yield from self._emit(FrameRun(first_sequence + consumed, payloads[consumed:], is_carried))
        while True:
            if self._segment is None:
                start = self._segment_names.find(self.last_sequence + 1)
                if start is None:
                    return
                self._open_segment(start)
            yield from self._read_segment(is_final=False)
            next_segment = self._segment_names.next_after(cast("SegmentName", self._segment))
            if next_segment is None:
                return
            # The previous segment may have grown between the read and the listing. Now it is final.
            yield from self._read_segment(is_final=True)
            self._open_segment(next_segment)

    def _emit(self, run: FrameRun) -> Iterator[FrameRun]:
        if run.payloads:
            self._current_run = run
            yield run
            self.last_sequence = run.first_sequence + len(run.payloads) - 1
        self._current_run = None

    def _open_segment(self, name: SegmentName) -> None:
        self._advance_to(name.first_sequence)
        self._segment = name
        self._unconfirmed_end = -1
        self._scan = SegmentScan(self._disk, f"{self._folder}/{name}")

    def _read_segment(self, *, is_final: bool) -> Iterator[FrameRun]:
        """Read the rest of the segment. ``is_final``: nothing is appended to it any more."""
        scan = self._scan
        assert scan is not None
        try:
            while not (yield from self._read_items(scan, is_final=is_final)):
                pass
        except JournalVersionError:
            raise
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            if not is_missing:
                self._read_failures += 1
                if self._read_failures < self._patience:
                    raise
            if not is_final:
                return  # it may be temporary
            if is_missing:
                self._segment_names.invalidate()
            if not is_missing or scan.offset:  # otherwise its events only count as missing
                self.unreadable_segments.append(scan.path)
        self._read_failures = 0

    def _read_items(self, scan: SegmentScan, *, is_final: bool) -> Generator[FrameRun, None, bool]:
        """Yield what follows. Returns False if the same bytes must be read again."""
        for item in scan.frame_runs(self._expected_sequence or 1):
            if isinstance(item, FrameRun):
                self._advance_to(item.first_sequence)
                self._expected_sequence = max(self._expected_sequence or 1, item.first_sequence + len(item.payloads))
                yield from self._emit(item)
            elif isinstance(item, Frame):
                yield from self._emit(self._single_frame_run(item))
            elif isinstance(item, IncompleteTail):
                self.torn_bytes += item.length if is_final else 0
            elif is_final or scan.offset == self._unconfirmed_end:
                self.corrupt_bytes += item.length
            else:
                # It may have been read while it was being written. It counts as damage if it is there the second time.
                self._unconfirmed_end = scan.offset
                scan.offset -= item.length
                return False
        return True

    def _single_frame_run(self, single: Frame) -> FrameRun:
        """The run of a single event; empty for other frames and for events that were returned before."""
        if single.kind == frame.CLOSED:
            self._advance_to(single.sequence)
        if single.kind == frame.EVENT:
            self._advance_to(single.sequence)
            self._expected_sequence = max(self._expected_sequence or 1, single.sequence + 1)
        is_new = single.sequence > self.last_sequence and single.kind in {frame.EVENT, frame.CARRIED}
        return FrameRun(single.sequence, [bytes(single.payload)] if is_new else [], single.kind == frame.CARRIED)

    def _advance_to(self, sequence: int) -> None:
        """Record the sequences before this one that were not returned as missing."""
        if self._expected_sequence is not None and sequence > self._expected_sequence:
            self.missing_ranges.append((self._expected_sequence, sequence - 1))
        self._expected_sequence = max(self._expected_sequence or sequence, sequence)
