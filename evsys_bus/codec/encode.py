"""Encode envelopes to bytes: a fast path for common values, `to_builtins` for all others. Encoding never raises.

On the wire an envelope is one map, the same in msgpack and JSON:
``{"stream", "seq", "time", "run", "rank", "event": {"type", …fields}, "replaced", "handles", "keywords"}``. The last
three are present only if not empty, and the last two only for event classes defined outside the library: they show
processes without the class which fields are handles, and which ones the hook takes by keyword.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.event_fields import HANDLE_NAMES, Reasons, event_copier, handle_kinds, log_replaced
from evsys_bus.codec.normalize import Builtins, dict_or_empty, escape_surrogates, format_path, to_builtins
from evsys_bus.codec.redact import Redaction, current_redaction, redact
from evsys_bus.codec.scalars import MAX_EVENT_BYTES, MAX_TEXT_CHARS, scalar_dict
from evsys_bus.codec.step_template import LastPart, RunContextNeeded, step_encoder
from evsys_bus.codec.wire_types import HANDLES, field_annotations, handle_class, wire_parts
from evsys_bus.events import Envelope, Event, Metrics, StepEnd, UnknownEvent, event_tag, is_shipped
from evsys_bus.printable import escape_controls

# Never use enc_hook: msgspec reads containers while the hook runs, and can crash when they change meanwhile.
_encode_into: Final = msgspec.msgpack.Encoder().encode_into
_unpack: Final = msgspec.msgpack.Decoder().decode
_encode_as_json: Final = msgspec.json.Encoder().encode


def _to_json(value: object) -> bytes:
    encoded = _encode_as_json(value)
    return encoded if encoded.isascii() else escape_controls(encoded)


_DEFAULT_REDACTION: Final = Redaction()
_SIZE_FRACTIONS: Final = (0.95, 0.5, 0.1, 0.01)
"""Fractions of the size limit to try for the event when it is cut; the envelope takes some bytes as well."""


class _WireEnvelope(msgspec.Struct, gc=False):
    stream: str
    seq: int
    time: float
    run: str | None
    rank: int
    event: Builtins
    replaced: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    handles: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    keywords: list[str] | msgspec.UnsetType = msgspec.UNSET


def encode(
    envelope: Envelope,
    *,
    max_event_bytes: int = MAX_EVENT_BYTES,
    redaction: Redaction = _DEFAULT_REDACTION,
    secrets: frozenset[str] = frozenset(),
    whole_context: bool = False,
    log_replacements: bool = False,
) -> bytes:
    """Encode an envelope as msgpack. Never raises; a value that cannot be encoded does not affect the others.

    Args:
        envelope: Its event is read, never changed; its values are copied first.
        max_event_bytes: A larger event is cut to fit, texts and long lists first; ``replaced`` lists what was cut.
        redaction: Which keys are redacted besides those that look like credentials, and which are not.
        secrets: The former name of ``redaction.redact``.
        whole_context: Include the whole context of a state in the event, not just the run key.
        log_replacements: Log what was replaced, once for each path; `event_encoder` always does.
    """
    if secrets:
        redaction = Redaction.of({*redaction.redact, *secrets}, redaction.reveal)
    if envelope.replaced or whole_context:
        return _encode_normalized(
            envelope, max_event_bytes, redaction, whole_context=whole_context, log_replacements=log_replacements
        )
    event_type = type(envelope.event)
    if not issubclass(event_type, Event):
        return _encode_normalized(envelope, max_event_bytes, redaction, log_replacements=log_replacements)
    return _general_encoder(
        event_type,
        envelope.stream,
        envelope.rank,
        lambda _: envelope.run,
        redaction,
        max_event_bytes,
        log_replacements=log_replacements,
    )(cast("Event", envelope.event), envelope.seq, envelope.time)


def event_encoder(
    event_type: type[Event],
    stream: str,
    rank: int,
    run_of: Callable[[Event], str | None],
    redaction: Redaction = _DEFAULT_REDACTION,
    needs_context: Callable[[Any], bool] | None = None,
    last_part: LastPart | None = None,
) -> Callable[[Event, int, float], bytes]:
    """Return a function that encodes events of one type in one stream, given the event, its sequence number and time.

    The result is that of `encode`, but faster: what does not change from step to step is encoded once. Call the
    function with one event at a time.

    Args:
        event_type: The type of the events.
        stream: The stream of the events.
        rank: The rank of the process.
        run_of: Returns the run key of an event; it may depend only on the event's state or context.
        redaction: See `encode`.
        needs_context: Whether the context of a state's run is not recorded yet; then `RunContextNeeded` is raised.
            Called whenever a state has changed since the last step.
        last_part: Given to the encoders of `StepEnd` and `Metrics` of one stream.
    """
    encode_any = _general_encoder(event_type, stream, rank, run_of, redaction, MAX_EVENT_BYTES, log_replacements=True)
    if not issubclass(event_type, StepEnd | Metrics):
        return (
            encode_any
            if needs_context is None or "state" not in event_type.__struct_fields__
            else _require_run_context(encode_any, needs_context)
        )
    return cast(
        "Callable[[Event, int, float], bytes]",
        step_encoder(encode_any, MAX_TEXT_CHARS, needs_context, redaction, event_type, last_part),
    )


def _require_run_context(
    encode_any: Callable[[Any, int, float], bytes], needs_context: Callable[[Any], bool]
) -> Callable[[Event, int, float], bytes]:
    def encode_event(event: Any, seq: int, time: float) -> bytes:
        if needs_context(event.state):
            raise RunContextNeeded
        return encode_any(event, seq, time)

    return encode_event


def _general_encoder(
    event_type: type[Event],
    stream: str,
    rank: int,
    run_of: Callable[[Any], str | None],
    redaction: Redaction,
    max_event_bytes: int,
    *,
    log_replacements: bool,
) -> Callable[[Event, int, float], bytes]:
    """Return the general encoder for one type of event, without templates."""
    copy = _cached_event_copier(event_type)
    max_bytes = min(MAX_TEXT_CHARS, max_event_bytes)  # a text in a larger event may be too long
    is_builtin_event = is_shipped(event_type)

    def encode_event(event: Event, seq: int, time: float) -> bytes:
        run, data = run_of(event), None
        try:
            if copy is not None:
                reasons: Reasons = {}
                wire = _WireEnvelope(stream, seq, time, run, rank, copy(event, reasons))
                reasons |= redact(wire.event, redaction)
                if reasons and log_replacements:
                    log_replaced(wire.event["type"], reasons)
                if reasons:
                    wire.replaced = reasons
                if not is_builtin_event:
                    _describe_event(wire, event)
                data = _pack(wire)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # it holds a configuration, or msgspec refused a value
            data = None
        if data is None or len(data) > max_bytes:
            envelope = Envelope(stream, seq, time, event, run, rank)
            return _encode_normalized(envelope, max_event_bytes, redaction, log_replacements=log_replacements)
        return data

    return encode_event


_cached_event_copier: Final = functools.cache(event_copier)


def to_json(envelope: Envelope) -> bytes:
    """Encode an envelope as one JSON object, with the same structure and limits as msgpack.

    NaN and infinities become null; a ``nonfinite`` key beside the event lists them (``{"metrics.loss": "nan"}``).
    """
    row = _unpack(encode(envelope))
    _paths_to_text(row["event"])
    flags = find_nonfinite(row["event"])
    if flags:
        row["nonfinite"] = flags
    return _to_json(row)


def _paths_to_text(event: Builtins) -> None:
    """Convert the directories of an event's handles to text, in place, even if their names are not UTF-8."""
    for handle in map(dict_or_empty, dict_or_empty(event).values()):
        for parts in (handle, dict_or_empty(handle.get("context"))):
            for name in ("output_dir", "root"):
                if type(parts.get(name)) is bytes:
                    parts[name] = escape_surrogates(os.fsdecode(cast("bytes", parts[name])))


