"""Size limits of encoded values. A value beyond them is cut or replaced, and the envelope records why."""

from typing import Final

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""Of an event encoded as msgpack."""
MAX_DEPTH: Final = 32
"""Of nested containers; far below the depth at which any decoder gives up."""
MAX_KEY_CHARS: Final = 4096
"""Of a key of a mapping. A longer key is cut and gets a checksum, so keys stay distinct and the same in every row."""
MAX_TEXT_CHARS: Final = 256 * 1024
"""Of a text or bytes value."""
MAX_REASONS: Final = 100
"""Number of replaced values listed for one event; further ones are only counted."""
MAX_PATH_CHARS: Final = 256
"""Of the path of a replaced value."""
MAX_REPR_CHARS: Final = 200
"""Of the repr that replaces an object."""
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
"""The range of msgpack integers is `INT_MIN` to `INT_MAX`."""
