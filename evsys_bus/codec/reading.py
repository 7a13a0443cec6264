"""Bytes to envelopes: real event classes with detached handles, tolerant of older and newer writers.

Only the envelope itself is strict. In an event, unknown fields are ignored, absent ones take their defaults, and a
value that is not of the type it should be is kept as it was read: a hook sees the row rather than nothing.
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
"""The context of each run, by its key; `RunContexts` where there may be two of one key."""


_MOST_RUNS: Final = 10_000
"""Contexts that are kept: runs that nobody ends would stay for ever."""


class RunContexts(dict[str, LogContext]):
    """The contexts of runs, by key, the newest where two experiments have a run of one key.

    `decode` adds those that a state introduces.

    Args:
        introduced: Called with the key and the context of a run that a state introduced.
    """

    def __init__(self, introduced: Callable[[str, LogContext], None] | None = None) -> None:
        super().__init__()
        self.introduced: Final = introduced
        self.shared: Final[set[str]] = set()
        """Keys that runs of several experiments have."""
        self._by_root: dict[str, dict[str, LogContext]] = {}

    def of(self, run: str | None, root: str | None) -> LogContext | None:
        """The context of the run of this experiment, which is named by its directory."""
        return self._by_root.get(run or "", {}).get(root or "")

    def put(self, run: str, root: str, ctx: LogContext) -> None:
        """Add a context, or replace it."""
        if run not in self and len(self) >= _MOST_RUNS:
            oldest = next(iter(self._by_root))
            for each in [*self._by_root[oldest]]:
                self.drop(oldest, each)
        same = self._by_root.setdefault(run, {})
        same[root] = self[run] = ctx
        if len(same) > 1:
            self.shared.add(run)

    def drop(self, run: str, root: str) -> None:
        """Forget a context."""
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
        """Forget all."""
        super().clear()
        self.shared.clear()
        self._by_root.clear()


Reader: TypeAlias = Callable[[dict[str, Plain], str | None, Contexts], Event]


class _Head(msgspec.Struct, gc=False, kw_only=True):
    stream: str
    seq: int
    time: float
    event: Any  # Any: as it was written
    run: str | None = None
    rank: int = 0
    replaced: dict[str, str] = {}
    handles: dict[str, str] = {}
    keywords: tuple[str, ...] = ()


class _AnyHead(_Head, gc=False, kw_only=True):
    event: dict[str, Any]


class _Step(msgspec.Struct, gc=False):
    """A step that has every field. Any: as they were written. What it has besides is passed over unread."""

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
    """The envelope that was encoded; its event is of its own class, or an `UnknownEvent` where this process has none.

    Handles are detached: their scalars are there, live parts raise `DetachedError`.

    Args:
        data: What `encode` made.
        contexts: Gives ``state.ctx``, by the run's key; `RunContexts` also learns those that a state introduces. Where
            the run is not in it, a state that had a ``ctx`` has one that names the run, and where it lies, and nothing
            else (what a hook writes into that one reaches no later hook); a state that had none has none.

    Raises:
        CodecError: The bytes are no envelope.
    """
    try:  # nearly all are steps: they take three quarters of the time where nothing is looked up by name
        head = _unpack_step(data)
    except (ValueError, TypeError, RecursionError, BufferError):
        return _decode_any(data, contexts)
    run, step = head.run, head.event
    state: Any = _state(step.state, run, contexts)  # Any: a program may have published None, here and in the next line
    batch: Any = _batch(step.batch, run, contexts)
    event = StepEnd(state, step.step_idx, batch, step.metrics)
    return Envelope(head.stream, head.seq, head.time, event, run, head.rank, head.replaced)


def _decode_any(data: bytes | memoryview, contexts: Contexts) -> Envelope:
    try:
        head = _unpack(data)
        fields = head.event
        tag: Any = fields.pop("type")  # Any: as it was written
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
    """The event, or None if a field that it needs is absent or refused."""
    reader, parts = _reader(kind)
    try:
        return reader(fields, run, contexts)
    except Exception:  # a field is absent, or the event's __post_init__ refuses what it is given
        present = {name: part(fields[name], run, contexts) for name, part in parts.items() if name in fields}
    try:
        return kind(**present)
    except Exception:
        return None


Part: TypeAlias = Callable[[Plain, str | None, Contexts], Any]
"""Reads one field. Any: it makes what the field is annotated with."""


@functools.cache
def _reader(kind: type[Event]) -> tuple[Reader, dict[str, Part]]:
    """The function that reads an event with all its fields, and what reads each field of an incomplete one."""
    parts: dict[str, Part] = {}
    calls: list[str] = []
    for name, annotation in annotations_of(kind).items():
        part = parts[name] = _part(annotation)
        read = f"fields[{name!r}]" if part is _as_it_is else f"parts[{name!r}](fields[{name!r}], run, contexts)"
        calls.append(f"{name}={read}")
    # Written out, as dataclasses write their constructors: a loop over the fields would take twice as long.
    source = f"lambda fields, run, contexts: kind({', '.join(calls)})"
    return eval(source, {"kind": kind, "parts": parts}), parts  # noqa: S307 - made of identifiers


def _part(annotation: Any) -> Part:
    """What reads a field of this annotation. Any: annotations."""
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
    own: Any = parts.get("run")  # Any: as it was written
    key: Any = own if own and type(own) is str else run
    if "context" in parts:
        state.ctx = _introduced(read_folders(entries(parts["context"])), _root_of(parts, key), key, contexts)
    elif contexts is not None and key in contexts:
        ctx = None
        if type(contexts) is RunContexts and key in contexts.shared:
            ctx = contexts.of(key, _root_of(parts, key))
        state.ctx = contexts[key] if ctx is None else ctx
    elif (own and key is own) or "root" in parts:
        # A bare state stays bare: adapters have their files elsewhere where there is a ctx.
        parts["ctx"] = cast("Plain", _unannounced)
    return state


def _introduced(parts: dict[str, Plain], root: str | None, run: Any, contexts: Contexts) -> LogContext:
    """The context that stands in a state; the one that is known already, if it is. Any: as it was written."""
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
    """The context of a run whose start was not seen: what can be told of it from one of its states, when asked for."""
    run = parts.get("run")
    known: dict[str, Plain] = {"run_key": run if type(run) is str else None, "ids": {}, "extras": {}}
    root = _root_of(parts, run)
    if root is not None:
        known["output_dir"] = root
    return _detached_context(dict.fromkeys(("config", "run_config", "group_name")) | known)


def _root_of(parts: Mapping[str, Plain], run: Any) -> str | None:
    """The directory of the experiment that a state belongs to. Any: the key of its run, as it was written."""
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
    """The value as its annotation has it; where that fails, as much of it as possible. Any: annotations, and theirs."""
    if type(value) in _DETACHED:
        return value
    try:
        return msgspec.convert(value, annotation, str_keys=True, dec_hook=_foreign)
    except Exception:  # it is not as promised, or an __post_init__ or validator refuses it
        return _typed_in_part(value, annotation)


def _typed_in_part(value: Plain, annotation: Any) -> Any:
    """Structs and lists of them, each field read by itself; anything else as it is. Any: as for `typed`."""
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
    """Types that msgspec leaves to us. Any: that is what they are."""
    if issubclass(kind, PurePath):
        return kind(value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise NotImplementedError
