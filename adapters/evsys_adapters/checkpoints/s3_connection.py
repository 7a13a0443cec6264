"""`S3Connection`: requests to a bucket through aiobotocore, which only this module uses and imports on first request.

Every request has a deadline, is made once, and raises a delivery error with a fix for the user. After the server
rejects the credentials the client is recreated and reads the keys again, so that a rotated key is found.
"""

import asyncio
import importlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from evsys_adapters.checkpoints.store import RefusedError
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError


class ErrorResponse(msgspec.Struct, frozen=True):
    """An error response."""

    operation: str
    """The operation's name in S3's documentation: ``PutObject``."""
    status: int
    error_code: str
    """The error code; the status for responses without one, as to HEAD."""
    message: str = ""
    retry_after: str | None = None
    date: str | None = None
    """The server's time, an HTTP date."""


class KeyOrigin(msgspec.Struct, frozen=True):
    """The access key in use and its source, without the secret."""

    key: str
    """Truncated."""
    origin: str

    def __str__(self) -> str:
        return f"key {self.key} ({self.origin})"


_FIXES: Final = {
    "EntityTooSmall": "set `part_bytes` to at least the size that the server asks for; it is 5 MiB with most",
    "KeyTooLongError": "use a shorter prefix; keys have at most 1024 bytes",
}


class S3ResponseError(RefusedError):
    """An error response whose meaning depends on the request, so that the caller interprets it."""

    def __init__(self, response: ErrorResponse, where: str) -> None:
        super().__init__(
            f"{where} refuses {response.operation}: {response.error_code}, status {response.status}; "
            f"{response.message}",
            fix=_FIXES.get(
                response.error_code, "look up the error code in the server's documentation; the file is still here"
            ),
        )
        self.error_code = response.error_code
        self.status = response.status