def _encode_normalized(
    envelope: Envelope,
    max_event_bytes: int,
    redaction: Redaction,
    *,
    whole_context: bool = False,
    log_replacements: bool = False,
) -> bytes:
    """Encode an event with `to_builtins`, within a size limit for the whole event."""
    read_errors: Reasons = {}
    tag, fields = _open_event(envelope.event, read_errors, whole_context=whole_context)
    names = {"stream": envelope.stream, "run": envelope.run, "tag": tag}
    head, _ = to_builtins(names, max_bytes=max(max_event_bytes // 8, 1024))
    why = f"the event is larger than {max_event_bytes} bytes"
    for fraction in _SIZE_FRACTIONS:
        try:
            plain, reasons = to_builtins(fields, max_bytes=int(max_event_bytes * fraction))
            reasons |= redact(plain, redaction)
            if log_replacements:
                log_replaced(tag, read_errors | reasons)
            data = _pack_envelope(envelope, head, dict_or_empty(plain), {**envelope.replaced, **read_errors, **reasons})
        except MemoryError:
            why = "there was no memory to encode the event"
            continue
        if len(data) <= max_event_bytes:
            return data
    return _pack_envelope(envelope, head, {}, {"": why})


def _pack(wire: _WireEnvelope) -> bytes:
    """Encode into a bytearray: msgspec 0.22 crashes if memory runs out while it enlarges a buffer of its own."""
    buffer = bytearray()
    _encode_into(wire, buffer)
    return bytes(buffer)


def _pack_envelope(envelope: Envelope, head: Builtins, body: dict[str, Builtins], replaced: dict[str, str]) -> bytes:
    event = {"type": head["tag"], **body}
    wire = _WireEnvelope(
        head["stream"], envelope.seq, envelope.time, head["run"], envelope.rank, event, replaced or msgspec.UNSET
    )
    _describe_event(wire, envelope.event)
    return _pack(wire)


def _describe_event(wire: _WireEnvelope, event: Event | UnknownEvent) -> None:
    """Add handles and keywords to the envelope of an event class that other processes may not know."""
    if isinstance(event, UnknownEvent):
        handles, keywords = event.handles, [*event.keywords]
    elif is_shipped(type(event)):
        return
    else:
        handles, keywords = (
            handle_kinds(event),
            [name for name in type(event).__struct_fields__ if name in event.keywords],
        )
    if handles:
        wire.handles = handles
    if keywords:
        wire.keywords = keywords


def _open_event(
    event: Event | UnknownEvent, read_errors: Reasons, *, whole_context: bool
) -> tuple[str, dict[str, Any]]:
    """Return the tag and the fields of an event, not copied; a value in place of a handle is replaced by its parts."""
    if isinstance(event, UnknownEvent):
        kinds: dict[str, type | None] = {name: _HANDLE_TYPES.get(handle) for name, handle in event.handles.items()}
        tag, fields = event.type, dict(event.fields)
    else:
        kinds = {name: handle_class(annotation) for name, annotation in field_annotations(type(event)).items()}
        tag, fields = event_tag(type(event)), {name: getattr(event, name) for name in kinds}
    for name, value in fields.items():
        kind = kinds.get(name) or next(
            (handle_type for handle_type in HANDLES if issubclass(type(value), handle_type)), None
        )
        if kind is not None and value is not None:
            fields[name] = wire_parts(value, kind, (read_errors, name), whole_context=whole_context)
    state = fields.get("state")
    if type(state) is dict and "step" not in state and "step_idx" in fields:
        cast("dict[str, Any]", state)["step"] = fields["step_idx"]
    return tag, fields


_HANDLE_TYPES: Final = {name: kind for kind, name in HANDLE_NAMES.items()}


def json_line(row: Mapping[str, Any], redaction: Redaction | msgspec.UnsetType | None = msgspec.UNSET) -> bytes:
    """Encode one row as a JSON object, without the newline. Never raises.

    A value that JSON cannot represent is replaced, for the reason under the key ``replaced``. NaN and infinities become
    null, and the key ``nonfinite`` names them. Keys of these names that the row already has are not overwritten.

    Args:
        row: Text keys and values of any type.
        redaction: What looks like a credential is redacted. Default: as the bus of this process does it. None: nothing
            is redacted.

    Example:
        >>> json_line({"step": 3, "loss": float("nan")})
        b'{"step":3,"loss":null,"nonfinite":{"loss":"nan"}}'
    """
    if redaction is msgspec.UNSET:
        redaction = current_redaction()
    try:
        scalars = scalar_dict(row)
        if redaction is not None:
            redact(scalars, redaction)
        line = _to_json(scalars)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not scalars, refused by msgspec, or a value's own code raised
        return _normalized_line(row, redaction)
    if len(line) > MAX_TEXT_CHARS:  # a text in it may be too long
        return _normalized_line(row, redaction)
    return _encode_with_nonfinite(scalars) if b"null" in line else line


def _normalized_line(row: object, redaction: Redaction | None) -> bytes:
    plain, replaced = to_builtins(row)
    if redaction is not None:
        replaced |= redact(plain, redaction)
    fields = dict_or_empty(plain) if type(plain) is dict else {"row": plain}
    if replaced:
        fields.setdefault("replaced", replaced)
    return _encode_with_nonfinite(fields)


def _encode_with_nonfinite(row: dict[str, Builtins]) -> bytes:
    flags = find_nonfinite(row)
    if flags:
        row.setdefault("nonfinite", flags)
    return _to_json(row)


def find_nonfinite(value: Builtins, path: str = "") -> dict[str, str]:
    """Find NaN and infinities in built-in data, which JSON cannot represent: path -> ``nan``, ``inf`` or ``-inf``."""
    found: dict[str, str] = {}
    items = cast("list[Builtins]", value) if type(value) is list else []
    for key, item in itertools.chain(dict_or_empty(value).items(), enumerate(items)):
        if isinstance(item, float):
            if not math.isfinite(item):
                found[format_path(path, (key,))] = str(item)
        elif isinstance(item, dict | list):
            found |= find_nonfinite(item, format_path(path, (key,)))
    return found
