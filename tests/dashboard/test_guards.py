"""Who may call the dashboard, and what a connection may take: over raw sockets, with short limits."""

import asyncio
import gzip
import json
import random
import socket
import sqlite3
import time

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.bodies import BodyLimits
from evsys_adapters.dashboard.server.guards import GuessLimit
from evsys_adapters.dashboard.server.ingest import Ingester
from evsys_adapters.dashboard.server.protocol import ConnectionLimits
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.store import Store
from support.running_dashboard import TOKEN, Trainer, body_of, running_dashboard
from support.waiting import wait_until

SHORT = ConnectionLimits(
    head_seconds=0.4, max_head_bytes=4096, body_seconds=0.6, write_seconds=0.4, close_seconds=0.3, max_idle=8
)
BODIES = BodyLimits(max_bytes=100_000, max_inflated_bytes=200_000, max_json_bytes=50_000, seconds=0.5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    limits = ConnectionLimits(max_head_bytes=4096)
    folder = tmp_path_factory.mktemp("guards")
    with running_dashboard(folder, limits=limits, settings={"bodies": BODIES}) as dashboard:
        yield dashboard


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """With short deadlines, which a request may miss on a busy machine."""
    folder = tmp_path_factory.mktemp("strict")
    with running_dashboard(folder, limits=SHORT, settings={"bodies": BODIES}) as dashboard:
        yield dashboard


def exchange(dashboard, data, timeout=5.0):
    """Send bytes; return all that comes until the server closes, and after how many seconds."""
    start = time.monotonic()
    with dashboard.raw() as raw:
        raw.settimeout(timeout)
        raw.sendall(data)
        received = b""
        while True:
            try:
                part = raw.recv(65536)
            except ConnectionResetError:
                break
            if not part:
                break
            received += part
    return received, time.monotonic() - start


def head(dashboard, path="/health", method="GET", host=None, **headers):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{dashboard.port}'}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


# Tokens.


@pytest.mark.parametrize(
    "path",
    ["/api/home", "/api/experiments/x", "/api/live?topics=[]", "/api/openapi.json", "/api/none", "/api/import/x"],
)
def test_every_route_of_the_api_needs_the_token(shared, path):
    answer = shared.request("GET", path, token=None)
    assert (answer.status, answer.code) == (401, "token")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "dash --status" in answer.json["error"]["fix"]
    assert shared.request("GET", path, token=None, Authorization=f"Basic {TOKEN}").status == 401
    assert shared.request("GET", path, token=None, Authorization="Bearer ").status == 401


@pytest.mark.parametrize("path", ["/api/ingest?stream=s", "/api/import", "/api/charts", "/api/dashboard/api/sdk/data/"])
def test_a_body_without_the_token_is_not_read(shared, path):
    received, seconds = exchange(
        shared,
        head(shared, path, "POST", Content_Length=1_000_000, Connection="close"),  # and nothing of it
    )
    assert received.startswith(b"HTTP/1.1 401")
    assert seconds < 5.0


def test_health_and_the_page_need_no_token_and_show_no_content(shared):
    health = shared.request("GET", "/health", token=None)
    assert health.status == 200
    assert set(health.json) == {"service", "protocol", "version", "store", "encodings"}
    assert shared.request("GET", "/", token=None).status == 503


@pytest.mark.parametrize("token", [TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), "é", "x" * 3000])
def test_a_token_that_differs_is_refused(shared, token):
    assert shared.request("GET", "/api/home", token=None, Authorization=f"Bearer {token}".encode()).status in {401, 429}


