"""Maps error responses of S3 servers to delivery errors with a fix for the user.

It is independent of the client library: `s3_connection` passes plain data.
"""

from typing import Final

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


class KeyOrigin(msgspec.Struct, frozen=True):
    """The access key in use and its source, without the secret."""

    key: str
    """Truncated."""
    origin: str

    def __str__(self) -> str:
        return f"key {self.key} ({self.origin})"


class S3ResponseError(RefusedError):
    """An error response whose meaning depends on the request, so that the caller interprets it."""

    def __init__(self, response: ErrorResponse, where: str) -> None:
        super().__init__(
            f"{where} refuses {response.operation}: {response.error_code}, status {response.status}; "
            f"{response.message}",
            fix="look up the error code in the server's documentation; the file is still here",
        )
        self.error_code = response.error_code
        self.status = response.status


_WRONG_SECRET: Final = frozenset({"SignatureDoesNotMatch"})
_UNKNOWN_KEY: Final = frozenset({"InvalidAccessKeyId", "NotSignedUp"})
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "InvalidBucketName"})
_REGION: Final = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_FULL: Final = frozenset({"QuotaExceeded", "EntityTooLarge", "InsufficientStorage", "XMinioStorageFull"})
"""Parts are never too large for S3; with other servers these codes mean that the bucket's quota is used up."""
_TRANSIENT: Final = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "XAmzContentSHA256Mismatch",
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
    is_server_error = response.status >= 500 and response.status not in {501, 507}  # noqa: PLR2004
    if error_code in _TRANSIENT or response.status in _BUSY or is_server_error:
        return RetryLaterError(
            f"{where} is busy or faulty: {response.operation} got {error_code}, status {response.status}",
            after_seconds=_seconds(response.retry_after),
        )
    retry_hint = "it is read again at the next attempt"
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
    if error_code == "RequestTimeTooSkewed":
        return ParkedError(f"{where} refuses requests: this machine's clock is wrong", fix="set the clock")
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


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
