"""`ObjectStore`: where checkpoints are kept, by key; the errors of that; and `open_store`, which makes one for an URL.

    raised by a store            what it means
    ---------------------------  ---------------------------------------------------------------------
    RetryLaterError              the store is busy or away; the same call goes on where this one ended
    ParkedError                  it refuses who we are, or lacks what a person must mend (bucket, quota)
    ConflictError                other content stands under the key
    MissingError                 the local file, or the object, is not there
    DamagedError                 what came back is not what was stored
    RefusedError                 the store says no to this object, for good

All of them are `DeliveryError`s, and the last four will not change by trying again. An OSError is of the local disk.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from evsys_adapters.checkpoints.ledger import UploadLedger
from evsys_bus.errors import ConfigError, DeliveryError

Told = Callable[[int, int], None]
"""Is called with the bytes that are done, and the bytes in all."""

PART_BYTES: Final = 16 << 20
MOST_SMALL_BYTES: Final = 64 << 20
"""A manifest of several hundred thousand files; what `ObjectStore.get_bytes` takes into memory."""
MOST_KEY_BYTES: Final = 1024
"""S3's limit."""


class StoreError(DeliveryError):
    """An object cannot be stored or fetched, and trying again will not change that."""

    code = "EB400"


class RefusedError(StoreError):
    """The store says no to this object, for good."""

    code = "EB401"


class ConflictError(StoreError):
    """Other content stands under the key; it was left as it is."""

    code = "EB402"


class MissingError(StoreError):
    """The local file, or the object, is not there."""

    code = "EB403"


class DamagedError(StoreError):
    """What came back is not what was stored; nothing was put in place."""

    code = "EB404"


class Stored(msgspec.Struct, frozen=True):
    """An object, as it stands in a store."""

    key: str
    size: int
    """In bytes."""
    sha256: str | None = None
    """Of the content, in hexadecimal; None where a listing does not tell."""


def check(got: Stored, wanted: Stored | None, where: str) -> None:
    """Hold what was fetched to what it must be, as far as that is known.

    Raises:
        DamagedError: It is another content.
    """
    if wanted is not None and (got.size, got.sha256) != (wanted.size, wanted.sha256 or got.sha256):
        raise DamagedError(
            f"{got.key} in {where} is not what was stored: {got.size} bytes, SHA-256 {got.sha256}, and not "
            f"{wanted.size} bytes, SHA-256 {wanted.sha256}",
            fix="fetch another checkpoint; this object cannot be trusted",
        )


def check_size(key: str, size: int, wanted: Stored | None, where: str) -> None:
    """The same, by the size alone, before anything is fetched."""
    if wanted is not None and size != wanted.size:
        raise DamagedError(
            f"{key} in {where} is not what was stored: {size} bytes, and not {wanted.size}",
            fix="fetch another checkpoint; this object cannot be trusted",
        )


def too_large(key: str, where: str, most_bytes: int) -> DamagedError:
    """The error that says that what should be small is not."""
    return DamagedError(
        f"{key} in {where} is larger than {most_bytes:,} bytes", fix="it was not written by evsys-bus; remove it"
    )


def check_key(key: str) -> None:
    """Raise RefusedError for what is no key."""
    if key.startswith("/") or {"", ".", ".."} & set(key.split("/")) or len(key.encode()) > MOST_KEY_BYTES:
        raise RefusedError(f"{key!r} is no key", fix="use parts that are not empty, `.` or `..`, with slashes between")


def missing_file(path: Path) -> MissingError:
    """The error that says that a local file is not there."""
    return MissingError(f"{path} is not there to be stored", fix="keep files until they are stored; this one is lost")