def test_guessing_is_limited_while_the_right_token_always_passes(tmp_path):
    with running_dashboard(tmp_path) as dashboard:
        statuses = [dashboard.request("GET", "/api/home", token=f"guess-{n}").status for n in range(30)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert dashboard.request("GET", "/api/home", token="guess").headers["retry-after"] == "60"
        assert all(dashboard.request("GET", "/api/home").status == 200 for _ in range(30))
        assert dashboard.request("GET", "/api/home", token=None).status == 401


def test_the_count_of_guesses_begins_anew_each_minute_and_does_not_grow():
    now = 0.0
    limit = GuessLimit(2, 60.0, clock=lambda: now)
    assert [limit.count("a") for _ in range(4)] == [False, False, True, True]
    assert not limit.count("b")
    now = 61.0
    assert not limit.count("a")
    for n in range(5_000):
        limit.count(str(n))
    assert not limit.count("a")


# Other origins and names.


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "", "[::2]"])
def test_a_host_that_is_not_this_server_is_refused(shared, host):
    received, _ = exchange(shared, head(shared, host=host or " ", Connection="close"))
    assert received.startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9999", "[::1]:8420", "[::1]"])
def test_loopback_is_reached_by_any_of_its_names_and_ports(shared, host):
    received, _ = exchange(shared, head(shared, host=host, Connection="close"))
    assert received.startswith(b"HTTP/1.1 200")


def test_two_hosts_or_none_are_refused(shared):
    two = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{shared.port}\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert exchange(shared, two.encode())[0].startswith((b"HTTP/1.1 421", b"HTTP/1.1 400"))
    assert exchange(shared, b"GET /health HTTP/1.0\r\n\r\n")[0].startswith(b"HTTP/1.1 421")


def test_another_name_can_be_allowed(tmp_path):
    with running_dashboard(tmp_path, settings={"allowed_hosts": ("Proxy.example",)}) as dashboard:
        received, _ = exchange(dashboard, head(dashboard, host="proxy.example", Connection="close"))
        assert received.startswith(b"HTTP/1.1 200")
        assert dashboard.request("GET", "/api/home", Origin="https://proxy.example").status == 200
        assert dashboard.request("GET", "/api/home", Origin="https://other.example").status == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost", "http://[", "file://", ""])
@pytest.mark.parametrize(("method", "path"), [("POST", "/api/ingest?stream=s"), ("OPTIONS", "/api/home"), ("GET", "/")])
def test_a_page_of_another_server_may_not_call_it(shared, origin, method, path):
    answer = shared.request(method, path, Origin=origin)
    assert (answer.status, answer.code) == (403, "origin")
    assert "access-control-allow-origin" not in answer.headers


def test_its_own_page_may(shared):
    assert shared.request("GET", "/api/home", Origin=f"http://127.0.0.1:{shared.port}").status == 200


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (401, {"subprotocols": ["evsys"]}),
        (401, {"subprotocols": ["evsys", "token.wrong"]}),
        (403, {"subprotocols": ["evsys", f"token.{TOKEN}"], "origin": "http://evil.example"}),
        (403, {"subprotocols": ["evsys", f"token.{TOKEN}"], "origin": "null"}),
        (421, {"subprotocols": ["evsys", f"token.{TOKEN}"], "additional_headers": {"Host": "evil.example"}}),
    ],
)
def test_a_handshake_is_checked_as_a_request_is(shared, status, options):
    with pytest.raises(InvalidStatus) as refused, connect(f"ws://127.0.0.1:{shared.port}/api/live", **options):
        pass
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body)["error"]["message"]


def test_a_handshake_with_the_token_in_a_header_or_a_subprotocol_is_accepted(shared):
    with shared.live(origin=f"http://127.0.0.1:{shared.port}") as live:
        assert live.subprotocol == "evsys"
    url = f"ws://127.0.0.1:{shared.port}/api/live"
    with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as live:
        assert live.subprotocol is None


def test_open_loopback_accepts_any_token_on_the_hosted_routes_only(tmp_path, shared):
    gateway = "/api/dashboard/api/sdk/data/"
    assert shared.request("POST", gateway, '{"op": "x"}', token="any").status in {401, 429}
    with running_dashboard(tmp_path, settings={"open_loopback": True}) as dashboard:
        assert dashboard.request("POST", gateway, '{"op": "x"}', token="any").code == "hosted"
        assert dashboard.request("POST", gateway, '{"op": "x"}', token=None).status == 401
        assert dashboard.request("GET", "/api/home", token="any").status == 401
        assert dashboard.request("POST", gateway, "{}", token="any", Origin="http://evil.example").status == 403
        forwarded = dashboard.request("GET", "/api/home", token="any", X_Forwarded_For="127.0.0.1")
        assert forwarded.status == 401


