"""A real S3 server on loopback: the four servers of OpenStack Swift with its S3 interface, in one separate process.

It checks secrets, permissions, digests and conditions, and its data survives a SIGKILL, so tests can check all of that.
`S3Server` controls it from a test; run as a program, this file is the server. A replacement only needs the attributes
and methods of `S3Server`.
"""

import getpass
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from string import Template

SECRET = "a-secret-of-the-tests"
LIMITED_SECRET = "another-secret-of-the-tests"

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = evsys
swift_hash_path_suffix = bus
[storage-policy:0]
name = default
default = yes
[swift-constraints]
max_header_size = 32768
"""

STORAGE_CONF = Template("""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
workers = 0
user = $user
swift_dir = $etc
devices = $nodes
mount_check = false
disable_fallocate = true
log_level = ERROR
[pipeline:main]
pipeline = $kind-server
[app:$kind-server]
use = egg:swift#$kind
""")

PROXY_CONF = Template("""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
workers = 0
user = $user
swift_dir = $etc
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo
    versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
# On a busy machine it would give up its own servers after half a second, and answer 503.
conn_timeout = 20
node_timeout = 20
recoverable_node_timeout = 20
error_suppression_limit = 1000000
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
min_segment_size = 65536
[filter:tempauth]
use = egg:swift#tempauth
user_evsys_admin = $secret .admin .reseller_admin
user_evsys_limited = $limited
[filter:cache]
paste.filter_factory = s3_server:remembering
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
[filter:symlink]
use = egg:swift#symlink
""")


class Memory:
    """Replaces memcached; without a cache the server looks up account and container at every request."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, float]] = {}

    def get(self, key, raise_on_error=False):
        value, expiry = self._values.get(key, ("null", 0.0))
        return json.loads(value) if time.monotonic() < expiry else None

    def set(self, key, value, serialize=True, time=0, min_compress_len=0, raise_on_error=False):
        self._values[key] = (json.dumps(value), _expiry(time))

    def incr(self, key, delta=1, time=0):
        count = (self.get(key) or 0) + delta
        self.set(key, count, time=time)
        return count

    def delete(self, key, server_key=None):
        self._values.pop(key, None)


def _expiry(seconds: float) -> float:
    return time.monotonic() + (seconds or float("inf"))


def remembering(global_conf, **conf):
    """Make a Paste filter that gives every request the same `Memory`."""
    memory = Memory()

    def wrap(app):
        def handle(environ, start_response):
            environ["swift.cache"] = memory
            return app(environ, start_response)

        return handle

    return wrap


class S3Server:
    """The server process; call `start` before use and `stop` after."""

    region = "us-east-1"
    key = "evsys:admin"
    secret = SECRET
    limited_key = "evsys:limited"
    """A key without permissions."""
    limited_secret = LIMITED_SECRET

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        ports = free_ports(4)
        self.port = ports["proxy"]
        (folder / "etc").mkdir(parents=True)
        (folder / "nodes" / "d1").mkdir(parents=True)
        (folder / "etc" / "ports.json").write_text(json.dumps(ports), encoding="utf-8")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, always at the same port, and wait until it responds."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "server.log").read_text(errors="replace")[-2000:])
            time.sleep(0.05)

    def kill(self) -> None:
        """End the server by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """End the server."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill()

    def grant_read(self, bucket: str) -> None:
        """Give the limited key read permission for this bucket."""
        credentials = {"X-Auth-User": self.key, "X-Auth-Key": self.secret}
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/auth/v1.0", headers=credentials)) as reply:
            url, token = reply.headers["X-Storage-Url"], reply.headers["X-Auth-Token"]
        headers = {"X-Auth-Token": token, "X-Container-Read": self.limited_key}
        urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", headers=headers, method="POST")).close()

    @asynccontextmanager
    async def behind_proxy(self):
        """Run a `InterceptingProxy` in front of this server."""
        proxy = InterceptingProxy(self)
        async with proxy.running():
            yield proxy

    def data_files(self) -> list[Path]:
        """Return the files that contain the data of objects and parts."""
        return sorted((self.folder / "nodes").glob("d1/objects/**/*.data"))

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthcheck", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False


