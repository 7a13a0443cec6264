"""Reading a file in parts: digests of the parts and of the whole, and a part as the body of a request."""

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Final

from anyio import to_thread

_READ_BYTES: Final = 1 << 20


class ShortFileError(OSError):
    """The file ended before its part did."""


class PartBody:
    """A part of an open file as a request body; it is read while it is sent, to save memory."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._size = size
        self._signed = 0

    def read(self, size: int) -> bytes:
        """Read the next bytes, for signing; sending iterates instead."""
        piece = os.pread(self._file, min(size, self._size - self._signed), self._offset + self._signed)
        self._signed += len(piece)
        return piece

    def seek(self, position: int) -> int:
        """Set the position of `read`."""
        self._signed = position
        return position

    def tell(self) -> int:
        """Return the position of `read`."""
        return self._signed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the content in chunks."""
        done = 0
        while done < self._size:
            want = min(_READ_BYTES, self._size - done)
            piece = await to_thread.run_sync(os.pread, self._file, want, self._offset + done)
            if not piece:
                raise ShortFileError(f"{self._size - done} bytes of a part are missing")
            done += len(piece)
            yield piece


async def digests(file: int, size: int, part_bytes: int) -> tuple[str, list[str]]:
    """Return the SHA-256 digests of the whole file and of each of its parts, in hexadecimal."""
    whole, parts = hashlib.sha256(), list[str]()
    for offset in range(0, size, part_bytes):
        parts.append(await to_thread.run_sync(_digest, file, offset, min(part_bytes, size - offset), whole.update))
    return whole.hexdigest(), parts


def _digest(file: int, offset: int, size: int, seen: Callable[[bytes], None]) -> str:
    digest = hashlib.sha256()
    for start in range(offset, offset + size, _READ_BYTES):
        piece = os.pread(file, min(_READ_BYTES, offset + size - start), start)
        digest.update(piece)
        seen(piece)
    return digest.hexdigest()
