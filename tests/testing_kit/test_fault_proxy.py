"""The proxy that breaks connections, in front of a real server that echoes."""

import errno
import time
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute

from evsys_bus.testing import Fault, fault_proxy, unavailable
from support.waiting import wait_until_async


@asynccontextmanager
async def echo():
    """A server that sends back what it gets, and says how much that was in a list."""
    got = bytearray()

    async def serve(client):
        async with client:
            try:
                async for piece in client:
                    got.extend(piece)
                    await client.send(piece)
            except anyio.BrokenResourceError:
                pass

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        async with fault_proxy("127.0.0.1", listener.extra(SocketAttribute.local_port)) as proxy:
            yield proxy, got
        group.cancel_scope.cancel()


async def ask(proxy, data=b"hello", bound=5.0):
    """Send it, say that it was all, and return what comes back."""
    with anyio.fail_after(bound):
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
            await client.send(data)
            await client.send_eof()
            return b"".join([piece async for piece in client])


async def test_without_a_fault_everything_goes_through_and_is_counted():
    async with echo() as (proxy, got):
        large = b"0123456789" * 100_000
        assert await ask(proxy, large) == large
        assert (proxy.connections, proxy.sent, proxy.received) == (1, len(large), len(large))
        assert bytes(got) == large


async def test_a_canned_answer_comes_from_the_proxy_and_the_server_hears_nothing():
    async with echo() as (proxy, got):
        await proxy.apply(unavailable(retry_after=7))
        said = await ask(proxy, b"GET / HTTP/1.1\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\n")
        await proxy.apply(Fault())
        assert await ask(proxy) == b"hello"
        assert bytes(got) == b"hello"


@pytest.mark.parametrize("at", [0, 3, 70_000])
async def test_a_request_is_reset_at_the_byte(at):
    async with echo() as (proxy, got):
        await proxy.apply(Fault(reset_request_at=at))
        with pytest.raises((anyio.BrokenResourceError, OSError)) as caught:
            await ask(proxy, b"x" * 200_000)
        assert errno.ECONNRESET in {getattr(each, "errno", None) for each in (caught.value, caught.value.__cause__)}
        assert proxy.sent == at
        await proxy.apply(Fault())
        assert await ask(proxy) == b"hello"
        assert len(got) <= at + 5


async def test_a_reply_is_lost_after_the_server_has_the_request():
    async with echo() as (proxy, got):
        await proxy.apply(Fault(reset_reply_at=2))
        seen = b""
        with pytest.raises((anyio.BrokenResourceError, OSError)):
            seen = await ask(proxy)
        assert bytes(got) == b"hello"
        assert proxy.received == 2
        assert seen == b""


async def test_nobody_listens_and_then_somebody_does_at_the_same_port():
    async with echo() as (proxy, _):
        port = proxy.port
        await proxy.apply(Fault(refuse=True))
        with pytest.raises(OSError, match="All connection attempts failed") as caught:
            await ask(proxy)
        assert "ConnectionRefusedError" in repr(caught.value.__cause__)
        await proxy.apply(Fault())
        assert proxy.port == port
        assert await ask(proxy) == b"hello"


async def test_a_black_hole_swallows_and_says_nothing_also_on_open_connections():
    async with echo() as (proxy, got):
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
            await client.send(b"a")
            assert await client.receive() == b"a"
            await proxy.apply(Fault(silent=True))
            await client.send(b"b")
            with anyio.move_on_after(0.1) as waited:
                await client.receive()
            assert waited.cancelled_caught
        with pytest.raises(TimeoutError):
            await ask(proxy, bound=0.1)
        assert bytes(got) == b"a"


async def test_delay_and_rate_hold_things_up():
    async with echo() as (proxy, _):
        for fault, at_least in ((Fault(delay_seconds=0.1), 0.19), (Fault(bytes_per_second=100), 0.19)):
            await proxy.apply(fault)
            began = time.monotonic()
            assert await ask(proxy, b"0123456789") == b"0123456789"
            assert at_least <= time.monotonic() - began < 2


async def test_the_end_cuts_what_is_open_and_frees_the_port():
    async with echo() as (proxy, _):
        client = await anyio.connect_tcp("127.0.0.1", proxy.port)
        await client.send(b"a")
        await wait_until_async(lambda: proxy.received == 1)
    with anyio.fail_after(5), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
        while True:
            await client.receive()
    await client.aclose()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=proxy.port)
    await listener.aclose()


async def test_a_server_that_is_away_is_a_reset():
    async with fault_proxy("127.0.0.1", 9) as proxy:
        with pytest.raises((anyio.BrokenResourceError, OSError)):
            await ask(proxy)
