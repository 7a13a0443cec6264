"""The run, step and folder that a hook call refers to, and tolerant access to what hooks receive.

State of a callback that belongs to a run is keyed by `run_id`; files of a run go to `run_folder`. Handles and results
may be of any class: ours, those of other versions, a host's own objects, plain dicts, or None. An object with a ``ctx``
or a ``step`` is the state of a loop, anything else is a context, and each may lack attributes.
"""

import functools
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from evsys_bus.adapter import EventInfo
from evsys_bus.bus.recorder import rank_from_environment
from evsys_bus.codec import to_builtins
from evsys_bus.context import DetachedLogContext, DetachedLoopState, LogContext
from evsys_bus.diagnostics import log
from evsys_bus.location import local_path, short_digest


def field(obj: object, name: str, default: object = None) -> Any:
    """Return an attribute of an object or an entry of a mapping; the default if it is missing or reading it raises."""
    try:
        if isinstance(obj, Mapping):
            return cast("Mapping[str, Any]", obj).get(name, default)
        return getattr(obj, name, default)
    except Exception:  # a property or __getattr__ of the host
        return default


def fields(obj: object) -> dict[str, Any]:
    """Return all entries of a mapping or fields of an object as a new dict; empty if it has none."""
    if isinstance(obj, Mapping):
        return dict(cast("Mapping[str, Any]", obj))
    plain, _ = to_builtins(vars(obj) if hasattr(obj, "__dict__") else obj)
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {}


def list_or_empty(obj: object) -> list[Any]:
    """Return the items of a list, a tuple or a set as a new list; empty for anything else."""
    return list(cast("list[Any]", obj)) if isinstance(obj, list | tuple | set | frozenset) else []


_MAX_FOLDER_BYTES: Final = 255
"""Limit of common file systems."""
_MAX_NAME_BYTES: Final = 200
"""The rest is for suffixes that callbacks add."""
_UNBOUNDED_STEPS: Final = 1 << 53
"""A step count from here on means "no end": ``sys.maxsize``, or a float of that size."""
_STEP_BITS: Final = 63
"""What event files can store, besides the sign."""
_STREAM_RANK: Final = re.compile(r"[a-z]+(\d+)-")
_ABSENT: Final = object()
_DETACHED: Final = (DetachedLoopState, DetachedLogContext)


def run_context(handle: object) -> LogContext | None:
    """Return the context of the run: the handle itself, or the state's context if it has one.

    It may be an object of another class with some of the same attributes.
    """
    ctx = field(handle, "ctx", _ABSENT)
    if ctx is _ABSENT:
        ctx = handle if field(handle, "step", _ABSENT) is _ABSENT else None
    return cast("LogContext | None", ctx)


def run_key(handle: object) -> str | None:
    """Return the run key of the handle's context, or None."""
    key: object = field(run_context(handle), "run_key")
    return key if isinstance(key, str) or key is None else str(key)


def run_id(handle: object) -> str:
    """Return the output path of the run: the same for a state and for its context. Does not access the disk."""
    ctx, key = run_context(handle), run_key(handle)
    root = output_dir_of(ctx)
    if not root or key is None:
        return output_dir_of(handle) or root
    return os.path.join(root, key)  # noqa: PTH118  # at every step; a Path costs ten times as much


def is_run_of(run: str, ctx: object) -> bool:
    """Whether the run with this `run_id` belongs to the experiment of the context."""
    root = output_dir_of(ctx)
    run = run.partition("\0")[0]
    return bool(root) and (run == root or run.startswith(os.path.join(root, "")))  # noqa: PTH118  # with the separator


def run_name(handle: object) -> str:
    """Return the run's name as one path component."""
    return safe_name(run_key(handle) or Path(run_id(handle)).name)


def run_folder(handle: object) -> Path:
    """Return the run's folder: ``<output_dir>/<run_key>``, or a sibling if that would leave ``output_dir``.

    The path is absolute. Resolves symbolic links on disk, so call it once per run.

    Raises:
        ValueError: Neither the handle nor its context has an ``output_dir``, or it is a URL.
    """
    ctx, key = run_context(handle), run_key(handle)
    output_dir = output_dir_of(ctx)
    if not output_dir or not key:
        output_dir = output_dir_of(handle) or output_dir
        if not output_dir:
            kind = type(handle).__name__
            raise ValueError(f"a {kind} without output_dir names no folder for the files of its run")
        return local_path(output_dir, "output_dir")
    root = local_path(output_dir, "output_dir")
    if all(map(_is_plain, key.split("/"))):
        folder = root / key
        # `Path.resolve` raises for a link to itself, which may be another folder a moment later.
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
            return folder
    folder = root / f"{safe_name(key)}-{short_digest(key)}"
    log().warning("run.folder_renamed", run=ascii(key)[:_MAX_NAME_BYTES], folder=str(folder))
    return folder


