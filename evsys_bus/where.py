"""Places: `Where` in a configuration, with a caret under the token; `local_path` on this machine's disk.

Also `encode_json` and `decode_json`, for what holds paths: the name of a folder need not be UTF-8, and JSON must be.
"""

import os
import re
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import msgspec

_T = TypeVar("_T")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""As a path begins that was a URL; `pathlib` makes one slash of two. One letter is a drive."""


class Where(msgspec.Struct, frozen=True):
    """A place in a configuration."""

    path: str
    """JSON path, ``$`` being the whole: ``$.callbacks[1].kind``."""
    file: str | None = None
    """The file it was read from, if it was read from one; or the option of the command line."""
    line: int | None = None
    """1-based line in that file."""
    column: int | None = None
    """1-based column of the token."""
    text: str | None = None
    """The line itself, so that a caret can be drawn under the token."""
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


def local_path(text: str | os.PathLike[str], what: str) -> Path:
    """The absolute path that a setting names now: ``~`` is expanded, and a later ``chdir`` changes nothing.

    Args:
        text: The path, absolute or relative to the working directory.
        what: The name of the setting, for the error.

    Raises:
        SettingError: It is a URL, or the home directory of a user who does not exist.
    """
    from evsys_bus.errors import SettingError  # that module needs `Where`

    if type(text) is str and text.startswith("/"):
        return Path(text)
    if isinstance(text, Path) and text.is_absolute():
        return text
    if _URL.match(str(text)) and ("://" in str(text) or isinstance(text, os.PathLike)):
        raise SettingError(
            f"{what} is {str(text)!r}, which is a URL and no path on this machine",
            fix="give a local directory; what is to be at a URL is copied there from it, as checkpoint_upload does",
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        fix = "write the directory out; ~ is known only for users of this machine"
        raise SettingError(f"{what} is {str(text)!r}", fix=fix, why=str(error)) from error


def encode_json(value: object) -> bytes:
    """The value as JSON, as `msgspec.json.encode` has it; what is not UTF-8 in its texts stands there as escapes.

    Python's text of a path has a lone surrogate for each byte that is no UTF-8 (`os.fsdecode`). It becomes the escape
    that `json.dumps` writes and `json.loads` reads back; msgspec refuses both.

    Raises:
        TypeError: JSON has nothing for it.
        UnicodeEncodeError: A text is none, and no path either.
    """
    try:
        return _encode(value)
    except UnicodeEncodeError:
        import json  # seldom needed

        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return _NO_UTF8.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


@overload
def decode_json(data: bytes, kind: type[_T]) -> _T: ...
@overload
def decode_json(data: bytes, kind: Any) -> Any: ...
def decode_json(data: bytes, kind: Any) -> Any:
    """What `encode_json` wrote. Any: a type, and a value of it.

    Raises:
        msgspec.DecodeError: It is no JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # no text, or brackets without end
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
_NO_UTF8: Final = re.compile("[\udc80-\udcff]")
_LONE_SURROGATE: Final = re.compile(rb"\\u[dD][cC][89a-fA-F]")
