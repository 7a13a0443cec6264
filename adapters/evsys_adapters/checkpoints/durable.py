"""Atomic and durable file operations, and digests of file contents."""

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
_DISK_FULL_ERRORS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def full_disk_as_retry(where: object) -> Generator[None]:
    """Convert a full disk in the block to an error that names the place.

    Raises:
        RetryLaterError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL_ERRORS:
            raise
        raise RetryLaterError(f"no room in {where}: {error.strerror}; it resumes once there is space") from error


def partial_path(path: Path) -> Path:
    """Return a temporary name beside the path; creates the parent directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.encode(errors="ignore")[:_SHOWN_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{token_hex(6)}.partial")


def sync_file(file: BinaryIO) -> None:
    """Flush and fsync a file."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a directory."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a synced file to its final path, and fsync the directory."""
    partial.replace(path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
