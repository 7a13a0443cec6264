"""What is encoded of an event: its fields, by their annotations, and the parts of the handles in them.

The parts of a handle are the scalars of a `LoopState`, and the data of a `LogContext` or a `TrainingBatch`.

Attributes decide, not the class: of a host's own state, context or batch, the attributes with our names are encoded,
and of a state its custom fields too. An encoder never receives the handle itself, and live parts (``backend``,
``store``, ``batch.data``, …) are never encoded. On the wire a state is a map; fields with their usual values are
omitted (`evsys_bus.context.OmittedDefaults`):

    step, num_steps, output_dir, stop_requested, stop_reason
    error      the exception that the loop raised, as text
    run        the run key of its context
    root       the context's output_dir, unless it follows from output_dir
    context    the whole context, in the first recorded event of a run
    live       the names of the custom fields that are not encoded
    own        the custom fields, by name

Custom fields are those that a subclass of `LoopState` or a host's own class adds: the fields that the class declares
and the attributes of the instance. Scalars and small built-in containers are encoded. Live objects, large values,
credentials and configurations (by their names) are not.

An annotation only chooses what is tried first, because a field may hold a value of any type. Annotations may be
classes, unions, generic aliases, or whatever a user writes.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from keyword import iskeyword
from operator import attrgetter
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from evsys_bus.codec.redact import CONFIG_KEYS, is_secret_key, redact_key, redact_text
from evsys_bus.codec.scalars import INT_MAX, INT_MIN, SCALARS, copy_small, number_converter
from evsys_bus.context import (
    DetachedLogContext,
    DetachedLoopState,
    DetachedTrainingBatch,
    LogContext,
    LoopState,
    TrainingBatch,
)

_STATE_FIELDS: Final = ("step", "num_steps", "output_dir", "stop_requested", "stop_reason", "error", "ctx")
_LOOP_STATE_FIELDS: Final = frozenset(LoopState.__dataclass_fields__)
_MAX_CUSTOM_FIELDS: Final = 100
_MAX_CUSTOM_CHARS: Final = 4096
_MAX_CUSTOM_ITEMS: Final = 64
_MAX_CUSTOM_DEPTH: Final = 2
CONTAINERS: Final = frozenset({list, tuple, dict, set, frozenset})


class _Absent:
    """Type of the sentinel `ABSENT`, which marks a missing attribute."""


ABSENT: Final = _Absent()


def add_custom_fields(parts: dict[str, Any], state: object) -> None:
    """Add the custom fields of a state to ``parts``, and the names of those that are not encoded."""
    entries = cast("dict[str, Any]", state) if issubclass(type(state), dict) else None
    custom: dict[str, Any] = {}
    live_names: list[str] = []
    for name in custom_field_names(state):
        try:
            value = getattr(state, name, ABSENT) if entries is None else entries[name]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # raised by the state's own code
            value = ABSENT
        kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is float or kind is bool or value is None:
            custom[name] = value
        elif value is not ABSENT:
            encoded = custom_field_value(value, name)
            if encoded is ABSENT:
                live_names.append(name)
            else:
                custom[name] = encoded
    if live_names:
        parts["live"] = live_names
    if custom:
        parts["own"] = custom


def custom_field_names(state: object) -> tuple[str, ...]:
    """Return the names of a state's custom fields; private names are left out."""
    kind = type(state)
    try:
        instance: Any = state if issubclass(kind, dict) else getattr(state, "__dict__", None)
    except Exception:  # raised by the state's own code
        instance = None
    return _public_names(kind, tuple(cast("dict[Any, Any]", instance)) if isinstance(instance, dict) else ())  # pyright: ignore[reportUnknownArgumentType] - untyped


@functools.lru_cache(maxsize=1024)
def _public_names(kind: type, names: tuple[Any, ...]) -> tuple[str, ...]:
    excluded = _LOOP_STATE_FIELDS if issubclass(kind, LoopState) else _STATE_FIELDS
    found = dict.fromkeys((*_declared_names(kind), *names))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return tuple(name for name in found if _is_public(name) and name not in excluded)[:_MAX_CUSTOM_FIELDS]


