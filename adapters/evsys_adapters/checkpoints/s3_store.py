"""`S3Store`: objects in a bucket.

Single requests and downloads are here; `s3_upload` sends files in parts over an `s3_connection`. Temporary errors are
raised as RetryLaterError and retried by the courier; only parts and downloads are retried here.

Integrity does not depend on the connection: uploads carry their SHA-256, which the server verifies. `probe` tests
whether it does; for a server that does not, the payload is signed, which every server verifies.
"""

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from anyio import to_thread

from evsys_adapters.checkpoints.copying import HashingWriter, copy_into
from evsys_adapters.checkpoints.s3_connection import REPLY_SECONDS, S3Connection, S3ResponseError
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
    identity_of,
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
        self._supports_conditions = True

    async def open(self) -> None:
        """See `ObjectStore.open`."""

    async def close(self) -> None:
        """See `ObjectStore.close`. A later request reconnects with current credentials."""
        self._probed = False
        await self._connection.close()

    async def probe(self) -> None:
        """See `ObjectStore.probe`."""
        key, data = f"{self._prefix}.evsys-bus-probe-{token_hex(4)}", b"evsys-bus was here"
        other = base64_of(hashlib.sha256(b"something else").hexdigest())
        try:
            await self._connection.call("put_object", expect=["BadDigest"], Key=key, Body=data, ChecksumSHA256=other)
        except S3ResponseError as error:
            if error.status != 400:  # noqa: PLR2004
                raise
        else:
            if not self._connection.signs_payload:
                self._connection.signs_payload = True
                await self._connection.close()
        await self._connection.call("put_object", Key=key, Body=data)
        await self._connection.call("delete_object", Key=key)
        self._probed = True

    async def put_file(
        self, key: str, path: Path, *, ledger: UploadLedger, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.put_file`."""
        check_key(key)
        if not self._probed:
            await self.probe()
        return await FileUpload(self, self._connection, key, path, ledger, on_progress).run()

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """See `ObjectStore.put_bytes`."""
        check_key(key)
        expected = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        return await self.put_whole(expected, data, replace=replace)

    async def get_file(
        self, key: str, path: Path, *, stored: Stored | None = None, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.get_file`. An interrupted download is resumed, even by another process."""
        head = await self._head(key)
        remote = Stored(key, head["ContentLength"], head["Metadata"].get("sha256"))
        check_size(key, remote.size, stored, self.where)
        return await copy_into(
            path, remote, stored, self.where, on_progress, partial(self._read, key, head, on_progress)
        )

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """See `ObjectStore.change_bytes`. Uses ``If-Match`` and ``If-None-Match`` if the server supports them."""
        check_key(key)
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
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            try:
                await self._put(key, changed, condition if self._supports_conditions else {})
            except S3ResponseError as error:
                if error.error_code == "PreconditionFailed" or (tag is not None and error.status == 404):  # noqa: PLR2004
                    continue
                if error.status not in {400, 501} or not self._supports_conditions:
                    raise
                self._supports_conditions = False
            else:
                return self._supports_conditions
        raise RetryLaterError(f"{key} in {self.where} is changed by other processes all the time")

    async def get_bytes(self, key: str, *, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """See `ObjectStore.get_bytes`."""
        return (await self._get(key, max_bytes))[0]

    async def _get(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """Return a small object and its ETag."""
        try:
            async with self._connection.requesting("GetObject") as client:
                reply = await client.get_object(Bucket=self._connection.bucket, Key=key)
                async with reply["Body"] as body:
                    if int(reply.get("ContentLength") or 0) > max_bytes:
                        raise too_large_error(key, self.where, max_bytes)
                    data: bytes = await body.read()
        except S3ResponseError as error:
            raise self._missing_error(key, error) from error
        actual = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        check_content(actual, Stored(key, len(data), reply["Metadata"].get("sha256")), self.where)
        return data, reply["ETag"]

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
            if await to_thread.run_sync(identity_of, plan.path) == plan.source:
                continue
            await abort_uploads(self._connection, plan.key)
            await to_thread.run_sync(ledger.remove, self.where, plan.key)
            ended += 1
        return ended

    async def put_whole(self, expected: Stored, data: bytes, *, replace: bool = False) -> Stored:
        """Send a small object in one request."""
        try:
            await self._put(expected.key, data, {} if replace else {"IfNoneMatch": "*"})
        except S3ResponseError as error:
            if error.error_code != "PreconditionFailed":
                raise
            if await self.existing(expected) is None:
                raise RetryLaterError(f"{expected.key} was removed from {self.where} while it was stored") from error
        return expected

    async def _put(self, key: str, data: bytes, condition: dict[str, Any]) -> None:
        """Send the data in one request."""
        sha256 = hashlib.sha256(data).hexdigest()
        await self._connection.call(
            "put_object",
            Key=key,
            Body=data,
            ChecksumSHA256=base64_of(sha256),
            Metadata={"sha256": sha256},
            **condition,
        )

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
        size, sha256 = head["ContentLength"], head["Metadata"].get("sha256")
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
            return await self._connection.call("head_object", Key=key)
        except S3ResponseError as error:
            raise self._missing_error(key, error) from error

    def _missing_error(self, key: str, error: S3ResponseError) -> StoreError:
        """Convert an error response of a read to an error about the object."""
        if error.status != 404:  # noqa: PLR2004
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
