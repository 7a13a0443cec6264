"""A real S3 server on loopback: the four servers of OpenStack Swift with its S3 interface, in one separate process.

It checks secrets, permissions, digests and conditions, and its data survives a SIGKILL, so tests can check all of that.
`S3Server` controls it from a test; run as a program, this file is the server. A replacement only needs the attributes
and methods of `S3Server`.

`DialectServer` is a stand-in in the test's own process, which behaves as one of the `DIALECTS` of the S3 API does where
they differ: headers that are refused or ignored, ETags, listings, sizes of parts, missing permissions.
"""

import base64
import getpass
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

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


MIN_PART = 64 << 10
"""Of all dialects, so that tests stay small; the real ones take 5 MiB."""


@dataclass(frozen=True)
class Dialect:
    """How a kind of store differs. A pair of status and code is what it answers to a header that it refuses."""

    digests: str | tuple[int, str] = "BadDigest"
    """The code for a wrong ``x-amz-checksum-*``, or "ignored"."""
    create: str | tuple[int, str] = "honoured"
    """``If-None-Match`` of a write."""
    replace: str | tuple[int, str] = "honoured"
    """``If-Match`` of a write."""
    chunked: tuple[int, str] | None = (501, "NotImplemented")
    """What it answers to bodies with trailers; None where it takes them (these tests never send any)."""
    md5_tags: bool = True
    quoted_tags: bool = True
    """Whether listings have ETags with quotes."""
    canonical_headers: bool = False
    """Whether names of headers come as ``X-Amz-Meta-Name``."""
    metadata: str = "x-amz-meta-"
    """The prefix of metadata in replies."""
    listing: int = 2
    """The version it knows; 1 ignores the params of 2."""
    page: int = 1000
    """The most entries of a page, however many are asked for."""
    equal_parts: bool = False
    region: str | None = None
    """The bucket's region; another one is redirected."""


DIALECTS = {
    "aws": Dialect(region="eu-central-1"),
    "minio": Dialect(digests="XAmzContentChecksumMismatch", canonical_headers=True, page=2),
    "r2": Dialect(md5_tags=False, equal_parts=True, page=3),
    "b2": Dialect(digests=(400, "InvalidArgument"), create=(501, "NotImplemented"), replace=(501, "NotImplemented")),
    "ceph": Dialect(digests="ignored", create="ignored", replace="ignored", quoted_tags=False, listing=1, page=2),
    "gcs": Dialect(
        digests="ignored",
        create=(400, "InvalidArgument"),
        replace="ignored",
        chunked=(400, "InvalidArgument"),
        md5_tags=False,
        metadata="x-goog-meta-",
        equal_parts=True,
        page=2,
    ),
}


