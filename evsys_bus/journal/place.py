"""Where a new stream is created: in the journal's directory or, if its file system is not suitable, on a local disk.

Network file systems may have no locks, or write appended data to the wrong offset. Then the stream and the couriers'
lock files are created in a local directory, and the journal gets symbolic links to them, so that every process on this
machine uses the same paths.
"""

import errno
from typing import Final, Literal
from uuid import uuid4

from evsys_bus.diagnostics import log
from evsys_bus.disk import Disk
from evsys_bus.journal import layout

_NOT_SUPPORTED: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def place(disk: Disk, directory: str, stream: str) -> None:
    """Create the directory of a new stream.

    Raises:
        OSError: The journal's directory cannot be written; or its file system does not append correctly, and no local
            directory can take the stream either.
    """
    lacks = _lacking(disk, directory)
    if lacks is not None:
        for root in disk.local_directories():
            local = f"{root}/evsys-bus-{stream}"
            try:
                _move(disk, directory, stream, root, local)
            except OSError as error:
                log().warning("journal.not_moved", directory=directory, to=local, lacks=lacks, exc_info=error)
            else:
                log().warning("journal.moved", directory=directory, to=local, lacks=lacks)
                return
    if lacks == "appends":
        raise OSError(errno.ENOTSUP, "its file system does not append, and no local directory can hold the journal")
    disk.make_directory(f"{directory}/{stream}")


def _move(disk: Disk, directory: str, stream: str, root: str, local: str) -> None:
    disk.make_directory(root)
    lacks = _lacking(disk, root)
    if lacks is not None:
        raise OSError(errno.ENOTSUP, f"its file system lacks {lacks}", root)
    disk.make_directory(local)
    disk.sync_path(root)
    for name in (stream, layout.COURIERS):
        disk.make_directory(f"{local}/{name}")
        try:
            disk.link(f"{directory}/{name}", f"{local}/{name}")
        except FileExistsError:
            if name == stream:
                raise


def _lacking(disk: Disk, directory: str) -> Literal["locks", "appends"] | None:
    """What the file system of a directory does not support, tested with a small file."""
    path = f"{directory}/.trial-{uuid4().hex}"
    file = disk.open_append(path)
    try:
        if not _appends(disk, path, file):
            return "appends"
        return None if _locks(disk, path) else "locks"
    finally:
        disk.close(file)
        disk.remove(path)


def _appends(disk: Disk, path: str, file: int) -> bool:
    """Whether a write goes to the end of the file, also after the file was truncated."""
    try:
        disk.write(file, b"ab")
        disk.truncate(file, 1)
        disk.write(file, b"c")
        return disk.read(path, 0, 4) == b"ac"
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise


def _locks(disk: Disk, path: str) -> bool:
    try:
        lock = disk.lock(path)
    except OSError:
        return False
    if lock is not None:
        disk.close(lock)
    return lock is not None
