"""Copy any value into built-in types, which msgspec encodes without running foreign code.

`to_builtins` handles what people put into metrics, configs and predictions: numpy and torch scalars, dataclasses,
pydantic models, paths, and the occasional circular, hostile or 50 MB object. A value that cannot be encoded is replaced
and the reason is recorded; its neighbours are not affected. The result shares nothing with the original, so a thread
that keeps changing the original cannot disturb the encoder.
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
from types import SimpleNamespace
from typing import Any, Final, TypeAlias, TypeVar, cast
from uuid import UUID

import msgspec

from evsys_bus.codec.scalars import (
    INT_MAX,
    INT_MIN,
    MAX_DEPTH,
    MAX_EVENT_BYTES,
    MAX_KEY_CHARS,
    MAX_PATH_CHARS,
    MAX_REASONS,
    MAX_REPR_CHARS,
    MAX_TEXT_CHARS,
    TooLarge,
)
from evsys_bus.codec.wire_types import HANDLES, read_attributes, wire_parts

T = TypeVar("T")

_MAX_ATTEMPTS: Final = 5


def object_fields(value: Any, kind: Any) -> dict[str, Any] | None:  # noqa: PLR0911 - one line for each kind of class
    """Return the named fields of a value, one level deep; None if its class has none."""
    if issubclass(kind, HANDLES):
        return wire_parts(value, kind)
    if issubclass(kind, msgspec.Struct):
        return struct_fields(value)
    if hasattr(kind, "_asdict"):
        return value._asdict()
    if hasattr(kind, "__dataclass_fields__"):
        return read_attributes(value, kind.__dataclass_fields__)
    if hasattr(kind, "__attrs_attrs__"):
        return read_attributes(value, (each.name for each in kind.__attrs_attrs__))
    if hasattr(kind, "model_fields"):
        return dict(value)  # pydantic: iterating a model gives its fields and extras
    if issubclass(kind, SimpleNamespace) or (kind.__module__, kind.__name__) == ("argparse", "Namespace"):
        return value.__dict__.copy()
    return None


def has_fields(kind: Any) -> bool:
    """Whether values of this type have named fields."""
    return (
        issubclass(kind, (*HANDLES, msgspec.Struct, SimpleNamespace))
        or any(hasattr(kind, name) for name in ("_asdict", "__dataclass_fields__", "__attrs_attrs__", "model_fields"))
        or (kind.__module__, kind.__name__) == ("argparse", "Namespace")
    )


def struct_fields(value: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a Struct with the names and the tag that msgspec would encode."""
    config = value.__struct_config__
    fields = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
    tag = {} if config.tag is None else {cast("str", config.tag_field): config.tag}
    return tag | {encoded: getattr(value, name) for encoded, name in fields}


def snapshot(copy: Callable[[], T]) -> T:
    """Call ``copy`` and return its result, with retries when another thread changed the original meanwhile."""
    for _ in range(_MAX_ATTEMPTS - 1):
        try:
            return copy()
        except RuntimeError:
            continue
    return copy()


def short_repr(value: object) -> str:
    """Return a value's qualified name if it has one, else its repr, on one line. Never raises."""
    try:
        name = getattr(value, "__qualname__", None)
        line = f"{cast('Any', value).__module__}.{name}" if type(name) is str else repr(value)
        return escape_surrogates(line[:MAX_REPR_CHARS])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # raised by the value's own code
        return f"<{type(value).__name__}>"