def custom_field_value(value: Any, name: str) -> Any:
    """Copy the value of a custom field if it is a scalar or a small built-in container.

    Returns:
        `ABSENT` for a value that is not encoded: a live object, a large value, or by its name a credential or a
        configuration.
    """
    kind = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind is int:
        return value if INT_MIN <= value <= INT_MAX else ABSENT
    if kind is str:
        return value if _is_harmless(value) and not _is_secret(name) else ABSENT
    if kind in CONTAINERS:
        return ABSENT if len(value) > _MAX_CUSTOM_ITEMS or name in CONFIG_KEYS else _container_value(value)
    number = number_converter(kind)  # not tensors: fetching one may block on a device  # pyright: ignore[reportUnknownArgumentType] - untyped
    if number is not None:
        value = number(value)
    elif issubclass(kind, PurePath):
        value = str(value)
    elif issubclass(kind, Enum):
        value = value.value
    is_encodable = type(value) in SCALARS and _is_small(value) and not (type(value) is str and _is_secret(name))
    return value if is_encodable else ABSENT


def _container_value(value: Any) -> Any:
    try:
        plain = copy_small(list(value) if type(value) in {set, frozenset} else value, _MAX_CUSTOM_DEPTH)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it holds a live object, or another thread changed it
        return ABSENT
    return plain if _is_small(plain) and not has_config(plain) else ABSENT


_is_secret: Final = functools.lru_cache(maxsize=1024)(is_secret_key)


@functools.lru_cache(maxsize=256)
def _declared_names(kind: Any) -> tuple[str, ...]:
    """Return the fields that a class declares: as a dataclass, attrs, msgspec or pydantic class, or in its slots."""
    names: list[Any] = [*_as_list(getattr(kind, "__dataclass_fields__", ()))]
    names += [getattr(each, "name", None) for each in _as_list(getattr(kind, "__attrs_attrs__", ()))]
    for attribute in ("__struct_fields__", "model_fields", "_fields"):
        names += _as_list(getattr(kind, attribute, ()))
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - untyped
        names += [slots] if isinstance(slots, str) else _as_list(slots)
    return tuple(dict.fromkeys(name for name in names if type(name) is str))


def _as_list(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Iterable) else []  # pyright: ignore[reportUnknownArgumentType] - untyped


def _is_public(name: Any) -> bool:
    return type(name) is str and name.isidentifier() and not name.startswith("_") and not iskeyword(name)


def _is_small(plain: Any) -> bool:
    """Whether built-in data holds only small texts and containers, and no credential."""
    if type(plain) is int:
        return INT_MIN <= plain <= INT_MAX
    if type(plain) is not dict and type(plain) is not list:
        return type(plain) is not str or _is_harmless(plain)
    entries = cast("dict[Any, Any]", plain) if type(plain) is dict else dict(enumerate(cast("list[Any]", plain)))  # pyright: ignore[reportUnknownArgumentType] - untyped
    return len(entries) <= _MAX_CUSTOM_ITEMS and all(
        _is_small(value) and not (type(value) is str and type(key) is str and _is_secret(key))
        for key, value in entries.items()
    )


def _is_harmless(text: str) -> bool:
    """Whether a text is short and holds no credential."""
    return len(text) <= _MAX_CUSTOM_CHARS and redact_key(text) == text


HANDLES: Final = (LoopState, LogContext, TrainingBatch)

CONTEXT_FIELDS: Final = ("output_dir", "run_key", "group_name", "ids", "extras", "config", "run_config")
_BATCH_FIELDS: Final = ("loss_fn", "loss_fn_config", "metrics")
ALREADY_COPIED: Final = frozenset({"own", "live"})
"""Parts of a state that are copies already."""

ReadErrors = tuple[dict[str, str], str]
"""Errors of reading attributes, path -> reason, to add to; and the path of the handle."""


