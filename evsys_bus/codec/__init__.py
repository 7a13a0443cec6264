"""Events as bytes and back: the only room that knows how they look on the wire.

Envelopes go as msgpack (`encode`, `decode`) and, for people and browsers, as JSON (`to_json`). Whatever an event holds,
encoding it neither raises nor loses the good values beside a bad one. `to_plain` and `json_line` do the same for single
values and rows.
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
