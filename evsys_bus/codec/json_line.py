"""Encode rows of ``metrics.jsonl`` and similar files: one JSON object per line, from values of any type.

JSON has no NaN: such a number becomes null, and a ``nonfinite`` key records what it was.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.bounds import MAX_TEXT_CHARS
from evsys_bus.codec.flat import flat
from evsys_bus.codec.plain import Plain, dotted, entries, to_plain

_encode: Final = msgspec.json.Encoder().encode


def json_line(row: Mapping[str, Any]) -> bytes:
    """Encode one row as a JSON object, without the newline. Never raises.

    A value that JSON cannot represent is replaced, and a ``replaced`` key says why. NaN and infinities become null, and
    a ``nonfinite`` key says which they were. Keys of these names that the row already has are not overwritten.

    Example:
        >>> json_line({"step": 3, "loss": float("nan")})
        b'{"step":3,"loss":null,"nonfinite":{"loss":"nan"}}'
    """
    try:
        own = flat(row)
        line = _encode(own)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not scalars, refused by msgspec, or a value's own code raised
        return _thorough_line(row)
    if len(line) > MAX_TEXT_CHARS:  # a text in it may be too long
        return _thorough_line(row)
    return _flagged(own) if b"null" in line else line


def _thorough_line(row: object) -> bytes:
    plain, replaced = to_plain(row)
    own = entries(plain) if type(plain) is dict else {"row": plain}
    if replaced:
        own.setdefault("replaced", replaced)
    return _flagged(own)


def _flagged(row: dict[str, Plain]) -> bytes:
    flags = nonfinite(row)
    if flags:
        row.setdefault("nonfinite", flags)
    return _encode(row)


def nonfinite(value: Plain, path: str = "") -> dict[str, str]:
    """Find NaN and infinities in built-in data, which JSON cannot represent: path -> ``nan``, ``inf`` or ``-inf``."""
    found: dict[str, str] = {}
    items = cast("list[Plain]", value) if type(value) is list else []
    for step, item in itertools.chain(entries(value).items(), enumerate(items)):
        if isinstance(item, float):
            if not math.isfinite(item):
                found[dotted(path, (step,))] = str(item)
        elif isinstance(item, dict | list):
            found |= nonfinite(item, dotted(path, (step,)))
    return found