def wire_parts(
    handle: object, kind: type, read_errors: ReadErrors | None = None, *, whole_context: bool = False
) -> dict[str, Any]:
    """Return the parts of a handle that are encoded, not copied; parts that it lacks are left out.

    Args:
        handle: A handle, an object of any class in its place, or a dict with the same keys.
        kind: The handle class to read it as.
        read_errors: Collects errors raised by the handle's own code.
        whole_context: Include the whole context of a state.
    """
    if issubclass(type(handle), _DETACHED):
        return _detached_wire_parts(handle)
    if issubclass(kind, TrainingBatch):
        return batch_wire_parts(handle, read_errors)
    if issubclass(kind, LogContext):
        parts = _read_named(attribute_reader(handle, read_errors), CONTEXT_FIELDS)
        if "output_dir" in parts:
            parts["output_dir"] = encode_path(absolute_path(parts["output_dir"]))
        if "run_key" in parts:
            parts["run_key"] = run_key_text(parts["run_key"])
        return parts
    return _state_wire_parts(handle, read_errors, whole_context=whole_context)


def _detached_wire_parts(handle: Any) -> dict[str, Any]:
    """Return the parts of a detached handle that were recorded, with their current values."""
    parts: dict[str, Any] = {}
    for name, written in handle._parts.items():  # noqa: SLF001 - its own
        if name == "output_dir":
            parts[name] = encode_path(str(handle.output_dir))  # a relative path is relative to the writer's cwd
        elif name not in _WIRE_ONLY_KEYS:
            parts[name] = getattr(handle, name, written)
        elif name != "ctx":
            parts[name] = written
    if issubclass(type(handle), LoopState) and "run" not in parts and handle.ctx is not None:
        parts["run"] = handle.ctx.run_key
    return parts


_DETACHED: Final = (DetachedLoopState, DetachedLogContext, DetachedTrainingBatch)
_WIRE_ONLY_KEYS: Final = frozenset({"run", "root", "context", "live", "own", "ctx"})


def attribute_reader(handle: object, read_errors: ReadErrors | None = None) -> Callable[[str], Any]:
    """Return a function that reads an attribute or a dict entry; it returns `ABSENT` if there is none or on errors."""
    if issubclass(type(handle), dict):
        entries = cast("dict[str, Any]", handle)
        return lambda name: entries.get(name, ABSENT)

    def read(name: str) -> Any:
        try:
            return getattr(handle, name, ABSENT)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # raised by the handle's own code
            if read_errors is not None:
                notes, path = read_errors
                notes.setdefault(f"{path}.{name}", f"{type(error).__name__} when it was read")
            return ABSENT

    return read


def run_and_root(state: object) -> tuple[str | None, str | None]:
    """Return the run key of a state, and the experiment's directory if it has a context; None for a missing part."""
    read = attribute_reader(state)
    ctx = read("ctx")
    read_ctx = attribute_reader(None if ctx is ABSENT else ctx)
    run, root = run_key_text(read_ctx("run_key")), absolute_path(read_ctx("output_dir"))
    if run is None:
        folder = absolute_path(read("output_dir"))
        run = PurePath(folder).name if type(folder) is str else run_key_text(read("run_key"))
    return run, root if type(root) is str else None


def run_key_text(key: Any) -> str | None:
    """Convert a run key to text; a host may use another type, such as a number. None stays None."""
    if key is None or key is ABSENT or isinstance(key, str):
        return None if key is ABSENT else key
    try:
        return str(key)
    except Exception:  # raised by the key's own code
        return type(key).__name__


def absolute_path(path: Any) -> Any:
    """Return a directory as an absolute path in text; return a value that is not a path unchanged.

    Between `pin_relative_paths` and `unpin_relative_paths`, a relative path is resolved once, against the working
    directory of its first use.
    """
    try:
        text = path if type(path) is str else os.fsdecode(cast("os.PathLike[str]", path))
    except Exception:  # not a path, or raised by its own code
        return path
    if text[:1] == "/" or "://" in text:
        return text
    pinned = _pinned_paths.get(text)
    if pinned is not None:
        return pinned
    try:
        folder = str(Path(text).expanduser().absolute())
    except (OSError, RuntimeError, ValueError):  # no such user, or no working directory
        return text
    if _pin_owners and len(_pinned_paths) < _MAX_PINNED_PATHS:
        _pinned_paths[text] = folder
    return folder


