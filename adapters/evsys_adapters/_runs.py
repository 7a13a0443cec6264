"""Which run a hook speaks of, and which folder is its own.

State of a callback that belongs to a run is kept under `run_id`; files of a run lie in `run_folder`.
"""

import hashlib
import os
from pathlib import Path
from typing import Final

from evsys_bus.context import LogContext, LoopState
from evsys_bus.diagnostics import log

_MAX_FOLDER_BYTES: Final = 255
"""What file systems take."""
_MAX_NAME_BYTES: Final = 200
"""The rest is for what callbacks put around a name."""


def run_context(handle: LoopState | LogContext) -> LogContext | None:
    """The context of the run: the handle itself, or the state's, if it has one (a detached one may not)."""
    return handle.ctx if isinstance(handle, LoopState) else handle


def run_id(handle: LoopState | LogContext) -> str:
    """The path under which the run was announced: the same for a state and for its context. Touches no disk."""
    ctx = run_context(handle)
    if ctx is None or ctx.run_key is None:
        return os.fspath((ctx or handle).output_dir)
    return os.path.join(ctx.output_dir, ctx.run_key)  # noqa: PTH118  # at every step; a Path costs ten times as much


def run_name(handle: LoopState | LogContext) -> str:
    """What people call the run, as one component of a path."""
    ctx = run_context(handle)
    return safe_name(ctx.run_key if ctx is not None and ctx.run_key else Path(run_id(handle)).name)


def run_folder(handle: LoopState | LogContext) -> Path:
    """Where files of the run lie: ``<output_dir>/<run_key>``, or beside it if that would lie outside ``output_dir``.

    Looks at the disk for symbolic links, so ask once per run.
    """
    ctx = run_context(handle)
    if ctx is None or ctx.run_key is None:
        return Path((ctx or handle).output_dir)
    root = Path(ctx.output_dir)
    if all(map(_is_plain, ctx.run_key.split("/"))):
        folder = root / ctx.run_key
        if folder.resolve().is_relative_to(root.resolve()):
            return folder
    folder = root / f"{safe_name(ctx.run_key)}-{digest(ctx.run_key)}"
    log().warning("run.folder_renamed", run=ascii(ctx.run_key)[:_MAX_NAME_BYTES], folder=str(folder))
    return folder


def safe_name(text: str) -> str:
    """``text`` as one component of a path that leads nowhere else; two texts may get the same."""
    plain = "".join(letter if letter.isprintable() and letter not in '/\\:*?"<>|' else "-" for letter in text)
    plain = plain.lstrip(".- ")  # no hidden file, no `..`, no option of a command
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(".- ") or "run"


def digest(text: str) -> str:
    """Eight characters that tell two texts apart."""
    return hashlib.blake2s(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()


def _is_plain(part: str) -> bool:
    """Whether it names a folder here: not nothing, not ``..``, nothing unprintable, no longer than names may be."""
    return part not in {"", ".", ".."} and part.isprintable() and len(part.encode()) <= _MAX_FOLDER_BYTES
