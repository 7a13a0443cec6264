"""Which run a hook speaks of, at which step, and which folder is its own.

State of a callback that belongs to a run is kept under `run_id`; files of a run lie in `run_folder`. Handles may be of
any class: what has a ``ctx`` or a ``step`` is the state of a loop, anything else is a context, and each may lack
attributes.
"""

import functools
import hashlib
import operator
import os
import re
from pathlib import Path
from typing import Any, Final, cast

from evsys_adapters._result_fields import field
from evsys_bus.attached import EventInfo
from evsys_bus.bus.recording import rank_of
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import log
from evsys_bus.where import local_path

_MAX_FOLDER_BYTES: Final = 255
"""What file systems take."""
_MAX_NAME_BYTES: Final = 200
"""The rest is for what callbacks put around a name."""
_UNBOUNDED_STEPS: Final = 1 << 53
"""A horizon from here on stands for "no end": ``sys.maxsize``, or a float of that size."""
_STEP_BITS: Final = 63
"""What event files have room for, besides the sign."""
_STREAM_RANK: Final = re.compile(r"[a-z]+(\d+)-")
_ABSENT: Final = object()


def run_context(handle: object) -> LogContext | None:
    """The context of the run: the handle itself, or the state's, if it has one.

    It may be an object of another class with the same attributes, or with some of them.
    """
    ctx = field(handle, "ctx", _ABSENT)
    if ctx is _ABSENT:
        ctx = handle if field(handle, "step", _ABSENT) is _ABSENT else None
    return cast("LogContext | None", ctx)


def run_key(handle: object) -> str | None:
    """The key that its context gives the run; None where there is none."""
    key: object = field(run_context(handle), "run_key")
    return key if isinstance(key, str) or key is None else str(key)


def run_id(handle: object) -> str:
    """The path under which the run was announced: the same for a state and for its context. Touches no disk."""
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
    """What people call the run, as one component of a path."""
    return safe_name(run_key(handle) or Path(run_id(handle)).name)


def run_folder(handle: object) -> Path:
    """Where files of the run lie: ``<output_dir>/<run_key>``, or beside it if that would lie outside ``output_dir``.

    Absolute. Looks at the disk for symbolic links, so ask once per run.

    Raises:
        ValueError: Neither the handle nor its context has an ``output_dir``, or it is a URL.
    """
    ctx, key = run_context(handle), run_key(handle)
    given = output_dir_of(ctx)
    if not given or not key:
        given = output_dir_of(handle) or given
        if not given:
            kind = type(handle).__name__
            raise ValueError(f"a {kind} without output_dir names no folder for the files of its run")
        return local_path(given, "output_dir")
    root = local_path(given, "output_dir")
    if all(map(_is_plain, key.split("/"))):
        folder = root / key
        # `Path.resolve` raises for a link to itself, which may be another folder a moment later.
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
            return folder
    folder = root / f"{safe_name(key)}-{digest(key)}"
    log().warning("run.folder_renamed", run=ascii(key)[:_MAX_NAME_BYTES], folder=str(folder))
    return folder


def experiment_folder(handle: object) -> Path:
    """Where files of the experiment lie: the context's folder, or the one around the folder of a state without context.

    Raises:
        ValueError: Neither has an ``output_dir``, or it is a URL.
    """
    root, given = output_dir_of(run_context(handle)), output_dir_of(handle)
    if root:
        return local_path(root, "output_dir")
    if given:
        return local_path(given, "output_dir").parent
    raise ValueError(f"a {type(handle).__name__} without output_dir names no folder for the files of its experiment")


def step_of(step_idx: object) -> int:
    """The step as an int: of an int of any library, a float that is whole, an array of one such number.

    A bus makes it an int before hooks see it; `evsys_bus.dispatch` hands on what it is given.

    Raises:
        TypeError: It is no whole number, or larger than any file can hold.
    """
    step = _whole(step_idx)
    if step is None:
        raise TypeError(f"step_idx must be a whole number, not {step_idx!r:.60}")
    if step.bit_length() > _STEP_BITS:
        raise TypeError(f"step_idx must be a number of at most {_STEP_BITS} bits, not {step}")
    return step


def _whole(number: Any) -> int | None:
    """As an int, if it is a whole number of any kind. Any: that is found out here."""
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
    """The step at which training starts, by the state; None where it says none."""
    step = field(state, "step")
    return None if step is None else step_of(step)


def num_steps_of(state: object) -> int | None:
    """How many steps the run is to have; None where nobody knows, whatever stands for that."""
    steps = _whole(field(state, "num_steps"))
    return steps if steps is not None and 0 < steps < _UNBOUNDED_STEPS else None


@functools.lru_cache(maxsize=64)
def rank_of_stream(stream: str | None) -> int:
    """The rank of the process whose stream of the journal this is; 0 for what is no name of a stream."""
    found = _STREAM_RANK.match(stream or "")
    return int(found[1]) if found is not None else 0


def rank_of_event(event: EventInfo) -> int:
    """Of the process that published the event: as its stream says, else, where nothing is recorded, its launcher."""
    return rank_of_stream(event.stream) if event.stream else rank_of()


def is_carried(event: EventInfo) -> bool:
    """Whether it is a start that is given again, at which nothing starts; not so where another bus does not say."""
    return bool(getattr(event, "carried", False))


def ranked_key(run: str, rank: int) -> str:
    """What a callback keeps of a run of one rank it keeps under this; `is_run_of` takes it as the run's."""
    return f"{run}\0{rank}" if rank else run


def ranked_folder(folder: Path, rank: int) -> Path:
    """Where files of a rank lie: those of rank 0 in the run's folder, those of another in a folder of its own there."""
    return folder / f"rank{rank}" if rank else folder


def safe_name(text: str) -> str:
    """``text`` as one component of a path that leads nowhere else; two texts may get the same."""
    plain = "".join(letter if letter.isprintable() and letter not in '/\\:*?"<>|' else "-" for letter in text)
    plain = plain.lstrip(".- ")  # no hidden file, no `..`, no option of a command
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(".- ") or "run"


def digest(text: str) -> str:
    """Eight characters that tell two texts apart."""
    return hashlib.blake2s(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()


def output_dir_of(handle: object) -> str:
    """Its ``output_dir`` as text, as it was given; empty where there is none."""
    folder: object = field(handle, "output_dir")
    if folder is None:
        return ""
    try:
        return os.fsdecode(os.fspath(cast("os.PathLike[str]", folder)))
    except TypeError:  # it is no path of any kind
        return str(folder)


def _is_plain(part: str) -> bool:
    """Whether it names a folder here: not nothing, not ``..``, nothing unprintable, no longer than names may be."""
    return part not in {"", ".", ".."} and part.isprintable() and len(part.encode()) <= _MAX_FOLDER_BYTES


def names_another(said: bytes, owner: bytes, folder: Path) -> bool:
    """Whether the note beside a file, which says whose it is, names another run than this owner.

    A part of the owner's name, or zeros, are what a power cut leaves, and nobody's; unless that part is the name of a
    run that is there, of a note without an end of line, as 0.1.0 wrote it.

    Args:
        said: What the note holds: the name, and what else is noted behind a zero byte.
        owner: The folder of the run, absolute or as seen from ``folder``.
        folder: Where the note lies.
    """
    whole = said.endswith(b"\n")
    name = said.removesuffix(b"\n").partition(b"\0")[0]
    if not name or name == owner:
        return False
    if whole or not owner.startswith(name):
        return True
    beside = os.path.dirname(name) == os.path.dirname(owner)  # noqa: PTH120  # as bytes
    return beside and (folder / os.fsdecode(name)).is_dir()
