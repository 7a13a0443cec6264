"""Frames: the encoding of records in a segment, and the search for records in torn or damaged bytes.

    segment  = head (12 bytes), frame, frame, …
    head     = "EVSYSJ" · version (u16) · checksum (u32) of these eight bytes
    frame    = checksum (u32) · mark "EJ" · kind (u16) · length (u32) · sequence (u64) · payload (length bytes)

All numbers are little-endian. A frame's checksum is the CRC-32 of all bytes of the frame after the checksum itself. The
mark makes it possible to find the next frame after a damaged one without trying every byte. The head has a checksum so
that a flipped bit in it is not read as a later format version. This module works on bytes and opens no files. The
format is described in docs/journal-format.md.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple
from zlib import crc32

VERSION: Final = 1
"""The format version. A reader refuses later ones; new kinds of frames do not change it."""
MAX_PAYLOAD_BYTES: Final = 64 << 20
"""A larger length is treated as damage. The codec keeps events far below it."""

EVENT: Final = 0
"""Kind: an envelope. Readers skip kinds that they do not know."""
CARRIED: Final = 1
"""Kind: the start event of a run that was open when the segment was created."""
CLOSED: Final = 2
"""Kind: the writer closed the journal. No payload; its sequence is the one that the next event would have."""

_CHECKSUM_BYTES: Final = 4
_CHECKED_HEADER: Final = struct.Struct("<2sHIQ")
_FRAME_HEADER: Final = struct.Struct("<I2sHIQ")
FRAME_HEADER_BYTES: Final = _FRAME_HEADER.size
_SEGMENT_HEADER: Final = struct.Struct("<6sHI")
SEGMENT_HEADER_BYTES: Final = _SEGMENT_HEADER.size
_MAGIC: Final = b"EVSYSJ"

MARKER: Final = b"EJ"
pack_checked_header: Final = _CHECKED_HEADER.pack
pack_checksum: Final = struct.Struct("<I").pack


class Frame(NamedTuple):
    """A complete record."""

    end: int
    """The offset after its last byte in the scanned buffer."""
    sequence: int
    kind: int
    payload: memoryview


class CorruptRange(NamedTuple):
    """Bytes that are not a valid frame, followed by a valid frame."""

    end: int
    length: int


class FrameRun(NamedTuple):
    """Complete events with consecutive sequences."""

    first_sequence: int
    """The sequence of the first event."""
    length: int
    """How many events these are."""
    payloads: list[bytes]
    """Empty where events are only counted."""
    is_carried: bool = False
    """Whether these are start events that the segment repeats because their runs were open when it was created."""


class IncompleteTail(NamedTuple):
    """The end of the buffer: an incomplete frame, which may still be being written."""

    length: int


def pack(sequence: int, payload: bytes, kind: int = EVENT) -> bytes:
    """Encode a frame, to be appended by a single write."""
    checked = pack_checked_header(MARKER, kind, len(payload), sequence) + payload
    return pack_checksum(crc32(checked)) + checked


def pack_segment_header(version: int = VERSION) -> bytes:
    """Encode the header of a segment."""
    checked = _SEGMENT_HEADER.pack(_MAGIC, version, 0)[:-_CHECKSUM_BYTES]
    return checked + crc32(checked).to_bytes(4, "little")


def read_version(buffer: bytes) -> int | None:
    """The version in a segment's header; None if the header is damaged or cut."""
    if len(buffer) < SEGMENT_HEADER_BYTES:
        return None
    magic, version, checksum = _SEGMENT_HEADER.unpack_from(buffer)
    is_valid = magic == _MAGIC and checksum == crc32(buffer[: SEGMENT_HEADER_BYTES - _CHECKSUM_BYTES])
    return version if is_valid else None


def scan(buffer: bytes, start: int = 0) -> Iterator[Frame | CorruptRange | IncompleteTail]:
    """Yield the frames in the buffer from ``start`` on, and the bytes between them that are not frames.

    Only the last item can be a `IncompleteTail`. The bytes do not show whether it is being written, torn or damaged:
    that depends on whether the writer is alive and whether another segment follows.
    """
    view = memoryview(buffer)
    size = len(buffer)
    while start < size:
        frame = _parse_frame(view, start)
        if frame is not None:
            yield frame
            start = frame.end
            continue
        found = _find_next_frame(buffer, view, start + 1)
        if found is None:
            yield IncompleteTail(size - start)
            return
        yield CorruptRange(found, found - start)
        start = found


def read_run(buffer: bytes, start: int, sequence: int, *, count_only: bool = False) -> tuple[FrameRun, int]:
    """Read complete events with consecutive sequences. Returns them and the offset after them.

    Equivalent to `scan`, in a fraction of the time, because nearly all records are such events.

    Args:
        buffer: The bytes.
        start: Where to start.
        sequence: The first sequence. If the next record is another one, the run is empty.
        count_only: Whether to leave the payloads out.
    """
    view = memoryview(buffer)
    size = len(buffer)
    last_start = size - FRAME_HEADER_BYTES
    unpack = _FRAME_HEADER.unpack_from
    payloads: list[bytes] = []
    add_payload = payloads.append
    next_sequence = sequence
    while start <= last_start:
        checksum, marker, kind, length, frame_sequence = unpack(buffer, start)
        payload_start = start + FRAME_HEADER_BYTES
        end = payload_start + length
        if frame_sequence != next_sequence or kind or marker != MARKER or end > size:
            break
        if crc32(view[start + _CHECKSUM_BYTES : end]) != checksum:
            break
        if not count_only:
            add_payload(buffer[payload_start:end])
        start = end
        next_sequence += 1
    return FrameRun(sequence, next_sequence - sequence, payloads), start


def _parse_frame(view: memoryview, start: int) -> Frame | None:
    payload_start = start + FRAME_HEADER_BYTES
    if payload_start > len(view):
        return None
    checksum, marker, kind, length, sequence = _FRAME_HEADER.unpack_from(view, start)
    end = payload_start + length
    if marker != MARKER or length > MAX_PAYLOAD_BYTES or end > len(view):
        return None
    if crc32(view[start + _CHECKSUM_BYTES : end]) != checksum:
        return None
    return Frame(end, sequence, kind, view[payload_start:end])


def _find_next_frame(buffer: bytes, view: memoryview, start: int) -> int | None:
    """The offset of the next valid frame."""
    marker_offset = buffer.find(MARKER, start + _CHECKSUM_BYTES)
    while marker_offset >= 0:
        if _parse_frame(view, marker_offset - _CHECKSUM_BYTES) is not None:
            return marker_offset - _CHECKSUM_BYTES
        marker_offset = buffer.find(MARKER, marker_offset + 1)
    return None