class InterceptingProxy:
    """A proxy that sees whole requests, and may respond to them itself or change them."""

    def __init__(self, server: S3Server) -> None:
        self.requests = []
        """Method, path and headers of every request."""
        self.on_request = None
        """Called with a request and its body; returns a response, or bytes to replace the body, or None."""
        self.should_drop_reply = None
        """Called with a forwarded request; returns whether to drop the response."""
        self.endpoint = ""
        self._server = server

    @asynccontextmanager
    async def running(self):
        from aiohttp import ClientSession, web

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with ClientSession(auto_decompress=False) as self._session:
            try:
                yield
            finally:
                await runner.cleanup()

    async def _forward(self, request):
        from aiohttp import web
        from multidict import CIMultiDict
        from yarl import URL

        self.requests.append((request.method, request.path_qs, request.headers))
        body = await request.read()
        override = self.on_request and await self.on_request(request, body)
        if isinstance(override, web.Response):
            return override
        url = URL(f"{self._server.endpoint}{request.raw_path}", encoded=True)
        skipped_headers = ["User-Agent", "Accept", "Accept-Encoding", "Content-Type"]
        body = io.BytesIO(override or body)
        async with self._session.request(
            request.method, url, headers=request.headers, data=body, skip_auto_headers=skipped_headers
        ) as reply:
            headers = CIMultiDict(reply.headers)
            headers.pop("Transfer-Encoding", None)
            if request.method != "HEAD":
                headers.pop("Content-Length", None)
            body = await reply.read()
            response = web.Response(status=reply.status, headers=headers, body=body or None)
        if self.should_drop_reply and await self.should_drop_reply(request):
            request.transport.abort()
        return response

    @staticmethod
    def make_response(status: int, code: str | None = None, message: str = "", **headers: str):
        """Make a response: an S3 error with the code ``code``, or an empty one without."""
        from aiohttp import web

        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return web.Response(status=status, text=text if code else None, headers=headers)


def free_ports(count: int) -> dict[str, int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(("account", "container", "object", "proxy"), ports, strict=True))


def serve(folder: Path) -> None:
    """Run the server until a signal ends it."""
    import warnings

    warnings.simplefilter("ignore")  # eventlet warns that it is deprecated
    import eventlet

    eventlet.monkey_patch()
    os.fsync = os.fdatasync = lambda _: None  # the tests kill processes, not the machine
    from eventlet import wsgi
    from swift.common import utils
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import SwiftHttpProtocol, loadapp

    etc = folder / "etc"
    ports = json.loads((etc / "ports.json").read_text(encoding="utf-8"))
    (etc / "swift.conf").write_text(SWIFT_CONF, encoding="utf-8")
    utils.set_swift_dir(str(etc))
    settings = {"etc": etc, "nodes": folder / "nodes", "user": getpass.getuser()}
    for kind, port in ports.items():
        template = PROXY_CONF if kind == "proxy" else STORAGE_CONF
        text = template.substitute(
            settings,
            port=port,
            kind=kind,
            secret=SECRET,
            limited=LIMITED_SECRET.replace(" ", "_"),
        )
        (etc / f"{kind}-server.conf").write_text(text, encoding="utf-8")
        if kind != "proxy":
            ring = RingBuilder(4, 1, 0)
            device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1}
            ring.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": port})
            ring.rebalance()
            ring.get_ring().save(str(etc / f"{kind}.ring.gz"))
    eventlet.spawn(exit_with_parent)
    listening = {kind: eventlet.listen(("127.0.0.1", port)) for kind, port in ports.items()}
    threads = [
        eventlet.spawn(
            wsgi.server,
            listening[kind],
            loadapp(str(etc / f"{kind}-server.conf"), global_conf={}),
            protocol=SwiftHttpProtocol,
            log_output=False,
        )
        for kind in ports
    ]
    for thread in threads:
        thread.wait()


def exit_with_parent() -> None:
    """Exit when the parent process ends, which closes its end of the pipe however it ends."""
    from eventlet.hubs import trampoline

    trampoline(sys.stdin.fileno(), read=True)
    os._exit(0)


if __name__ == "__main__":
    os.umask(0o077)
    serve(Path(sys.argv[1]))
