"""Active uploads of checkpoints, read incrementally from the couriers' streams of a journal.

An upload is active if a live courier has reported it recently and it has not finished since.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from evsys_bus.cli.events import fields_of, type_of
from evsys_bus.cli.output.transfers import FinishedUpload, Transfer, UploadSnapshot
from evsys_bus.codec import decode
from evsys_bus.errors import CodecError
from evsys_bus.journal import Disk, JournalReader, OsDisk, Record, TailReader
from evsys_bus.journal.reader import read_newest_first

POLL_SECONDS: Final = 0.5
MAX_SILENT_SECONDS: Final = 300.0
"""The time that `upload_sink` waits for a byte before it restarts an upload."""
_MAX_RECORDS: Final = 1000
"""Limit of records that are searched, from the end, for the last report of an upload."""
_EVENT_TYPES: Final = ("upload_progress", "checkpoint_uploaded", "checkpoint_conflict")


class _UploadEvent(msgspec.Struct, frozen=True):
    """What is read of an event about an upload; its own class, in the package of the adapter, is not imported here."""

    run: str
    checkpoint: str
    url: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_second: float = 0.0
    eta_seconds: float | None = None
    bytes: int = 0
    seconds: float = 0.0
    why: str = ""


class _UploadKey(NamedTuple):
    """Identifies the uploads of one courier to one destination, which are sequential."""

    stream: str
    destination: str


class UploadMonitor:
    """Monitors the uploads of a journal from the first call on. Not thread-safe.

    Args:
        directory: The journal; it may not exist yet.
        clock: Monotonic seconds; the journal is read at most every `POLL_SECONDS`.
        wall_clock: Seconds since the epoch.
        disk: The file system.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> None:
        self._clock: Final = clock
        self._wall_clock: Final = wall_clock
        self._disk: Final = OsDisk() if disk is None else disk
        self._reader: Final = JournalReader(directory, self._disk)
        self._tails: dict[str, TailReader] | None = None
        self._transfers: dict[_UploadKey, Transfer] = {}
        self._next_poll = clock()

    def poll(self, *, force: bool = False) -> UploadSnapshot:
        """Return active uploads, and those that finished since the last call; ``force`` ignores the interval."""
        now, ended = self._clock(), list[FinishedUpload]()
        if force or now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            try:
                ended = self._read_new()
            except OSError:  # the disk is unavailable, or the journal is of a newer version
                self._transfers.clear()
        cutoff = self._wall_clock() - MAX_SILENT_SECONDS
        return UploadSnapshot([each for each in self._transfers.values() if each.reported_at > cutoff], ended)

    def _read_new(self) -> list[FinishedUpload]:
        ended: list[FinishedUpload] = []
        streams = self._reader.streams("c")
        if self._tails is None:
            self._tails = {stream: self._tail_from_end(stream) for stream in streams}
        for stream in streams:
            if stream not in self._tails:
                self._tails[stream] = self._reader.tail(stream)
            for at, kind, event in _upload_events(self._tails[stream].poll()):
                key = _upload_key(stream, event)
                if kind == "upload_progress":
                    self._transfers[key] = _make_transfer(at, event)
                else:
                    self._transfers.pop(key, None)
                    ended.append(_make_finished(at, kind, event))
        for key in list(self._transfers):
            if key.stream not in streams or not self._reader.is_live(key.stream):
                del self._transfers[key]
        return ended

    def _tail_from_end(self, stream: str) -> TailReader:
        """Skip earlier records: they are outdated, or repeated soon."""
        newest = next(read_newest_first(self._disk, self._reader.directory, stream), None)
        return self._reader.tail(stream, 0 if newest is None else newest.sequence)


def read_active_uploads(directory: Path) -> list[Transfer]:
    """Return the active uploads of a journal.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    reader, disk, cutoff = JournalReader(directory), OsDisk(), time.time() - MAX_SILENT_SECONDS
    last: dict[_UploadKey, Transfer | None] = {}
    for stream in filter(reader.is_live, reader.streams("c")):
        records = itertools.islice(read_newest_first(disk, reader.directory, stream), _MAX_RECORDS)
        for at, kind, event in _upload_events(records):
            active = _make_transfer(at, event) if kind == "upload_progress" else None
            last.setdefault(_upload_key(stream, event), active)
    return [each for each in last.values() if each is not None and each.reported_at > cutoff]


def _upload_events(records: Iterable[Record]) -> Iterator[tuple[float, str, _UploadEvent]]:
    """Yield the events about uploads, with their time and type."""
    for record in records:
        if not any(each.encode() in record.payload for each in _EVENT_TYPES):
            continue
        with suppress(CodecError, msgspec.ValidationError):
            envelope = decode(record.payload)
            kind = type_of(envelope.event)
            if kind in _EVENT_TYPES:
                yield envelope.time, kind, msgspec.convert(fields_of(envelope.event), _UploadEvent)


def _upload_key(stream: str, event: _UploadEvent) -> _UploadKey:
    return _UploadKey(stream, event.url.removesuffix(f"/{event.run}/{event.checkpoint}"))


def _make_transfer(at: float, event: _UploadEvent) -> Transfer:
    return Transfer(
        event.run, event.checkpoint, event.done_bytes, event.total_bytes, event.bytes_per_second, event.eta_seconds, at
    )


def _make_finished(at: float, kind: str, event: _UploadEvent) -> FinishedUpload:
    if kind == "checkpoint_conflict":
        return FinishedUpload("conflict", at, event.run, event.checkpoint, {"why": event.why, "url": event.url})
    facts = {"bytes": event.bytes, "seconds": event.seconds, "url": event.url}
    return FinishedUpload("uploaded", at, event.run, event.checkpoint, facts)
