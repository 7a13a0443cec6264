"""Files that are there whole or not at all, also after a power cut, and the digests of their content."""

import errno
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, Final

from evsys_bus.errors import RetryLaterError

CHUNK_BYTES: Final = 1 << 20
_MOST_NAME_BYTES: Final = 100
_MOST_TAG_CHARS: Final = 32
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
    return _beside(path, token_hex(6))


def _beside(path: Path, tag: str) -> Path:
    name = path.name.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{tag[:_MOST_TAG_CHARS]}.partial")


@contextmanager
def unfinished(path: Path, tag: str | None) -> Generator[tuple[BinaryIO, Path]]:
    """What is to become the file, to be added to, and its name: it holds what an earlier attempt has left.

    It is empty where there was none, and where another process is at it. It stays if this attempt ends early.

    Args:
        path: The file; its directory is made if need be.
        tag: Names its content, for what is left of another content is of no use; None if that is not known.
    """
    copy = beside(path)
    left = _beside(path, tag or "")
    file = None if tag is None else _locked(left)
    if file is not None:
        with file:
            yield file, left
        return
    try:
        with _locked(copy) or copy.open("a+b") as file:
            yield file, copy
    finally:
        copy.unlink(missing_ok=True)  # it is in its place, unless this failed


def clear(path: Path) -> None:
    """Remove what attempts at the file have left, and nobody is at now."""
    for left in path.parent.glob(f"{escape(_beside(path, '').name.removesuffix('.partial'))}*.partial"):
        file = _locked(left)
        if file is not None:
            with file:
                left.unlink()


def _locked(copy: Path) -> BinaryIO | None:
    """The file, open for as long as it is locked; None where another one has it, or moves it away just now."""
    import fcntl  # POSIX only

    file = copy.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), copy.stat()):
            return file
    except OSError:  # or there are no locks here
        pass
    file.close()
    return None


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


def replace(path: Path, data: bytes) -> None:
    """Have the file hold just this."""
    partial = beside(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            sync(file)
        move(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # it is in its place, unless this failed


def sha256_of(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
