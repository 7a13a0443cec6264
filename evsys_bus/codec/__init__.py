"""Encode events to bytes and decode them again; the only package that knows the wire format.

Envelopes are encoded as msgpack (`encode`, `decode`) or as JSON for people and browsers (`to_json`). Whatever an event
holds, encoding it never raises, and a value that cannot be encoded does not cost the values beside it. `to_builtins`
and `json_line` do the same for single values and rows.
"""

from evsys_bus.codec.decode import RunContexts, decode
from evsys_bus.codec.encode import encode, event_encoder, json_line, to_json
from evsys_bus.codec.normalize import Builtins, to_builtins
from evsys_bus.codec.scalars import MAX_EVENT_BYTES
from evsys_bus.codec.step_template import RunContextNeeded
from evsys_bus.codec.wire_types import error_text
from evsys_bus.deprecated import former_names

__all__ = [
    "MAX_EVENT_BYTES",
    "Builtins",
    "RunContextNeeded",
    "RunContexts",
    "decode",
    "encode",
    "error_text",
    "event_encoder",
    "json_line",
    "to_builtins",
    "to_json",
]

__getattr__ = former_names(__name__, {"Plain": "Builtins", "encoder": "event_encoder", "to_plain": "to_builtins"})
