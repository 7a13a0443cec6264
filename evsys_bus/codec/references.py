"""What of a handle travels: the scalars of `LoopState`, the parts of `LogContext` and `TrainingBatch` that are data.

Attributes decide, never the class: a host's own state, context or batch travels with what it has of ours, and a state
with its own fields too. The handle itself is never given to an encoder; the live parts (``backend``, ``store``,
``batch.data``, …) never leave. On the wire a state is a map, in which what is as nearly always is left out
(`evsys_bus.context.Unsaid`):

    step, num_steps, output_dir, stop_requested, stop_reason
    error      what the loop raised, as text
    run        the run key of its context
    root       the context's output_dir, where output_dir does not say it
    context    the whole context, in the event that introduces a run
    live       the names of its own fields that do not travel
    own        its own fields, by name
"""

import functools
import os
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any, Final, cast

from evsys_bus.codec.own_fields import ABSENT, add_own
from evsys_bus.context import (
    DetachedLogContext,
    DetachedLoopState,
    DetachedTrainingBatch,
    LogContext,
    LoopState,
    TrainingBatch,
)

HANDLES: Final = (LoopState, LogContext, TrainingBatch)

CONTEXT_PARTS: Final = ("output_dir", "run_key", "group_name", "ids", "extras", "config", "run_config")
_BATCH_PARTS: Final = ("loss_fn", "loss_fn_config", "metrics")
COPIED: Final = frozenset({"own", "live"})
"""Parts of a state that hold nothing that anybody else holds."""

Raised = tuple[dict[str, str], str]
"""Where it is noted that reading an attribute raised something, path -> why; and the path of the handle."""


def parts_of(handle: object, kind: type, raised: Raised | None = None, *, context: bool = False) -> dict[str, Any]:
    """The parts of a handle that travel, uncopied; those that it lacks, as detached ones do, are left out.

    Any: they are of every type.

    Args:
        handle: A handle, or something that stands in its place: an object of any class, or a dict with such keys.
        kind: Which handle it is.
        raised: Where it is noted that its code raises.
        context: Of a state, the whole context too.
    """
    if issubclass(type(handle), _DETACHED):
        return _written_again(handle)
    if issubclass(kind, TrainingBatch):
        return batch_parts(handle, raised)
    if issubclass(kind, LogContext):
        parts = _named(reader_of(handle, raised), CONTEXT_PARTS)
        if "output_dir" in parts:
            parts["output_dir"] = written_folder(folder_of(parts["output_dir"]))
        if "run_key" in parts:
            parts["run_key"] = run_key_of(parts["run_key"])
        return parts
    return _state_parts(handle, raised, context=context)


def _written_again(handle: Any) -> dict[str, Any]:
    """The parts of a handle that was read: those that were written, as they are now. Any: a detached handle."""
    parts: dict[str, Any] = {}
    for name, written in handle._parts.items():  # noqa: SLF001 - its own
        if name == "output_dir":
            parts[name] = written_folder(str(handle.output_dir))  # relative to where it was written, if it is
        elif name not in _NO_ATTRIBUTES:
            parts[name] = getattr(handle, name, written)
        elif name != "ctx":
            parts[name] = written
    if issubclass(type(handle), LoopState) and "run" not in parts and handle.ctx is not None:
        parts["run"] = handle.ctx.run_key
    return parts


_DETACHED: Final = (DetachedLoopState, DetachedLogContext, DetachedTrainingBatch)
_NO_ATTRIBUTES: Final = frozenset({"run", "root", "context", "live", "own", "ctx"})


def reader_of(handle: object, raised: Raised | None = None) -> Callable[[str], Any]:
    """What reads an attribute, or the entry of a dict; `ABSENT` where there is none, or where reading it raises."""
    if issubclass(type(handle), dict):
        entries = cast("dict[str, Any]", handle)
        return lambda name: entries.get(name, ABSENT)

    def read(name: str) -> Any:
        try:
            return getattr(handle, name, ABSENT)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the handle's own code ran, and may raise what it likes
            if raised is not None:
                notes, path = raised
                notes.setdefault(f"{path}.{name}", f"{type(error).__name__} when it was read")
            return ABSENT

    return read


def run_and_root(state: object) -> tuple[str | None, str | None]:
    """The key of a state's run, and the directory of its experiment where it has a context; None for what it lacks."""
    read = reader_of(state)
    ctx = read("ctx")
    of_ctx = reader_of(None if ctx is ABSENT else ctx)
    run, root = run_key_of(of_ctx("run_key")), folder_of(of_ctx("output_dir"))
    if run is None:
        folder = folder_of(read("output_dir"))
        run = PurePath(folder).name if type(folder) is str else run_key_of(read("run_key"))
    return run, root if type(root) is str else None


def run_key_of(key: Any) -> str | None:
    """The key of a run as text, whatever a host has for one, as a number; None for none. Any: that is found out."""
    if key is None or key is ABSENT or isinstance(key, str):
        return None if key is ABSENT else key
    try:
        return str(key)
    except Exception:  # its own code ran, and may raise what it likes
        return type(key).__name__


def folder_of(path: Any) -> Any:
    """A directory as absolute text; what is none, as it is. Any: that is found out.

    Between `hold_folders` and `release_folders` a relative one stays where it was when it was first asked for.
    """
    try:
        text = path if type(path) is str else os.fsdecode(cast("os.PathLike[str]", path))
    except Exception:  # it is none, or its own code raised what it likes
        return path
    if text[:1] == "/" or "://" in text:
        return text
    known = _folders.get(text)
    if known is not None:
        return known
    try:
        folder = str(Path(text).expanduser().absolute())
    except (OSError, RuntimeError, ValueError):  # there is no such user, or no working directory
        return text
    if _holders and len(_folders) < _MOST_FOLDERS:
        _folders[text] = folder
    return folder


