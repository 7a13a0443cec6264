"""Copies of what is in a store: a file appears, or is replaced, once it is right; one that was cut short goes on."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO, Final

from anyio import to_thread

from evsys_adapters.checkpoints import durable
from evsys_adapters.checkpoints.store import DamagedError, Stored, check


class Copy:
    """Content on its way into an open file, or into none, and its digest so far. It blocks as long as the disk does."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.size = 0
        """How much there is."""
        self._file: Final = file
        self._digest: Final = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Add the next bytes."""
        if self._file is not None:
            self._file.write(piece)
        self._digest.update(piece)
        self.size += len(piece)

    def recall(self, most: int) -> None:
        """Go on behind what is in the file; from the start, where that is more than there can be."""
        file = self._file
        assert file is not None
        if file.seek(0, 2) > most:
            file.truncate(0)
        file.seek(0)
        while piece := file.read(durable.CHUNK_BYTES):
            self._digest.update(piece)
            self.size += len(piece)

    def stored(self, key: str) -> Stored:
        """What it is a copy of."""
        return Stored(key, self.size, self._digest.hexdigest())


async def copy_into(
    path: Path,
    theirs: Stored,
    wanted: Stored | None,
    where: str,
    tag: str | None,
    read: Callable[[Copy], Awaitable[None]],
) -> Stored:
    """Have a copy at the path.

    Args:
        path: Where it goes.
        theirs: The object, as the store has it.
        wanted: What it must be, if that is known.
        where: The store, in words.
        tag: Names the content: what is left of a copy with the same one is gone on with.
        read: Adds what is missing.

    Raises:
        DamagedError: It is another content; nothing is kept of it.
        DeliveryError, OSError: What ``read`` raises; what is here by then is kept.
    """
    while True:
        with durable.unfinished(path, tag) as (file, partial):
            copy = Copy(file)
            await to_thread.run_sync(copy.recall, theirs.size)
            before = copy.size
            if before < theirs.size or not before:
                await read(copy)
            await to_thread.run_sync(durable.sync, file)
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
