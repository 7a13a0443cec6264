"""Texts, tables, histograms and pictures of runs, as pages show them.

The file of a picture is named after the SHA-256 of its bytes. Only a file that has them is returned: what a run sends
as a path leads to no other file.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from evsys_adapters.common.hook_arguments import fields, list_or_empty
from evsys_adapters.dashboard.details import Details
from evsys_adapters.dashboard.values import finite

MAX_PICTURE_BYTES: Final = 16 << 20
_SHOWN: Final = frozenset({"text", "table", "histogram", "image", "figure"})
_MAX_NAMES: Final = 200
_MAX_TEXT: Final = 20_000
_MAX_CELL: Final = 300
_MAX_ROWS: Final = 50
_MAX_COLUMNS: Final = 30
_MAX_BINS: Final = 512
_PICTURE_NAME: Final = re.compile(r"media/([0-9a-f]{64})\.(png|jpg|jpeg|gif|webp)")
_PICTURE_TYPES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def latest_contents(details: Details, run: int) -> list[dict[str, Any]]:
    """Return the newest content of each kind and name that pages can show, with its data.

    Returns:
        For each ``kind``, ``name``, ``step``, ``time``, ``caption``; ``data``: a text, columns and rows, or edges and
        counts; ``picture``, the digest of one whose file is here; and ``earlier``, how many came before it.
    """
    found: list[dict[str, Any]] = []
    for each, count in details.newest_contents(run, sorted(_SHOWN), _MAX_NAMES):
        picture, file = _PICTURE_NAME.fullmatch(str(each.get("path"))), each["file"]
        found.append(
            {
                **{name: each.get(name) for name in ("kind", "name", "step", "time", "caption")},
                "data": _bounded_data(str(each.get("kind")), fields(each.get("data"))),
                "picture": picture[1] if picture and file and os.path.exists(file) else None,  # noqa: PTH110 # as text, like the path
                "earlier": count - 1,
            }
        )
    return found


def read_picture(contents: Sequence[Mapping[str, Any]], digest: str) -> tuple[str, bytes] | None:
    """Return the media type and the bytes of a picture; None if its file is not here, or is another one by now."""
    for each in contents:
        name = _PICTURE_NAME.fullmatch(str(each.get("path")))
        if name is None or name[1] != digest or not each.get("file"):
            continue
        path = Path(each["file"])
        try:
            if not path.is_file() or path.stat().st_size > MAX_PICTURE_BYTES:
                continue
            data = path.read_bytes()
        except OSError:
            continue
        kind = next((kind for mark, kind in _PICTURE_TYPES if data.startswith(mark)), None)
        if kind is not None and hashlib.sha256(data).hexdigest() == digest:
            return kind, data
    return None


def _bounded_data(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "text":
        return {"text": str(data.get("text") or "")[:_MAX_TEXT]}
    if kind == "histogram":
        names = ("edges", "counts")
        return {name: [_number(each) for each in list_or_empty(data.get(name))[:_MAX_BINS]] for name in names}
    if kind == "table":
        rows = [list_or_empty(each)[:_MAX_COLUMNS] for each in list_or_empty(data.get("rows"))[:_MAX_ROWS]]
        return {
            "columns": [str(each)[:_MAX_CELL] for each in list_or_empty(data.get("columns"))[:_MAX_COLUMNS]],
            "rows": [[_cell(each) for each in row] for row in rows],
            "row_count": data.get("row_count"),
        }
    return {}


def _number(value: object) -> float | None:
    return finite(float(value)) if isinstance(value, int | float) else None


def _cell(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    return finite(value) if isinstance(value, float) else str(value)[:_MAX_CELL]
