"""`S3Store`: objects in a bucket.

Single requests and downloads are here; `s3_upload` sends files in parts over an `s3_connection`. Temporary errors are
raised as RetryLaterError and retried by the courier; only parts and downloads are retried here.

Integrity does not depend on the connection: uploads carry their SHA-256, which the server verifies. `s3_probe` finds
out whether it does; for a server that does not, the payload is signed. Likewise a server without conditional writes is
asked for the key before it is written.
"""

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from anyio import to_thread

from evsys_adapters.checkpoints.copying import HashingWriter, copy_into
from evsys_adapters.checkpoints.s3_connection import (
    DENIED,
    REPLY_SECONDS,
    UNSUPPORTED_STATUSES,
    S3Connection,
    S3Features,
    S3ResponseError,
)
from evsys_adapters.checkpoints.s3_probe import find_features, log_limits
from evsys_adapters.checkpoints.s3_upload import FileUpload, abort_uploads, base64_of
from evsys_adapters.checkpoints.store import (
    MAX_SMALL_BYTES,
    PART_BYTES,
    ConflictError,
    DamagedError,
    MissingError,
    ProgressCallback,
    Stored,
    StoreError,
    UploadLedger,
    check_content,
    check_key,
    check_size,
    file_identity_at,
    retrying,
    too_large_error,
)
from evsys_bus.errors import ParkedError, RetryLaterError

READ_BYTES: Final = 1 << 20
_MAX_CHANGE_ATTEMPTS: Final = 20
"""Attempts of a conditional change while other writers interfere."""


