"""Frames: how a record stands in a segment, and how records are found again in bytes that may be torn or damaged.

    segment  = head (12 bytes), frame, frame, …
    head     = "EVSYSJ" · version (u16) · checksum (u32) of these eight bytes
    frame    = checksum (u32) · mark "EJ" · kind (u16) · length (u32) · sequence (u64) · payload (length bytes)

All numbers are little-endian. A frame's checksum is CRC-32 of everything behind it, so no bit of a frame can change
unnoticed. The mark is there to find the next frame behind a damaged one without trying every byte. The head has a
checksum so that a flipped bit in it is not taken for a format of the future. This module owns the bytes, and knows no
file. The page for people is docs/journal-format.md.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple
from zlib import crc32

VERSION: Final = 1
"""Of the format. A reader refuses a newer one; kinds of frames may be added without a new version."""
MAX_PAYLOAD_BYTES: Final = 64 << 20
"""A length beyond this is damage; the codec keeps events far below it."""

EVENT: Final = 0
"""Kind: an envelope. Readers pass over kinds that they do not know."""
CARRIED: Final = 1
"""Kind: the start event of a run that was open when the segment began, with the sequence it was first given."""
CLOSED: Final = 2
"""Kind: the writer closed the journal; no payload, and the sequence that the next event would have had."""

_SUM_BYTES: Final = 4
_BODY: Final = struct.Struct("<2sHIQ")
_FRAME: Final = struct.Struct("<I2sHIQ")
HEADER_BYTES: Final = _FRAME.size
_HEAD: Final = struct.Struct("<6sHI")
HEAD_BYTES: Final = _HEAD.size
_MAGIC: Final = b"EVSYSJ"

MARK: Final = b"EJ"
pack_body: Final = _BODY.pack
pack_sum: Final = struct.Struct("<I").pack


class Frame(NamedTuple):
    """One whole record."""

    end: int
    """Offset behind its last byte, in the buffer that was scanned."""
    sequence: int
    kind: int
    payload: memoryview


class Damage(NamedTuple):
    """Bytes that are no frame, with a whole frame behind them."""

    end: int
    length: int


class Run(NamedTuple):
    """Whole events that number on, one after another."""

    first: int
    """The sequence of the first of them."""
    payloads: list[bytes]
    carried: bool = False
    """Whether these are start events that the segment repeats, of what was open when it began."""


class Rest(NamedTuple):
    """The end of the buffer: a frame that is not whole, or not whole yet."""

    length: int


def pack(sequence: int, payload: bytes, kind: int = EVENT) -> bytes:
    """One frame, to be appended by one write."""
    body = pack_body(MARK, kind, len(payload), sequence) + payload
    return pack_sum(crc32(body)) + body


def head(version: int = VERSION) -> bytes:
    """The first bytes of a segment."""
    checked = _HEAD.pack(_MAGIC, version, 0)[:-_SUM_BYTES]
    return checked + crc32(checked).to_bytes(4, "little")


def version_in(buffer: bytes) -> int | None:
    """The version that a segment's head names; None where the head is damaged or cut."""
    if len(buffer) < HEAD_BYTES:
        return None
    magic, version, checksum = _HEAD.unpack_from(buffer)
    whole = magic == _MAGIC and checksum == crc32(buffer[: HEAD_BYTES - _SUM_BYTES])
    return version if whole else None


def scan(buffer: bytes, start: int = 0) -> Iterator[Frame | Damage | Rest]:
    """What stands in the buffer from ``start`` on, in order, until its end.

    Only the last item can be a `Rest`. Whether it is a record on its way, a torn one or damage is not to be told from
    the bytes: it depends on whether the writer lives and whether anything follows.
    """
    view = memoryview(buffer)
    size = len(buffer)
    while start < size:
        frame = _frame_at(view, start)
        if frame is not None:
            yield frame
            start = frame.end
            continue
        found = _next_frame(buffer, view, start + 1)
        if found is None:
            yield Rest(size - start)
            return
        yield Damage(found, found - start)
        start = found


def pass_over(buffer: bytes, start: int, sequence: int) -> tuple[int, int]:
    """Pass over whole events that number on from ``sequence``: the offset behind them, and the sequence to come.

    What `scan` would find there, in a third of the time, for those who only count.
    """
    view = memoryview(buffer)
    size = len(buffer)
    last = size - HEADER_BYTES
    unpack = _FRAME.unpack_from
    while start <= last:
        checksum, mark, kind, length, number = unpack(buffer, start)
        end = start + HEADER_BYTES + length
        if number != sequence or kind or mark != MARK or end > size:
            break
        if crc32(view[start + _SUM_BYTES : end]) != checksum:
            break
        start = end
        sequence += 1
    return start, sequence


def take(buffer: bytes, start: int, sequence: int) -> tuple[Run, int, int]:
    """As `pass_over`, and with them what they hold."""
    view = memoryview(buffer)
    size = len(buffer)
    last = size - HEADER_BYTES
    unpack = _FRAME.unpack_from
    payloads: list[bytes] = []
    keep = payloads.append
    while start <= last:
        checksum, mark, kind, length, number = unpack(buffer, start)
        body = start + HEADER_BYTES
        end = body + length
        if number != sequence or kind or mark != MARK or end > size:
            break
        if crc32(view[start + _SUM_BYTES : end]) != checksum:
            break
        keep(buffer[body:end])
        start = end
        sequence += 1
    return Run(sequence - len(payloads), payloads), start, sequence


def _frame_at(view: memoryview, start: int) -> Frame | None:
    body = start + HEADER_BYTES
    if body > len(view):
        return None
    checksum, mark, kind, length, sequence = _FRAME.unpack_from(view, start)
    end = body + length
    if mark != MARK or length > MAX_PAYLOAD_BYTES or end > len(view):
        return None
    if crc32(view[start + _SUM_BYTES : end]) != checksum:
        return None
    return Frame(end, sequence, kind, view[body:end])


def _next_frame(buffer: bytes, view: memoryview, start: int) -> int | None:
    """Where the next whole frame begins."""
    mark = buffer.find(MARK, start + _SUM_BYTES)
    while mark >= 0:
        if _frame_at(view, mark - _SUM_BYTES) is not None:
            return mark - _SUM_BYTES
        mark = buffer.find(MARK, mark + 1)
    return None
