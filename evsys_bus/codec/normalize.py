"""Copy any value into built-in types, which msgspec encodes without running foreign code.

`to_builtins` handles what people put into metrics, configs and predictions: numpy and torch scalars, dataclasses,
pydantic models, paths, and the occasional circular, hostile or 50 MB object. A value that cannot be encoded is replaced
and the reason is recorded; its neighbours are not affected. The result shares nothing with the original, so a thread
that keeps changing the original cannot disturb the encoder.
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as time_of_day
from enum import Enum
from functools import lru_cache
from itertools import islice
from pathlib import PurePath
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, cast
from uuid import UUID

import msgspec

from evsys_bus.codec.redact import CONFIG_KEYS, REASON, REDACTED
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
from evsys_bus.codec.wire_types import ABSENT, HANDLES, wire_parts

T = TypeVar("T")

_MAX_ATTEMPTS: Final = 5


def object_fields(value: Any, kind: Any) -> dict[str, Any] | None:  # noqa: PLR0911 - one line for each kind of class
    """Return the named fields of a value, one level deep; None if its class has none.

    A field whose reading raised is an `Unreadable`.
    """
    if issubclass(kind, HANDLES):
        return wire_parts(value, kind)
    if issubclass(kind, msgspec.Struct):
        return struct_fields(value)
    if _is_named_tuple(kind):
        return value._asdict()
    if hasattr(kind, "__dataclass_fields__"):
        return _read_fields(value, [each.name for each in dataclasses.fields(kind)])
    if hasattr(kind, "__attrs_attrs__"):
        return _read_fields(value, [each.name for each in kind.__attrs_attrs__])
    if _is_pydantic(kind):
        extras: Any = getattr(value, "__pydantic_extra__", None)
        declared = getattr(kind, "model_fields", None) or getattr(kind, "__fields__", {})
        computed = getattr(kind, "model_computed_fields", {})
        return _read_fields(value, [*declared, *dict_or_empty(extras), *computed])
    return cast("dict[str, Any]", value.__dict__.copy()) if _is_namespace(kind) else None


def has_fields(kind: Any) -> bool:
    """Whether values of this type have named fields."""
    return (
        issubclass(kind, (*HANDLES, msgspec.Struct))
        or _is_named_tuple(kind)
        or hasattr(kind, "__dataclass_fields__")
        or hasattr(kind, "__attrs_attrs__")
        or _is_pydantic(kind)
        or _is_namespace(kind)
    )


def _is_named_tuple(kind: Any) -> bool:
    return callable(getattr(kind, "_asdict", None))


def _is_pydantic(kind: Any) -> bool:
    return hasattr(kind, "__pydantic_validator__") or hasattr(kind, "__fields_set__")


def _is_namespace(kind: Any) -> bool:
    """Whether a type is `SimpleNamespace`, `argparse.Namespace` or a subclass of them."""
    return any(
        (each.__module__, each.__name__) in {("types", "SimpleNamespace"), ("argparse", "Namespace")}
        for each in kind.__mro__
    )


class Unreadable(NamedTuple):
    """In the place of a value whose reading raised an error."""

    error: str


def _read_fields(value: object, names: Iterable[str]) -> dict[str, Any]:
    """Return the attributes with these names that the value has."""
    found = {name: _read(getattr, value, name, ABSENT) for name in names}
    return {name: part for name, part in found.items() if part is not ABSENT}


def _read(get: Callable[..., Any], *args: Any) -> Any:
    """Call ``get``, which runs the code of a value; return an `Unreadable` if it raises."""
    try:
        return get(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # raised by the value's own code
        return Unreadable(type(error).__name__)


def _is_descriptor(item: object) -> bool:
    return hasattr(type(item), "__get__")


def _call_method(value: object, name: str) -> Any:
    return getattr(value, name)()


def _public_attributes(value: Any) -> dict[str, Any]:
    """Return the public data attributes of any object or class, inherited ones included."""
    kinds = value.__mro__ if issubclass(type(value), type) else type(value).__mro__
    names: dict[str, None] = {}
    for kind in reversed(kinds[:-1]):
        slots = kind.__dict__.get("__slots__", ())
        names |= dict.fromkeys((slots,) if isinstance(slots, str) else slots)
        names |= {name: None for name, item in vars(kind).items() if not _is_descriptor(item)}
    names |= dict.fromkeys(dict_or_empty(_read(getattr, value, "__dict__", ())))
    public = [name for name in names if type(name) is str and not name.startswith("_")]
    attributes = _read_fields(value, public[:_MAX_ATTRIBUTES])
    return {name: part for name, part in attributes.items() if not callable(part) and type(part) is not ModuleType}


_MAX_ATTRIBUTES: Final = 1_000
_AS_DICT: Final = ("to_dict", "as_dict", "flag_values_dict", "toDict", "dict")
"""Methods by which configuration objects without public attributes give their values."""


def struct_fields(value: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of a Struct with the names and the tag that msgspec would encode."""
    config = value.__struct_config__
    fields = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
    tag = {} if config.tag is None else {cast("str", config.tag_field): config.tag}
    return tag | {encoded: _read(getattr, value, name) for encoded, name in fields}


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
_MAX_OBJECT_BYTES: Final = 256 * 1024
"""Of an object without declared fields in a configuration, whose attributes may lead anywhere."""
_MAX_READ_SECONDS: Final = 0.5
"""For a container that may read its items from a file, or compute them."""
_MAX_LAZY_SECONDS: Final = 2.0
"""For all such containers of one value, which may contain each other."""
_MAX_LAZY_ENTRIES: Final = 20_000
MAX_ARRAY_ITEMS: Final = 128
"""Of an array that is recorded as numbers; a larger one is described."""
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

    __slots__ = ("_ancestors", "_base_path", "_lazy_seconds", "_trail", "bytes_left", "omitted_count", "reasons")

    def __init__(
        self, path: str, max_bytes: int, trail: Iterable[str | int] = (), reasons: dict[str, str] | None = None
    ) -> None:
        self._base_path = path
        self._trail: list[str | int] = [*trail]
        self._ancestors: set[int] = set()
        self._lazy_seconds = _MAX_LAZY_SECONDS
        self.bytes_left = max_bytes
        self.reasons: dict[str, str] = {} if reasons is None else reasons
        self.omitted_count = 0

    def normalize(self, value: object) -> Builtins:
        """Copy the value into built-in types, or return a replacement."""
        kind = type(value)
        if kind is float or kind is bool or value is None:
            return value
        if kind is Unreadable:
            return self.replace_value("<unreadable>", f"{cast('Unreadable', value).error} when it was read")
        depth = len(self._trail)
        try:
            copy = _COPY_BY_TYPE.get(kind)
            return (_copier_for(kind) if copy is None else copy)(self, value)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the value's own code
            del self._trail[depth:]
            self._ancestors.discard(id(value))
            return self.replace_value(short_repr(value), f"{type(error).__name__} when it was read")

    def copy_int(self, value: int) -> Builtins:
        if INT_MIN <= value <= INT_MAX:
            return value
        try:
            return self.replace_value(float(value), "an integer beyond 64 bits, kept as a float")
        except OverflowError:
            return self.replace_value(f"<integer of {value.bit_length()} bits>", "an integer beyond 64 bits")

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

    def copy_dict(self, value: dict[Any, Any]) -> Builtins:
        limit = max(self.bytes_left, 0) // _ITEM_BYTES + 1
        if len(value) <= limit:
            return self.copy_mapping(value, snapshot(value.copy))
        self._add_reason(f"cut after {limit} of {len(value)} items: the whole is too large")
        return self.copy_mapping(value, snapshot(lambda: dict(islice(value.items(), limit))))

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
        try:
            items = self._read_lazily(lambda: iter(value), lambda item: item)
        except Exception:  # one item raised: read the others by their index
            if not issubclass(type(value), Sequence):
                raise
            count = min(len(value), max(self.bytes_left, 0) // _ITEM_BYTES)
            items = [(index, _read(value.__getitem__, index)) for index in range(count)]
        self._report_cut(value, items)
        return self.copy_sequence(value, [item for _, item in items])

    def copy_lazy_mapping(self, value: Any) -> Builtins:
        """Copy a mapping of any class item by item; one whose look-up raises costs only itself."""
        limit = MAX_EVENT_BYTES if issubclass(type(value), dict) else _MAX_LAZY_ENTRIES  # pyright: ignore[reportUnknownArgumentType] - untyped
        items: list[tuple[Any, Any]] = []
        try:
            keys = value.__iter__ if hasattr(type(value), "__iter__") else lambda: iter(value.keys())  # pyright: ignore[reportUnknownArgumentType] - untyped
            self._read_lazily(keys, lambda key: _read(value.__getitem__, key), limit, items)
        except Exception as error:  # raised by the iteration: keep what came before
            if not items:
                raise
            self._add_reason(f"{type(error).__name__} after {len(items)} entries")
        else:
            self._report_cut(value, items)
        return self.copy_mapping(value, dict(items))

    def _read_lazily(
        self,
        keys: Callable[[], Iterator[Any]],
        get: Callable[[Any], Any],
        limit: int = MAX_EVENT_BYTES,
        items: list[tuple[Any, Any]] | None = None,
    ) -> list[tuple[Any, Any]]:
        """Read the items of a container of unknown cost, with their keys, as many as there is room and time for."""
        found = [] if items is None else items
        limit = min(limit, max(self.bytes_left, 0) // _ITEM_BYTES + 1)
        began = time.monotonic()
        deadline = began + min(_MAX_READ_SECONDS, self._lazy_seconds)

        def read() -> None:
            found.clear()
            for key in islice(keys(), limit):
                found.append((key, get(key)))
                if time.monotonic() > deadline:
                    break

        try:
            snapshot(read)
        finally:
            self._lazy_seconds -= time.monotonic() - began
        return found

    def _report_cut(self, value: Any, items: list[tuple[Any, Any]]) -> None:
        total = _read(len, value)
        if type(total) is int and total > len(items):
            self._add_reason(f"cut after {len(items)} of {total} entries: reading all of them takes too long")

    def copy_object(self, value: Any) -> Builtins:
        """Copy the public attributes of an object in a configuration; replace any other object by a description."""
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        is_described = callable(value) or issubclass(kind, ModuleType) or hasattr(kind, "__float__")
        if self._is_in_config() and (not is_described or self._trail[-1] in CONFIG_KEYS):
            attributes = _public_attributes(value)
            for name in () if attributes else _AS_DICT:
                found = _read(_call_method, value, name)
                if isinstance(found, dict):
                    attributes = cast("dict[str, Any]", found)
                    break
            if attributes:
                return self._within(_MAX_OBJECT_BYTES, lambda: self.copy_mapping(value, attributes))
        if hasattr(kind, "__float__"):
            return self.replace_value(float.__float__(float(cast("Any", value))), f"a {kind.__name__}, kept as a float")
        return self.replace_value(short_repr(value), f"a {kind.__name__} cannot be recorded")

    def _is_in_config(self) -> bool:
        return not CONFIG_KEYS.isdisjoint(self._trail)

    def _within(self, max_bytes: int, copy: Callable[[], Builtins]) -> Builtins:
        """Copy with at most this much of the room that is left."""
        withheld = max(self.bytes_left - max_bytes, 0)
        self.bytes_left -= withheld
        try:
            return copy()
        finally:
            self.bytes_left += withheld

    def copy_array(self, value: Any) -> Builtins:
        """Copy a scalar or a small array of numpy, torch, jax or a similar library; describe a larger array."""
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if self._is_in_config() and not hasattr(kind, "dtype"):  # a class with a field of the name "item"
            return self.copy_object(value)
        shape = getattr(value, "shape", ())
        count = math.prod(shape)
        if count == 1:
            scalar = value.item()
            if type(scalar) in _COPY_BY_TYPE:
                return self.normalize(scalar)
            if hasattr(scalar, "__float__"):  # np.longdouble.item() returns another np.longdouble
                return float.__float__(float(scalar))
            return self.replace_value(short_repr(value), f"a {kind.__name__} cannot be recorded")
        if count <= MAX_ARRAY_ITEMS and hasattr(kind, "tolist"):
            return self.normalize(value.tolist())
        dtype = _cached_str(getattr(value, "dtype", "?"))
        description = f"{kind.__name__}(shape={tuple(shape)}, dtype={dtype})"[:MAX_REPR_CHARS]
        return self.replace_value(description, f"an array of {count} values; record numbers, or a list of a few")

    def copy_enum(self, value: Enum) -> Builtins:
        """Copy the value of a member; its name if the value is an object."""
        return self.normalize(value.value if type(value.value) in _COPY_BY_TYPE else value.name)

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
        return self.replace_value(f"<{type(container).__name__}>", why)

    def _reserve_items(self, count: int) -> int:
        granted = min(count, max(self.bytes_left, 0) // _ITEM_BYTES)
        if granted < count:
            self._add_reason(f"cut after {granted} of {count} items: the whole is too large")
        self.bytes_left -= granted * _ITEM_BYTES
        return granted

    def replace_value(self, replacement: Builtins, why: str) -> Builtins:
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
    dict: _Normalizer.copy_dict,
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
def _copier_for(kind: Any) -> Callable[[_Normalizer, Any], Builtins]:  # noqa: C901, PLR0911, PLR0912 - one line for each kind of class
    """Return how values of a type that is not in `_COPY_BY_TYPE` are copied."""
    if issubclass(kind, float):
        return lambda _, value: float.__float__(value)
    if issubclass(kind, str):
        return lambda copying, value: copying.copy_text(str.__str__(value))
    if issubclass(kind, int):
        return lambda copying, value: copying.copy_int(int.__int__(value))
    if issubclass(kind, Enum):
        return _Normalizer.copy_enum
    if issubclass(kind, PurePath):
        return lambda copying, value: copying.copy_text(str(value))
    if hasattr(kind, "get_secret_value"):  # pydantic's SecretStr and its like
        return lambda copying, _: copying.replace_value(REDACTED, REASON)
    if hasattr(kind, "__pydantic_root_model__") and kind.__pydantic_root_model__:
        return lambda copying, value: copying.normalize(value.root)
    if has_fields(kind):
        return lambda copying, value: copying.copy_mapping(value, dict_or_empty(object_fields(value, kind)))
    if hasattr(kind, "item") and not issubclass(kind, Mapping):
        return _Normalizer.copy_array
    if issubclass(kind, Mapping) or (callable(getattr(kind, "keys", None)) and hasattr(kind, "__getitem__")):
        return _Normalizer.copy_lazy_mapping
    if issubclass(kind, Sequence | AbstractSet):
        return _Normalizer.copy_iterable
    if issubclass(kind, date | time_of_day):
        return lambda copying, value: copying.copy_text(value.isoformat())
    if (kind.__module__.partition(".")[0], kind.__name__) == ("ml_collections", "FieldReference"):
        return lambda copying, value: copying.normalize(value.get())
    return _Normalizer.copy_object


_cached_str: Final = lru_cache(maxsize=64)(str)
