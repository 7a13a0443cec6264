"""Encode rows of ``metrics.jsonl`` and similar files: one JSON object per line, from values of any type.

JSON has no NaN: such a number becomes null, and a ``find_nonfinite`` key records what it was.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec.limits import MAX_TEXT_CHARS
from evsys_bus.codec.normalize import Builtins, dict_or_empty, format_path, to_builtins
from evsys_bus.codec.scalars import scalar_dict

_encode: Final = msgspec.json.Encoder().encode


def json_line(row: Mapping[str, Any]) -> bytes:
    """Encode one row as a JSON object, without the newline. Never raises.

    A value that JSON cannot represent is replaced, and a ``replaced`` key says why. NaN and infinities become null, and
    a ``find_nonfinite`` key says which they were. Keys of these names that the row already has are not overwritten.

    Example:
        >>> json_line({"step": 3, "loss": float("nan")})
        b'{"step":3,"loss":null,"nonfinite":{"loss":"nan"}}'
    """
    try:
        scalars = scalar_dict(row)
        line = _encode(scalars)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not scalars, refused by msgspec, or a value's own code raised
        return _normalized_line(row)
    if len(line) > MAX_TEXT_CHARS:  # a text in it may be too long
        return _normalized_line(row)
    return _encode_with_nonfinite(scalars) if b"null" in line else line


def _normalized_line(row: object) -> bytes:
    plain, replaced = to_builtins(row)
    fields = dict_or_empty(plain) if type(plain) is dict else {"row": plain}
    if replaced:
        fields.setdefault("replaced", replaced)
    return _encode_with_nonfinite(fields)


def _encode_with_nonfinite(row: dict[str, Builtins]) -> bytes:
    flags = find_nonfinite(row)
    if flags:
        row.setdefault("nonfinite", flags)
    return _encode(row)


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
