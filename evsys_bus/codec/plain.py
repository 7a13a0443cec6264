"""Copy any value into built-in types, which msgspec encodes without running foreign code.

`to_plain` handles what people put into metrics, configs and predictions: numpy and torch scalars, dataclasses, pydantic
models, paths, and the occasional circular, hostile or 50 MB object. A value that cannot be encoded is replaced and the
reason is recorded; its neighbours are not affected. The result shares nothing with the original, so a thread that keeps
changing the original cannot disturb the encoder.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta, timezone
from enum import Enum
from functools import lru_cache
from itertools import islice
from pathlib import PurePath
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec

from evsys_bus.codec.bounds import (
    INT_MAX,
    INT_MIN,
    MAX_DEPTH,
    MAX_EVENT_BYTES,
    MAX_KEY_CHARS,
    MAX_PATH_CHARS,
    MAX_REASONS,
    MAX_SHOWN_CHARS,
    MAX_TEXT_CHARS,
)
from evsys_bus.codec.flat import TooLarge
from evsys_bus.codec.foreign import fields_of, has_fields, shown, snapshot, without_surrogates

Plain: TypeAlias = Any
"""None, bool, int, float, str, bytes, datetimes with a time zone, and dicts (with text keys) and lists of these."""

_SMALL_BYTES: Final = 256 * 1024
_ITEM_BYTES: Final = 10
"""Upper bound for a number, or for the header of a text or a container, in msgpack."""


def to_plain(value: object, path: str = "", *, max_bytes: int = MAX_EVENT_BYTES) -> tuple[Plain, dict[str, str]]:
    """Copy a value into built-in types, within size limits, and report what was replaced.

    Conversions without loss are not reported: scalars of numpy and torch become numbers; sets and tuples become lists;
    dataclasses, Structs, models and named tuples become dicts; enums become their values; dates, durations, paths and
    keys become text. A handle becomes its scalars. Never raises, whatever the value's own code does, except for
    KeyboardInterrupt and SystemExit.

    Args:
        value: Any object.
        path: Path of the value; prefix of the paths of replaced values.
        max_bytes: Approximate size limit of the copy as msgpack; it also limits the number of items. The numbers of a
            mapping are copied before its texts and containers.

    Returns:
        The copy, and for every value that was replaced: its path (``metrics.grads[3]``) -> the reason, in words.
    """
    copying = _Copying(path, max_bytes)
    plain = copying.plain(value)
    if copying.untold:
        copying.reasons["…"] = f"and {copying.untold} more"
    return plain, copying.reasons


def plain_at(value: object, trail: Iterable[str | int], reasons: dict[str, str]) -> Plain:
    """Copy one small value inside an event like `to_plain`; reasons are added to ``reasons``.

    Raises:
        TooLarge: The value is not small.
    """
    copying = _Copying("", _SMALL_BYTES, trail, reasons)
    plain = copying.plain(value)
    if copying.left < _SMALL_BYTES // 2:
        raise TooLarge
    if copying.untold:
        reasons["…"] = f"and {copying.untold} more"
    return plain


def dotted(path: str, steps: Iterable[str | int]) -> str:
    """Format a path: ``metrics.grads[3]``."""
    for step in steps:
        path = f"{path}[{step}]" if type(step) is int else f"{path}.{step}" if path else str(step)
    return path


def entries(plain: Plain) -> dict[str, Plain]:
    """Return the value if it is a dict, else an empty dict."""
    return plain if type(plain) is dict else {}  # pyright: ignore[reportUnknownVariableType, reportReturnType]


class _Copying:
    """The state of one copy: the current path, the bytes left, and what was replaced."""

    __slots__ = ("_above", "_path", "_trail", "left", "reasons", "untold")

    def __init__(
        self, path: str, max_bytes: int, trail: Iterable[str | int] = (), reasons: dict[str, str] | None = None
    ) -> None:
        self._path = path
        self._trail: list[str | int] = [*trail]
        self._above: set[int] = set()
        self.left = max_bytes
        self.reasons: dict[str, str] = {} if reasons is None else reasons
        self.untold = 0

    def plain(self, value: object) -> Plain:
        """Copy the value into built-in types, or return a replacement."""
        kind = type(value)
        if kind is float or kind is bool or value is None:
            return value
        depth = len(self._trail)
        try:
            copy = _EXACT.get(kind)
            return (_way_of(kind) if copy is None else copy)(self, value)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the value's own code
            del self._trail[depth:]
            self._above.discard(id(value))
            return self._replaced(shown(value), f"{type(error).__name__} when it was read")

    def integer(self, value: int) -> Plain:
        if INT_MIN <= value <= INT_MAX:
            return value
        try:
            return self._replaced(float(value), "an integer beyond 64 bits, kept as a float")
        except OverflowError:
            return self._replaced(f"<integer of {value.bit_length()} bits>", "an integer beyond 64 bits")

    def text(self, value: str) -> str:
        if len(value) > MAX_TEXT_CHARS:
            self._replace(f"a text of {len(value)} characters, cut to {MAX_TEXT_CHARS}")
            value = value[:MAX_TEXT_CHARS]
        size = len(value)
        if not value.isascii():
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                value = without_surrogates(value)
                size = len(value.encode())
                self._replace("lone surrogates, written out as \\udc80")
        if size > self.left:
            kept = max(self.left // 4, 0)
            self._replace(f"a text of {len(value)} characters, cut to {kept}: the whole is too large")
            value = value[:kept]
            size = 4 * kept
        self.left -= size
        return value

    def octets(self, value: bytes) -> bytes:
        kept = min(MAX_TEXT_CHARS, max(self.left, 0))
        if len(value) > kept:
            self._replace(f"{len(value)} bytes, cut to {kept}")
        self.left -= min(len(value), kept)
        return value[:kept]

    def moment(self, value: datetime) -> Plain:
        if value.tzinfo is None:
            return msgspec.to_builtins(value)
        # Any other tzinfo may be Python code, and that must not run inside the encoder.
        return value if type(value.tzinfo) is timezone else value.astimezone(UTC)

    def mapping(self, source: object, entries: Mapping[Any, Any]) -> Plain:
        """Copy ``entries``, a private dict that was taken from ``source``."""
        if self._barred(source):
            return self._left_out(source)
        self._above.add(id(source))
        out: dict[str, Plain] = {}
        later: list[tuple[str, Any]] = []
        for key, value in islice(entries.items(), self._room(len(entries))):
            name = key if type(key) is str and len(key) <= MAX_KEY_CHARS and key.isascii() else self._key(key)
            if name in out:
                name = self._another(name, out)
            self.left -= len(name)
            kind: type = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
            if kind is float or kind is bool or value is None or (kind is int and INT_MIN <= value <= INT_MAX):
                out[name] = value
            elif issubclass(kind, float):
                out[name] = float.__float__(value)
            else:
                out[name] = None  # filled below: numbers come first, so that a large neighbour cannot displace them
                later.append((name, value))
            if self.left < 0:
                self._replace(f"cut after {len(out)} of {len(entries)} entries: the whole is too large")
                break
        for name, value in later:
            self._trail.append(name)
            out[name] = self.plain(value)
            self._trail.pop()
        self._above.discard(id(source))
        return out

    def sequence(self, source: object, items: Sequence[object]) -> Plain:
        """Copy ``items``, which were taken from ``source`` and may change meanwhile."""
        if self._barred(source):
            return self._left_out(source)
        self._above.add(id(source))
        out: list[Plain] = []
        for index, value in enumerate(islice(items, self._room(len(items)))):
            self._trail.append(index)
            out.append(self.plain(value))
            self._trail.pop()
        self._above.discard(id(source))
        return out

    def items(self, value: Any) -> Plain:
        return self.sequence(value, snapshot(lambda: list(islice(value, max(self.left, 0) // _ITEM_BYTES + 1))))

    def stranger(self, value: Any) -> Plain:
        if hasattr(type(value), "__float__"):  # pyright: ignore[reportUnknownArgumentType] - untyped
            return self._replaced(float.__float__(float(value)), f"a {type(value).__name__}, kept as a float")
        return self._replaced(shown(value), f"a {type(value).__name__} cannot be recorded")

    def array(self, value: Any) -> Plain:
        """Copy a scalar of numpy, torch, jax or a similar library, or replace an array by a description."""
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        shape = getattr(value, "shape", ())
        count = math.prod(shape)
        if count == 1:
            single = value.item()
            if type(single) in _EXACT:
                return self.plain(single)
            if hasattr(single, "__float__"):  # np.longdouble.item() returns another np.longdouble
                return float.__float__(float(single))
            return self._replaced(shown(value), f"a {kind.__name__} cannot be recorded")
        dtype = _text_of(getattr(value, "dtype", "?"))
        picture = f"{kind.__name__}(shape={tuple(shape)}, dtype={dtype})"[:MAX_SHOWN_CHARS]
        return self._replaced(picture, f"an array of {count} values; record numbers, or a list of a few")

    def _key(self, key: Any) -> str:
        """Convert a key to text."""
        try:
            name = without_surrogates(str.__str__(str(key.value if issubclass(type(key), Enum) else key)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the key's own code
            name = f"<{type(key).__name__}>"
            self._replace(f"{type(error).__name__} when a key was read", name)
        if len(name) > MAX_KEY_CHARS:
            length, name = len(name), f"{name[: MAX_KEY_CHARS - 9]}…{zlib.crc32(name.encode()):08x}"
            self._replace(f"a name of {length} characters, cut to {MAX_KEY_CHARS}", name)
        self.left -= 3 * len(name)  # mapping() counts one byte a character; here a character may take four
        return name

    def _another(self, name: str, taken: Mapping[str, object]) -> str:
        number = next(n for n in range(2, len(taken) + 3) if f"{name}#{n}" not in taken)
        self._replace("two keys that are the same as text", f"{name}#{number}")
        return f"{name}#{number}"

    def _barred(self, container: object) -> bool:
        return id(container) in self._above or len(self._trail) >= MAX_DEPTH

    def _left_out(self, container: object) -> Plain:
        circular = id(container) in self._above
        why = "it contains itself" if circular else f"nested deeper than {MAX_DEPTH} levels"
        return self._replaced(f"<{type(container).__name__}>", why)

    def _room(self, count: int) -> int:
        room = min(count, max(self.left, 0) // _ITEM_BYTES)
        if room < count:
            self._replace(f"cut after {room} of {count} items: the whole is too large")
        self.left -= room * _ITEM_BYTES
        return room

    def _replaced(self, stand_in: Plain, why: str) -> Plain:
        if type(stand_in) is str:
            self.left -= len(stand_in)
        self._replace(why)
        return stand_in

    def _replace(self, why: str, *within: str) -> None:
        if len(self.reasons) >= MAX_REASONS:
            self.untold += 1
            return
        path = dotted(self._path, (*self._trail, *within))
        path = without_surrogates(path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}…")
        self.reasons[path] = why
        self.left -= len(path) + len(why)


_EXACT: Final[dict[type, Callable[[_Copying, Any], Plain]]] = {
    int: _Copying.integer,
    str: _Copying.text,
    bytes: _Copying.octets,
    dict: lambda copying, value: copying.mapping(value, snapshot(value.copy)),
    list: lambda copying, value: copying.sequence(value, value),
    tuple: lambda copying, value: copying.sequence(value, value),
    set: lambda copying, value: copying.sequence(value, snapshot(lambda: list(value))),
    frozenset: lambda copying, value: copying.sequence(value, list(value)),
    bytearray: lambda copying, value: copying.octets(bytes(value)),
    memoryview: lambda copying, value: copying.octets(value.tobytes()),
    float: lambda _, value: value,
    bool: lambda _, value: value,
    type(None): lambda _, value: value,
    datetime: _Copying.moment,
    date: lambda _, value: msgspec.to_builtins(value),
    timedelta: lambda _, value: msgspec.to_builtins(value),
    UUID: lambda _, value: msgspec.to_builtins(value),
}
"""Exact type -> how its values are copied."""


@lru_cache(maxsize=256)
def _way_of(kind: Any) -> Callable[[_Copying, Any], Plain]:  # noqa: C901, PLR0911 - one line for each kind of class
    """Return how values of a type that is not in `_EXACT` are copied."""
    if issubclass(kind, float):
        return lambda _, value: float.__float__(value)
    if issubclass(kind, str):
        return lambda copying, value: copying.text(str.__str__(value))
    if issubclass(kind, int):
        return lambda copying, value: copying.integer(int.__int__(value))
    if hasattr(kind, "item"):
        return _Copying.array
    if issubclass(kind, Enum):
        return lambda copying, value: copying.plain(value.value)
    if issubclass(kind, PurePath):
        return lambda copying, value: copying.text(str(value))
    if has_fields(kind):
        return lambda copying, value: copying.mapping(value, entries(fields_of(value, kind)))
    if issubclass(kind, Mapping):
        return lambda copying, value: copying.mapping(value, snapshot(lambda: dict(value.items())))
    if issubclass(kind, Sequence | AbstractSet):
        return _Copying.items
    if issubclass(kind, date | time):
        return lambda copying, value: copying.text(value.isoformat())
    return _Copying.stranger


_text_of: Final = lru_cache(maxsize=64)(str)
