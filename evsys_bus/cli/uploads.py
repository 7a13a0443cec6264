"""Active uploads of checkpoints, read incrementally from the couriers' streams of a journal.

An upload is active if a live courier has reported it recently and it has not finished since.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded, UploadProgress
from evsys_bus.cli.backwards import newest_first
from evsys_bus.cli.progress.transfers import Ended, Transfer, Uploads
from evsys_bus.codec import decode
from evsys_bus.errors import CodecError
from evsys_bus.journal import Disk, JournalReader, OsDisk, Record, Tail

LOOK_SECONDS: Final = 0.5
MOST_SILENT_SECONDS: Final = 300.0
"""The time that `upload_sink` waits for a byte before it restarts an upload."""
_MOST_RECORDS: Final = 1000
"""Limit of records that are searched, from the end, for the last report of an upload."""
_WORDS: Final = (b"upload_progress", b"checkpoint_uploaded", b"checkpoint_conflict")

_Word = UploadProgress | CheckpointUploaded | CheckpointConflict


class _Lane(NamedTuple):
    """Identifies the uploads of one courier to one destination, which are sequential."""

    stream: str
    destination: str


class UploadWatch:
    """Monitors the uploads of a journal from the first call on. Not thread-safe.

    Args:
        directory: The journal; it may not exist yet.
        clock: Monotonic seconds; the journal is read at most every `LOOK_SECONDS`.
        wall: Seconds since the epoch.
        disk: The file system.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> None:
        self._clock: Final = clock
        self._wall: Final = wall
        self._disk: Final = OsDisk() if disk is None else disk
        self._reader: Final = JournalReader(directory, self._disk)
        self._tails: dict[str, Tail] | None = None
        self._lanes: dict[_Lane, Transfer] = {}
        self._due = clock()

    def look(self, *, at_once: bool = False) -> Uploads:
        """Return active uploads, and those that finished since the last call; ``at_once`` ignores the interval."""
        now, ended = self._clock(), list[Ended]()
        if at_once or now >= self._due:
            self._due = now + LOOK_SECONDS
            try:
                ended = self._read_on()
            except OSError:  # the disk is unavailable, or the journal is of a newer version
                self._lanes.clear()
        recent = self._wall() - MOST_SILENT_SECONDS
        return Uploads([each for each in self._lanes.values() if each.told > recent], ended)

    def _read_on(self) -> list[Ended]:
        ended: list[Ended] = []
        streams = self._reader.streams("c")
        if self._tails is None:
            self._tails = {stream: self._at_end(stream) for stream in streams}
        for stream in streams:
            if stream not in self._tails:
                self._tails[stream] = self._reader.tail(stream)
            for at, word in _words(self._tails[stream].poll()):
                lane = _lane(stream, word)
                if isinstance(word, UploadProgress):
                    self._lanes[lane] = _transfer(at, word)
                else:
                    self._lanes.pop(lane, None)
                    ended.append(_ended(at, word))
        for lane in list(self._lanes):
            if lane.stream not in streams or not self._reader.is_live(lane.stream):
                del self._lanes[lane]
        return ended

    def _at_end(self, stream: str) -> Tail:
        """Skip earlier records: they are outdated, or repeated soon."""
        newest = next(newest_first(self._disk, self._reader.directory, stream), None)
        return self._reader.tail(stream, 0 if newest is None else newest.sequence)


def uploads_under_way(directory: Path) -> list[Transfer]:
    """Return the active uploads of a journal.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    reader, disk, recent = JournalReader(directory), OsDisk(), time.time() - MOST_SILENT_SECONDS
    last: dict[_Lane, Transfer | None] = {}
    for stream in filter(reader.is_live, reader.streams("c")):
        records = itertools.islice(newest_first(disk, reader.directory, stream), _MOST_RECORDS)
        for at, word in _words(records):
            last.setdefault(_lane(stream, word), _transfer(at, word) if isinstance(word, UploadProgress) else None)
    return [each for each in last.values() if each is not None and each.told > recent]


def _words(records: Iterable[Record]) -> Iterator[tuple[float, _Word]]:
    """Yield the events about uploads, with their time."""
    for record in records:
        if not any(word in record.payload for word in _WORDS):
            continue
        try:
            envelope = decode(record.payload)
        except CodecError:
            continue
        if isinstance(envelope.event, UploadProgress | CheckpointUploaded | CheckpointConflict):
            yield envelope.time, envelope.event


def _lane(stream: str, word: _Word) -> _Lane:
    return _Lane(stream, word.url.removesuffix(f"/{word.run}/{word.checkpoint}"))


def _transfer(at: float, word: UploadProgress) -> Transfer:
    return Transfer(
        word.run, word.checkpoint, word.done_bytes, word.total_bytes, word.bytes_per_second, word.eta_seconds, at
    )


def _ended(at: float, word: CheckpointUploaded | CheckpointConflict) -> Ended:
    if isinstance(word, CheckpointConflict):
        return Ended("conflict", at, word.run, word.checkpoint, {"why": word.why, "url": word.url})
    facts = {"bytes": word.bytes, "seconds": word.seconds, "url": word.url}
    return Ended("uploaded", at, word.run, word.checkpoint, facts)
