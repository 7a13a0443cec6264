"""The parts of handles that are encoded: the scalars of `LoopState`, and the data of `LogContext` and `TrainingBatch`.

Attributes decide, not the class: of a host's own state, context or batch, the attributes with our names are encoded,
and of a state its custom fields too. An encoder never receives the handle itself, and live parts (``backend``,
``store``, ``batch.data``, …) are never encoded. On the wire a state is a map; fields with their usual values are
omitted (`evsys_bus.context.Unsaid`):

    step, num_steps, output_dir, stop_requested, stop_reason
    error      the exception that the loop raised, as text
    run        the run key of its context
    root       the context's output_dir, unless it follows from output_dir
    context    the whole context, in the first recorded event of a run
    live       the names of the custom fields that are not encoded
    own        the custom fields, by name
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
"""Parts of a state that are copies already."""

Raised = tuple[dict[str, str], str]
"""Errors of reading attributes, path -> reason, to add to; and the path of the handle."""


def parts_of(handle: object, kind: type, raised: Raised | None = None, *, context: bool = False) -> dict[str, Any]:
    """Return the parts of a handle that are encoded, not copied; parts that it lacks are left out.

    Args:
        handle: A handle, an object of any class in its place, or a dict with the same keys.
        kind: The handle class to read it as.
        raised: Collects errors raised by the handle's own code.
        context: Include the whole context of a state.
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
    """Return the parts of a detached handle that were recorded, with their current values."""
    parts: dict[str, Any] = {}
    for name, written in handle._parts.items():  # noqa: SLF001 - its own
        if name == "output_dir":
            parts[name] = written_folder(str(handle.output_dir))  # a relative path is relative to the writer's cwd
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
            if raised is not None:
                notes, path = raised
                notes.setdefault(f"{path}.{name}", f"{type(error).__name__} when it was read")
            return ABSENT

    return read


def run_and_root(state: object) -> tuple[str | None, str | None]:
    """Return the run key of a state, and the experiment's directory if it has a context; None for a missing part."""
    read = reader_of(state)
    ctx = read("ctx")
    of_ctx = reader_of(None if ctx is ABSENT else ctx)
    run, root = run_key_of(of_ctx("run_key")), folder_of(of_ctx("output_dir"))
    if run is None:
        folder = folder_of(read("output_dir"))
        run = PurePath(folder).name if type(folder) is str else run_key_of(read("run_key"))
    return run, root if type(root) is str else None


def run_key_of(key: Any) -> str | None:
    """Convert a run key to text; a host may use another type, such as a number. None stays None."""
    if key is None or key is ABSENT or isinstance(key, str):
        return None if key is ABSENT else key
    try:
        return str(key)
    except Exception:  # raised by the key's own code
        return type(key).__name__


def folder_of(path: Any) -> Any:
    """Return a directory as an absolute path in text; return a value that is not a path unchanged.

    Between `hold_folders` and `release_folders`, a relative path is resolved once, against the working directory of
    its first use.
    """
    try:
        text = path if type(path) is str else os.fsdecode(cast("os.PathLike[str]", path))
    except Exception:  # not a path, or raised by its own code
        return path
    if text[:1] == "/" or "://" in text:
        return text
    known = _folders.get(text)
    if known is not None:
        return known
    try:
        folder = str(Path(text).expanduser().absolute())
    except (OSError, RuntimeError, ValueError):  # no such user, or no working directory
        return text
    if _holders and len(_folders) < _MOST_FOLDERS:
        _folders[text] = folder
    return folder


def written_folder(folder: Any) -> Any:
    """Encode a directory as text, or as bytes if its name is not UTF-8 (see `read_folders`)."""
    if type(folder) is not str or folder.isascii():
        return folder
    try:
        folder.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(folder)
        except UnicodeEncodeError:  # not a possible file name
            pass
    return folder


def read_folders(parts: dict[str, Any]) -> dict[str, Any]:
    """Decode the directories among the parts of a handle to text, in place."""
    for name in ("output_dir", "root"):
        if type(parts.get(name)) is bytes:
            parts[name] = os.fsdecode(parts[name])
    return parts


def hold_folders(holder: object) -> None:
    """Keep relative run directories where they are when the program changes its working directory."""
    _holders.add(id(holder))


def is_held(path: object) -> bool:
    """Whether a relative directory has been pinned to an absolute one."""
    return isinstance(path, str | PurePath) and str(path) in _folders


def release_folders(holder: object) -> None:
    """Undo `hold_folders`; without any holder left, no directory stays pinned."""
    _holders.discard(id(holder))
    if not _holders:
        _folders.clear()


_MOST_FOLDERS: Final = 4_096
_folders: Final[dict[str, str]] = {}
_holders: Final[set[int]] = set()


@functools.lru_cache(maxsize=256)
def above(folder: str, levels: int) -> str:
    """Return the directory ``levels`` levels up; cached, because all steps of a run ask for the same one."""
    path = PurePath(folder)
    for _ in range(levels):
        path = path.parent
    return str(path)


def error_text(error: object) -> str:
    """Format an exception as its type and message; return text, which detached states have, unchanged."""
    if type(error) is str:
        return error
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def attributes(value: object, names: Any) -> dict[str, Any]:
    """Return the attributes with these names that the value has."""
    found = ((name, getattr(value, name, ABSENT)) for name in names)
    return {name: part for name, part in found if part is not ABSENT}


def _named(read: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: part for name in names if (part := read(name)) is not ABSENT}


def batch_parts(batch: Any, raised: Raised | None) -> dict[str, Any]:
    """Return the parts of a batch that are encoded, like `parts_of`."""
    if issubclass(type(batch), dict):
        loss_fn, config, metrics = (batch.get(name) for name in _BATCH_PARTS)
    else:
        try:
            loss_fn = getattr(batch, "loss_fn", None)
            config = getattr(batch, "loss_fn_config", None)
            metrics = getattr(batch, "metrics", None)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # raised by the batch's own code
            read = reader_of(batch, raised)
            loss_fn, config, metrics = (None if (part := read(name)) is ABSENT else part for name in _BATCH_PARTS)
    parts: dict[str, Any] = {}
    if loss_fn is not None:  # a host's batch may hold the function instead of its name
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
    """Read attributes of a handle, `ABSENT` for missing ones; ``all_of`` reads them in one call if it has them all."""
    try:
        if not issubclass(type(handle), dict):
            return all_of(handle)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # an attribute is missing, or the handle's own code raised
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