def written_folder(folder: Any) -> Any:
    """A directory as it travels: text, or bytes where its name is not UTF-8 (`read_folders`). Any: it may be none."""
    if type(folder) is not str or folder.isascii():
        return folder
    try:
        folder.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(folder)
        except UnicodeEncodeError:  # no folder is called so
            pass
    return folder


def read_folders(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of a handle that was read, its directories as text again. Any: they are of every type."""
    for name in ("output_dir", "root"):
        if type(parts.get(name)) is bytes:
            parts[name] = os.fsdecode(parts[name])
    return parts


def hold_folders(holder: object) -> None:
    """Have the program change its working directory without moving the runs of states with relative folders."""
    _holders.add(id(holder))


def is_held(path: object) -> bool:
    """Whether a relative directory is known to stay where it is."""
    return isinstance(path, str | PurePath) and str(path) in _folders


def release_folders(holder: object) -> None:
    """End what `hold_folders` began; with the last holder, all folders are forgotten."""
    _holders.discard(id(holder))
    if not _holders:
        _folders.clear()


_MOST_FOLDERS: Final = 4_096
_folders: Final[dict[str, str]] = {}
_holders: Final[set[int]] = set()


@functools.lru_cache(maxsize=256)
def above(folder: str, levels: int) -> str:
    """The directory so many levels up; a path takes itself apart at every look, and steps of one run have one."""
    path = PurePath(folder)
    for _ in range(levels):
        path = path.parent
    return str(path)


def error_text(error: object) -> str:
    """An exception as text: its type and what it says. Text, as a detached state has it, stays as it is."""
    if type(error) is str:
        return error
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def attributes(value: object, names: Any) -> dict[str, Any]:
    """Those of the named attributes that the value has. Any: names come from foreign classes, values are anything."""
    found = ((name, getattr(value, name, ABSENT)) for name in names)
    return {name: part for name, part in found if part is not ABSENT}


def _named(read: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: part for name in names if (part := read(name)) is not ABSENT}


def batch_parts(batch: Any, raised: Raised | None) -> dict[str, Any]:
    """As `parts_of`, for a batch."""
    if issubclass(type(batch), dict):
        loss_fn, config, metrics = (batch.get(name) for name in _BATCH_PARTS)
    else:
        try:
            loss_fn = getattr(batch, "loss_fn", None)
            config = getattr(batch, "loss_fn_config", None)
            metrics = getattr(batch, "metrics", None)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # its own code ran, and may raise what it likes
            read = reader_of(batch, raised)
            loss_fn, config, metrics = (None if (part := read(name)) is ABSENT else part for name in _BATCH_PARTS)
    parts: dict[str, Any] = {}
    if loss_fn is not None:  # a host's batch may hold the function itself
        parts["loss_fn"] = getattr(loss_fn, "__name__", loss_fn) if callable(loss_fn) else loss_fn
    if config is not None:
        parts["loss_fn_config"] = config
    if metrics is not None and (type(metrics) is not dict or metrics):
        parts["metrics"] = metrics
    return parts


def _state_parts(state: object, raised: Raised | None, *, context: bool) -> dict[str, Any]:
    step, num_steps, folder, stop, reason, error, ctx = _read(state, _STATE_PARTS, _seven, raised)
    parts: dict[str, Any] = {}
    if step is not ABSENT:
        parts["step"] = step
    if num_steps is not ABSENT:
        parts["num_steps"] = num_steps
    if folder is not ABSENT:
        parts["output_dir"] = written_folder(folder_of(folder))
    if stop is not False and stop is not ABSENT:
        parts["stop_requested"] = stop
    if reason is not None and reason is not ABSENT:
        parts["stop_reason"] = reason
    if error is not None and error is not ABSENT:
        parts["error"] = error_text(error)
    if ctx is not None and ctx is not ABSENT:
        _add_context(parts, ctx, context=context)
    if type(state) is not LoopState:
        add_own(parts, state)
    return parts


_STATE_PARTS: Final = ("step", "num_steps", "output_dir", "stop_requested", "stop_reason", "error", "ctx")
_CONTEXT_KEYS: Final = ("run_key", "output_dir")
_seven: Final = attrgetter(*_STATE_PARTS)
_two: Final = attrgetter(*_CONTEXT_KEYS)


def _read(
    handle: object, names: tuple[str, ...], all_of: Callable[[Any], tuple[Any, ...]], raised: Raised | None = None
) -> tuple[Any, ...]:
    """The named attributes of a handle, `ABSENT` for those that it lacks; ``all_of`` reads them where it has all."""
    try:
        if not issubclass(type(handle), dict):
            return all_of(handle)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it lacks one, or its own code ran, and may raise what it likes
        return tuple(map(reader_of(handle, raised), names))
    return tuple(map(reader_of(handle), names))


def _add_context(parts: dict[str, Any], ctx: object, *, context: bool) -> None:
    key, root = _read(ctx, _CONTEXT_KEYS, _two)
    run = run_key_of(key)
    if run is not None:
        parts["run"] = run
    root, folder = written_folder(folder_of(root)), parts.get("output_dir")
    is_above = type(run) is str and type(folder) is str and above(folder, run.count("/") + 1) == root
    if type(root) in {str, bytes} and not is_above:
        parts["root"] = root
    if context:
        parts["context"] = parts_of(ctx, LogContext)