_WRONG_SECRET: Final = frozenset({"SignatureDoesNotMatch"})
_UNKNOWN_KEY: Final = frozenset({"InvalidAccessKeyId", "InvalidSecurity", "NotSignedUp", "Unauthorized"})
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_CLOCK: Final = frozenset({"RequestTimeTooSkewed", "RequestExpired", "ExpiredRequest"})
_MAX_SKEW_SECONDS: Final = 900
"""S3's limit."""
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "InvalidBucketName"})
_REGION: Final = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_FULL: Final = frozenset(
    {
        "EntityTooLarge",
        "InsufficientStorage",
        "QuotaExceeded",
        "StorageCapExceeded",
        "TransactionCapExceeded",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)
"""Parts are never too large for S3; with other servers these codes mean that the bucket's quota is used up."""
DIGEST_ERRORS: Final = frozenset(
    {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
)
"""Codes of servers that compared the digest of a body with the one announced."""
DENIED: Final = ("AccessDenied", "AccessForbidden", "Forbidden", "403")
"""Codes for a missing permission; HEAD has no code but its status."""
UNSUPPORTED_STATUSES: Final = frozenset({400, 405, 501})
"""Statuses of servers that do not know an operation or a header."""
_TRANSIENT: Final = DIGEST_ERRORS | frozenset(
    {
        "ClientDisconnect",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_ACTIONS: Final = {
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
_BUSY: Final = frozenset({408, 425, 429})


def delivery_error_for(  # noqa: PLR0911 # a table
    response: ErrorResponse, *, where: str, bucket: str, key: KeyOrigin
) -> DeliveryError:
    """Return the delivery error for the response, with a fix for the user."""
    error_code = response.error_code
    is_server_error = (
        response.status >= 500 and response.status not in {501, 507} and error_code != "NotImplemented"  # noqa: PLR2004
    )
    if error_code in _TRANSIENT or response.status in _BUSY or is_server_error:
        return RetryLaterError(
            f"{where} is busy or faulty: {response.operation} got {error_code}, status {response.status}",
            after_seconds=_seconds(response.retry_after),
        )
    retry_hint = "it is read again at the next attempt"
    skew = _skew(response.date) if error_code in _CLOCK or response.status == 403 else 0.0  # noqa: PLR2004
    if error_code in _CLOCK or abs(skew) > _MAX_SKEW_SECONDS:
        how = f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" if skew else "wrong"
        return ParkedError(
            f"{where} refuses requests: this machine's clock is {how} ({error_code})",
            fix="set the clock, as with `timedatectl set-ntp true`; a container has the clock of its host",
        )
    if error_code in _WRONG_SECRET:
        return ParkedError(
            f"{where} refuses the {key}: the secret is wrong ({error_code})",
            fix=f"correct the secret where it is; {retry_hint}",
        )
    if error_code in _UNKNOWN_KEY:
        return ParkedError(
            f"{where} does not know the {key} ({error_code})", fix=f"put a valid key where it is; {retry_hint}"
        )
    if error_code in _EXPIRED:
        return ParkedError(f"{where} refuses the {key}: it has expired ({error_code})", fix=f"renew it; {retry_hint}")
    if error_code in _NO_BUCKET:
        return ParkedError(
            f"there is no bucket {bucket!r} at {where}", fix="create it, or correct the URL in the adapter's params"
        )
    if error_code in _REGION or response.status == 301:  # noqa: PLR2004
        return ParkedError(
            f"the bucket {bucket!r} is in another region: {response.message or error_code}",
            fix="set `region` to the bucket's",
        )
    if error_code in _FULL or response.status == 507:  # noqa: PLR2004
        return ParkedError(
            f"{where} is full: {error_code}, {response.message}", fix="make room, or raise the bucket's quota"
        )
    if response.status in {401, 403}:
        action = _ACTIONS.get(response.operation, f"s3:{response.operation}")
        return ParkedError(
            f"{where} does not let the {key} do {response.operation} ({error_code})",
            fix=f"grant it {action} on {bucket!r}",
        )
    return S3ResponseError(response, where)


def _skew(date: str | None) -> float:
    """Return how many seconds the local clock is ahead of an HTTP date; 0 if there is none."""
    try:
        return 0.0 if date is None else time.time() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return 0.0


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


CONNECT_SECONDS: Final = 10.0
REPLY_SECONDS: Final = 60.0
_ENTRY_IDS: Final = ("Key", "UploadId", "PartNumber")

_ORIGINS: Final = {
    "env": "from the environment, AWS_ACCESS_KEY_ID",
    "shared-credentials-file": "from the credentials file, ~/.aws/credentials or AWS_SHARED_CREDENTIALS_FILE",
    "config-file": "from the config file, ~/.aws/config or AWS_CONFIG_FILE",
    "iam-role": "from this machine's role",
    "container-role": "from this container's role",
}


class S3Features(msgspec.Struct, frozen=True):
    """What a server and the permissions of a key allow, as found by `s3_probe`."""

    checks_digests: bool = True
    """Whether a body is compared with ``x-amz-checksum-sha256``. Otherwise that is not sent, and bodies are signed."""
    create_conditions: bool = True
    """Whether ``If-None-Match: *`` is honoured."""
    replace_conditions: bool = True
    """Whether ``If-Match`` is honoured."""
    may_delete: bool = True
    hides_missing: bool = False
    """Whether a missing object is answered with 403, as S3 does for keys that may not list the bucket."""


class S3Connection:
    """A connection to one bucket; it belongs to one event loop.

    Attributes:
        features: What the server can do; set by the store once it is known.
    """

    def __init__(
        self,
        bucket: str,
        *,
        endpoint: str | None,
        region: str | None,
        path_style: bool,
        profile: str | None,
        concurrency: int,
    ) -> None:
        self.where = f"s3://{bucket} at {endpoint}" if endpoint else f"s3://{bucket}"
        self.concurrency = concurrency
        self.features = S3Features()
        self.bucket = bucket
        self._profile = profile
        self._settings = {"endpoint_url": endpoint, "region_name": region}
        # "auto" means "path" for another endpoint than Amazon's
        self._style = "path" if path_style else "auto" if endpoint is None else "virtual"
        self._key = KeyOrigin("?", "from nowhere")
        self._client: Any = None  # the class is generated at run time
        self._stack = AsyncExitStack()
        self._connect_lock = asyncio.Lock()
        self._in_flight = 0
        self._refused = False

    async def close(self) -> None:
        """Close the client; the next request reconnects."""
        stack, self._stack, self._client = self._stack, AsyncExitStack(), None
        self._refused = False
        await stack.aclose()

    async def call(
        self, operation: str, *, expect: Sequence[str] = (), seconds: float = REPLY_SECONDS, **params: Any
    ) -> dict[str, Any]:
        """Make a request, once.

        Args:
            operation: The name of a method of aiobotocore's client.
            expect: Error codes that raise WordError instead of a delivery error.
            seconds: The timeout.
            params: S3's parameters of the operation.
        """
        async with self.requesting(operation.title().replace("_", ""), seconds=seconds, expect=expect) as client:
            return await getattr(client, operation)(Bucket=self.bucket, **params)

    async def pages(
        self, operation: str, key: str, *, expect: Sequence[str] = (), **params: Any
    ) -> list[dict[str, Any]]:
        """Return the entries of all pages of a listing, each once.

        Servers differ in how they name the next page, so the last entry of a page replaces a missing marker.
        """
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        while True:
            try:
                page = await self.call(operation, expect=expect, **params)
            except S3ResponseError as error:
                if operation != "list_objects_v2" or error.status not in UNSUPPORTED_STATUSES:
                    raise
                operation = "list_objects"
                continue
            entries: list[dict[str, Any]] = page.get(key) or []
            count = len(found)
            found.update({tuple(each.get(name) for name in _ENTRY_IDS): each for each in entries})
            if not page.get("IsTruncated"):
                return list(found.values())
            operation, marker = _next_page(operation, page, entries)
            if not marker or (len(found) == count and marker.items() <= params.items()):
                raise RetryLaterError(f"{self.where} lists one page of {key} again and again")
            params = {name: value for name, value in params.items() if name != "ContinuationToken"} | marker

    @asynccontextmanager
    async def requesting(
        self, operation: str, *, seconds: float | None = REPLY_SECONDS, expect: Sequence[str] = ()
    ) -> AsyncGenerator[Any]:
        """Yield the client for one request; converts its exceptions to delivery errors."""
        client = await self._connected()
        exceptions = _import_library("botocore.exceptions")
        self._in_flight += 1
        try:
            async with asyncio.timeout(seconds):
                yield client
        except exceptions.ClientError as error:
            response = _response_of(operation, error)
            if response.error_code in expect:
                raise S3ResponseError(response, self.where) from error
            delivery_error = delivery_error_for(response, where=self.where, bucket=self.bucket, key=self._key)
            self._refused = self._refused or isinstance(delivery_error, ParkedError)
            raise delivery_error from error
        except exceptions.SSLError as error:
            fix = "trust its certificate: set AWS_CA_BUNDLE to a file of certificate authorities"
            raise ParkedError(f"{self.where} cannot be trusted: {error}", fix=fix) from error
        except (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            _import_library("aiohttp").ClientError,
            OSError,
        ) as error:
            raise RetryLaterError(f"{self.where} cannot be reached: {str(error) or 'it took too long'}") from error
        except _import_library("botocore.parsers").ResponseParserError as error:
            raise RetryLaterError(f"{self.where} sent a response that is not S3's: {error}") from error
        except exceptions.BotoCoreError as error:
            self._refused = True
            fix = "set a key in the environment, ~/.aws/credentials, or `profile`; it is read again at each attempt"
            raise ParkedError(f"{self.where} cannot be used: {error}", fix=fix) from error
        finally:
            self._in_flight -= 1

    async def _connected(self) -> Any:
        """Return the client; reconnects with fresh credentials after they were rejected."""
        async with self._connect_lock:  # held while credentials are requested; all callers share the answer
            if self._refused and not self._in_flight:
                await self.close()
            if self._client is None:
                async with asyncio.timeout(REPLY_SECONDS):
                    await self._connect()
            return self._client

    async def _connect(self) -> None:
        session = _import_library("aiobotocore.session").AioSession(profile=self._profile)
        config = _import_library("aiobotocore.config").AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=REPLY_SECONDS,
            max_pool_connections=self.concurrency + 4,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": self._style, "payload_signing_enabled": not self.features.checks_digests},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            found = await session.get_credentials()
            self._client = await self._stack.enter_async_context(
                session.create_client("s3", config=config, **self._settings)
            )
        except (
            _import_library("botocore.exceptions").BotoCoreError,
            ValueError,
        ) as error:  # unknown profile, invalid endpoint
            raise ParkedError(f"{self.where} cannot be used: {error}", fix="correct the adapter's params") from error
        if found is not None:
            self._key = KeyOrigin(f"{found.access_key[:4]}…", _ORIGINS.get(found.method, f"from {found.method}"))


def _next_page(operation: str, page: dict[str, Any], entries: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the operation for the next page of a listing, and its params; without params if the page names none."""
    if operation == "list_objects_v2" and page.get("NextContinuationToken"):
        return operation, {"ContinuationToken": page["NextContinuationToken"]}
    if operation in {"list_objects_v2", "list_objects"}:  # a server without version 2 ignores that it was asked for
        last = page.get("NextMarker") or (entries[-1]["Key"] if entries else None)
        return "list_objects", {"Marker": last} if last else {}
    last_entry = entries[-1] if entries else {}
    if operation == "list_parts":
        number = page.get("NextPartNumberMarker") or last_entry.get("PartNumber")
        return operation, {"PartNumberMarker": number} if number else {}
    key = page.get("NextKeyMarker") or last_entry.get("Key")
    upload = page.get("NextUploadIdMarker") or last_entry.get("UploadId")
    return operation, {"KeyMarker": key, "UploadIdMarker": upload} if key and upload else {}


def _response_of(operation: str, error: Any) -> ErrorResponse:
    """Extract the error response from a client exception."""
    details, metadata = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    return ErrorResponse(
        operation,
        status,
        str(details.get("Code") or status),
        str(details.get("Message", "")),
        metadata.get("HTTPHeaders", {}).get("retry-after"),
        metadata.get("HTTPHeaders", {}).get("date"),
    )


def _import_library(module: str) -> Any:
    """Import a module of the client library."""
    return importlib.import_module(module)