def encode_path(path: Any) -> Any:
    """Encode a directory as text, or as bytes if its name is not UTF-8 (see `decode_paths`)."""
    if type(path) is not str or path.isascii():
        return path
    try:
        path.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(path)
        except UnicodeEncodeError:  # not a possible file name
            pass
    return path


def decode_paths(parts: dict[str, Any]) -> dict[str, Any]:
    """Decode the directories among the parts of a handle to text, in place."""
    for name in ("output_dir", "root"):
        if type(parts.get(name)) is bytes:
            parts[name] = os.fsdecode(parts[name])
    return parts


def pin_relative_paths(owner: object) -> None:
    """Keep relative run directories where they are when the program changes its working directory."""
    _pin_owners.add(id(owner))


def is_pinned_path(path: object) -> bool:
    """Whether a relative directory has been pinned to an absolute one."""
    return isinstance(path, str | PurePath) and str(path) in _pinned_paths


def unpin_relative_paths(owner: object) -> None:
    """Undo `pin_relative_paths`; without any holder left, no directory stays pinned."""
    _pin_owners.discard(id(owner))
    if not _pin_owners:
        _pinned_paths.clear()


_MAX_PINNED_PATHS: Final = 4_096
_pinned_paths: Final[dict[str, str]] = {}
_pin_owners: Final[set[int]] = set()


@functools.lru_cache(maxsize=256)
def ancestor(folder: str, levels: int) -> str:
    """Return the directory ``levels`` levels up; cached, because all steps of a run ask for the same one."""
    path = PurePath(folder)
    for _ in range(levels):
        path = path.parent
    return str(path)


def error_text(error: object) -> str:
    """Format an exception as its type and message, without credentials; detached states have text already."""
    try:
        return redact_text(error if type(error) is str else f"{type(error).__name__}: {error}")
    except Exception:
        return type(error).__name__


def _read_named(read: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: part for name in names if (part := read(name)) is not ABSENT}


def batch_wire_parts(batch: Any, read_errors: ReadErrors | None) -> dict[str, Any]:
    """Return the parts of a batch that are encoded, like `wire_parts`."""
    if issubclass(type(batch), dict):
        loss_fn, config, metrics = (batch.get(name) for name in _BATCH_FIELDS)
    else:
        try:
            loss_fn = getattr(batch, "loss_fn", None)
            config = getattr(batch, "loss_fn_config", None)
            metrics = getattr(batch, "metrics", None)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # raised by the batch's own code
            read = attribute_reader(batch, read_errors)
            loss_fn, config, metrics = (None if (part := read(name)) is ABSENT else part for name in _BATCH_FIELDS)
    parts: dict[str, Any] = {}
    if loss_fn is not None:  # a host's batch may hold the function instead of its name
        parts["loss_fn"] = getattr(loss_fn, "__name__", loss_fn) if callable(loss_fn) else loss_fn
    if config is not None:
        parts["loss_fn_config"] = config
    if metrics is not None and (type(metrics) is not dict or metrics):
        parts["metrics"] = metrics
    return parts


def _state_wire_parts(state: object, read_errors: ReadErrors | None, *, whole_context: bool) -> dict[str, Any]:
    step, num_steps, folder, stop, reason, error, ctx = _read_fields(
        state, _STATE_FIELDS, _get_state_fields, read_errors
    )
    parts: dict[str, Any] = {}
    if step is not ABSENT:
        parts["step"] = step
    if num_steps is not ABSENT:
        parts["num_steps"] = num_steps
    if folder is not ABSENT:
        parts["output_dir"] = encode_path(absolute_path(folder))
    if stop is not False and stop is not ABSENT:
        parts["stop_requested"] = stop
    if reason is not None and reason is not ABSENT:
        parts["stop_reason"] = reason
    if error is not None and error is not ABSENT:
        parts["error"] = error_text(error)
    if ctx is not None and ctx is not ABSENT:
        _add_context(parts, ctx, whole_context=whole_context)
    if type(state) is not LoopState:
        add_custom_fields(parts, state)
    return parts


_CONTEXT_KEYS: Final = ("run_key", "output_dir")
_get_state_fields: Final = attrgetter(*_STATE_FIELDS)
_get_context_fields: Final = attrgetter(*_CONTEXT_KEYS)


