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

_NOT_SUPPORTED_ERRNOS: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def create_stream_directory(disk: Disk, directory: str, stream: str) -> None:
    """Create the directory of a new stream.

    Raises:
        OSError: The journal's directory cannot be written; or its file system does not append correctly, and no local
            directory can take the stream either.
    """
    missing_feature = _find_missing_feature(disk, directory)
    if missing_feature is not None:
        for root in disk.local_directories():
            local_path = f"{root}/evsys-bus-{stream}"
            try:
                _create_on_local_disk(disk, directory, stream, root, local_path)
            except OSError as error:
                log().warning(
                    "journal.not_moved", directory=directory, to=local_path, lacks=missing_feature, exc_info=error
                )
            else:
                log().warning("journal.moved", directory=directory, to=local_path, lacks=missing_feature)
                return
    if missing_feature == "appends":
        raise OSError(errno.ENOTSUP, "its file system does not append, and no local directory can hold the journal")
    disk.make_directory(f"{directory}/{stream}")


def _create_on_local_disk(disk: Disk, directory: str, stream: str, root: str, local_path: str) -> None:
    disk.make_directory(root)
    missing_feature = _find_missing_feature(disk, root)
    if missing_feature is not None:
        raise OSError(errno.ENOTSUP, f"its file system lacks {missing_feature}", root)
    disk.make_directory(local_path)
    disk.sync_path(root)
    for name in (stream, layout.COURIERS):
        disk.make_directory(f"{local_path}/{name}")
        try:
            disk.link(f"{directory}/{name}", f"{local_path}/{name}")
        except FileExistsError:
            if name == stream:
                raise


def _find_missing_feature(disk: Disk, directory: str) -> Literal["locks", "appends"] | None:
    """What the file system of a directory does not support, tested with a small file."""
    path = f"{directory}/.trial-{uuid4().hex}"
    file = disk.open_append(path)
    try:
        if not _supports_append(disk, path, file):
            return "appends"
        return None if _supports_locks(disk, path) else "locks"
    finally:
        disk.close(file)
        disk.remove(path)


def _supports_append(disk: Disk, path: str, file: int) -> bool:
    """Whether a write goes to the end of the file, also after the file was truncated."""
    try:
        disk.write(file, b"ab")
        disk.truncate(file, 1)
        disk.write(file, b"c")
        return disk.read(path, 0, 4) == b"ac"
    except OSError as error:
        if error.errno in _NOT_SUPPORTED_ERRNOS:
            return False
        raise


def _supports_locks(disk: Disk, path: str) -> bool:
    try:
        lock = disk.lock(path)
    except OSError:
        return False
    if lock is not None:
        disk.close(lock)
    return lock is not None
