"""Maps error responses of S3 servers to delivery errors with a fix for the user.

It is independent of the client library: `s3_connection` passes plain data.
"""

from typing import Final

import msgspec

from evsys_adapters.checkpoints.store import RefusedError
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError


class Refusal(msgspec.Struct, frozen=True):
    """An error response."""

    operation: str
    """The operation's name in S3's documentation: ``PutObject``."""
    status: int
    word: str
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


class WordError(RefusedError):
    """An error response whose meaning depends on the request, so that the caller interprets it."""

    def __init__(self, refusal: Refusal, where: str) -> None:
        super().__init__(
            f"{where} refuses {refusal.operation}: {refusal.word}, status {refusal.status}; {refusal.message}",
            fix="look up the error code in the server's documentation; the file is still here",
        )
        self.word = refusal.word
        self.status = refusal.status


_WRONG_SECRET: Final = frozenset({"SignatureDoesNotMatch"})
_UNKNOWN_KEY: Final = frozenset({"InvalidAccessKeyId", "NotSignedUp"})
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "InvalidBucketName"})
_REGION: Final = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_FULL: Final = frozenset({"QuotaExceeded", "EntityTooLarge", "InsufficientStorage", "XMinioStorageFull"})
"""Parts are never too large for S3; with other servers these codes mean that the bucket's quota is used up."""
_PASSING: Final = frozenset(
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


def meaning(  # noqa: PLR0911 # a table
    refusal: Refusal, *, where: str, bucket: str, key: KeyOrigin
) -> DeliveryError:
    """Return the delivery error for the response, with a fix for the user."""
    word = refusal.word
    if word in _PASSING or refusal.status in _BUSY or (refusal.status >= 500 and refusal.status not in {501, 507}):  # noqa: PLR2004
        return RetryLaterError(
            f"{where} is busy or faulty: {refusal.operation} got {word}, status {refusal.status}",
            after_seconds=_seconds(refusal.retry_after),
        )
    again = "it is read again at the next attempt"
    if word in _WRONG_SECRET:
        return ParkedError(
            f"{where} refuses the {key}: the secret is wrong ({word})", fix=f"correct the secret where it is; {again}"
        )
    if word in _UNKNOWN_KEY:
        return ParkedError(f"{where} does not know the {key} ({word})", fix=f"put a valid key where it is; {again}")
    if word in _EXPIRED:
        return ParkedError(f"{where} refuses the {key}: it has expired ({word})", fix=f"renew it; {again}")
    if word == "RequestTimeTooSkewed":
        return ParkedError(f"{where} refuses requests: this machine's clock is wrong", fix="set the clock")
    if word in _NO_BUCKET:
        return ParkedError(
            f"there is no bucket {bucket!r} at {where}", fix="create it, or correct the URL in the adapter's params"
        )
    if word in _REGION or refusal.status == 301:  # noqa: PLR2004
        return ParkedError(
            f"the bucket {bucket!r} is in another region: {refusal.message or word}", fix="set `region` to the bucket's"
        )
    if word in _FULL or refusal.status == 507:  # noqa: PLR2004
        return ParkedError(f"{where} is full: {word}, {refusal.message}", fix="make room, or raise the bucket's quota")
    if refusal.status in {401, 403}:
        action = _ACTIONS.get(refusal.operation, f"s3:{refusal.operation}")
        return ParkedError(
            f"{where} does not let the {key} do {refusal.operation} ({word})", fix=f"grant it {action} on {bucket!r}"
        )
    return WordError(refusal, where)


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
