"""The state of a journal's streams, read from file names, sizes and the last records only."""

from pathlib import Path
from typing import Literal

import msgspec

from evsys_bus.codec import decode
from evsys_bus.errors import CodecError
from evsys_bus.journal import JournalReader, OsDisk, frame, layout
from evsys_bus.journal.layout import LockOwner
from evsys_bus.journal.reader import read_frames_newest_first, read_newest_first
from evsys_bus.journal.stream_lock import read_stream_owner


class StreamState(msgspec.Struct):
    """The state of one stream."""

    stream: str
    state: Literal["live", "closed", "dead"]
    owner: LockOwner | None
    """The current or last writer."""
    segments: int
    bytes: int
    first: int | None
    """The sequence of the oldest retained event; None if there is no event."""
    last: int | None
    last_time: float | None
    """When the last event was published."""


def read_stream_states(directory: Path) -> list[StreamState]:
    """Read the state of every stream.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    reader = JournalReader(directory)
    return [_read_stream_state(reader, stream) for stream in reader.streams()]


def _read_stream_state(reader: JournalReader, stream: str) -> StreamState:
    disk = OsDisk()
    folder = f"{reader.directory}/{stream}"
    live = reader.is_live(stream)
    names = layout.list_segments(disk, folder)
    # A writer that closes a stream without events only removes its reserve file, which a kill leaves behind.
    closed = not names and _has_no_reserve(disk, folder)
    for name in names[-1:]:
        newest = next(read_frames_newest_first(disk, f"{folder}/{name}"), None)
        closed = newest is not None and newest.kind == frame.CLOSED
    last = next(read_newest_first(disk, reader.directory, stream), None)
    last_time = None
    if last is not None:
        try:
            last_time = decode(last.payload).time
        except CodecError:
            pass  # intact but not decodable: its sequence is still known
    return StreamState(
        stream=stream,
        state="live" if live else "closed" if closed else "dead",
        owner=read_stream_owner(disk, reader.directory, stream),
        segments=len(names),
        bytes=sum(disk.size(f"{folder}/{name}") for name in names),
        first=None if last is None else names[0].first_sequence,
        last=None if last is None else last.sequence,
        last_time=last_time,
    )


def _has_no_reserve(disk: OsDisk, folder: str) -> bool:
    try:
        return layout.RESERVE not in disk.names(folder)
    except FileNotFoundError:  # the stream's directory is missing
        return False