def experiment_folder(handle: object) -> Path:
    """Return the experiment's folder: that of the context, or the parent of the folder of a state without context.

    Raises:
        ValueError: Neither has an ``output_dir``, or it is a URL.
    """
    root, output_dir = output_dir_of(run_context(handle)), output_dir_of(handle)
    if root:
        return local_path(root, "output_dir")
    if output_dir:
        return local_path(output_dir, "output_dir").parent
    raise ValueError(f"a {type(handle).__name__} without output_dir names no folder for the files of its experiment")


def step_of(step_idx: object) -> int:
    """Return the step as an int; accepts ints of any library, whole floats, and arrays of one such number.

    A bus converts steps before it calls hooks; `evsys_bus.dispatch` passes them unchanged.

    Raises:
        TypeError: It is not a whole number, or larger than any file can hold.
    """
    step = _as_int(step_idx)
    if step is None:
        raise TypeError(f"step_idx must be a whole number, not {step_idx!r:.60}")
    if step.bit_length() > _STEP_BITS:
        raise TypeError(f"step_idx must be a number of at most {_STEP_BITS} bits, not {step}")
    return step


def _as_int(number: Any) -> int | None:
    """Return the number as an int if it is a whole number of any type, else None."""
    try:
        return operator.index(number)
    except TypeError:
        pass
    try:
        number = number.item() if hasattr(number, "item") else number
        step = int(number)
        if not isinstance(number, str | bytes) and step == number:
            return step
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch, for more than one number
        pass
    return None


def first_step_of(state: object) -> int | None:
    """Return the step at which training starts; None if the state has none."""
    step = field(state, "step")
    return None if step is None else step_of(step)


def num_steps_of(state: object) -> int | None:
    """Return the number of steps of the run; None if it is unknown or unbounded."""
    steps = _as_int(field(state, "num_steps"))
    return steps if steps is not None and 0 < steps < _UNBOUNDED_STEPS else None


@functools.lru_cache(maxsize=64)
def rank_of_stream(stream: str | None) -> int:
    """Return the rank encoded in the name of a journal stream; 0 for any other text."""
    found = _STREAM_RANK.match(stream or "")
    return int(found[1]) if found is not None else 0


def rank_of_event(event: EventInfo) -> int:
    """Return the rank of the event's process: from its stream, or that of this process if it is not recorded."""
    return rank_of_stream(event.stream) if event.stream else rank_from_environment()


def is_repeated_start(event: EventInfo) -> bool:
    """Whether the event is a repeated start, at which nothing begins; False if the bus does not set ``carried``."""
    return bool(getattr(event, "carried", False))


def ranked_key(run: str, rank: int) -> str:
    """Return the key for state of one run and rank; `is_run_of` accepts it as the run's."""
    return f"{run}\0{rank}" if rank else run


def ranked_folder(folder: Path, rank: int) -> Path:
    """Return the folder for files of a rank: the run's folder for rank 0, else a subfolder."""
    return folder / f"rank{rank}" if rank else folder


def safe_name(text: str) -> str:
    """Return ``text`` as one safe path component; two texts may map to the same."""
    plain = "".join(letter if letter.isprintable() and letter not in '/\\:*?"<>|' else "-" for letter in text)
    plain = plain.lstrip(".- ")  # no hidden file, no `..`, no command-line option
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(".- ") or "run"


def output_dir_of(handle: object) -> str:
    """Return the handle's ``output_dir`` as text, unchanged; empty if there is none."""
    folder: object = field(handle, "output_dir")
    if folder is None or (folder == Path() and isinstance(handle, _DETACHED)):  # what a detached one lacks is empty
        return ""
    try:
        return os.fsdecode(os.fspath(cast("os.PathLike[str]", folder)))
    except TypeError:  # it is not a path
        return str(folder)


def _is_plain(part: str) -> bool:
    """Whether the text is a valid, printable folder name of bounded length."""
    return part not in {"", ".", ".."} and part.isprintable() and len(part.encode()) <= _MAX_FOLDER_BYTES


def names_other_run(content: bytes, owner: bytes, folder: Path) -> bool:
    """Whether the owner file beside an output names another run than this owner.

    A prefix of the owner's name, or zeros, are left by a power cut and name no run; unless that prefix is the
    name of an existing run, from an owner file without line end as 0.1.0 wrote it.

    Args:
        content: Content of the owner file: the name, and after a zero byte other data.
        owner: The folder of the run, absolute or relative to ``folder``.
        folder: Folder of the owner file.
    """
    is_complete = content.endswith(b"\n")
    name = content.removesuffix(b"\n").partition(b"\0")[0]
    if not name or name == owner:
        return False
    if is_complete or not owner.startswith(name):
        return True
    is_sibling = os.path.dirname(name) == os.path.dirname(owner)  # noqa: PTH120  # as bytes
    return is_sibling and (folder / os.fsdecode(name)).is_dir()