class DialectServer:
    """A bucket on loopback that answers in a dialect; call `start` before use and `stop` after.

    Attributes:
        denied: Names of operations that the key may not do; they get 403.
        on_request: Called with the operation and the key before each request; returns a status and a code to refuse it.
        date: The time of its clock, an HTTP date; None for the right one.
        requests: The operation and the key of every request.
        headers: The headers of every request.
    """

    def __init__(self, dialect: str, port: int = 0) -> None:
        self.dialect = DIALECTS[dialect]
        self.denied: set[str] = set()
        self.on_request = None
        self.date: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.objects: dict[str, tuple[bytes, dict[str, str], str]] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], dict[int, tuple[bytes, str]]]] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_DialectHandler,), {"bucket": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tag(self, data: bytes) -> str:
        return f'"{hashlib.md5(data).hexdigest() if self.dialect.md5_tags else uuid4().hex.upper()}"'

    def count(self, *operations: str) -> int:
        """Return how often these operations were requested."""
        return sum(operation in operations for operation, _ in self.requests)


class _ReplyError(Exception):
    """A request that is refused with a status and a code."""


class _DialectHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: DialectServer

    def log_message(self, *args) -> None:
        pass

    def date_time_string(self, timestamp=None) -> str:
        return self.bucket.date or super().date_time_string(timestamp)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            super().handle()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        in_path = self.headers["Host"].startswith("127.0.0.1")
        self.key = unquote(parts.path).lstrip("/")
        if in_path:
            self.key = self.key.partition("/")[2]
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = self.operation()
        self.bucket.requests.append((operation, self.key))
        self.bucket.headers.append({name.lower(): value for name, value in self.headers.items()})
        try:
            self.check(operation, data)
            refusal = self.bucket.on_request and self.bucket.on_request(operation, self.key)
            if refusal:
                raise _ReplyError(*refusal)
            with self.bucket.lock:
                status, body, headers = getattr(self, operation)(data)
        except _ReplyError as error:
            status, code = error.args
            headers = {"x-amz-bucket-region": self.bucket.dialect.region} if status == 301 else {}
            body = f"<Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.title() if self.bucket.dialect.canonical_headers else name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 # names of the base class

    def operation(self) -> str:
        has = self.query.__contains__
        by_method = {
            "PUT": "upload_part" if has("uploadId") else "put_object",
            "POST": "create_upload" if has("uploads") else "complete_upload",
            "HEAD": "head_object",
            "DELETE": "abort_upload" if has("uploadId") else "delete_object",
            "GET": "list_parts" if has("uploadId") else "list_uploads" if has("uploads") else "get_object",
        }
        found = by_method[self.command]
        return "list_objects" if found == "get_object" and not self.key else found

    def check(self, operation: str, data: bytes) -> None:
        dialect, headers = self.bucket.dialect, self.headers
        if operation in self.bucket.denied:
            raise _ReplyError(403, "AccessDenied")
        scope = re.search(r"Credential=[^/]+/[^/]+/([^/]+)/", headers.get("Authorization", ""))
        if dialect.region is not None and (scope is None or scope[1] != dialect.region):
            raise _ReplyError(301, "PermanentRedirect")
        if "aws-chunked" in headers.get("Content-Encoding", "") or "X-Amz-Trailer" in headers:
            raise _ReplyError(*(dialect.chunked or (400, "InvalidRequest")))
        announced = headers.get("x-amz-content-sha256", "")
        if len(announced) == 64 and announced != hashlib.sha256(data).hexdigest():
            raise _ReplyError(400, "XAmzContentSHA256Mismatch")
        digests = [name for name in headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))]
        if digests and isinstance(dialect.digests, tuple):
            raise _ReplyError(*dialect.digests)
        wanted = headers.get("x-amz-checksum-sha256")
        found = base64.b64encode(hashlib.sha256(data).digest()).decode()
        if wanted is not None and dialect.digests != "ignored" and wanted != found:
            raise _ReplyError(400, dialect.digests)

    def check_conditions(self) -> None:
        there = self.bucket.objects.get(self.key)
        for header, behaviour in (
            ("If-None-Match", self.bucket.dialect.create),
            ("If-Match", self.bucket.dialect.replace),
        ):
            if header in self.headers and isinstance(behaviour, tuple):
                raise _ReplyError(*behaviour)
        if self.bucket.dialect.create == "honoured" and "If-None-Match" in self.headers and there is not None:
            raise _ReplyError(412, "PreconditionFailed")
        wanted = self.headers.get("If-Match") if self.bucket.dialect.replace == "honoured" else None
        if wanted is not None and (there is None or there[2] != wanted):
            raise _ReplyError(412, "PreconditionFailed") if there else _ReplyError(404, "NoSuchKey")

    def metadata(self) -> dict[str, str]:
        return {
            name.lower().removeprefix("x-amz-meta-"): value
            for name, value in self.headers.items()
            if name.lower().startswith("x-amz-meta-")
        }

    def put_object(self, data: bytes):
        self.check_conditions()
        tag = self.bucket.tag(data)
        self.bucket.objects[self.key] = data, self.metadata(), tag
        return 200, b"", {"ETag": tag}

    def head_object(self, _: bytes):
        there = self.bucket.objects.get(self.key)
        if there is None:
            hidden = self.command == "HEAD" or self.key
            raise _ReplyError(
                *((403, "AccessDenied") if hidden and "list_objects" in self.bucket.denied else (404, "NoSuchKey"))
            )
        data, metadata, tag = there
        if self.headers.get("If-Match", tag) != tag:
            raise _ReplyError(412, "PreconditionFailed")
        headers = {"ETag": tag} | {f"{self.bucket.dialect.metadata}{name}": value for name, value in metadata.items()}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return (206, data[int(span[1]) :], headers) if span else (200, data, headers)

    get_object = head_object

    def delete_object(self, _: bytes):
        self.bucket.objects.pop(self.key, None)
        return 204, b"", {}

    def create_upload(self, _: bytes):
        upload_id = uuid4().hex
        self.bucket.uploads[upload_id] = self.key, self.metadata(), {}
        return 200, _xml("InitiateMultipartUploadResult", Key=self.key, UploadId=upload_id), {}

    def upload_part(self, data: bytes):
        tag = self.bucket.tag(data)
        self.upload()[2][int(self.query["partNumber"])] = data, tag
        return 200, b"", {"ETag": tag}

    def upload(self):
        if self.query["uploadId"] not in self.bucket.uploads:
            raise _ReplyError(404, "NoSuchUpload")
        return self.bucket.uploads[self.query["uploadId"]]

    def complete_upload(self, body: bytes):
        key, metadata, parts = self.upload()
        listed = re.findall(
            r"<PartNumber>(\d+)</PartNumber>|<ETag>(.*?)</ETag>",
            body.decode().replace("&quot;", '"').replace("&#34;", '"'),
        )
        numbers, tags = [int(number) for number, _ in listed if number], [tag for _, tag in listed if tag]
        if any(number not in parts or parts[number][1] != tag for number, tag in zip(numbers, tags, strict=True)):
            raise _ReplyError(400, "InvalidPart")
        sizes = [len(parts[number][0]) for number in numbers]
        if any(size < MIN_PART for size in sizes[:-1]):
            raise _ReplyError(400, "EntityTooSmall")
        if self.bucket.dialect.equal_parts and (len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]):
            raise _ReplyError(400, "InvalidPart")
        self.check_conditions()
        data = b"".join(parts[number][0] for number in numbers)
        tag = f'{self.bucket.tag(data)[:-1]}-{len(numbers)}"'
        self.bucket.objects[key] = data, metadata, tag
        del self.bucket.uploads[self.query["uploadId"]]
        return 200, _xml("CompleteMultipartUploadResult", Key=key, ETag=tag), {}

    def abort_upload(self, _: bytes):
        self.upload()
        del self.bucket.uploads[self.query["uploadId"]]
        return 204, b"", {}

    def list_parts(self, _: bytes):
        after = int(self.query.get("part-number-marker") or 0)
        found = sorted((number, each) for number, each in self.upload()[2].items() if number > after)
        page = found[: self.bucket.dialect.page]
        rows = [
            _row(
                "Part",
                PartNumber=number,
                ETag=tag if self.bucket.dialect.quoted_tags else tag.strip('"'),
                Size=len(data),
            )
            for number, (data, tag) in page
        ]
        marker = {"NextPartNumberMarker": page[-1][0]} if page and self.bucket.dialect.listing > 1 else {}
        return 200, _xml("ListPartsResult", *rows, IsTruncated=_flag(len(page) < len(found)), **marker), {}

    def list_uploads(self, _: bytes):
        after = self.query.get("key-marker", ""), self.query.get("upload-id-marker", "")
        found = sorted(
            (key, upload_id)
            for upload_id, (key, *_) in self.bucket.uploads.items()
            if key.startswith(self.query.get("prefix", "")) and (key, upload_id) > after
        )
        page = found[: self.bucket.dialect.page]
        rows = [_row("Upload", Key=key, UploadId=upload_id) for key, upload_id in page]
        return 200, _xml("ListMultipartUploadsResult", *rows, IsTruncated=_flag(len(page) < len(found))), {}

    def list_objects(self, _: bytes):
        is_second = self.bucket.dialect.listing > 1 and self.query.get("list-type") == "2"
        after = self.query.get("marker", "")
        if is_second:  # an odd token, of letters that have to be quoted
            after = base64.b64decode(self.query.get("continuation-token", "").removeprefix("+/=")).decode()
        found = [
            key for key in sorted(self.bucket.objects) if key.startswith(self.query.get("prefix", "")) and key > after
        ]
        page = found[: self.bucket.dialect.page]
        rows = [_row("Contents", Key=key, Size=len(self.bucket.objects[key][0])) for key in page]
        more = {}
        if is_second and len(page) < len(found):
            more["NextContinuationToken"] = "+/=" + base64.b64encode(page[-1].encode()).decode()
        return 200, _xml("ListBucketResult", *rows, IsTruncated=_flag(len(page) < len(found)), **more), {}


def _row(name: str, **fields: object) -> str:
    return f"<{name}>{''.join(f'<{key}>{escape(str(value))}</{key}>' for key, value in fields.items())}</{name}>"


def _xml(name: str, *rows: str, **fields: object) -> bytes:
    texts = "".join(f"<{key}>{escape(str(value))}</{key}>" for key, value in fields.items())
    return f"<{name}>{texts}{''.join(rows)}</{name}>".encode()


def _flag(value: bool) -> str:
    return "true" if value else "false"


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