def _read_fields(
    handle: object,
    names: tuple[str, ...],
    get_all: Callable[[Any], tuple[Any, ...]],
    read_errors: ReadErrors | None = None,
) -> tuple[Any, ...]:
    """Read attributes of a handle, `ABSENT` for missing ones; ``get_all`` reads them in one call if it has them all."""
    try:
        if not issubclass(type(handle), dict):
            return get_all(handle)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # an attribute is missing, or the handle's own code raised
        return tuple(map(attribute_reader(handle, read_errors), names))
    return tuple(map(attribute_reader(handle), names))


def _add_context(parts: dict[str, Any], ctx: object, *, whole_context: bool) -> None:
    key, root = _read_fields(ctx, _CONTEXT_KEYS, _get_context_fields)
    run = run_key_text(key)
    if run is not None:
        parts["run"] = run
    root, folder = encode_path(absolute_path(root)), parts.get("output_dir")
    is_ancestor = type(run) is str and type(folder) is str and ancestor(folder, run.count("/") + 1) == root
    if type(root) in {str, bytes} and not is_ancestor:
        parts["root"] = root
    if whole_context:
        parts["context"] = wire_parts(ctx, LogContext)


_BUILTIN_TYPES: Final = SCALARS | {bytes, Any, object}


@functools.cache
def field_annotations(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the annotation of each field; Any for one that cannot be evaluated.

    An annotation cannot be evaluated if its type is imported for type checkers only, or is local to a function. Names
    of handle classes are resolved without an import.
    """
    try:
        return {field.name: field.type for field in msgspec.structs.fields(struct)}
    except Exception:  # evaluating an annotation runs its code
        declared: dict[str, tuple[Any, type]] = {}
        for kind in reversed(struct.__mro__):
            declared |= {name: (annotation, kind) for name, annotation in vars(kind).get("__annotations__", {}).items()}
        return {name: _evaluate(*declared[name]) if name in declared else Any for name in struct.__struct_fields__}


def _evaluate(annotation: Any, kind: type) -> Any:
    """Evaluate one annotation of a class; Any if that fails."""
    holder = type(kind.__name__, (), {"__annotations__": {"it": annotation}, "__module__": kind.__module__})
    module = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    try:
        return get_type_hints(holder, {**_HANDLES_BY_NAME, **module}, dict(vars(kind)), include_extras=True)["it"]
    except Exception:  # evaluating an annotation runs its code
        return Any


_HANDLES_BY_NAME: Final = {each.__name__: each for each in HANDLES}


def handle_class(annotation: Any) -> type | None:
    """Return the handle class of an annotation such as ``LoopState`` or ``LoopState | None``; None for others."""
    kinds = [each for each in _union_members(annotation) if each is not NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], HANDLES):
        return kinds[0]
    return None


def is_scalar(annotation: Any) -> bool:
    """Whether an annotation allows only numbers, text and None."""
    return all(member in SCALARS for member in _union_members(annotation))


def is_scalar_dict(annotation: Any) -> bool:
    """Whether an annotation is a dict of scalars with text keys."""
    arguments = get_args(annotation)
    return get_origin(annotation) is dict and arguments[0] is str and is_scalar(arguments[1])


def is_builtin(annotation: Any) -> bool:
    """Whether values of an annotation are decoded unchanged, without a conversion."""
    for member in _union_members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if member in _BUILTIN_TYPES or origin is Literal or member is list or member is dict:
            continue
        if (origin is dict and arguments[0] is str and is_builtin(arguments[1])) or (
            origin is list and is_builtin(arguments[0])
        ):
            continue
        return False
    return True


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def has_config(plain: Any) -> bool:
    """Whether built-in data holds a configuration for `redact` to search."""
    values = plain
    if type(plain) is dict:
        if not CONFIG_KEYS.isdisjoint(plain):  # pyright: ignore[reportUnknownArgumentType] - untyped
            return True
        values = cast("dict[str, Any]", plain).values()
    elif type(plain) is not list:
        return False
    return any((type(each) is dict or type(each) is list) and has_config(each) for each in values)