class S3Store:
    """An `ObjectStore` in a bucket. It belongs to one event loop."""

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool = False,
        profile: str | None = None,
        concurrency: int = 4,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.part_bytes = part_bytes
        self._prefix = prefix
        self._connection = S3Connection(
            bucket,
            endpoint=endpoint,
            region=region,
            path_style=path_style,
            profile=profile,
            concurrency=concurrency,
        )
        self.where = self._connection.where
        self._probed = False
        self._probe_lock = asyncio.Lock()
        self._logged_features: S3Features | None = None

    async def open(self) -> None:
        """See `ObjectStore.open`."""

    async def close(self) -> None:
        """See `ObjectStore.close`. A later request reconnects with current credentials."""
        self._probed = False
        await self._connection.close()

    async def probe(self) -> None:
        """See `ObjectStore.probe`."""
        features = await find_features(self._connection, self._prefix)
        self._probed = True
        if features != self._logged_features:
            log_limits(self.where, features)
            self._logged_features = features

    async def put_file(
        self, key: str, path: Path, *, ledger: UploadLedger, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.put_file`."""
        check_key(key)
        await self._ensure_probed()
        return await FileUpload(self, self._connection, key, path, ledger, on_progress).run()

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """See `ObjectStore.put_bytes`."""
        check_key(key)
        await self._ensure_probed()
        expected = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        if not replace and not self._connection.features.create_conditions and await self.existing(expected):
            return expected
        return await self.put_whole(expected, data, replace=replace)

    async def get_file(
        self, key: str, path: Path, *, stored: Stored | None = None, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.get_file`. An interrupted download is resumed, even by another process."""
        head = await self._head(key)
        remote = Stored(key, head["ContentLength"], _digest_of(head))
        check_size(key, remote.size, stored, self.where)
        return await copy_into(
            path, remote, stored, self.where, on_progress, partial(self._read, key, head, on_progress)
        )

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """See `ObjectStore.change_bytes`. Uses ``If-Match`` and ``If-None-Match`` if the server supports them."""
        check_key(key)
        await self._ensure_probed()
        for _ in range(_MAX_CHANGE_ATTEMPTS):
            data, tag = None, None
            try:
                data, tag = await self._get(key, MAX_SMALL_BYTES)
            except DamagedError:  # it is replaced in any case
                tag = (await self._head(key))["ETag"]
            except MissingError:
                pass
            changed = change(data)
            if changed is None:
                return True
            features = self._connection.features
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            is_supported = features.create_conditions if tag is None else features.replace_conditions
            try:
                await self._put(key, changed, condition if is_supported else {})
            except S3ResponseError as error:
                if error.error_code == "PreconditionFailed" or (tag is not None and error.status == 404):  # noqa: PLR2004
                    continue
                if error.status not in UNSUPPORTED_STATUSES or not is_supported:
                    raise
                self._connection.features = msgspec.structs.replace(features, replace_conditions=False)
            else:
                return is_supported
        raise RetryLaterError(f"{key} in {self.where} is changed by other processes all the time")

    async def get_bytes(self, key: str, *, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """See `ObjectStore.get_bytes`."""
        return (await self._get(key, max_bytes))[0]

    async def _get(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """Return a small object and its ETag."""
        try:
            async with self._connection.requesting("GetObject", expect=self._missing_codes) as client:
                reply = await client.get_object(Bucket=self._connection.bucket, Key=key)
                async with reply["Body"] as body:
                    if int(reply.get("ContentLength") or 0) > max_bytes:
                        raise too_large_error(key, self.where, max_bytes)
                    data: bytes = await body.read()
        except S3ResponseError as error:
            raise self._missing_error(key, error) from error
        actual = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        check_content(actual, Stored(key, len(data), _digest_of(reply)), self.where)
        return data, reply.get("ETag", "")

    async def names(self, prefix: str) -> list[Stored]:
        """See `ObjectStore.names`."""
        found = await self._connection.pages("list_objects_v2", "Contents", Prefix=prefix)
        return sorted((Stored(each["Key"], each["Size"]) for each in found), key=lambda each: each.key)

    async def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        await self._connection.call("delete_object", Key=key)

    async def abort_abandoned(self, prefix: str, ledger: UploadLedger) -> int:
        """See `ObjectStore.abort_abandoned`."""
        ended = 0
        for plan in await to_thread.run_sync(ledger.uploads_under, self.where, prefix):
            if await to_thread.run_sync(file_identity_at, plan.path) == plan.source:
                continue
            await abort_uploads(self._connection, plan.key, plan.upload_id)
            await to_thread.run_sync(ledger.remove, self.where, plan.key)
            ended += 1
        return ended

    async def put_whole(self, expected: Stored, data: bytes, *, replace: bool = False) -> Stored:
        """Send a small object in one request. Without conditions, the caller has looked the key up before."""
        condition = {"IfNoneMatch": "*"} if self._connection.features.create_conditions and not replace else {}
        try:
            await self._put(expected.key, data, condition)
        except S3ResponseError as error:
            if error.error_code != "PreconditionFailed":
                raise
            if await self.existing(expected) is None:
                raise RetryLaterError(f"{expected.key} was removed from {self.where} while it was stored") from error
        return expected

    async def _put(self, key: str, data: bytes, condition: dict[str, Any]) -> None:
        """Send the data in one request."""
        sha256 = hashlib.sha256(data).hexdigest()
        checksum = {"ChecksumSHA256": base64_of(sha256)} if self._connection.features.checks_digests else {}
        await self._connection.call(
            "put_object", Key=key, Body=data, Metadata={"sha256": sha256}, **checksum, **condition
        )

    async def _ensure_probed(self) -> None:
        async with self._probe_lock:
            if not self._probed:
                await self.probe()

    async def existing(self, expected: Stored, *, assume_missing: bool = False) -> Stored | None:
        """Return the object if it has the expected content, None if there is none.

        Args:
            expected: The expected content.
            assume_missing: Treat a denied request as a missing object: S3 denies it without permission to list the
                bucket.

        Raises:
            ConflictError: The object has other content.
        """
        try:
            head = await self._head(expected.key)
        except MissingError:
            return None
        except ParkedError:
            if assume_missing:
                return None
            raise
        size, sha256 = head["ContentLength"], _digest_of(head)
        if size == expected.size and sha256 is None:  # it was not stored by us
            writer = HashingWriter()
            await self._read(expected.key, head, None, writer)
            sha256 = writer.as_stored(expected.key).sha256
        if (size, sha256) != (expected.size, expected.sha256):
            raise ConflictError(
                f"{expected.key} in {self.where} has other content: {size} bytes, and not the {expected.size} "
                "to be stored",
                fix="store this run under another prefix, or move that object away",
            )
        return expected

    async def _head(self, key: str) -> dict[str, Any]:
        try:
            return await self._connection.call("head_object", expect=self._missing_codes, Key=key)
        except S3ResponseError as error:
            raise self._missing_error(key, error) from error

    @property
    def _missing_codes(self) -> tuple[str, ...]:
        """The codes for a missing object, beside status 404."""
        return DENIED if self._connection.features.hides_missing else ()

    def _missing_error(self, key: str, error: S3ResponseError) -> StoreError:
        """Convert an error response of a read to an error about the object."""
        if error.status != 404 and error.error_code not in self._missing_codes:  # noqa: PLR2004
            return error
        return MissingError(f"{key} is not in {self.where}", fix="see what is stored: evsys-bus checkpoints RUN")

    async def _read(
        self, key: str, head: dict[str, Any], on_progress: ProgressCallback | None, writer: HashingWriter
    ) -> None:
        """Add the missing content of an object to the copy."""
        size = int(head["ContentLength"])

        async def read_on() -> None:
            start = {"Range": f"bytes={writer.size}-"} if writer.size else {}
            async with self._connection.requesting("GetObject", seconds=None) as client:
                async with asyncio.timeout(REPLY_SECONDS):
                    reply = await client.get_object(
                        Bucket=self._connection.bucket, Key=key, IfMatch=head["ETag"], **start
                    )
                async with reply["Body"] as body:
                    while True:
                        async with asyncio.timeout(REPLY_SECONDS):
                            chunk: bytes = await body.read(READ_BYTES)
                        if not chunk:
                            break
                        await to_thread.run_sync(writer.add, chunk)
                        if on_progress is not None:
                            on_progress(writer.size, size)
            if writer.size < size:
                raise RetryLaterError(f"{key} ended after {writer.size} of {size} bytes")

        try:
            await retrying()(read_on)
        except S3ResponseError as error:
            if error.error_code not in {"PreconditionFailed", "NoSuchKey"}:
                raise
            raise DamagedError(f"{key} in {self.where} was replaced while it was fetched", fix="fetch again") from error


def _digest_of(head: dict[str, Any]) -> str | None:
    """Return the SHA-256 digest that was stored with an object; Google's servers may name it in their own way."""
    metadata = {name.lower(): value for name, value in head.get("Metadata", {}).items()}
    headers = head.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return metadata.get("sha256") or headers.get("x-goog-meta-sha256")
