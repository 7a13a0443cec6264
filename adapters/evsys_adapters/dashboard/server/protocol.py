"""The connections of the server: deadlines and bounds that uvicorn does not have.

Uvicorn waits without end for the rest of a request's head or body and for a client that does not read its response,
and accepts headers of any size. Here each of these has a deadline or a bound, and of too many idle connections the one
that has been idle longest is closed.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import ClassVar, Final

import msgspec
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

_HEADER_SEPARATORS: Final = len(": \r\n")


class ConnectionLimits(msgspec.Struct, frozen=True):
    """What a connection may take."""

    head_seconds: float = 10.0
    """From the first byte of a request, or from connecting, to the end of its headers."""
    max_head_bytes: int = 32 << 10
    body_seconds: float = 30.0
    """From the end of the headers to the end of the body."""
    write_seconds: float = 10.0
    """How long a client may not read while more than 64 KiB wait for it."""
    close_seconds: float = 5.0
    """How long a connection that is closed waits for its client to read the rest."""
    keep_alive_seconds: int = 75
    max_idle: int = 512
    """Connections without a request to respond to. One more closes the one that has been idle longest."""


class _Timer:
    """At most one pending call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[[], object]) -> None:
        self.cancel()
        self._handle = self._loop.call_later(seconds, call)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class BoundedWriting(asyncio.Protocol):
    """Cuts the connection of a client that does not read."""

    limits: ClassVar[ConnectionLimits]
    transport: asyncio.Transport
    _write_timer: _Timer

    def pause_writing(self) -> None:
        """Start the deadline of a client that does not read."""
        super().pause_writing()
        self._write_timer.start(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop it."""
        self._write_timer.cancel()
        super().resume_writing()


class BoundedHttpProtocol(BoundedWriting, HttpToolsProtocol):
    """HTTP/1.1 with deadlines. `http_protocol` makes the class for one server."""

    idle: ClassVar[dict["BoundedHttpProtocol", None]]
    """Connections without a request to respond to, in the order in which they became idle."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start the deadline of the first head, and make room where too many are idle."""
        super().connection_made(transport)
        self._request_timer = _Timer(self.loop)
        self._write_timer = _Timer(self.loop)
        self._between_requests = True
        self._head_complete = False
        self._head_bytes = 0
        self._field_bytes = 0
        self._refused = False
        self._request_timer.start(self.limits.head_seconds, self.close)
        self._set_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadlines."""
        self._release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that is too large."""
        if self._refused:
            return
        starts_here = self._between_requests
        if starts_here:
            self._between_requests = False
            self._head_complete = False
            self._head_bytes = self._field_bytes = 0
            self._request_timer.start(self.limits.head_seconds, self._head_timed_out)
        super().data_received(data)
        if not self._head_complete and not self._between_requests:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head_bytes:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Start counting the next head: a client may send several requests at once."""
        self._between_requests = self._head_complete = False
        self._head_bytes = self._field_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the URL to the head."""
        self._field_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header to the head."""
        self._field_bytes += len(name) + len(value) + _HEADER_SEPARATORS
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, and the deadline of its body."""
        self._head_complete = True
        if self._field_bytes > self.limits.max_head_bytes:
            self._refuse_head()
        if self._refused:
            return
        self.idle.pop(self, None)
        # The application responds at the deadline itself; what is left then is closed here.
        self._request_timer.start(self.limits.body_seconds + 1.0, self.close)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Ignore what follows a head that was refused."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the deadline of the body."""
        if self._refused:
            return
        self._request_timer.cancel()
        self._between_requests = True
        super().on_message_complete()
        self._set_idle_if_done()

    def on_response_complete(self) -> None:
        """Count the connection among the idle ones again."""
        super().on_response_complete()
        self._set_idle_if_done()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the WebSocket protocol."""
        if self._refused:
            return
        self._release()
        super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection also where its client has not read the last response."""
        self.close()

    def _set_idle_if_done(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None until the first request, and when it was an upgrade
        # One that was refused early and still sends its body counts as idle too: anybody can send such requests.
        if cycle and cycle.response_complete and not self.transport.is_closing():
            self._set_idle()

    def _set_idle(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None
        if len(self.idle) > self.limits.max_idle:
            next(iter(self.idle)).close()

    def _release(self) -> None:
        self.idle.pop(self, None)
        self._request_timer.cancel()
        self._write_timer.cancel()

    def close(self) -> None:
        """Close the connection, at the latest when its client has not read the rest for some seconds."""
        self.idle.pop(self, None)
        self._request_timer.cancel()
        self.transport.close()
        self._write_timer.start(self.limits.close_seconds, self.transport.abort)

    def _head_timed_out(self) -> None:
        seconds = self.limits.head_seconds
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, "timeout", f"the headers did not arrive within {seconds:g} s")

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "headers_too_large",
            f"URL and headers have more than {self.limits.max_head_bytes} bytes",
        )

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Respond in place of the application, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = msgspec.json.encode({"error": {"code": code, "message": message, "fix": "send a smaller request"}})
        self.transport.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.close()


class BoundedWebSocketProtocol(BoundedWriting, WebSocketsSansIOProtocol):
    """A WebSocket that is cut where its client does not read. `websocket_protocol` makes the class for one server."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Prepare the deadlines."""
        self._write_timer = _Timer(self.loop)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop them."""
        self._write_timer.cancel()
        super().connection_lost(exc)

    async def send(self, message: ASGISendEvent) -> None:
        """Send; a handshake that was refused is complete with the response, and no error of the application."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        """Run the application; afterwards the client has a few seconds to read the rest."""
        await super().run_asgi()
        if not self.disconnected:
            self._write_timer.start(self.limits.close_seconds, self.transport.abort)


def http_protocol(limits: ConnectionLimits) -> type[BoundedHttpProtocol]:
    """Return the protocol class for one server."""
    return type("HttpProtocol", (BoundedHttpProtocol,), {"limits": limits, "idle": {}})


def websocket_protocol(limits: ConnectionLimits) -> type[BoundedWebSocketProtocol]:
    """Return the WebSocket protocol class for one server."""
    return type("WebSocketProtocol", (BoundedWebSocketProtocol,), {"limits": limits})
