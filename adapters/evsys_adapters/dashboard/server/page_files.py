"""The page's files: built into the package, read once, compressed once."""

import gzip
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from evsys_adapters.dashboard.server.answers import AnswerError

_ASSET_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "map": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "woff2": "font/woff2",
}
_MIN_COMPRESSED_BYTES: Final = 1024
_MAX_FILES: Final = 64


class PageFiles:
    """The routes of the page.

    Args:
        folder: Has ``index.html`` and ``assets/``, whose names change with their content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder: Final = folder

    async def index(self, request: Request) -> Response:
        """Return the page for any of its own URLs; it shows what the URL names."""
        try:
            response = _file_response(self._folder / "index.html", request)
        except FileNotFoundError:
            return PlainTextResponse(self._not_built(), 503)
        response.headers["cache-control"] = "no-cache"
        return response

    async def asset(self, request: Request) -> Response:
        """Return a script, a style sheet or an image."""
        name: str = request.path_params["name"]
        unknown = AnswerError(404, "asset", "no such file", fix="load the page again")
        if _ASSET_NAME.fullmatch(name) is None:
            raise unknown
        try:
            response = _file_response(self._folder / "assets" / name, request)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise unknown from error
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response

    def _not_built(self) -> str:
        try:
            reason = (self._folder / "not-built.txt").read_text("utf-8", errors="replace").strip()
        except OSError:
            reason = "fix: uv sync --reinstall-package evsys-bus"
        return f"The dashboard runs and receives events, but its page was not built.\n\n{reason}\n"


def _file_response(path: Path, request: Request) -> Response:
    status = path.stat()
    plain, packed = _load(path, status.st_mtime_ns, status.st_size)
    headers = {"vary": "accept-encoding"}
    if packed and "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        plain = packed
    kind = _TYPES.get(path.suffix.removeprefix("."), "application/octet-stream")
    response = Response(plain, headers=headers)
    response.headers["content-type"] = kind
    return response


@lru_cache(_MAX_FILES)
def _load(path: Path, _modified: int, _size: int) -> tuple[bytes, bytes]:
    """Return a file as it is and compressed; empty if that does not help."""
    data = path.read_bytes()
    packed = gzip.compress(data, 9, mtime=0) if len(data) >= _MIN_COMPRESSED_BYTES else b""
    return data, packed if len(packed) < len(data) else b""
