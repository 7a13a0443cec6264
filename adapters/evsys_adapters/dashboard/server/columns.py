"""The columns container: a JSON header and float64 columns in one binary body, read in a browser without copying.

``EVC1``, the length of the header as a little-endian u32, the header, then the columns back to back. The header is
padded with spaces so that they begin at a multiple of 8 bytes. It refers to a column as ``[offset, length]``, both
counted in numbers.
"""

import struct
from typing import Any, Final

import msgspec

MAGIC: Final = b"EVC1"
_ALIGNMENT: Final = 8


_ROUNDED_BITS: Final = 29


def round_numbers(values: Any) -> Any:
    """Return an array rounded to the 24 significant bits of a float32, which compresses to half; exponents stay."""
    import numpy as np

    bits = np.asarray(values, "<f8").view("<u8")
    half, mask = np.uint64(1 << (_ROUNDED_BITS - 1)), np.uint64((1 << 64) - (1 << _ROUNDED_BITS))
    return ((bits + half) & mask).view("<f8")


class ColumnWriter:
    """Collects columns. Columns with the same content are stored once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._offsets: dict[bytes, int] = {}
        self._length = 0

    def add(self, values: Any) -> list[int]:
        """Add a numpy array. Returns the reference for the header."""
        data = values.astype("<f8", copy=False).tobytes()
        offset = self._offsets.get(data)
        if offset is None:
            offset = self._offsets[data] = self._length
            self._parts.append(data)
            self._length += len(values)
        return [offset, len(values)]

    def encode(self, header: object) -> bytes:
        """Return the container."""
        text = msgspec.json.encode(header)
        text += b" " * (-(len(MAGIC) + 4 + len(text)) % _ALIGNMENT)
        return b"".join([MAGIC, struct.pack("<I", len(text)), text, *self._parts])


def decode_columns(data: bytes) -> tuple[Any, Any]:
    """Return the header and all numbers of a container, as a numpy array. For Python clients and tests.

    Raises:
        ValueError: It is not a container.
    """
    import numpy as np

    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("not a columns container")
    start = len(MAGIC) + 4 + struct.unpack_from("<I", data, len(MAGIC))[0]
    return msgspec.json.decode(data[len(MAGIC) + 4 : start]), np.frombuffer(data, "<f8", offset=start)
