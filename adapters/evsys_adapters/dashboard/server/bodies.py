"""Bodies of requests: read within a size and a time, decompressed within a size, split into envelopes."""

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache, partial
from http import HTTPStatus
from typing import Any, Final, Protocol

import anyio.to_thread
import msgspec
from starlette.requests import ClientDisconnect, Request

from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_bus.files import DECODE_ERRORS

_GZIP_WINDOW: Final = 31
_MAX_INLINE_BYTES: Final = 64 << 10
"""Larger bodies are decompressed on a worker thread."""

_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode
_envelopes: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])


class BodyLimits(msgspec.Struct, frozen=True):
    """What the bodies of requests may take."""

    max_bytes: int = 8 << 20
    """As sent."""
    max_inflated_bytes: int = 16 << 20
    max_json_bytes: int = 8 << 20
    seconds: float = 30.0
    """From the headers to the end of the body."""
    max_bytes_under_way: int = 128 << 20
    """Of all bodies that are being received or applied; further ones are to come later."""
    max_inflated: int = 8
    """Bodies of events that are decompressed at a time; further ones wait."""


class BodyReader:
    """Reads the bodies of one server's requests, within limits that hold for all of them together."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._bytes_under_way = 0
        self._inflated: Final = asyncio.Semaphore(limits.max_inflated)

    async def read_json(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a body; an empty body is an empty object. Raises AnswerError."""
        async with self._read(request, self._limits.max_json_bytes) as body:
            try:
                return _decode_object(body) if body.strip() else {}
            except DECODE_ERRORS as error:
                raise AnswerError(
                    HTTPStatus.BAD_REQUEST, "json", f"the body is no JSON object: {error}", fix="send a JSON object"
                ) from error

    @asynccontextmanager
    async def read_envelopes(self, request: Request) -> AsyncGenerator[list[bytes]]:
        """A context manager that yields the encoded envelopes of a body, which is a msgpack array.

        The body counts as under way until the block ends. Raises AnswerError.
        """
        async with self._read(request, self._limits.max_bytes) as body, self._inflated:
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            split = partial(split_body, body, encoding, self._limits.max_inflated_bytes)
            yield split() if len(body) <= _MAX_INLINE_BYTES else await anyio.to_thread.run_sync(split)

    @asynccontextmanager
    async def _read(self, request: Request, max_bytes: int) -> AsyncGenerator[bytes]:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise _too_large(max_bytes, "")
        if self._bytes_under_way > self._limits.max_bytes_under_way:
            raise AnswerError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "busy",
                "too many large requests at once",
                fix="send it again later",
                headers={"retry-after": "1"},
            )
        body = bytearray()
        counted = 0
        try:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > max_bytes:
                            raise _too_large(max_bytes, "")
                        self._bytes_under_way += len(chunk)
                        counted += len(chunk)
            except TimeoutError as error:
                raise AnswerError(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "timeout",
                    f"the body did not arrive within {self._limits.seconds:g} s",
                    fix="send smaller bodies",
                    headers={"connection": "close"},
                ) from error
            except ClientDisconnect as error:
                raise AnswerError(
                    HTTPStatus.BAD_REQUEST, "disconnected", "the body ended early", fix="send it again"
                ) from error
            yield bytes(body)
        finally:
            self._bytes_under_way -= counted


def encodings() -> list[str]:
    """Return the content encodings that are understood here."""
    return ["identity", "gzip", *(["zstd"] if _zstd() is not None else [])]


def split_body(body: bytes, encoding: str, max_bytes: int) -> list[bytes]:
    """Decompress a body and split it into its envelopes. Raises AnswerError."""
    data = inflate(body, encoding, max_bytes)
    try:
        return [bytes(each) for each in _envelopes.decode(data)]
    except DECODE_ERRORS as error:
        raise AnswerError(
            HTTPStatus.BAD_REQUEST,
            "msgpack",
            f"the body is not a msgpack array: {error}",
            fix="send an array header and envelopes as the journal has them",
        ) from error


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress a body, but not beyond a size: a few kilobytes can become gigabytes. Raises AnswerError."""
    if encoding in {"identity", ""}:
        data, rest = body, False
    else:
        decompressor = _decompressor(encoding)
        try:
            data = decompressor.decompress(body, max_bytes + 1)
        except (zlib.error, *_zstd_errors()) as error:
            raise AnswerError(
                HTTPStatus.BAD_REQUEST, "encoding", f"the body is not {encoding}: {error}", fix="send it again"
            ) from error
        rest = not decompressor.eof
    if len(data) > max_bytes:
        raise _too_large(max_bytes, " decompressed")
    if rest:
        raise AnswerError(HTTPStatus.BAD_REQUEST, "encoding", "the compressed body is incomplete", fix="send it again")
    return data


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _decompressor(encoding: str) -> _Decompressor:
    zstd = _zstd()
    if encoding in {"gzip", "x-gzip"}:
        return zlib.decompressobj(_GZIP_WINDOW)
    if encoding == "zstd" and zstd is not None:
        return zstd.ZstdDecompressor()
    raise AnswerError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "encoding",
        "the content encoding is not understood here",
        fix=f"send one of: {', '.join(encodings())}",
    )


@cache
def _zstd() -> Any:
    """Return Python's zstd module, which 3.14 has."""
    # Once: without the module, the search for it takes longer than to decompress a small body.
    try:
        from compression import zstd  # type: ignore[import-not-found] # not in the oldest supported version
    except ImportError:
        return None
    return zstd  # pyright: ignore[reportUnknownVariableType] # as above


def _zstd_errors() -> tuple[type[Exception], ...]:
    zstd = _zstd()
    return () if zstd is None else (zstd.ZstdError,)


def _too_large(max_bytes: int, state: str) -> AnswerError:
    return AnswerError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too_large",
        f"the body has more than {max_bytes} bytes{state}",
        fix="send fewer events in a request",
        extra={"limit": max_bytes},
    )
