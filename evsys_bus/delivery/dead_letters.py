"""`DeadLetters`: the file of the events that an adapter rejected for good, with the reason, one JSON object per line.

A line is ``{"stream", "seq", "at", "why", "event"}``, with the event as `evsys_bus.codec.to_json` encodes it. A record
that could not be decoded has its ``bytes`` in base64 instead. The cursor moves past an event only once it is in the
file.
"""

from base64 import b64encode
from typing import Final

import msgspec

from evsys_bus.codec import to_json
from evsys_bus.delivery.source import CorruptRecord
from evsys_bus.events import Envelope
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import Clock, Cursor, Disk, layout

MAX_PENDING: Final = 1000
"""How many dead letters may wait for the disk before the delivery has to wait."""
MAX_PENDING_BYTES: Final = 16 << 20


_NO_EVENT: Final = msgspec.Raw()


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the file."""

    stream: str
    seq: int
    at: float
    """When it was rejected; seconds since the epoch, wall clock."""
    why: str
    event: msgspec.Raw = _NO_EVENT
    """The envelope as JSON; empty for a corrupt record."""
    bytes: str | None = None
    """The corrupt record in base64."""


class DeadLetters:
    """The dead-letter file of one adapter; created when it is first needed."""

    def __init__(self, directory: str, name: str, *, disk: Disk, clock: Clock) -> None:
        self._folder: Final = f"{directory}/{layout.COURIERS}"
        self._path: Final = layout.courier_path(directory, name, "dead.jsonl")
        self._disk: Final = disk
        self._clock: Final = clock
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._file: int | None = None
        self._torn_at: int | None = None  # offset of a failed write that was not truncated
        self._already_written: set[tuple[str, int]] = set()
        """Stream and sequence of letters after the cursor, from a courier that ended before it moved the cursor."""

    @property
    def is_full(self) -> bool:
        """Whether no more should be added before `flush` succeeds."""
        return len(self._pending) >= MAX_PENDING or self._pending_bytes >= MAX_PENDING_BYTES

    def open(self, cursor: Cursor) -> None:
        """Find the letters after the cursor that are already in the file.

        Raises:
            OSError: The file cannot be read now.
        """
        try:
            size = self._disk.size(self._path)
        except FileNotFoundError:
            return
        tail = self._disk.read(self._path, max(0, size - 2 * MAX_PENDING_BYTES), 2 * MAX_PENDING_BYTES)
        for line in tail.splitlines():
            try:
                letter = _decode(line)
            except DECODE_ERRORS:
                continue  # cut off by a crash, or by reading only the tail
            if letter.seq > cursor.position(letter.stream).sequence:
                self._already_written.add((letter.stream, letter.seq))

    def add(self, stream: str, sequence: int, why: str, source: Envelope | CorruptRecord) -> None:
        """Add a letter; `flush` writes it to the file."""
        if (stream, sequence) in self._already_written:
            return
        event = msgspec.Raw(to_json(source)) if isinstance(source, Envelope) else _NO_EVENT
        record = b64encode(source.payload).decode() if isinstance(source, CorruptRecord) else None
        line = _encode(DeadLetter(stream, sequence, self._clock.wall(), why, event, record)) + b"\n"
        self._pending.append(line)
        self._pending_bytes += len(line)

    def flush(self) -> None:
        """Write all added letters to the file and sync it.

        Raises:
            OSError: The write failed; the letters stay pending for the next call.
        """
        if not self._pending:
            return
        if self._file is None:
            self._file = self._open()
        if self._torn_at is not None:  # a failed write that could not be truncated then
            self._disk.truncate(self._file, self._torn_at)
        data = b"".join(self._pending)
        before = self._torn_at = self._disk.length(self._file)
        written = 0
        try:
            while written < len(data):
                written += self._disk.write(self._file, data[written:])
            self._disk.sync(self._file)
            self._disk.sync_path(self._folder)
        except OSError:
            self._disk.truncate(self._file, before)
            self._torn_at = None
            raise
        self._torn_at = None
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._disk.close(self._file)
            self._file = self._torn_at = None

    def _open(self) -> int:
        self._disk.make_directory(self._folder)
        # `Disk.lock` is the only call that opens a file for appending and creates it if it is missing.
        file = self._disk.lock(self._path)
        if file is None:
            raise BlockingIOError(f"{self._path} is locked by another process")
        try:
            size = self._disk.length(file)
            start = max(0, size - 2 * MAX_PENDING_BYTES)
            complete_size = start + self._disk.read(self._path, start, size - start).rfind(b"\n") + 1
            if complete_size < size:
                self._disk.truncate(file, complete_size)  # a line that a crash cut off; its event is delivered again
        except OSError:
            self._disk.close(file)
            raise
        return file


_decode: Final = msgspec.json.Decoder(DeadLetter).decode
_encode: Final = msgspec.json.Encoder().encode