def escape_surrogates(text: str) -> str:
    r"""Return the text with lone surrogates escaped (``\udc80``), so that it is valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


Builtins: TypeAlias = Any
"""None, bool, int, float, str, bytes, datetimes with a time zone, and dicts (with text keys) and lists of these."""

_MAX_INNER_BYTES: Final = 256 * 1024
_ITEM_BYTES: Final = 10
"""Upper bound for a number, or for the header of a text or a container, in msgpack."""


def to_builtins(value: object, path: str = "", *, max_bytes: int = MAX_EVENT_BYTES) -> tuple[Builtins, dict[str, str]]:
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
    normalizer = _Normalizer(path, max_bytes)
    plain = normalizer.normalize(value)
    if normalizer.omitted_count:
        normalizer.reasons["…"] = f"and {normalizer.omitted_count} more"
    return plain, normalizer.reasons


def to_builtins_at(value: object, trail: Iterable[str | int], reasons: dict[str, str]) -> Builtins:
    """Copy one small value inside an event like `to_builtins`; reasons are added to ``reasons``.

    Raises:
        TooLarge: The value is not small.
    """
    normalizer = _Normalizer("", _MAX_INNER_BYTES, trail, reasons)
    plain = normalizer.normalize(value)
    if normalizer.bytes_left < _MAX_INNER_BYTES // 2:
        raise TooLarge
    if normalizer.omitted_count:
        reasons["…"] = f"and {normalizer.omitted_count} more"
    return plain


def format_path(path: str, steps: Iterable[str | int]) -> str:
    """Format a path: ``metrics.grads[3]``."""
    for step in steps:
        path = f"{path}[{step}]" if type(step) is int else f"{path}.{step}" if path else str(step)
    return path


def dict_or_empty(plain: Builtins) -> dict[str, Builtins]:
    """Return the value if it is a dict, else an empty dict."""
    return plain if type(plain) is dict else {}  # pyright: ignore[reportUnknownVariableType, reportReturnType]


class _Normalizer:
    """The state of one copy: the current path, the bytes left, and what was replaced."""

    __slots__ = ("_ancestors", "_base_path", "_trail", "bytes_left", "omitted_count", "reasons")

    def __init__(
        self, path: str, max_bytes: int, trail: Iterable[str | int] = (), reasons: dict[str, str] | None = None
    ) -> None:
        self._base_path = path
        self._trail: list[str | int] = [*trail]
        self._ancestors: set[int] = set()
        self.bytes_left = max_bytes
        self.reasons: dict[str, str] = {} if reasons is None else reasons
        self.omitted_count = 0

    def normalize(self, value: object) -> Builtins:
        """Copy the value into built-in types, or return a replacement."""
        kind = type(value)
        if kind is float or kind is bool or value is None:
            return value
        depth = len(self._trail)
        try:
            copy = _COPY_BY_TYPE.get(kind)
            return (_copier_for(kind) if copy is None else copy)(self, value)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the value's own code
            del self._trail[depth:]
            self._ancestors.discard(id(value))
            return self._replace_value(short_repr(value), f"{type(error).__name__} when it was read")

    def copy_int(self, value: int) -> Builtins:
        if INT_MIN <= value <= INT_MAX:
            return value
        try:
            return self._replace_value(float(value), "an integer beyond 64 bits, kept as a float")
        except OverflowError:
            return self._replace_value(f"<integer of {value.bit_length()} bits>", "an integer beyond 64 bits")

    def copy_text(self, value: str) -> str:
        if len(value) > MAX_TEXT_CHARS:
            self._add_reason(f"a text of {len(value)} characters, cut to {MAX_TEXT_CHARS}")
            value = value[:MAX_TEXT_CHARS]
        size = len(value)
        if not value.isascii():
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                value = escape_surrogates(value)
                size = len(value.encode())
                self._add_reason("lone surrogates, written out as \\udc80")
        if size > self.bytes_left:
            limit = max(self.bytes_left // 4, 0)
            self._add_reason(f"a text of {len(value)} characters, cut to {limit}: the whole is too large")
            value = value[:limit]
            size = 4 * limit
        self.bytes_left -= size
        return value

    def copy_bytes(self, value: bytes) -> bytes:
        limit = min(MAX_TEXT_CHARS, max(self.bytes_left, 0))
        if len(value) > limit:
            self._add_reason(f"{len(value)} bytes, cut to {limit}")
        self.bytes_left -= min(len(value), limit)
        return value[:limit]

    def copy_datetime(self, value: datetime) -> Builtins:
        if value.tzinfo is None:
            return msgspec.to_builtins(value)
        # Any other tzinfo may be Python code, and that must not run inside the encoder.
        return value if type(value.tzinfo) is timezone else value.astimezone(UTC)

    def copy_mapping(self, source: object, entries: Mapping[Any, Any]) -> Builtins:
        """Copy ``entries``, a private dict that was taken from ``source``."""
        if self._must_omit(source):
            return self._omit(source)
        self._ancestors.add(id(source))
        result: dict[str, Builtins] = {}
        deferred: list[tuple[str, Any]] = []
        for key, value in islice(entries.items(), self._reserve_items(len(entries))):
            name = key if type(key) is str and len(key) <= MAX_KEY_CHARS and key.isascii() else self._key_text(key)
            if name in result:
                name = self._unique_key(name, result)
            self.bytes_left -= len(name)
            kind: type = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
            if kind is float or kind is bool or value is None or (kind is int and INT_MIN <= value <= INT_MAX):
                result[name] = value
            elif issubclass(kind, float):
                result[name] = float.__float__(value)
            else:
                result[name] = None  # filled below: numbers come first, so that a large neighbour cannot displace them
                deferred.append((name, value))
            if self.bytes_left < 0:
                self._add_reason(f"cut after {len(result)} of {len(entries)} entries: the whole is too large")
                break
        for name, value in deferred:
            self._trail.append(name)
            result[name] = self.normalize(value)
            self._trail.pop()
        self._ancestors.discard(id(source))
        return result

    def copy_sequence(self, source: object, items: Sequence[object]) -> Builtins:
        """Copy ``items``, which were taken from ``source`` and may change meanwhile."""
        if self._must_omit(source):
            return self._omit(source)
        self._ancestors.add(id(source))
        result: list[Builtins] = []
        for index, value in enumerate(islice(items, self._reserve_items(len(items)))):
            self._trail.append(index)
            result.append(self.normalize(value))
            self._trail.pop()
        self._ancestors.discard(id(source))
        return result

    def copy_iterable(self, value: Any) -> Builtins:
        return self.copy_sequence(
            value, snapshot(lambda: list(islice(value, max(self.bytes_left, 0) // _ITEM_BYTES + 1)))
        )

    def copy_unknown(self, value: Any) -> Builtins:
        if hasattr(type(value), "__float__"):  # pyright: ignore[reportUnknownArgumentType] - untyped
            return self._replace_value(float.__float__(float(value)), f"a {type(value).__name__}, kept as a float")
        return self._replace_value(short_repr(value), f"a {type(value).__name__} cannot be recorded")

    def copy_array(self, value: Any) -> Builtins:
        """Copy a scalar of numpy, torch, jax or a similar library, or replace an array by a description."""
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        shape = getattr(value, "shape", ())
        count = math.prod(shape)
        if count == 1:
            scalar = value.item()
            if type(scalar) in _COPY_BY_TYPE:
                return self.normalize(scalar)
            if hasattr(scalar, "__float__"):  # np.longdouble.item() returns another np.longdouble
                return float.__float__(float(scalar))
            return self._replace_value(short_repr(value), f"a {kind.__name__} cannot be recorded")
        dtype = _cached_str(getattr(value, "dtype", "?"))
        description = f"{kind.__name__}(shape={tuple(shape)}, dtype={dtype})"[:MAX_REPR_CHARS]
        return self._replace_value(description, f"an array of {count} values; record numbers, or a list of a few")

    def _key_text(self, key: Any) -> str:
        """Convert a key to text."""
        try:
            name = escape_surrogates(str.__str__(str(key.value if issubclass(type(key), Enum) else key)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the key's own code
            name = f"<{type(key).__name__}>"
            self._add_reason(f"{type(error).__name__} when a key was read", name)
        if len(name) > MAX_KEY_CHARS:
            length, name = len(name), f"{name[: MAX_KEY_CHARS - 9]}…{zlib.crc32(name.encode()):08x}"
            self._add_reason(f"a name of {length} characters, cut to {MAX_KEY_CHARS}", name)
        self.bytes_left -= 3 * len(name)  # mapping() counts one byte a character; here a character may take four
        return name

    def _unique_key(self, name: str, taken: Mapping[str, object]) -> str:
        number = next(n for n in range(2, len(taken) + 3) if f"{name}#{n}" not in taken)
        self._add_reason("two keys that are the same as text", f"{name}#{number}")
        return f"{name}#{number}"

    def _must_omit(self, container: object) -> bool:
        return id(container) in self._ancestors or len(self._trail) >= MAX_DEPTH

    def _omit(self, container: object) -> Builtins:
        is_circular = id(container) in self._ancestors
        why = "it contains itself" if is_circular else f"nested deeper than {MAX_DEPTH} levels"
        return self._replace_value(f"<{type(container).__name__}>", why)

    def _reserve_items(self, count: int) -> int:
        granted = min(count, max(self.bytes_left, 0) // _ITEM_BYTES)
        if granted < count:
            self._add_reason(f"cut after {granted} of {count} items: the whole is too large")
        self.bytes_left -= granted * _ITEM_BYTES
        return granted

    def _replace_value(self, replacement: Builtins, why: str) -> Builtins:
        if type(replacement) is str:
            self.bytes_left -= len(replacement)
        self._add_reason(why)
        return replacement

    def _add_reason(self, why: str, *within: str) -> None:
        if len(self.reasons) >= MAX_REASONS:
            self.omitted_count += 1
            return
        path = format_path(self._base_path, (*self._trail, *within))
        path = escape_surrogates(path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}…")
        self.reasons[path] = why
        self.bytes_left -= len(path) + len(why)


_COPY_BY_TYPE: Final[dict[type, Callable[[_Normalizer, Any], Builtins]]] = {
    int: _Normalizer.copy_int,
    str: _Normalizer.copy_text,
    bytes: _Normalizer.copy_bytes,
    dict: lambda copying, value: copying.copy_mapping(value, snapshot(value.copy)),
    list: lambda copying, value: copying.copy_sequence(value, value),
    tuple: lambda copying, value: copying.copy_sequence(value, value),
    set: lambda copying, value: copying.copy_sequence(value, snapshot(lambda: list(value))),
    frozenset: lambda copying, value: copying.copy_sequence(value, list(value)),
    bytearray: lambda copying, value: copying.copy_bytes(bytes(value)),
    memoryview: lambda copying, value: copying.copy_bytes(value.tobytes()),
    float: lambda _, value: value,
    bool: lambda _, value: value,
    type(None): lambda _, value: value,
    datetime: _Normalizer.copy_datetime,
    date: lambda _, value: msgspec.to_builtins(value),
    timedelta: lambda _, value: msgspec.to_builtins(value),
    UUID: lambda _, value: msgspec.to_builtins(value),
}
"""Exact type -> how its values are copied."""


@lru_cache(maxsize=256)
def _copier_for(kind: Any) -> Callable[[_Normalizer, Any], Builtins]:  # noqa: C901, PLR0911 - one line for each kind of class
    """Return how values of a type that is not in `_COPY_BY_TYPE` are copied."""
    if issubclass(kind, float):
        return lambda _, value: float.__float__(value)
    if issubclass(kind, str):
        return lambda copying, value: copying.copy_text(str.__str__(value))
    if issubclass(kind, int):
        return lambda copying, value: copying.copy_int(int.__int__(value))
    if hasattr(kind, "item"):
        return _Normalizer.copy_array
    if issubclass(kind, Enum):
        return lambda copying, value: copying.normalize(value.value)
    if issubclass(kind, PurePath):
        return lambda copying, value: copying.copy_text(str(value))
    if has_fields(kind):
        return lambda copying, value: copying.copy_mapping(value, dict_or_empty(object_fields(value, kind)))
    if issubclass(kind, Mapping):
        return lambda copying, value: copying.copy_mapping(value, snapshot(lambda: dict(value.items())))
    if issubclass(kind, Sequence | AbstractSet):
        return _Normalizer.copy_iterable
    if issubclass(kind, date | time):
        return lambda copying, value: copying.copy_text(value.isoformat())
    return _Normalizer.copy_unknown


_cached_str: Final = lru_cache(maxsize=64)(str)
