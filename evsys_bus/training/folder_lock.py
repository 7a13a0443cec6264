"""`lock_folder`: a lock on a directory, so that one training at a time uses it.

The lock is released when its process ends, however that ends; forked children do not inherit it. This module owns the
``.lock`` file, which names the process that holds the lock. The file is never removed: otherwise two processes could
lock two different files of this name.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError

LOCK_FILE: Final = ".lock"

_open_locks: set[int] = set()


@contextmanager
def lock_folder(folder: Path, description: str) -> Generator[None]:
    """Create the directory if necessary, and lock it until the block ends.

    On a file system without locks, a warning is logged and nothing is locked.

    Args:
        folder: The directory.
        description: Name of the directory in error messages: ``the run's directory``.

    Raises:
        TrainingError: From an OSError: the directory is locked by another process, or cannot be written.
    """
    file = _open_lock_file(folder, description)
    try:
        _acquire(file, folder, description)
        try:
            yield
        finally:
            if file in _open_locks:  # not in a forked child
                with suppress(OSError):
                    os.ftruncate(file, 0)
    finally:
        if file in _open_locks:
            _open_locks.discard(file)
            os.close(file)


def unwritable_error(folder: Path, description: str, error: OSError | ValueError) -> TrainingError:
    """Return the error for a directory that cannot be written; raise it from ``error``."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return TrainingError(f"{description} {folder} cannot be written: {reason}", fix="choose another output_dir")


def _open_lock_file(folder: Path, description: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, or not encodable
        raise unwritable_error(folder, description, error) from error
    _open_locks.add(file)
    return file


def _acquire(file: int, folder: Path, description: str) -> None:
    import fcntl  # POSIX only

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        raise TrainingError(
            f"{description} {folder} is in use by {owner}",
            fix="wait until that has ended, or choose another output_dir",
        ) from error
    except OSError as error:
        log().warning("folder.not_locked", folder=str(folder), error=str(error))
        return
    with suppress(OSError):  # a full disk: the lock works, but cannot name its owner
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _close_in_child() -> None:
    """Release the locks in a forked child: one that outlives its parent would keep the directory locked."""
    for file in _open_locks:
        os.close(file)
    _open_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
