"""Decode bytes to envelopes with real event classes and detached handles; accepts older and newer writers.

Only the envelope itself is checked strictly. In an event, unknown fields are ignored, absent ones take their defaults,
and a value of an unexpected type is passed on as it was read, so that a hook still sees the row.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Final, Literal, TypeAlias, cast, get_args, get_origin

import msgspec

from evsys_bus.codec.plain import Plain, entries
from evsys_bus.codec.references import above, read_folders
from evsys_bus.codec.shapes import annotations_of, handle_in, is_plain
from evsys_bus.context import (
    DetachedLogContext,
    DetachedLoopState,
    DetachedTrainingBatch,
    LogContext,
    LoopState,
    TrainingBatch,
    detacher,
)
from evsys_bus.errors import CodecError
from evsys_bus.events import Envelope, Event, StepEnd, UnknownEvent, event_type

Contexts: TypeAlias = Mapping[str, LogContext] | None
"""Run key -> context of the run; use `RunContexts` where several experiments may share a key."""


_MOST_RUNS: Final = 10_000
"""Contexts in memory at a time; without a limit, runs that never end would accumulate."""


class RunContexts(dict[str, LogContext]):
    """Run key -> context; the newest one where two experiments have a run with the same key.

    `decode` adds the contexts that it finds in recorded states.

    Args:
        introduced: Called with the key and the context of each run that `decode` adds.
    """

    def __init__(self, introduced: Callable[[str, LogContext], None] | None = None) -> None:
        super().__init__()
        self.introduced: Final = introduced
        self.shared: Final[set[str]] = set()
        """Keys that runs of several experiments share."""
        self._by_root: dict[str, dict[str, LogContext]] = {}

    def of(self, run: str | None, root: str | None) -> LogContext | None:
        """Return the context of a run of the experiment with this directory, or None."""
        return self._by_root.get(run or "", {}).get(root or "")

    def put(self, run: str, root: str, ctx: LogContext) -> None:
        """Add or replace a context."""
        if run not in self and len(self) >= _MOST_RUNS:
            oldest = next(iter(self._by_root))
            for each in [*self._by_root[oldest]]:
                self.drop(oldest, each)
        same = self._by_root.setdefault(run, {})
        same[root] = self[run] = ctx
        if len(same) > 1:
            self.shared.add(run)

    def drop(self, run: str, root: str) -> None:
        """Remove a context."""
        same = self._by_root.get(run, {})
        same.pop(root, None)
        self.shared.discard(run)
        if same:
            self[run] = next(reversed(same.values()))
            if len(same) > 1:
                self.shared.add(run)
        else:
            self._by_root.pop(run, None)
            self.pop(run, None)

    def clear(self) -> None:
        """Remove all contexts."""
        super().clear()
        self.shared.clear()
        self._by_root.clear()


Reader: TypeAlias = Callable[[dict[str, Plain], str | None, Contexts], Event]


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


_detached_state: Final = detacher(LoopState)
_detached_context: Final = detacher(LogContext)
_detached_batch: Final = detacher(TrainingBatch)
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
    state: Any = _state(step.state, run, contexts)  # a program may have published None, here and in the next line
    batch: Any = _batch(step.batch, run, contexts)
    event = StepEnd(state, step.step_idx, batch, step.metrics)
    return Envelope(head.stream, head.seq, head.time, event, run, head.rank, head.replaced)


def _decode_any(data: bytes | memoryview, contexts: Contexts) -> Envelope:
    try:
        head = _unpack(data)
        fields = head.event
        tag: Any = fields.pop("type")
    except Exception as error:
        raise _no_envelope(f"{type(error).__name__}: {error}") from error
    if type(tag) is not str:
        raise _no_envelope("its event has no type")
    known = event_type(tag)
    for name, handle in head.handles.items():
        if name in fields and handle in _HANDLES:
            fields[name] = _HANDLES[handle](fields[name], head.run, contexts)
    event = None if known is None else _read(known, fields, head.run, contexts)
    if event is None:
        event = UnknownEvent(tag, fields, head.handles, head.keywords)
    return Envelope(head.stream, head.seq, head.time, event, head.run, head.rank, head.replaced)


def _no_envelope(why: str) -> CodecError:
    fix = "read with decode() only what encode() wrote; if a newer evsys-bus wrote it, update this one"
    return CodecError("these bytes are no envelope", why=why, fix=fix)


def _read(kind: type[Event], fields: dict[str, Plain], run: str | None, contexts: Contexts) -> Event | None:
    """Build the event; None if a required field is absent or refused."""
    reader, parts = _reader(kind)
    try:
        return reader(fields, run, contexts)
    except Exception:  # a field is absent, or the event's __post_init__ raised
        present = {name: part(fields[name], run, contexts) for name, part in parts.items() if name in fields}
    try:
        return kind(**present)
    except Exception:
        return None


Part: TypeAlias = Callable[[Plain, str | None, Contexts], Any]
"""Decodes one field to the type of its annotation."""


@functools.cache
def _reader(kind: type[Event]) -> tuple[Reader, dict[str, Part]]:
    """Return the function that builds a complete event, and the functions that decode single fields."""
    parts: dict[str, Part] = {}
    calls: list[str] = []
    for name, annotation in annotations_of(kind).items():
        part = parts[name] = _part(annotation)
        read = f"fields[{name!r}]" if part is _as_it_is else f"parts[{name!r}](fields[{name!r}], run, contexts)"
        calls.append(f"{name}={read}")
    # Generated code, like the constructors of dataclasses: a loop over the fields would take twice as long.
    source = f"lambda fields, run, contexts: kind({', '.join(calls)})"
    return eval(source, {"kind": kind, "parts": parts}), parts  # noqa: S307 - made of identifiers


def _part(annotation: Any) -> Part:
    """Return the function that decodes a field with this annotation."""
    handle = handle_in(annotation)
    if handle is None:
        return _as_it_is if is_plain(annotation) else lambda value, _, __: typed(value, annotation)
    if issubclass(handle, LoopState):
        return _state
    return _context if issubclass(handle, LogContext) else _batch


def _as_it_is(value: Plain, _: str | None, __: Contexts) -> Plain:
    return value


def _state(ref: Plain, run: str | None, contexts: Contexts) -> LoopState | None:
    if ref is None or type(ref) is DetachedLoopState:
        return ref
    parts = read_folders(entries(ref))
    state = _detached_state(parts)
    own: Any = parts.get("run")
    key: Any = own if own and type(own) is str else run
    if "context" in parts:
        state.ctx = _introduced(read_folders(entries(parts["context"])), _root_of(parts, key), key, contexts)
    elif contexts is not None and key in contexts:
        ctx = None
        if type(contexts) is RunContexts and key in contexts.shared:
            ctx = contexts.of(key, _root_of(parts, key))
        state.ctx = contexts[key] if ctx is None else ctx
    elif (own and key is own) or "root" in parts:
        # A state without ctx must not get one: adapters choose their file paths by whether there is a ctx.
        parts["ctx"] = cast("Plain", _unannounced)
    return state


def _introduced(parts: dict[str, Plain], root: str | None, run: Any, contexts: Contexts) -> LogContext:
    """Return the context recorded in a state, or the known context of that run."""
    if root is not None:
        parts.setdefault("output_dir", root)
    ctx, root = _detached_context(parts), parts.get("output_dir")
    if type(contexts) is not RunContexts or type(run) is not str or type(root) is not str:
        return ctx
    known = contexts.of(run, root)
    if known is not None:
        for part in ("ids", "extras"):
            setattr(known, part, {**entries(parts.get(part)), **getattr(known, part)})
        return known
    for part in ("ids", "extras"):
        setattr(ctx, part, entries(parts.get(part)))
    contexts.put(run, root, ctx)
    if contexts.introduced is not None:
        contexts.introduced(run, ctx)
    return ctx


def _unannounced(parts: Mapping[str, Plain]) -> LogContext:
    """Build the context of a run whose start was not read, from what one of its states records."""
    run = parts.get("run")
    known: dict[str, Plain] = {"run_key": run if type(run) is str else None, "ids": {}, "extras": {}}
    root = _root_of(parts, run)
    if root is not None:
        known["output_dir"] = root
    return _detached_context(dict.fromkeys(("config", "run_config", "group_name")) | known)


def _root_of(parts: Mapping[str, Plain], run: Any) -> str | None:
    """Return the directory of the experiment that a state belongs to."""
    root, folder = parts.get("root"), parts.get("output_dir")
    if type(root) is str:
        return root
    return above(folder, run.count("/") + 1) if type(folder) is str and type(run) is str else None


def _context(ref: Plain, _: str | None, __: Contexts) -> LogContext | None:
    return ref if ref is None or type(ref) is DetachedLogContext else _detached_context(read_folders(entries(ref)))


def _batch(ref: Plain, _: str | None, __: Contexts) -> TrainingBatch | None:
    return ref if ref is None or type(ref) is DetachedTrainingBatch else _detached_batch(entries(ref))


_HANDLES: Final[dict[str, Part]] = {"state": _state, "context": _context, "batch": _batch}


def typed(value: Plain, annotation: Any) -> Any:
    """Convert a value to its annotated type; where that fails, convert as much of it as possible."""
    if type(value) in _DETACHED:
        return value
    try:
        return msgspec.convert(value, annotation, str_keys=True, dec_hook=_foreign)
    except Exception:  # the value has another type, or a __post_init__ or validator raised
        return _typed_in_part(value, annotation)


def _typed_in_part(value: Plain, annotation: Any) -> Any:
    """Convert the fields of Structs, and of lists of Structs, one by one; return anything else unchanged."""
    if get_origin(annotation) is list and type(value) is list:
        return [typed(each, get_args(annotation)[0]) for each in cast("list[Plain]", value)]
    struct = next((each for each in (annotation, *get_args(annotation)) if _is_struct(each)), None)
    if struct is None or type(value) is not dict:
        return value
    fields = entries(value)
    kinds = annotations_of(struct)
    names = zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True)
    try:
        return struct(**{name: typed(fields[key], kinds[name]) for key, name in names if key in fields})
    except TypeError:  # a field without a default is absent
        return fields


def _is_struct(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def _foreign(kind: Any, value: Plain) -> Any:
    """Convert to types that msgspec does not support."""
    if issubclass(kind, PurePath):
        return kind(value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise NotImplementedError
