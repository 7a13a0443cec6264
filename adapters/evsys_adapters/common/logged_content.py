"""The content of runs for loggers: its file, its rows and its text, from its description in the event.

Content is in ``<run>/media``. A logger shows what its format can, and of the rest one line with the file's path.
"""

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import field, fields, run_folder
from evsys_adapters.common.logged_values import Table, redacted
from evsys_bus.codec import to_builtins
from evsys_bus.disk import DamagedFileError, read_file
from evsys_bus.errors import RetryLaterError

_MAX_FILE_BYTES: Final = 1 << 30  # as of `evsys_bus.front.media`
_START_OF_FRAME: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the JPEG segment with the size of the image."""
_STANDALONE_MARKERS: Final = frozenset({0x01, 0xFF, *range(0xD0, 0xD9)})
_decode_table: Final = msgspec.json.Decoder(dict[str, Any]).decode


class Content:
    """One content of a run.

    Args:
        handle: The state or context of the run.
        item: Its description; of any class with these fields.
    """

    def __init__(self, handle: object, item: object) -> None:
        self.kind: Final = str(field(item, "kind") or "artifact")
        self.name: Final = str(field(item, "name"))
        self.media_type: Final = str(field(item, "media_type") or "")
        self.size: Final = int(field(item, "size") or 0)
        self.digest: Final = str(field(item, "digest") or "")
        self.caption: Final[str | None] = field(item, "caption")
        self.artifact_type: Final[str | None] = field(item, "artifact_type")
        self.data: Final = fields(field(item, "data"))
        self.path: Final[str | None] = field(item, "path")
        """Relative to the run's folder."""
        self.file: Final = run_folder(handle) / self.path if self.path else None
        """The file, or the folder of a directory; None if `data` holds all."""

    def read(self, max_bytes: int = _MAX_FILE_BYTES) -> bytes | None:
        """Return the file's content; None if it is missing, larger than ``max_bytes``, or a directory.

        Raises:
            RetryLaterError: It cannot be read now.
        """
        if self.file is None or self.size > max_bytes or self.path is None or self.path.endswith("/"):
            return None
        try:
            return read_file(self.file, max_bytes=max_bytes)
        except (FileNotFoundError, NotADirectoryError, DamagedFileError):
            return None
        except OSError as error:
            raise RetryLaterError(f"{self.file} cannot be read: {error}") from error

    def text(self) -> str | None:
        """Return the whole of a text; None if its file is missing."""
        known = self.data.get("text")
        if isinstance(known, str):
            return known
        data = self.read()
        return None if data is None else data.decode(errors="replace")

    def table(self, max_rows: int) -> Table:
        """Return the first rows of a table; only those that its description has, if its file is missing."""
        data, stored = self.read(), self.data
        if data is not None:
            try:
                stored = _decode_table(data)
            except msgspec.DecodeError:
                pass
        columns, rows = ([*(stored.get(name) or ())] for name in ("columns", "rows"))
        total = max(len(rows), int(self.data.get("row_count") or 0))
        return Table([str(each) for each in columns], [[*row] for row in rows[:max_rows]], total, "rows")

    def line(self, why: str | None = None) -> str:
        """Return one line of Markdown about the content: what it is and where its file is."""
        name = "directory" if str(self.path).endswith("/") else self.media_type or self.kind
        where = f"in `{self.path}` of the run's directory" if self.path else "without a file"
        facts = [f"{self.kind} ({name}, {self.size:,} bytes) {where}", self.artifact_type, self.caption, why]
        return "; ".join(each for each in facts if each)


def stored_row(step: int | None, item: object) -> dict[str, Any]:
    """Return the description of a content as a row for a file of rows."""
    names = ("name", "kind", "path", "caption", "artifact_type", "media_type", "digest", "size", "data")
    plain, _ = to_builtins({name: field(item, name) for name in names})
    return {"step": step, **redacted({name: value for name, value in plain.items() if value not in (None, "", {})})}


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, GIF or JPEG image in pixels; zeros if they are not found."""
    if data.startswith(b"\x89PNG") and len(data) >= 24:  # noqa: PLR2004 # the end of its first chunk's size
        return struct.unpack_from(">II", data, 16)
    if data.startswith(b"GIF8") and len(data) >= 10:  # noqa: PLR2004
        return struct.unpack_from("<HH", data, 6)
    for marker, start in _jpeg_segments(data):
        if marker in _START_OF_FRAME and start + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, start + 3)
            return width, height
    return 0, 0


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment of a JPEG file, and where its length is."""
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:  # noqa: PLR2004 # every segment begins with it
        marker = data[at + 1]
        if marker in _STANDALONE_MARKERS:
            at += 1 if marker == 0xFF else 2  # noqa: PLR2004
            continue
        yield marker, at + 2
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
