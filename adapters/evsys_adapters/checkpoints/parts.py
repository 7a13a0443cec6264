"""Reading a file in parts: digests of the parts and of the whole, and a part as the body of a request."""

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Final

from anyio import to_thread

_READ_BYTES: Final = 1 << 20


class TruncatedFileError(OSError):
    """The file ended before its part did."""


class PartBody:
    """A part of an open file as a request body; it is read while it is sent, to save memory."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._size = size
        self._read_offset = 0

    def read(self, size: int) -> bytes:
        """Read the next bytes, for signing; sending iterates instead."""
        chunk = os.pread(self._file, min(size, self._size - self._read_offset), self._offset + self._read_offset)
        self._read_offset += len(chunk)
        return chunk

    def seek(self, position: int) -> int:
        """Set the position of `read`."""
        self._read_offset = position
        return position

    def tell(self) -> int:
        """Return the position of `read`."""
        return self._read_offset

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the content in chunks."""
        done = 0
        while done < self._size:
            count = min(_READ_BYTES, self._size - done)
            chunk = await to_thread.run_sync(os.pread, self._file, count, self._offset + done)
            if not chunk:
                raise TruncatedFileError(f"{self._size - done} bytes of a part are missing")
            done += len(chunk)
            yield chunk


async def digest_parts(file: int, size: int, part_bytes: int) -> tuple[str, list[str]]:
    """Return the SHA-256 digests of the whole file and of each of its parts, in hexadecimal."""
    whole, parts = hashlib.sha256(), list[str]()
    for offset in range(0, size, part_bytes):
        parts.append(await to_thread.run_sync(_digest, file, offset, min(part_bytes, size - offset), whole.update))
    return whole.hexdigest(), parts


def _digest(file: int, offset: int, size: int, on_chunk: Callable[[bytes], None]) -> str:
    digest = hashlib.sha256()
    for start in range(offset, offset + size, _READ_BYTES):
        chunk = os.pread(file, min(_READ_BYTES, offset + size - start), start)
        digest.update(chunk)
        on_chunk(chunk)
    return digest.hexdigest()
