"""Envelopes to bytes: the fast way for what is flat, the thorough way for everything else; neither ever raises.

On the wire an envelope is one map, the same in msgpack and JSON:
``{"stream", "seq", "time", "run", "rank", "event": {"type", …fields}, "replaced"}``, the last only if not empty.
"""

from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.bounds import MAX_EVENT_BYTES, MAX_TEXT_CHARS
from evsys_bus.codec.json_line import nonfinite
from evsys_bus.codec.plain import Plain, entries, to_plain
from evsys_bus.codec.redaction import redact_configs
from evsys_bus.codec.references import HANDLES, parts_of
from evsys_bus.codec.shapes import annotations_of, handle_in
from evsys_bus.codec.step_form import step_encoder
from evsys_bus.codec.twins import twin_maker
from evsys_bus.events import Envelope, Event, StepEnd, UnknownEvent

# No enc_hook, ever: msgspec reads containers while the hook runs, and can crash when they change meanwhile.
_encode_into: Final = msgspec.msgpack.Encoder().encode_into
_unpack: Final = msgspec.msgpack.Decoder().decode
_to_json: Final = msgspec.json.Encoder().encode

_SHARES: Final = (0.95, 0.5, 0.1, 0.01)
"""Parts of the room that the thorough way tries to fill with the event; the head takes some as well."""


class _Wire(msgspec.Struct, gc=False):
    stream: str
    seq: int
    time: float
    run: str | None
    rank: int
    event: msgspec.Struct | Plain
    replaced: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


def encode(
    envelope: Envelope, *, max_event_bytes: int = MAX_EVENT_BYTES, secrets: frozenset[str] = frozenset()
) -> bytes:
    """The envelope as msgpack. Whatever the event holds, it neither raises nor loses the good values beside a bad one.

    Args:
        envelope: Its event is read, never changed; where the event has containers inside containers, or values of
            foreign types, they are copied by value first.
        max_event_bytes: More than this is cut to fit, texts and long lists first; ``replaced`` says what.
        secrets: Keys, in lower case, whose text is redacted in configs, besides those that look like a credential's.
    """
    if envelope.replaced:
        return _thorough(envelope, max_event_bytes, secrets)
    return _ordinary(
        type(envelope.event), envelope.stream, envelope.rank, lambda _: envelope.run, secrets, max_event_bytes
    )(envelope.event, envelope.seq, envelope.time)


def encoder(
    event_type: type[Event],
    stream: str,
    rank: int,
    run_of: Callable[[Event], str | None],
    secrets: frozenset[str] = frozenset(),
) -> Callable[[Event, int, float], bytes]:
    """What encodes the events of one type of one stream, given event, sequence and time; otherwise as `encode`.

    For those who publish, one event at a time: where the event is flat, no envelope is made.

    Args:
        run_of: The run of an event: it depends on nothing but the event's state, or its context.
        secrets: As `encode` takes them.
    """
    ordinary = _ordinary(event_type, stream, rank, run_of, secrets, MAX_EVENT_BYTES)
    if event_type is not StepEnd:
        return ordinary
    return cast("Callable[[Event, int, float], bytes]", step_encoder(ordinary, MAX_TEXT_CHARS))


def _ordinary(
    event_type: type[Event] | type[UnknownEvent],
    stream: str,
    rank: int,
    run_of: Callable[[Any], str | None],
    secrets: frozenset[str],
    max_event_bytes: int,
) -> Callable[[Event | UnknownEvent, int, float], bytes]:
    """As `encoder`, for any type. Any: an event of that type."""
    twin_of = twin_maker(event_type)
    most = min(MAX_TEXT_CHARS, max_event_bytes)  # some text in a larger one may be too long

    def encode_event(event: Event | UnknownEvent, seq: int, time: float) -> bytes:
        run = run_of(event)
        try:
            data = _pack(_Wire(stream, seq, time, run, rank, twin_of(event)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # not flat, or refused by msgspec, or a value's own code raised: the thorough way tells
            data = None
        if data is None or len(data) > most:
            return _thorough(Envelope(stream, seq, time, event, run, rank), max_event_bytes, secrets)
        return data

    return encode_event


def to_json(envelope: Envelope) -> bytes:
    """The envelope as one JSON object, in the shape and within the bounds that it has as msgpack.

    NaN and infinities become null; ``nonfinite`` beside the event then says which (``{"metrics.loss": "nan"}``).
    """
    row = _unpack(encode(envelope))
    flags = nonfinite(row["event"])
    if flags:
        row["nonfinite"] = flags
    return _to_json(row)


def _thorough(envelope: Envelope, max_event_bytes: int, secrets: frozenset[str]) -> bytes:
    tag, fields = _opened(envelope.event)
    names = {"stream": envelope.stream, "run": envelope.run, "tag": tag}
    head, _ = to_plain(names, max_bytes=max(max_event_bytes // 8, 1024))
    why = f"the event is larger than {max_event_bytes} bytes"
    for share in _SHARES:
        try:
            plain, reasons = to_plain(fields, max_bytes=int(max_event_bytes * share))
            reasons |= redact_configs(plain, secrets)
            data = _packed(envelope, head, entries(plain), {**envelope.replaced, **reasons})
        except MemoryError:
            why = "there was no memory to encode the event"
            continue
        if len(data) <= max_event_bytes:
            return data
    return _packed(envelope, head, {}, {"": why})


def _pack(wire: _Wire) -> bytes:
    """Into a buffer of Python's: where memory ends while msgspec enlarges one of its own, it crashes (seen, 0.22)."""
    buffer = bytearray()
    _encode_into(wire, buffer)
    return bytes(buffer)


def _packed(envelope: Envelope, head: Plain, body: dict[str, Plain], replaced: dict[str, str]) -> bytes:
    event = {"type": head["tag"], **body}
    wire = _Wire(
        head["stream"], envelope.seq, envelope.time, head["run"], envelope.rank, event, replaced or msgspec.UNSET
    )
    return _pack(wire)


def _opened(event: Event | UnknownEvent) -> tuple[str, dict[str, Any]]:
    """The tag and the live fields of an event; what stands where a handle belongs, opened as one. Any: of all types."""
    if isinstance(event, UnknownEvent):
        return event.type, event.fields
    fields: dict[str, Any] = {}
    for name, annotation in annotations_of(type(event)).items():
        fields[name] = value = getattr(event, name)
        kind = handle_in(annotation)
        if kind is not None and value is not None and not issubclass(type(value), HANDLES):
            fields[name] = _stranger(value, kind)
    return event.hook.removeprefix("on_"), fields


def _stranger(value: object, kind: type) -> object:
    """The parts of something that stands in the place of a handle, or itself where its own code keeps them back."""
    try:
        return parts_of(value, kind)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # to_plain will tell what it is
        return value
