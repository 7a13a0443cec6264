"""Encode events to bytes and decode them again; the only package that knows the wire format.

Envelopes are encoded as msgpack (`encode`, `decode`) or as JSON for people and browsers (`to_json`). Whatever an event
holds, encoding it never raises, and a value that cannot be encoded does not cost the values beside it. `to_plain` and
`json_line` do the same for single values and rows.
"""

from evsys_bus.codec.bounds import MAX_EVENT_BYTES
from evsys_bus.codec.json_line import json_line
from evsys_bus.codec.plain import Plain, to_plain
from evsys_bus.codec.reading import RunContexts, decode
from evsys_bus.codec.references import error_text
from evsys_bus.codec.step_form import IntroductionNeeded
from evsys_bus.codec.writing import encode, encoder, to_json

__all__ = [
    "MAX_EVENT_BYTES",
    "IntroductionNeeded",
    "Plain",
    "RunContexts",
    "decode",
    "encode",
    "encoder",
    "error_text",
    "json_line",
    "to_json",
    "to_plain",
]
