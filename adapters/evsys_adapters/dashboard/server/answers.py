"""Responses: JSON, and errors that all have the same form."""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Final

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response

_GZIP_WINDOW: Final = 31
_MIN_COMPRESSED_BYTES: Final = 1024


class AnswerError(Exception):
    """Raised by a route to respond with an error.

    Attributes:
        status: The HTTP status.
        code: A short word for programs.
        fix: What to do about it.
        extra: More fields of the response, beside ``error``.
        headers: Headers of the response, such as ``retry-after``.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fix: str,
        extra: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.fix = fix
        self.extra = extra or {}
        self.headers = headers or {}

    def response(self) -> Response:
        """Return the response to send."""
        body = error_body(self.code, self.message, self.fix, self.extra)
        return Response(body, self.status, self.headers, "application/json")


def error_body(code: str, message: str, fix: str, extra: Mapping[str, object] | None = None) -> bytes:
    """Encode an error: ``{"error": {"code", "message", "fix"}}``, and ``extra`` beside it."""
    return msgspec.json.encode({"error": {"code": code, "message": message, "fix": fix}, **(extra or {})})


async def compressed_response(request: Request, body: bytes, media_type: str) -> Response:
    """Return a response with a body that is compressed if it is not small and the client takes that."""
    headers = {"vary": "accept-encoding"}
    if len(body) >= _MIN_COMPRESSED_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
        body = await anyio.to_thread.run_sync(partial(zlib.compress, body, 1, wbits=_GZIP_WINDOW))
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers, media_type=media_type)


def json_response(value: object, status: int = 200) -> Response:
    """Return a response with a value as JSON; numbers that are not finite become null."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
