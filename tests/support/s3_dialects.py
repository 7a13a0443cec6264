"""`DialectServer`: a bucket in the test's own process that behaves as one of the `DIALECTS` of the S3 API.

They differ in the headers that they refuse or ignore, ETags, listings, sizes of parts, and missing permissions.
"""

import base64
import hashlib
import re
import threading
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

from support.http_server import HttpServer, Reply, Request

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


class DialectServer(HttpServer):
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
        super().__init__(port, _DialectRequest)

    def respond(self, request: "_DialectRequest") -> Reply:
        return request.reply()

    def tag(self, data: bytes) -> str:
        return f'"{hashlib.md5(data).hexdigest() if self.dialect.md5_tags else uuid4().hex.upper()}"'

    def count(self, *operations: str) -> int:
        """Return how often these operations were requested."""
        return sum(operation in operations for operation, _ in self.requests)


class _ReplyError(Exception):
    """A request that is refused with a status and a code."""


class _DialectRequest(Request):
    protocol_version = "HTTP/1.1"

    @property
    def bucket(self) -> DialectServer:
        return self.server

    def date_time_string(self, timestamp=None) -> str:
        return self.bucket.date or super().date_time_string(timestamp)

    def reply(self) -> Reply:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        in_path = self.headers["Host"].startswith("127.0.0.1")
        self.key = unquote(parts.path).lstrip("/")
        if in_path:
            self.key = self.key.partition("/")[2]
        operation = self.operation()
        self.bucket.requests.append((operation, self.key))
        self.bucket.headers.append({name.lower(): value for name, value in self.headers.items()})
        try:
            self.check(operation)
            refusal = self.bucket.on_request and self.bucket.on_request(operation, self.key)
            if refusal:
                raise _ReplyError(*refusal)
            with self.bucket.lock:
                status, body, headers = getattr(self, operation)(self.body)
        except _ReplyError as error:
            status, code = error.args
            headers = {"x-amz-bucket-region": self.bucket.dialect.region} if status == 301 else {}
            body = f"<Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()
        if self.bucket.dialect.canonical_headers:
            headers = {name.title(): value for name, value in headers.items()}
        return status, body, headers

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

    def check(self, operation: str) -> None:
        dialect, headers = self.bucket.dialect, self.headers
        if operation in self.bucket.denied:
            raise _ReplyError(403, "AccessDenied")
        scope = re.search(r"Credential=[^/]+/[^/]+/([^/]+)/", headers.get("Authorization", ""))
        if dialect.region is not None and (scope is None or scope[1] != dialect.region):
            raise _ReplyError(301, "PermanentRedirect")
        if "aws-chunked" in headers.get("Content-Encoding", "") or "X-Amz-Trailer" in headers:
            raise _ReplyError(*(dialect.chunked or (400, "InvalidRequest")))
        announced = headers.get("x-amz-content-sha256", "")
        if len(announced) == 64 and announced != hashlib.sha256(self.body).hexdigest():
            raise _ReplyError(400, "XAmzContentSHA256Mismatch")
        digests = [name for name in headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))]
        if digests and isinstance(dialect.digests, tuple):
            raise _ReplyError(*dialect.digests)
        wanted = headers.get("x-amz-checksum-sha256")
        found = base64.b64encode(hashlib.sha256(self.body).digest()).decode()
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
