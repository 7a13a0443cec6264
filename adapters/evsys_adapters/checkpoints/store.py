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

`UploadLedger` records uploads in progress and the parts already sent, synced to disk before they are relied on. An
upload has one file: its first line is the `UploadPlan`, every further line a part that the store has. A torn last line
means that the part is sent again.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

import msgspec

from evsys_bus.errors import DeliveryError, RetryLaterError
from evsys_bus.files import load_file, replace_file

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState

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


class FileIdentity(msgspec.Struct, frozen=True):
    """Metadata that identify a file's content without reading it."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the identity from a file status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def file_identity_at(path: str) -> FileIdentity | None:
    """Return the identity of the file at the path; None if there is none."""
    try:
        return FileIdentity.of(Path(path).stat())
    except FileNotFoundError:
        return None


class UploadPlan(msgspec.Struct, frozen=True, rename={"upload_id": "upload"}):
    """An upload at its start."""

    where: str
    """Description of the store."""
    key: str
    path: str
    source: FileIdentity
    part_bytes: int = 0
    sha256: str = ""
    """Digest of the whole file."""
    digests: list[str] = []
    """Digests of the parts."""
    upload_id: str | None = None
    """The store's ID of the upload; None until it is known."""


class UploadedPart(msgspec.Struct, frozen=True, array_like=True):
    """A part that the store has."""

    number: int
    """Starts at 1."""
    tag: str
    """The store's identifier of the content."""


class UploadLedger:
    """The uploads in progress, in a directory of their own. Only one process at a time may write it.

    Its methods block.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def begin(self, plan: UploadPlan) -> None:
        """Record an upload, replacing an earlier one to the same key."""
        file = self._file(plan.where, plan.key)
        _load_upload(file, set_aside=True)
        replace_file(file, _encode(plan) + b"\n")

    def add_part(self, plan: UploadPlan, part: UploadedPart) -> None:
        """Record that the store has the part."""
        fd = os.open(self._file(plan.where, plan.key), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        with os.fdopen(fd, "ab") as file:  # buffered: it is written completely, or raises
            file.write(b"\n" + _encode(part))  # ends a torn line before it
            file.flush()
            os.fsync(file.fileno())

    def find(self, where: str, key: str) -> tuple[UploadPlan, dict[int, UploadedPart]] | None:
        """Return the upload to the key, and the parts that the store has, by number."""
        return _load_upload(self._file(where, key), set_aside=True)

    def uploads_under(self, where: str, prefix: str) -> list[UploadPlan]:
        """Return the uploads to keys with this prefix."""
        found = (_load_upload(path) for path in self._directory.glob("*.upload"))
        return [each[0] for each in found if each and each[0].where == where and each[0].key.startswith(prefix)]

    def remove(self, where: str, key: str) -> None:
        """Remove the record of the upload to the key."""
        with suppress(IsADirectoryError, PermissionError, NotADirectoryError):  # not a file of ours; it is quarantined
            self._file(where, key).unlink(missing_ok=True)

    def _file(self, where: str, key: str) -> Path:
        name = hashlib.sha256(f"{where}\0{key}".encode()).hexdigest()[:32]
        return self._directory / f"{name}.upload"


def _load_upload(path: Path, *, set_aside: bool = False) -> tuple[UploadPlan, dict[int, UploadedPart]] | None:
    """Return the record of an upload; None if it is missing or damaged, so that the upload is restarted."""
    return load_file(path, _decode_upload, quarantine=set_aside)


def _decode_upload(content: bytes) -> tuple[UploadPlan, dict[int, UploadedPart]]:
    first, *lines = content.split(b"\n")
    plan = _decode_plan(first)
    parts: dict[int, UploadedPart] = {}
    for line in filter(None, lines):
        try:
            part = _decode_part(line)
        except msgspec.DecodeError:
            continue  # torn; the part is sent again
        parts[part.number] = part
    return plan, parts


_encode: Final = msgspec.json.Encoder().encode
_decode_plan: Final = msgspec.json.Decoder(UploadPlan).decode
_decode_part: Final = msgspec.json.Decoder(UploadedPart).decode


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


def retrying(
    *,
    attempts: int = 4,
    first_pause_seconds: float = 0.1,
    max_pause_seconds: float = 2.0,
    max_requested_seconds: float = 0.0,
) -> "AsyncRetrying":
    """Return a policy that repeats a call of a store after `RetryLaterError`, and raises the error of the last attempt.

    A store that asks for a longer pause than the last parameter is not called again; the courier waits as asked.

    Args:
        attempts: Maximum number of calls.
        first_pause_seconds: Limit of the first pause. Pauses are random up to a limit that doubles (full jitter).
        max_pause_seconds: Limit of all pauses.
        max_requested_seconds: The longest pause that a store may ask for.
    """
    from tenacity import AsyncRetrying, stop_after_attempt, wait_random_exponential  # not needed by most imports

    backoff = wait_random_exponential(multiplier=first_pause_seconds, max=max_pause_seconds)

    def should_retry(state: "RetryCallState") -> bool:
        error = None if state.outcome is None else state.outcome.exception()
        return isinstance(error, RetryLaterError) and (error.after_seconds or 0.0) <= max_requested_seconds

    def pause(state: "RetryCallState") -> float:
        error = None if state.outcome is None else state.outcome.exception()
        return max(backoff(state), (isinstance(error, RetryLaterError) and error.after_seconds) or 0.0)

    return AsyncRetrying(stop=stop_after_attempt(attempts), wait=pause, retry=should_retry, reraise=True)
