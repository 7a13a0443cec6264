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

from evsys_adapters.checkpoints.copying import Copy, copy_into
from evsys_adapters.checkpoints.ledger import UploadLedger, source_of
from evsys_adapters.checkpoints.s3_connection import REPLY_SECONDS, S3Connection
from evsys_adapters.checkpoints.s3_errors import WordError
from evsys_adapters.checkpoints.s3_upload import FileUpload, abort_uploads, again, base64_of
from evsys_adapters.checkpoints.store import (
    MOST_SMALL_BYTES,
    PART_BYTES,
    ConflictError,
    DamagedError,
    MissingError,
    Stored,
    StoreError,
    Told,
    check,
    check_key,
    check_size,
    too_large,
)
from evsys_bus.errors import ParkedError, RetryLaterError

READ_BYTES: Final = 1 << 20
_CHANGES: Final = 20
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
        self._replaces_on_condition = True

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
        except WordError as error:
            if error.status != 400:  # noqa: PLR2004
                raise
        else:
            if not self._connection.signs:
                self._connection.signs = True
                await self._connection.close()
        await self._connection.call("put_object", Key=key, Body=data)
        await self._connection.call("delete_object", Key=key)
        self._probed = True

    async def put_file(self, key: str, path: Path, *, ledger: UploadLedger, told: Told | None = None) -> Stored:
        """See `ObjectStore.put_file`."""
        check_key(key)
        if not self._probed:
            await self.probe()
        return await FileUpload(self, self._connection, key, path, ledger, told).run()

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """See `ObjectStore.put_bytes`."""
        check_key(key)
        wanted = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        return await self.put_whole(wanted, data, replace=replace)

    async def get_file(self, key: str, path: Path, *, stored: Stored | None = None, told: Told | None = None) -> Stored:
        """See `ObjectStore.get_file`. An interrupted download is resumed, even by another process."""
        head = await self._head(key)
        theirs = Stored(key, head["ContentLength"], head["Metadata"].get("sha256"))
        check_size(key, theirs.size, stored, self.where)
        return await copy_into(path, theirs, stored, self.where, told, partial(self._read, key, head, told))

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """See `ObjectStore.change_bytes`. Uses ``If-Match`` and ``If-None-Match`` if the server supports them."""
        check_key(key)
        for _ in range(_CHANGES):
            data, tag = None, None
            try:
                data, tag = await self._get(key, MOST_SMALL_BYTES)
            except DamagedError:  # it is replaced in any case
                tag = (await self._head(key))["ETag"]
            except MissingError:
                pass
            changed = change(data)
            if changed is None:
                return True
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            try:
                await self._put(key, changed, condition if self._replaces_on_condition else {})
            except WordError as error:
                if error.word == "PreconditionFailed" or (tag is not None and error.status == 404):  # noqa: PLR2004
                    continue
                if error.status not in {400, 501} or not self._replaces_on_condition:
                    raise
                self._replaces_on_condition = False
            else:
                return self._replaces_on_condition
        raise RetryLaterError(f"{key} in {self.where} is changed by other processes all the time")

    async def get_bytes(self, key: str, *, most_bytes: int = MOST_SMALL_BYTES) -> bytes:
        """See `ObjectStore.get_bytes`."""
        return (await self._get(key, most_bytes))[0]

    async def _get(self, key: str, most_bytes: int) -> tuple[bytes, str]:
        """Return a small object and its ETag."""
        try:
            async with self._connection.requesting("GetObject") as client:
                reply = await client.get_object(Bucket=self._connection.bucket, Key=key)
                async with reply["Body"] as body:
                    if int(reply.get("ContentLength") or 0) > most_bytes:
                        raise too_large(key, self.where, most_bytes)
                    data: bytes = await body.read()
        except WordError as error:
            raise self._missing(key, error) from error
        got = Stored(key, len(data), hashlib.sha256(data).hexdigest())
        check(got, Stored(key, len(data), reply["Metadata"].get("sha256")), self.where)
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
        for plan in await to_thread.run_sync(ledger.under, self.where, prefix):
            if await to_thread.run_sync(source_of, plan.path) == plan.source:
                continue
            await abort_uploads(self._connection, plan.key)
            await to_thread.run_sync(ledger.forget, self.where, plan.key)
            ended += 1
        return ended

    async def put_whole(self, wanted: Stored, data: bytes, *, replace: bool = False) -> Stored:
        """Send a small object in one request."""
        try:
            await self._put(wanted.key, data, {} if replace else {"IfNoneMatch": "*"})
        except WordError as error:
            if error.word != "PreconditionFailed":
                raise
            if await self.standing(wanted) is None:
                raise RetryLaterError(f"{wanted.key} was removed from {self.where} while it was stored") from error
        return wanted

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

    async def standing(self, wanted: Stored, *, guess: bool = False) -> Stored | None:
        """Return the object if it has the expected content, None if there is none.

        Args:
            wanted: The expected content.
            guess: Treat a denied request as a missing object: S3 denies it without permission to list the bucket.

        Raises:
            ConflictError: The object has other content.
        """
        try:
            head = await self._head(wanted.key)
        except MissingError:
            return None
        except ParkedError:
            if guess:
                return None
            raise
        size, sha256 = head["ContentLength"], head["Metadata"].get("sha256")
        if size == wanted.size and sha256 is None:  # it was not stored by us
            there = Copy()
            await self._read(wanted.key, head, None, there)
            sha256 = there.stored(wanted.key).sha256
        if (size, sha256) != (wanted.size, wanted.sha256):
            raise ConflictError(
                f"{wanted.key} in {self.where} has other content: {size} bytes, and not the {wanted.size} to be stored",
                fix="store this run under another prefix, or move that object away",
            )
        return wanted

    async def _head(self, key: str) -> dict[str, Any]:
        try:
            return await self._connection.call("head_object", Key=key)
        except WordError as error:
            raise self._missing(key, error) from error

    def _missing(self, key: str, error: WordError) -> StoreError:
        """Convert an error response of a read to an error about the object."""
        if error.status != 404:  # noqa: PLR2004
            return error
        return MissingError(f"{key} is not in {self.where}", fix="see what is stored: evsys-bus checkpoints RUN")

    async def _read(self, key: str, head: dict[str, Any], told: Told | None, copy: Copy) -> None:
        """Add the missing content of an object to the copy."""
        size = int(head["ContentLength"])

        async def read_on() -> None:
            start = {"Range": f"bytes={copy.size}-"} if copy.size else {}
            async with self._connection.requesting("GetObject", seconds=None) as client:
                async with asyncio.timeout(REPLY_SECONDS):
                    reply = await client.get_object(
                        Bucket=self._connection.bucket, Key=key, IfMatch=head["ETag"], **start
                    )
                async with reply["Body"] as body:
                    while True:
                        async with asyncio.timeout(REPLY_SECONDS):
                            piece: bytes = await body.read(READ_BYTES)
                        if not piece:
                            break
                        await to_thread.run_sync(copy.add, piece)
                        if told is not None:
                            told(copy.size, size)
            if copy.size < size:
                raise RetryLaterError(f"{key} ended after {copy.size} of {size} bytes")

        try:
            await again()(read_on)
        except WordError as error:
            if error.word not in {"PreconditionFailed", "NoSuchKey"}:
                raise
            raise DamagedError(f"{key} in {self.where} was replaced while it was fetched", fix="fetch again") from error
