"""Files that are there whole or not at all, also after a power cut, and the digests of their content."""

import errno
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, Final

from evsys_bus.errors import RetryLaterError

CHUNK_BYTES: Final = 1 << 20
_SHOWN_BYTES: Final = 100
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def needing_room(where: object) -> Generator[None]:
    """Name the place where there is no room; the error of a write does not know it.

    Raises:
        RetryLaterError: The disk is full: in place of its OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise RetryLaterError(f"no room in {where}: {error.strerror}; it goes on once there is some") from error


def beside(path: Path) -> Path:
    """A name for what is to become the file, in the same directory, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.encode(errors="ignore")[:_SHOWN_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{token_hex(6)}.partial")


def sync(file: BinaryIO) -> None:
    """Have the content on the medium."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the entries of the directory on the medium."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(partial: Path, path: Path) -> None:
    """Put a file, whose content is on the medium, in its place."""
    partial.replace(path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
