"""What a value may take on its way; beyond it is cut or replaced, and the envelope says so."""

from typing import Final

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""An event as msgpack."""
MAX_DEPTH: Final = 32
"""Containers inside containers; far below the depth at which any decoder gives up."""
MAX_KEY_CHARS: Final = 4096
"""A key of a mapping; longer ones are cut and keep a checksum, so that they stay distinct and the same in every row."""
MAX_TEXT_CHARS: Final = 256 * 1024
"""A text or bytes value."""
MAX_REASONS: Final = 100
"""Reasons told about one event; the others are counted."""
MAX_PATH_CHARS: Final = 256
"""The path in a reason."""
MAX_SHOWN_CHARS: Final = 200
"""The picture that stands in for an object."""
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
"""The integers that msgpack has."""
