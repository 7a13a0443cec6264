"""`ObjectStore`: storage of checkpoints by key, and its errors. `stores.open_store` creates one for a URL.

    error                        meaning
    ---------------------------  ---------------------------------------------------------------------
    RetryLaterError              the store is busy or unreachable; a repeated call resumes
    ParkedError                  credentials are rejected, or a person must act (bucket, quota)
    ConflictError                the key holds other content
    MissingError                 the local file, or the object, does not exist
    DamagedError                 the content differs from what was stored
    RefusedError                 the store rejects this object permanently

All of them are `DeliveryError`s; retrying does not help with the last four. OSError refers to the local disk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from evsys_adapters.checkpoints.ledger import UploadLedger
from evsys_bus.errors import DeliveryError

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""

PART_BYTES: Final = 16 << 20
MAX_SMALL_BYTES: Final = 64 << 20
"""Limit of `ObjectStore.get_bytes`; enough for a manifest of several hundred thousand files."""
MAX_KEY_BYTES: Final = 1024
"""S3's limit."""


class StoreError(DeliveryError):
    """An object cannot be stored or fetched, and retrying will not change that."""

    code = "EB400"


class RefusedError(StoreError):
    """The store rejects this object permanently."""

    code = "EB401"


class ConflictError(StoreError):
    """The key holds other content, which was left unchanged."""

    code = "EB402"


class MissingError(StoreError):
    """The local file, or the object, does not exist."""

    code = "EB403"


class DamagedError(StoreError):
    """The content differs from what was stored; no file was replaced."""

    code = "EB404"


class Stored(msgspec.Struct, frozen=True):
    """An object in a store."""

    key: str
    size: int
    """In bytes."""
    sha256: str | None = None
    """Digest of the content, in hexadecimal; None if a listing does not provide it."""


def check_content(actual: Stored, expected: Stored | None, where: str) -> None:
    """Compare fetched content with the expected size and digest, as far as known.

    Raises:
        DamagedError: They differ.
    """
    if expected is not None and (actual.size, actual.sha256) != (expected.size, expected.sha256 or actual.sha256):
        raise DamagedError(
            f"{actual.key} in {where} is not what was stored: {actual.size} bytes, SHA-256 {actual.sha256}, and not "
            f"{expected.size} bytes, SHA-256 {expected.sha256}",
            fix="fetch another checkpoint; this object cannot be trusted",
        )


def check_size(key: str, size: int, expected: Stored | None, where: str) -> None:
    """Compare only the sizes, before anything is fetched."""
    if expected is not None and size != expected.size:
        raise DamagedError(
            f"{key} in {where} is not what was stored: {size} bytes, and not {expected.size}",
            fix="fetch another checkpoint; this object cannot be trusted",
        )


def too_large_error(key: str, where: str, max_bytes: int) -> DamagedError:
    """Return the error for an object that exceeds its limit."""
    return DamagedError(
        f"{key} in {where} is larger than {max_bytes:,} bytes", fix="it was not written by evsys-bus; remove it"
    )


def check_key(key: str) -> None:
    """Raise RefusedError if the key is invalid."""
    if key.startswith("/") or {"", ".", ".."} & set(key.split("/")) or len(key.encode()) > MAX_KEY_BYTES:
        raise RefusedError(f"{key!r} is no key", fix="use parts that are not empty, `.` or `..`, with slashes between")


def missing_file_error(path: Path) -> MissingError:
    """Return the error for a missing local file."""
    return MissingError(
        f"{path} does not exist, so it cannot be stored", fix="keep files until they are stored; this one is lost"
    )


class ObjectStore(Protocol):
    """Stores objects by key: a path with slashes, none of whose parts is empty, ``.`` or ``..``."""

    where: str
    """Description of the store."""

    async def open(self) -> None:
        """Prepare the store; makes no request yet."""
        ...

    async def probe(self) -> None:
        """Write and delete a few bytes, so that errors appear now and not with the first checkpoint.

        Raises:
            ParkedError: The store rejects the credentials, or there is no such bucket.
            RetryLaterError: It cannot be reached.
        """
        ...

    async def put_file(
        self, key: str, path: Path, *, ledger: UploadLedger, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """Store a file: complete and verified, or not at all.

        Parts recorded in the ledger are not sent again, even by another process. If the file changes meanwhile, the
        upload is restarted. If the same content is stored already, nothing is sent.

        Raises:
            RetryLaterError: Call again to resume, as after a cancellation.
            ParkedError: See `probe`.
            ConflictError: The key holds other content.
            MissingError: There is no such file.
            RefusedError: The store rejects it.
        """
        ...

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """Store bytes atomically; existing content is replaced only with ``replace``.

        Raises:
            ConflictError: The key holds other content, and ``replace`` is not set.
        """
        ...

    async def get_file(
        self, key: str, path: Path, *, stored: Stored | None = None, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """Fetch an object; the file appears, or is replaced, once its size and digest are verified.

        Args:
            stored: The expected content; by default the store's own metadata.

        Raises:
            MissingError: There is no such object.
            DamagedError: The content differs.
        """
        ...

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """Replace a small object by the result of ``change``, so that no change of another process is lost.

        Args:
            key: The object's key.
            change: Receives the current content, None if it is missing or unusable, and returns the new content, None
                for no change. It may be called again if another process was faster.

        Returns:
            Whether that is certain; False if the store cannot replace conditionally, and something was written.

        Raises:
            RetryLaterError: Other processes keep changing it.
        """
        ...

    async def get_bytes(self, key: str, *, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """Fetch a small object, verified if the store knows its digest.

        Raises:
            MissingError: There is no such object.
            DamagedError: The content differs, or is larger than ``max_bytes``, the maximum that is read.
        """
        ...

    async def names(self, prefix: str) -> list[Stored]:
        """List the objects whose keys have this prefix, in order and without digests."""
        ...

    async def delete(self, key: str) -> None:
        """Delete the object; a missing one is ignored."""
        ...

    async def abort_abandoned(self, prefix: str, ledger: UploadLedger) -> int:
        """Abort the uploads in the ledger whose file is missing or has changed.

        Must not be called while `put_file` runs with the same ledger.

        Returns:
            The number of aborted uploads.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...
