"""Text without characters that control a terminal, as text or as JSON. Imports next to nothing, for ``--help``."""

import re
from typing import Final

_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""Control characters; invisible ones, which change the order of the others or divide lines; and lone surrogates."""
_CONTROLS_IN_JSON: Final = re.compile(
    rb"\x7f|\xc2[\x80-\x9f]|\xd8\x9c|\xe2\x80[\x8b\x8e\x8f\xa8-\xae]|\xe2\x81[\xa0-\xaf]|\xef\xbb\xbf"
)


def printable(text: str) -> str:
    """Return the text with control characters escaped: text of files and errors must not control the terminal."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def escape_controls(encoded: bytes) -> bytes:
    """Escape what JSON leaves as it is, although terminals obey it: C1 controls, marks of direction."""
    return _CONTROLS_IN_JSON.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), encoded)
