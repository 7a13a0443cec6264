"""Decode bytes to envelopes with real event classes and detached handles; accepts older and newer writers.

Only the envelope itself is checked strictly. In an event, unknown fields are ignored, absent ones take their defaults,
and a value of an unexpected type is passed on as it was read, so that a hook still sees the row.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Final, Literal, TypeAlias, cast, get_args, get_origin

import msgspec

from evsys_bus.codec.normalize import Builtins, dict_or_empty
from evsys_bus.codec.wire_types import ancestor, decode_paths, field_annotations, handle_class, is_builtin
from evsys_bus.context import (
    DetachedLogContext,
    DetachedLoopState,
    DetachedTrainingBatch,
    LogContext,
    LoopState,
    TrainingBatch,
    detached_factory,
)
from evsys_bus.errors import CodecError
from evsys_bus.events import Envelope, Event, StepEnd, UnknownEvent, lookup_event_type

Contexts: TypeAlias = Mapping[str, LogContext] | None
"""Run key -> context of the run; use `RunContexts` where several experiments may share a key."""


_MAX_RUNS: Final = 10_000
"""Contexts in memory at a time; without a limit, runs that never end would accumulate."""


class RunContexts(dict[str, LogContext]):
    """Run key -> context; the newest one where two experiments have a run with the same key.

    `decode` adds the contexts that it finds in recorded states.

    Args:
        on_new_run: Called with the key and the context of each run that `decode` adds.
    """

    def __init__(self, on_new_run: Callable[[str, LogContext], None] | None = None) -> None:
        super().__init__()
        self.on_new_run: Final = on_new_run
        self.ambiguous_keys: Final[set[str]] = set()
        """Keys that runs of several experiments share."""
        self._by_root: dict[str, dict[str, LogContext]] = {}

    def lookup(self, run: str | None, root: str | None) -> LogContext | None:
        """Return the context of a run of the experiment with this directory, or None."""
        return self._by_root.get(run or "", {}).get(root or "")

    def add(self, run: str, root: str, ctx: LogContext) -> None:
        """Add or replace a context."""
        if run not in self and len(self) >= _MAX_RUNS:
            oldest = next(iter(self._by_root))
            for stored_root in [*self._by_root[oldest]]:
                self.remove(oldest, stored_root)
        contexts = self._by_root.setdefault(run, {})
        contexts[root] = self[run] = ctx
        if len(contexts) > 1:
            self.ambiguous_keys.add(run)

    def remove(self, run: str, root: str) -> None:
        """Remove a context."""
        contexts = self._by_root.get(run, {})
        contexts.pop(root, None)
        self.ambiguous_keys.discard(run)
        if contexts:
            self[run] = next(reversed(contexts.values()))
            if len(contexts) > 1:
                self.ambiguous_keys.add(run)
        else:
            self._by_root.pop(run, None)
            self.pop(run, None)

    def clear(self) -> None:
        """Remove all contexts."""
        super().clear()
        self.ambiguous_keys.clear()
        self._by_root.clear()


ReadEvent: TypeAlias = Callable[[dict[str, Builtins], str | None, Contexts], Event]


class _Head(msgspec.Struct, gc=False, kw_only=True):
    stream: str
    seq: int
    time: float
    event: Any
    run: str | None = None
    rank: int = 0
    replaced: dict[str, str] = {}
    handles: dict[str, str] = {}
    keywords: tuple[str, ...] = ()


class _AnyHead(_Head, gc=False, kw_only=True):
    event: dict[str, Any]


class _Step(msgspec.Struct, gc=False):
    """A step that has every field. Unknown fields are skipped without decoding them."""

    type: Literal["step_end"]
    state: Any
    step_idx: Any
    batch: Any
    metrics: Any


class _StepHead(_Head, gc=False, kw_only=True):
    event: _Step


_new_detached_state: Final = detached_factory(LoopState)
_new_detached_context: Final = detached_factory(LogContext)
_new_detached_batch: Final = detached_factory(TrainingBatch)
_DETACHED: Final = frozenset({DetachedLoopState, DetachedLogContext, DetachedTrainingBatch})
_unpack: Final = msgspec.msgpack.Decoder(_AnyHead).decode
_unpack_step: Final = msgspec.msgpack.Decoder(_StepHead).decode


def decode(data: bytes | memoryview, contexts: Contexts = None) -> Envelope:
    """Decode an envelope. Its event has its own class, or is an `UnknownEvent` where this process does not know that.

    Handles are detached: their scalars are available, live parts raise `DetachedError`.

    Args:
        data: The result of `encode`.
        contexts: Run key -> the context to use as ``state.ctx``. `decode` adds contexts found in recorded states to a
            `RunContexts`. For a run that is not in it, a state that had a ``ctx`` gets one with only the run key and
            the directory (what a hook writes into that one reaches no later hook); a state that had none gets None.

    Raises:
        CodecError: The bytes are not an envelope.
    """
    try:  # fast path: nearly all events are steps, and decoding them without a look-up of fields saves a quarter
        head = _unpack_step(data)
    except (ValueError, TypeError, RecursionError, BufferError):
        return _decode_any(data, contexts)
    run, step = head.run, head.event
    state: Any = _read_state(step.state, run, contexts)  # a program may have published None, here and in the next line
    batch: Any = _read_batch(step.batch, run, contexts)
    event = StepEnd(state, step.step_idx, batch, step.metrics)
    return Envelope(head.stream, head.seq, head.time, event, run, head.rank, head.replaced)


def _decode_any(data: bytes | memoryview, contexts: Contexts) -> Envelope:
    try:
        head = _unpack(data)
        fields = head.event
        tag: Any = fields.pop("type")
    except Exception as error:
        raise _codec_error(f"{type(error).__name__}: {error}") from error
    if type(tag) is not str:
        raise _codec_error("its event has no type")
    event_class = lookup_event_type(tag)
    for name, handle in head.handles.items():
        if name in fields and handle in _HANDLE_READERS:
            fields[name] = _HANDLE_READERS[handle](fields[name], head.run, contexts)
    event = None if event_class is None else _build_event(event_class, fields, head.run, contexts)
    if event is None:
        event = UnknownEvent(tag, fields, head.handles, head.keywords)
    return Envelope(head.stream, head.seq, head.time, event, head.run, head.rank, head.replaced)


def _codec_error(why: str) -> CodecError:
    fix = "read with decode() only what encode() wrote; if a newer evsys-bus wrote it, update this one"
    return CodecError("these bytes are no envelope", why=why, fix=fix)


def _build_event(kind: type[Event], fields: dict[str, Builtins], run: str | None, contexts: Contexts) -> Event | None:
    """Build the event; None if a required field is absent or refused."""
    reader, parts = _event_reader(kind)
    try:
        return reader(fields, run, contexts)
    except Exception:  # a field is absent, or the event's __post_init__ raised
        present = {name: part(fields[name], run, contexts) for name, part in parts.items() if name in fields}
    try:
        return kind(**present)
    except Exception:
        return None


ReadField: TypeAlias = Callable[[Builtins, str | None, Contexts], Any]
"""Decodes one field to the type of its annotation."""


@functools.cache
def _event_reader(kind: type[Event]) -> tuple[ReadEvent, dict[str, ReadField]]:
    """Return the function that builds a complete event, and the functions that decode single fields."""
    parts: dict[str, ReadField] = {}
    calls: list[str] = []
    for name, annotation in field_annotations(kind).items():
        part = parts[name] = _field_reader(annotation)
        read = f"fields[{name!r}]" if part is _unchanged else f"parts[{name!r}](fields[{name!r}], run, contexts)"
        calls.append(f"{name}={read}")
    # Generated code, like the constructors of dataclasses: a loop over the fields would take twice as long.
    source = f"lambda fields, run, contexts: kind({', '.join(calls)})"
    return eval(source, {"kind": kind, "parts": parts}), parts  # noqa: S307 - made of identifiers


def _field_reader(annotation: Any) -> ReadField:
    """Return the function that decodes a field with this annotation."""
    handle = handle_class(annotation)
    if handle is None:
        return _unchanged if is_builtin(annotation) else lambda value, _, __: convert_value(value, annotation)
    if issubclass(handle, LoopState):
        return _read_state
    return _read_context if issubclass(handle, LogContext) else _read_batch


def _unchanged(value: Builtins, _: str | None, __: Contexts) -> Builtins:
    return value


def _read_state(ref: Builtins, run: str | None, contexts: Contexts) -> LoopState | None:
    if ref is None or type(ref) is DetachedLoopState:
        return ref
    parts = decode_paths(dict_or_empty(ref))
    state = _new_detached_state(parts)
    recorded_run: Any = parts.get("run")
    key: Any = recorded_run if recorded_run and type(recorded_run) is str else run
    if "context" in parts:
        state.ctx = _recorded_context(
            decode_paths(dict_or_empty(parts["context"])), _experiment_root(parts, key), key, contexts
        )
    elif contexts is not None and key in contexts:
        ctx = None
        if type(contexts) is RunContexts and key in contexts.ambiguous_keys:
            ctx = contexts.lookup(key, _experiment_root(parts, key))
        state.ctx = contexts[key] if ctx is None else ctx
    elif (recorded_run and key is recorded_run) or "root" in parts:
        # A state without ctx must not get one: adapters choose their file paths by whether there is a ctx.
        parts["ctx"] = cast("Builtins", _inferred_context)
    return state


def _recorded_context(parts: dict[str, Builtins], root: str | None, run: Any, contexts: Contexts) -> LogContext:
    """Return the context recorded in a state, or the known context of that run."""
    if root is not None:
        parts.setdefault("output_dir", root)
    ctx, root = _new_detached_context(parts), parts.get("output_dir")
    if type(contexts) is not RunContexts or type(run) is not str or type(root) is not str:
        return ctx
    existing = contexts.lookup(run, root)
    if existing is not None:
        for part in ("ids", "extras"):
            setattr(existing, part, {**dict_or_empty(parts.get(part)), **getattr(existing, part)})
        return existing
    for part in ("ids", "extras"):
        setattr(ctx, part, dict_or_empty(parts.get(part)))
    contexts.add(run, root, ctx)
    if contexts.on_new_run is not None:
        contexts.on_new_run(run, ctx)
    return ctx


def _inferred_context(parts: Mapping[str, Builtins]) -> LogContext:
    """Build the context of a run whose start was not read, from what one of its states records."""
    run = parts.get("run")
    fields: dict[str, Builtins] = {"run_key": run if type(run) is str else None, "ids": {}, "extras": {}}
    root = _experiment_root(parts, run)
    if root is not None:
        fields["output_dir"] = root
    return _new_detached_context(dict.fromkeys(("config", "run_config", "group_name")) | fields)


def _experiment_root(parts: Mapping[str, Builtins], run: Any) -> str | None:
    """Return the directory of the experiment that a state belongs to."""
    root, folder = parts.get("root"), parts.get("output_dir")
    if type(root) is str:
        return root
    return ancestor(folder, run.count("/") + 1) if type(folder) is str and type(run) is str else None


def _read_context(ref: Builtins, _: str | None, __: Contexts) -> LogContext | None:
    return (
        ref
        if ref is None or type(ref) is DetachedLogContext
        else _new_detached_context(decode_paths(dict_or_empty(ref)))
    )


def _read_batch(ref: Builtins, _: str | None, __: Contexts) -> TrainingBatch | None:
    return ref if ref is None or type(ref) is DetachedTrainingBatch else _new_detached_batch(dict_or_empty(ref))


_HANDLE_READERS: Final[dict[str, ReadField]] = {"state": _read_state, "context": _read_context, "batch": _read_batch}


def convert_value(value: Builtins, annotation: Any) -> Any:
    """Convert a value to its annotated type; where that fails, convert as much of it as possible."""
    if type(value) in _DETACHED:
        return value
    try:
        return msgspec.convert(value, annotation, str_keys=True, dec_hook=_decode_hook)
    except Exception:  # the value has another type, or a __post_init__ or validator raised
        return _convert_partially(value, annotation)


def _convert_partially(value: Builtins, annotation: Any) -> Any:
    """Convert the fields of Structs, and of lists of Structs, one by one; return anything else unchanged."""
    if get_origin(annotation) is list and type(value) is list:
        return [convert_value(item, get_args(annotation)[0]) for item in cast("list[Builtins]", value)]
    struct = next((item for item in (annotation, *get_args(annotation)) if _is_struct(item)), None)
    if struct is None or type(value) is not dict:
        return value
    fields = dict_or_empty(value)
    kinds = field_annotations(struct)
    names = zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True)
    try:
        return struct(**{name: convert_value(fields[key], kinds[name]) for key, name in names if key in fields})
    except TypeError:  # a field without a default is absent
        return fields


def _is_struct(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def _decode_hook(kind: Any, value: Builtins) -> Any:
    """Convert to types that msgspec does not support."""
    if issubclass(kind, PurePath):
        return kind(value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise NotImplementedError