class ObjectStore(Protocol):
    """Keeps objects under keys: texts with slashes, none of whose parts is empty, ``.`` or ``..``."""

    where: str
    """The store, in words."""

    async def open(self) -> None:
        """Get ready; asks nothing of the store yet."""
        ...

    async def probe(self) -> None:
        """Write and delete a few bytes, so that what is wrong shows now and not at the first checkpoint.

        Raises:
            ParkedError: The store refuses who we are, or there is no such bucket.
            RetryLaterError: It cannot be reached.
        """
        ...

    async def put_file(self, key: str, path: Path, *, ledger: UploadLedger, told: Told | None = None) -> Stored:
        """Have the file's content under the key: whole and verified, or not at all.

        What the ledger says was sent is not sent again, also by another process. A file that changes meanwhile is begun
        again. When the same content stands there already, nothing is sent.

        Raises:
            RetryLaterError: To be called again, and goes on then. So it does after a cancellation.
            ParkedError: As `probe`.
            ConflictError: Other content stands there.
            MissingError: There is no such file.
            RefusedError: The store does not take it.
        """
        ...

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """Have these bytes under the key: whole or not at all; what stood there goes only with ``replace``.

        Raises:
            ConflictError: Other content stands there, and it is not to be replaced.
        """
        ...

    async def get_file(self, key: str, path: Path, *, stored: Stored | None = None, told: Told | None = None) -> Stored:
        """Fetch an object; the file appears, or is replaced, once its size and digest are right.

        Args:
            stored: What it must be; by default what the store itself says of it.

        Raises:
            MissingError: There is no such object.
            DamagedError: The content is another one.
        """
        ...

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """Replace a small object by what ``change`` makes of it, so that no change of another process is lost.

        Args:
            key: Of the object.
            change: Gets what is there, None for nothing that could be used, and returns what is to be there, None for
                no change. It may be called again, where another process was faster.

        Returns:
            Whether that is certain; False where the store cannot replace on a condition, and something was written.

        Raises:
            RetryLaterError: Others change it all the time.
        """
        ...

    async def get_bytes(self, key: str, *, most_bytes: int = MOST_SMALL_BYTES) -> bytes:
        """Fetch a small object, verified where the store knows its digest.

        Raises:
            MissingError: There is no such object.
            DamagedError: The content is another one, or larger than ``most_bytes``: no more than that is read.
        """
        ...

    async def names(self, prefix: str) -> list[Stored]:
        """What stands under keys that begin so, in order; without digests."""
        ...

    async def delete(self, key: str) -> None:
        """Have nothing under the key."""
        ...

    async def abort_abandoned(self, prefix: str, ledger: UploadLedger) -> int:
        """End the unfinished uploads in the ledger whose file is gone or another one by now, and what is left of them.

        Not to be called while `put_file` runs with the same ledger.

        Returns:
            How many it ended.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def open_store(
    url: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    path_style: bool | None = None,
    profile: str | None = None,
    concurrency: int = 4,
    part_bytes: int = PART_BYTES,
) -> tuple[ObjectStore, str]:
    """The store that the URL names, not yet opened, and what every key in it is to begin with.

    That is empty or ends with a slash: the key of ``name`` is ``prefix + name``.

    Args:
        url: ``s3://bucket/prefix``, or ``file:///directory``.
        endpoint: Of a server that is not Amazon's, as ``https://minio.example:9000``.
        path_style: Whether the bucket stands in the path and not in the host's name; by default where there is an
            endpoint.
        profile: In the user's AWS configuration.
        concurrency: How many parts of a file are sent side by side.
        part_bytes: Into parts of how many bytes a larger file is cut; at least 5 MiB, for S3's sake.

    Raises:
        ConfigError: The URL names no store.
        ModuleNotFoundError: aiobotocore is not installed; `build_callbacks` makes a BrokenAdapterError of it.

    Example:
        >>> store, prefix = open_store("file:///tmp/checkpoints")
        >>> prefix + "run-1/step-100.pt"
        'run-1/step-100.pt'
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        from evsys_adapters.checkpoints.folder_store import FolderStore

        return FolderStore(Path(unquote(parts.path))), ""
    if parts.scheme == "s3" and parts.netloc:
        if find_spec("aiobotocore") is None:
            raise ModuleNotFoundError('S3 needs aiobotocore; pip install "evsys-bus[s3]"', name="aiobotocore")
        from evsys_adapters.checkpoints.s3_store import S3Store

        prefix = url.removeprefix("s3://").partition("/")[2].strip("/")
        prefix = prefix and f"{prefix}/"
        store = S3Store(
            parts.netloc,
            prefix=prefix,
            endpoint=endpoint,
            region=region,
            path_style=endpoint is not None if path_style is None else path_style,
            profile=profile,
            concurrency=concurrency,
            part_bytes=part_bytes,
        )
        return store, prefix
    raise ConfigError(f"{url!r} names no object store", fix="write s3://bucket/prefix or file:///directory")
