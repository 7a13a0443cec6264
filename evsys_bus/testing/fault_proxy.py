"""`fault_proxy`: a TCP proxy in front of a real server, which breaks connections on demand."""

import math
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import anyio
import msgspec
from anyio.abc import SocketAttribute, SocketStream, TaskGroup

_CHUNK: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with a timeout of 0: closing sends a reset and discards unsent data."""


class Fault(msgspec.Struct, frozen=True):
    """How connections are broken; not at all by default."""

    refuse: bool = False
    """Refuse new connections."""
    silent: bool = False
    """A black hole: data that arrives is discarded, and nothing ever comes back."""
    answer: bytes | None = None
    """The response to every request instead of the server's, after which the connection is closed. See
    `unavailable`."""
    reset_request_at: int | None = None
    """Reset once this many bytes of a connection have gone to the server."""
    reset_reply_at: int | None = None
    """Reset once this many bytes of a connection have come back; 0 loses the reply to what the server has done."""
    delay_seconds: float = 0.0
    """Delay of each chunk of at most 64 KiB."""
    bytes_per_second: float = math.inf
    """In each direction of a connection."""


def unavailable(status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE, *, retry_after: int | None = None) -> Fault:
    """Return a fault that answers every HTTP request with this status and an empty body."""
    wait = "" if retry_after is None else f"Retry-After: {retry_after}\r\n"
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{wait}Content-Length: 0\r\nConnection: close\r\n\r\n"
    return Fault(answer=head.encode())


class FaultProxy:
    """The running proxy; created by `fault_proxy`."""

    def __init__(self, host: str, port: int, group: TaskGroup) -> None:
        self._server = (host, port)
        self._group = group
        self._listen_scope: anyio.CancelScope | None = None
        self._stopped_listening = anyio.Event()
        self.port = 0
        """Where it listens, on 127.0.0.1."""
        self.fault = Fault()
        self.connections = 0
        """How many were accepted."""
        self.sent = 0
        """Bytes that went to the server."""
        self.received = 0
        """Bytes that came back and were passed on."""

    async def apply(self, fault: Fault) -> None:
        """Break connections in this way from now on, including open ones."""
        self.fault = fault
        if fault.refuse and self._listen_scope is not None:
            self._listen_scope.cancel()
            self._listen_scope = None
            await self._stopped_listening.wait()
        elif not fault.refuse and self._listen_scope is None:
            self._listen_scope = await self._group.start(self._listen)

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[anyio.CancelScope]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self.port, reuse_port=False)
        self._stopped_listening = anyio.Event()
        self.port = listener.extra(SocketAttribute.local_port)  # noqa: S610  # anyio's
        async with listener:
            with anyio.CancelScope() as scope:
                task_status.started(scope)
                await listener.serve(self._serve, self._group)
        self._stopped_listening.set()

    async def _serve(self, client: SocketStream) -> None:
        self.connections += 1
        async with client:
            if self.fault.answer is not None or self.fault.silent:
                await self._answer(client)
                return
            try:
                server = await anyio.connect_tcp(*self._server)
            except OSError:
                _reset(client)
                return
            async with server, anyio.create_task_group() as directions:
                directions.start_soon(self._forward, client, server, True, directions.cancel_scope)
                directions.start_soon(self._forward, server, client, False, directions.cancel_scope)

    async def _answer(self, client: SocketStream) -> None:
        try:
            while True:  # answering before the request was read completely would cause a reset
                await client.receive(_CHUNK)
                if self.fault.answer is not None:
                    await client.send(self.fault.answer)
                    await client.send_eof()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            if self.fault.silent:  # do not even close
                await anyio.sleep_forever()

    async def _forward(
        self, source: SocketStream, target: SocketStream, to_server: bool, connection_scope: anyio.CancelScope
    ) -> None:
        """Forward one direction. A half-closed direction leaves the other one open; a broken one ends both."""
        forwarded = 0
        try:
            while True:
                chunk = await source.receive(_CHUNK)
                fault = self.fault
                await anyio.sleep(fault.delay_seconds + len(chunk) / fault.bytes_per_second)
                if fault.silent:
                    continue
                end = fault.reset_request_at if to_server else fault.reset_reply_at
                chunk = chunk if end is None else chunk[: max(end - forwarded, 0)]
                if chunk:
                    await target.send(chunk)
                forwarded += len(chunk)
                self.sent += len(chunk) if to_server else 0
                self.received += 0 if to_server else len(chunk)
                if end is not None and forwarded >= end:
                    _reset(source)
                    _reset(target)
                    break
        except anyio.EndOfStream:
            try:
                if not self.fault.silent:
                    await target.send_eof()
            except (OSError, RuntimeError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # it closed first; uvloop raises RuntimeError
            return
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            _reset(source)
            _reset(target)
        connection_scope.cancel()


def _reset(stream: SocketStream) -> None:
    try:
        raw = stream.extra(SocketAttribute.raw_socket)  # noqa: S610  # anyio's
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except (OSError, AttributeError):
        pass  # already closed; uvloop then has no socket


@asynccontextmanager
async def fault_proxy(host: str, port: int) -> AsyncGenerator[FaultProxy, None]:
    r"""Run a proxy in front of the server at ``host`` (a numeric address) and ``port``; initially without faults.

    Connections that are open at the end are closed.

    Example:
        >>> async def main() -> int:
        ...     async with fault_proxy("127.0.0.1", 9) as proxy:
        ...         await proxy.apply(unavailable(retry_after=3))
        ...         async with await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
        ...             await client.send(b"GET / HTTP/1.1\r\n\r\n")
        ...             print((await client.receive()).splitlines()[0].decode())
        ...         return proxy.connections
        >>> anyio.run(main)
        HTTP/1.1 503 Service Unavailable
        1
    """
    async with anyio.create_task_group() as group:
        proxy = FaultProxy(host, port, group)
        await proxy.apply(Fault())
        try:
            yield proxy
        finally:
            group.cancel_scope.cancel()
