"""Locations: `Location` in a configuration, with a caret under the token; `local_path` on this machine's disk.

Also `encode_json` and `decode_json` for data with paths: folder names need not be valid UTF-8, but JSON must be.
"""

import os
import re
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import msgspec

from evsys_bus.printable import escape_controls

_T = TypeVar("_T")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of a URL, also after `pathlib` has merged its two slashes. A single letter is a drive."""


class Location(msgspec.Struct, frozen=True):
    """A location in a configuration."""

    path: str
    """JSON path, ``$`` being the root: ``$.callbacks[1].kind``."""
    file: str | None = None
    """The file that it was read from, or the command line option, if any."""
    line: int | None = None
    """1-based line in that file."""
    column: int | None = None
    """1-based column of the token."""
    text: str | None = None
    """The line itself, for drawing a caret under the token."""
    width: int = 1
    """Length of the token in characters."""

    def __str__(self) -> str:
        if self.file is None:
            return f" --> {self.path}"
        if self.line is None or self.column is None:
            return f" --> {self.file}   {self.path}"
        head = f" --> {self.file}:{self.line}:{self.column}   {self.path}"
        if self.text is None:
            return head
        gutter = " " * len(str(self.line))
        caret = " " * (self.column - 1) + "^" * self.width
        return f"{head}\n{gutter} |\n{self.line} | {self.text}\n{gutter} | {caret}"


def local_path(text: str | os.PathLike[str], setting: str) -> Path:
    """Return a setting's path as an absolute one: ``~`` is expanded, and a later ``chdir`` changes nothing.

    Args:
        text: The path, absolute or relative to the working directory.
        setting: The name of the setting, for the error.

    Raises:
        SettingError: It is a URL, or the home directory of a user who does not exist.
    """
    from evsys_bus.errors import SettingError  # circular: that module needs `Location`

    if type(text) is str and text.startswith("/"):
        return Path(text)
    if isinstance(text, Path) and text.is_absolute():
        return text
    if _URL.match(str(text)) and ("://" in str(text) or isinstance(text, os.PathLike)):
        raise SettingError(
            f"{setting} is {str(text)!r}, which is a URL and no path on this machine",
            fix="give a local directory; what is to be at a URL is copied there from it, as checkpoint_upload does",
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        fix = "write the directory out; ~ is known only for users of this machine"
        raise SettingError(f"{setting} is {str(text)!r}", fix=fix, why=str(error)) from error


def short_digest(text: str) -> str:
    """Return eight characters that differ for different texts, to keep a name unique that was cut or made safe."""
    import hashlib  # takes 3 ms, and most programs need no digest

    return hashlib.blake2s(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()


def encode_json(value: object) -> bytes:
    """Encode like `msgspec.json.encode`, with escapes for text that is not valid UTF-8.

    Python represents each invalid byte of a path as a lone surrogate (`os.fsdecode`). It becomes the escape that
    `json.dumps` writes and `json.loads` reads; msgspec refuses both.

    Raises:
        TypeError: JSON has no such type.
        UnicodeEncodeError: A text is invalid, and not from a path either.
    """
    try:
        return escape_controls(_encode(value))
    except UnicodeEncodeError:
        import json  # seldom needed

        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


@overload
def decode_json(data: bytes, kind: type[_T]) -> _T: ...
@overload
def decode_json(data: bytes, kind: Any) -> Any: ...
def decode_json(data: bytes, kind: Any) -> Any:
    """Decode what `encode_json` wrote.

    Raises:
        msgspec.DecodeError: It is not JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # not text, or nested too deeply
        raise msgspec.DecodeError(str(error)) from error
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        if not _LONE_SURROGATE.search(data):
            raise
        import json  # seldom needed

        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise error from None
    return msgspec.convert(value, kind)


_encode: Final = msgspec.json.Encoder().encode
_SURROGATES: Final = re.compile("[\udc80-\udcff]")
_LONE_SURROGATE: Final = re.compile(rb"\\u[dD][cC][89a-fA-F]")
