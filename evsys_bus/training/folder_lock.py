"""`locked`: one training at a time in a folder.

The lock ends with its process, however that ends; children forked from it do not inherit it. This module owns the
``.lock`` file, which says who holds it. The file stays: were it removed, two processes could lock two of its name.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError

LOCK: Final = ".lock"

_held: set[int] = set()


@contextmanager
def locked(folder: Path, what: str) -> Generator[None]:
    """Make the folder if need be, and hold it until the block ends.

    Where the file system has no locks nothing is held, and a WARNING says so.

    Args:
        folder: What to hold.
        what: What the folder is called in an error: ``the run's directory``.

    Raises:
        TrainingError: From an OSError: somebody holds it, or it cannot be written.
    """
    file = _opened(folder, what)
    try:
        _lock(file, folder, what)
        try:
            yield
        finally:
            if file in _held:  # not so in a forked child
                with suppress(OSError):
                    os.ftruncate(file, 0)
    finally:
        if file in _held:
            _held.discard(file)
            os.close(file)


def unwritable(folder: Path, what: str, error: OSError | ValueError) -> TrainingError:
    """The error that says so; to be raised from ``error``."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return TrainingError(f"{what} {folder} cannot be written: {reason}", fix="choose another output_dir")


def _opened(folder: Path, what: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte, or that is no text
        raise unwritable(folder, what, error) from error
    _held.add(file)
    return file


def _lock(file: int, folder: Path, what: str) -> None:
    import fcntl  # POSIX only

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        raise TrainingError(
            f"{what} {folder} is in use by {holder}", fix="wait until that has ended, or choose another output_dir"
        ) from error
    except OSError as error:
        log().warning("folder.not_locked", folder=str(folder), error=str(error))
        return
    with suppress(OSError):  # a full disk: the lock holds, and cannot say who has it
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _close_in_child() -> None:
    """Else a child that outlives its parent would hold what nobody trains in."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