def test_every_response_has_the_security_headers(shared):
    requests = [("/", None), ("/health", None), ("/api/home", TOKEN), ("/api/home", None), ("/api/none", TOKEN)]
    for path, token in requests:
        headers = shared.request("GET", path, token=token).headers
        policy = headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
        assert (headers.get("cache-control") == "no-store") == path.startswith("/api/")


# Connections.


def test_headers_that_do_not_end_are_cut(strict):
    received, seconds = exchange(strict, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
    assert received.startswith(b"HTTP/1.1 408")
    assert 0.3 < seconds < 2.0


def test_headers_that_trickle_are_cut_all_the_same(strict):
    start = time.monotonic()
    with strict.raw() as raw, pytest.raises(OSError):  # noqa: PT011 # broken pipe or reset
        for byte in b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 100:
            raw.sendall(bytes([byte]))
            time.sleep(0.02)
    assert time.monotonic() - start < 3.0


def test_a_connection_that_sends_nothing_is_closed(strict):
    received, seconds = exchange(strict, b"")
    assert received == b""
    assert seconds < 2.0


def test_empty_lines_before_a_request_do_not_keep_it_open(strict):
    with strict.raw() as raw, pytest.raises(OSError):  # noqa: PT011 # as above
        for _ in range(200):
            raw.sendall(b"\r\n")
            time.sleep(0.02)


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("ends", [True, False])
def test_headers_that_are_too_large_are_refused(shared, pieces, ends):
    data = head(shared, **{f"X-{n}": "y" * 500 for n in range(20)})
    data = data if ends else data[:-4]
    with shared.raw() as raw:
        raw.settimeout(5)
        try:
            for n in range(pieces):
                raw.sendall(data[n * len(data) // pieces : (n + 1) * len(data) // pieces])
        except OSError:
            pass
        received = raw.recv(4096)
    assert received.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in received or b"more than 4096 bytes" in received


def test_a_url_that_is_too_long_is_refused(shared):
    received, _ = exchange(shared, head(shared, "/" + "x" * 10_000))
    assert received.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_the_server_lives(shared, data):
    received, _ = exchange(shared, data)
    assert received == b"" or received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 4"))
    assert shared.get("/health")


def test_a_body_that_does_not_end_is_cut(strict):
    request = head(strict, "/api/ingest?stream=s", "POST", Content_Length=1000, Authorization=f"Bearer {TOKEN}")
    received, seconds = exchange(strict, request + b"x" * 10)
    assert received.startswith(b"HTTP/1.1 408")
    assert seconds < 3.0


def test_a_body_that_is_refused_early_does_not_keep_the_connection(strict):
    with strict.raw() as raw:
        raw.sendall(head(strict, "/api/home", "POST", Content_Length=10_000_000))
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")
        with pytest.raises(OSError):  # noqa: PT011 # as above
            for _ in range(500):
                raw.sendall(b"x")
                time.sleep(0.02)


def test_of_too_many_idle_connections_the_oldest_goes(tmp_path):
    limits = ConnectionLimits(head_seconds=60.0, max_idle=8)
    with running_dashboard(tmp_path, limits=limits) as dashboard, dashboard.raw() as oldest:
        wait_until(lambda: dashboard.server.open_connections == 1)
        opened = [dashboard.raw() for _ in range(8)]
        assert oldest.recv(1) == b""
        assert dashboard.get("/health")
        for each in opened:
            each.close()


def test_strangers_whose_bodies_never_end_keep_nobody_out(tmp_path):
    limits = ConnectionLimits(body_seconds=60.0, max_idle=8)
    with running_dashboard(tmp_path, limits=limits) as dashboard:
        strangers = [dashboard.raw() for _ in range(40)]
        for each in strangers:
            each.sendall(head(dashboard, "/api/ingest?stream=s", "POST", Content_Length=1_000_000) + b"x")
        assert dashboard.get("/health")
        wait_until(lambda: dashboard.server.open_connections <= limits.max_idle + 1)
        for each in strangers:
            each.close()


def test_five_hundred_idle_sockets_keep_nobody_out(tmp_path):
    limits = ConnectionLimits(head_seconds=60.0)
    with running_dashboard(tmp_path, limits=limits) as dashboard:
        idle = [dashboard.raw() for _ in range(500)]
        half = [dashboard.raw() for _ in range(100)]
        for each in half:
            each.sendall(b"GET /health HTTP/1.1\r\n")
        assert all(dashboard.get("/health") for _ in range(20))
        wait_until(lambda: dashboard.server.open_connections <= limits.max_idle + 1)
        for each in idle + half:
            each.close()


def test_a_client_that_does_not_read_its_response_is_cut(tmp_path):
    assets = tmp_path / "_web" / "assets"
    assets.mkdir(parents=True)
    (assets / "big-1.bin").write_bytes(bytes(20 << 20))
    with running_dashboard(tmp_path, limits=SHORT) as dashboard, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", dashboard.port))
        stuck.sendall(head(dashboard, "/assets/big-1.bin"))
        assert stuck.recv(8) == b"HTTP/1.1"
        wait_until(lambda: dashboard.server.open_connections == 0)


def test_requests_one_after_another_share_a_connection_also_when_sent_at_once(shared):
    one = head(shared)
    received, _ = exchange(shared, one * 5 + head(shared, Connection="close"))
    assert received.count(b"HTTP/1.1 200") == 6


# Bodies.


@pytest.mark.parametrize("declares", [True, False])
def test_a_body_that_is_too_large_is_a_413_with_the_limit(shared, declares):
    body = bytes(150_000)
    request = {"Authorization": f"Bearer {TOKEN}", "Connection": "close"}
    if declares:
        data = head(shared, "/api/ingest?stream=s", "POST", Content_Length=len(body), **request) + body
    else:
        data = head(shared, "/api/ingest?stream=s", "POST", Transfer_Encoding="chunked", **request)
        data += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    received, _ = exchange(shared, data)
    assert received.startswith(b"HTTP/1.1 413")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["limit"] == 100_000


@pytest.mark.parametrize("size", [200_001, 20_000_000])
def test_a_body_that_becomes_too_large_is_a_413(shared, size):
    answer = shared.ingest("s", 0, [], body=bytes(size))
    assert (answer.status, answer.json["limit"]) == (413, 200_000)


def test_a_bomb_inside_a_bomb_takes_no_memory(shared):
    bomb = gzip.compress(gzip.compress(bytes(10_000_000)))
    answer = shared.request("POST", "/api/ingest?stream=s", bomb, Content_Encoding="gzip")
    assert answer.status == 400


def test_a_body_just_within_the_limits_passes(shared):
    trainer = Trainer(root="/runs/within")
    payloads = trainer.start() + trainer.steps(500, text="y" * 100)
    assert 100_000 < len(body_of(payloads)) < 200_000
    assert trainer.send(shared, payloads)["events"] == 502


@pytest.mark.parametrize("path", ["/api/charts", "/api/import", "/api/dashboard/api/sdk/data/"])
@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"1", b'{"a": ' * 8_000, b"[" * 40_000, b"\xff\xfe", b'"' + b"x" * 10_000],
    ids=lambda b: str(b[:6]),
)
def test_json_that_is_none_is_a_400(shared, path, body):
    assert shared.request("POST", path, body).status == 400


@pytest.mark.parametrize("path", ["/api/charts", "/api/import", "/api/dashboard/api/sdk/data/"])
def test_json_that_is_too_large_is_a_413(shared, path):
    assert shared.request("POST", path, b" " * 60_000).status == 413


def test_names_and_texts_that_are_markup_come_back_as_text(shared):
    evil = "<script>alert(1)</script>\"'&\u202e\x00\ud800".encode("utf-8", "replace").decode()
    trainer = Trainer("a-s0", root=f"/runs/{evil.replace('/', '_')}")
    trainer.stream = "r0-evil"
    trainer.send(shared, trainer.start() + trainer.steps(1, **{evil: 1.0}))
    answer = shared.request("GET", "/api/home")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert any("script" in row["name"] for row in answer.json["experiments"])


# The database.


def test_a_locked_database_is_a_503_and_works_again_without_a_restart(tmp_path):
    trainer = Trainer(root="/runs/locked")
    with running_dashboard(tmp_path) as dashboard:
        trainer.send(dashboard, trainer.start() + trainer.steps(3))
        payloads = trainer.steps(2)
        other = sqlite3.connect(tmp_path / "dashboard.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = dashboard.ingest(trainer.stream, 5, payloads)
        assert (answer.status, answer.code) == (503, "store")
        assert int(answer.headers["retry-after"]) >= 1
        assert "locked" in answer.json["error"]["message"]
        other.execute("ROLLBACK")
        other.close()
        wait_until(lambda: dashboard.ingest(trainer.stream, 5, payloads).status == 200)
        answer = trainer.send(dashboard, trainer.steps(1))
        assert (answer["sequence"], answer["events"], answer["points"]) == (8, 1, 1)


def test_a_damaged_database_is_a_503_with_the_fix_and_the_process_lives(tmp_path):
    trainer = Trainer(root="/runs/damaged")
    with running_dashboard(tmp_path) as dashboard:
        trainer.send(dashboard, trainer.start())
        for _ in range(4):
            trainer.send(dashboard, trainer.steps(4_000, loss=lambda _: random.random()))
        (id_,) = [row["id"] for row in dashboard.get("/api/home")["experiments"]]
    path = tmp_path / "dashboard.sqlite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    path.write_bytes(data)
    with running_dashboard(tmp_path) as dashboard:
        query = {
            "experiment": id_,
            "charts": [{"metric": "train/loss", "from": n, "to": n + 100} for n in range(0, 16_000, 250)],
        }
        answer = dashboard.post("/api/charts", query)
        assert (answer.status, answer.code) == (503, "store")
        assert "import" in answer.json["error"]["fix"]
        assert dashboard.request("GET", "/", token=None).status == 503
        assert dashboard.request("GET", "/api/openapi.json").status == 200


async def test_a_full_disk_is_a_503_and_nothing_acknowledged_is_lost(tmp_path):
    limits = [60]

    def open_store(path):
        store = Store.open(path)
        if limits:
            store.database.execute(f"PRAGMA max_page_count = {limits.pop()}")
        return store

    thread = StoreThread(tmp_path / "dashboard.sqlite", open_store)
    thread.open()
    try:
        ingester = Ingester(thread, lambda _: None)
        trainer = Trainer(root="/runs/full")
        await ingester.ingest(trainer.stream, 0, trainer.start())
        stored = 2
        with pytest.raises(AnswerError) as refused:
            while True:
                payloads = trainer.steps(2_000, loss=lambda _: random.random())
                stored = (await ingester.ingest(trainer.stream, stored, payloads)).sequence
        assert (refused.value.status, refused.value.code) == (503, "store")
        assert "space" in refused.value.fix
        with pytest.raises(AnswerError):
            await ingester.ingest(trainer.stream, stored, payloads)
        await asyncio.sleep(1.1)  # a store that failed is opened again after a second
        totals = await ingester.ingest(trainer.stream, stored, payloads)
        assert totals.sequence == trainer.sequence
        assert 0 < totals.events <= 2_000  # slices of the refused body may be stored already
        again = await ingester.ingest(trainer.stream, stored, payloads)
        assert again[:3] == (trainer.sequence, 0, 0)
    finally:
        thread.close()
