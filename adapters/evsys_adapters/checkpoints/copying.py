"""Copies of what is in a store: a file appears, or is replaced, once it is right; one that was cut short goes on.

    .<name>.<32 hexadecimal digits>.partial     what there is of a copy; the digits say of which content, to which name

Whoever is at a copy holds its lock. Where another process is, or there are no locks, a copy of one's own is begun.
"""

import hashlib
import os
import re
import stat
from collections.abc import Awaitable, Callable, Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Final

from anyio import to_thread

from evsys_adapters.checkpoints import durable
from evsys_adapters.checkpoints.store import DamagedError, Stored, Told, check

PIECE_BYTES: Final = 4 << 20
"""What is done in one go: a cancellation does not wait for more."""
_PARTIAL: Final = re.compile(r"\..*\.[0-9a-f]{32}\.partial", re.DOTALL)
_SHOWN_BYTES: Final = 100
"""Of the name; whole it may be as long as a name can be."""


class Copy:
    """Content on its way into an open file, or into none, and its digest so far. It blocks as long as the disk does.

    Args:
        file: The file's descriptor.
        where: The place, in words, where there may be no room.
        most: How much there can be; more is an error.
    """

    def __init__(self, file: int | None = None, where: object = None, most: int | None = None) -> None:
        self.size = 0
        """How much there is."""
        self._most: Final = most
        self._file: Final = file
        self._where: Final = where
        self._digest: Final = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Add the next bytes; where that fails they are not added, and may be once more.

        Raises:
            DamagedError: There is more than there can be.
            RetryLaterError: The disk is full.
        """
        if self._most is not None and self.size + len(piece) > self._most:
            raise DamagedError(
                f"more than {self._most} bytes came", fix="fetch again; if that does not help, another checkpoint"
            )
        if self._file is not None:
            done = 0
            with durable.needing_room(self._where), memoryview(piece) as view:
                while done < len(piece):
                    done += os.pwrite(self._file, view[done:], self.size + done)
        self._digest.update(piece)
        self.size += len(piece)

    def recall(self, most: int) -> bool:
        """Take the next piece of what is in the file already, up to ``most`` bytes in all; whether there was any."""
        assert self._file is not None
        piece = os.pread(self._file, min(PIECE_BYTES, most - self.size), self.size)
        self._digest.update(piece)
        self.size += len(piece)
        return bool(piece)

    def finish(self) -> None:
        """Have just this in the file, and on the medium."""
        assert self._file is not None
        with durable.needing_room(self._where):
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)

    def stored(self, key: str) -> Stored:
        """What it is a copy of."""
        return Stored(key, self.size, self._digest.hexdigest())


async def copy_into(
    path: Path,
    theirs: Stored,
    wanted: Stored | None,
    where: str,
    told: Told | None,
    read: Callable[[Copy], Awaitable[None]],
) -> Stored:
    """Have a copy at the path. What an earlier attempt has left is gone on with, where the content's digest is known.

    Args:
        path: Where it goes.
        theirs: The object, as the store has it; no more than that is taken.
        wanted: What it must be, if that is known.
        where: The store, in words.
        told: Is called with what there is, while that is read again.
        read: Adds what is missing.

    Raises:
        DamagedError: It is another content; nothing is kept of it.
        DeliveryError, OSError: What ``read`` raises; what is here by then is kept.
    """
    while True:
        with _unfinished(path, theirs.sha256 or (wanted and wanted.sha256)) as (file, partial):
            copy = Copy(file, path.parent, theirs.size)
            while await to_thread.run_sync(copy.recall, theirs.size):
                if told is not None:
                    told(copy.size, theirs.size)
            before = copy.size
            if before < theirs.size or not before:
                try:
                    await read(copy)
                except DamagedError:
                    partial.unlink()
                    raise
            await to_thread.run_sync(copy.finish)
            got = copy.stored(theirs.key)
            try:
                check(got, theirs, where)
                check(got, wanted, where)
            except DamagedError:
                partial.unlink()
                if not before:
                    raise
                continue  # what was left may have been torn
            await to_thread.run_sync(durable.move, partial, path)
            return got


def partial_of(path: Path, sha256: str) -> Path:
    """Where a copy to this path, of the content with this digest, stands until it is whole."""
    digits = hashlib.sha256(os.fsencode(path.name) + b"\0" + sha256.encode()).hexdigest()[:32]
    return _partial(path, digits)


def is_partial(path: Path) -> bool:
    """Whether it has the name of a copy that is not whole."""
    return _PARTIAL.fullmatch(path.name) is not None


def clear(folder: Path, keep: Collection[Path] = ()) -> None:
    """Remove what copies have left below the folder and nobody is at now, but for these files."""
    for partial in folder.rglob(".*.partial"):
        if partial not in keep and _PARTIAL.fullmatch(partial.name):
            file = _held(partial)
            if file is not None:
                with suppress(OSError):  # what stays is in nobody's way
                    partial.unlink()
                os.close(file)


@contextmanager
def _unfinished(path: Path, sha256: str | None) -> Generator[tuple[int, Path]]:
    """A file that is to become the one at the path, and its name. It stays if it may be gone on with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path, token_hex(16)) if sha256 is None else partial_of(path, sha256)
    file, stays = _held(partial, os.O_CREAT), sha256 is not None
    if file is None:
        partial, stays = _partial(path, token_hex(16)), False
        file = _held(partial, os.O_CREAT)
    if file is None:  # there are no locks here
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield file, partial
    finally:
        os.close(file)
        if not stays:
            partial.unlink(missing_ok=True)  # it is in its place, unless this failed


def _partial(path: Path, digits: str) -> Path:
    shown = path.name.encode(errors="ignore")[:_SHOWN_BYTES].decode(errors="ignore")
    return path.with_name(f".{shown}.{digits}.partial")


def _held(partial: Path, make: int = 0) -> int | None:
    """The file, open for as long as it is locked; None where another one has it, or it cannot be had."""
    import fcntl  # POSIX only

    file = None
    try:
        file = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | make, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.fstat(file)
        if stat.S_ISREG(there.st_mode) and os.path.samestat(there, partial.stat(follow_symlinks=False)):
            return file
    except OSError as error:
        if file is not None and not isinstance(error, BlockingIOError) and not os.fstat(file).st_size:
            partial.unlink(missing_ok=True)  # it was made just now, where there are no locks
    if file is not None:
        os.close(file)
    return None
