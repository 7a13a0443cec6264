"""The messages between `nats_relay` and the mirror: a batch of consecutive events of one stream.

subject          PREFIX.JOURNAL.STREAM: the id of the journal, and the name of the stream in it
body             a msgpack array of byte strings: the payloads, as the journal holds them
Nats-Msg-Id      STREAM/FIRST-LAST, by which the server recognizes a message that comes again
Evsys-Events     FIRST-LAST: the sequences of the first and the last event
Evsys-After      the sequence of the event that was sent before; more than FIRST - 1 never, less if the journal
itself lacks the events between
Evsys-Part       I/N: the body is the I-th of N parts of the payload of a single event, FIRST
Evsys-Ended      ``closed`` or ``gone``: there are no events, since the writer of the stream has closed it or has
ended without that; FIRST-LAST are those of the last event
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final, Literal, NamedTuple

import msgspec

from evsys_bus.journal import layout
from evsys_bus.sink import RawRecord

ID: Final = "Nats-Msg-Id"
EVENTS: Final = "Evsys-Events"
AFTER: Final = "Evsys-After"
PART: Final = "Evsys-Part"
ENDED: Final = "Evsys-Ended"
HEADER_BYTES: Final = 1024
"""More than the subject and the headers of a message take."""
_MAX_SEQUENCE: Final = 1 << 63
_ARRAY_BYTES: Final = 5
"""What the body has for itself, and for each payload in it."""

Ending = Literal["closed", "gone"]


class Message(NamedTuple):
    """What is published."""

    headers: dict[str, str]
    body: bytes


class ReceivedBatch(msgspec.Struct, frozen=True):
    """A message that was received and checked."""

    stream: str
    first: int
    last: int
    after: int
    payloads: list[bytes] = []
    part: tuple[int, int] | None = None
    """The number of the part and the number of parts; the only payload is a part of one event."""
    ending: Ending | None = None


def split_into_messages(events: Sequence[RawRecord], max_body_bytes: int) -> Iterator[Sequence[RawRecord]]:
    """Split events into slices of consecutive sequences that each fit into one message, or are a single event.

    Args:
        events: Events of one stream, in order.
        max_body_bytes: The largest body.
    """
    sizes = list(accumulate(len(each.payload) + _ARRAY_BYTES for each in events))
    start = 0
    while start < len(events):
        limit = (sizes[start - 1] if start else 0) + max_body_bytes - _ARRAY_BYTES
        end = max(start + 1, bisect_right(sizes, limit, start))
        if events[end - 1].sequence - events[start].sequence != end - 1 - start:
            pairs = enumerate(pairwise(events[start:end]), start + 1)
            end = next(index for index, (one, other) in pairs if other.sequence != one.sequence + 1)
        yield events[start:end]
        start = end


def batch_messages(events: Sequence[RawRecord], after: int, max_body_bytes: int) -> Iterator[Message]:
    """Encode one slice of `split_into_messages`: one message, or the parts of a larger event.

    Args:
        events: The slice.
        after: The sequence of the event that was sent before.
        max_body_bytes: The largest body.
    """
    first, last = events[0], events[-1]
    id_ = f"{first.stream}/{first.sequence}-{last.sequence}"
    headers = {EVENTS: f"{first.sequence}-{last.sequence}", AFTER: str(after)}
    if len(events) > 1 or len(first.payload) + 2 * _ARRAY_BYTES <= max_body_bytes:
        yield Message({ID: id_, **headers}, _encode([each.payload for each in events]))
        return
    count = -(-len(first.payload) // max_body_bytes)
    for number in range(count):
        body = first.payload[number * max_body_bytes : (number + 1) * max_body_bytes]
        part = f"{number + 1}/{count}"
        yield Message({ID: f"{id_}#{part}", **headers, PART: part}, body)


def ending_message(stream: str, last: int, ending: Ending) -> Message:
    """Encode that a stream has ended, for now: a later process may continue it."""
    return Message({ID: f"{stream}/{last}-{ending}", EVENTS: f"{last}-{last}", AFTER: str(last), ENDED: ending}, b"")


def read_message(subject: str, headers: Mapping[str, str] | None, body: bytes) -> ReceivedBatch:
    """Decode a message.

    Raises:
        ValueError: It is not one of these messages.
    """
    headers = headers or {}
    try:
        first, last = _pair(headers[EVENTS], "-")
        after = int(headers[AFTER])
        part = _pair(headers[PART], "/") if PART in headers else None
        ending = headers.get(ENDED)
        payloads = [body] if part is not None else [] if ending is not None else _decode(body)
    except (KeyError, msgspec.DecodeError) as error:
        raise ValueError(f"{subject} has a message that is not of nats_relay: {error!r}") from None
    stream = subject.rpartition(".")[2]
    if not layout.is_stream_name(stream) or not 0 <= first <= last < _MAX_SEQUENCE:
        raise ValueError(f"{subject:.200} has a message of events {first} to {last}, which no journal can have")
    if ending is not None:
        return ReceivedBatch(stream, first, last, after, ending="closed" if ending == "closed" else "gone")
    if not first or last - first + 1 != len(payloads):
        raise ValueError(f"{subject} has a message of the events {first} to {last} with {len(payloads)} payloads")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ValueError(f"{subject} has a message with part {part[0]} of {part[1]}")
    return ReceivedBatch(stream, first, last, after, payloads, part)


def _pair(text: str, separator: str) -> tuple[int, int]:
    first, _, second = text.partition(separator)
    return int(first), int(second)


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[bytes]).decode
