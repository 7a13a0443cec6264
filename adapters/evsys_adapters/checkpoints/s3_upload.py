"""Multipart uploads to S3: resumable by any process with the ledger, and atomic.

    planned    the file's digests are in the ledger
    started    the server's upload ID is in the ledger
    sent       each part confirmed by the server is in the ledger before the next one is sent in its place
    completed  on condition that the key is unused; then size and digest are verified

After a restart the ledger is compared with the server's list of parts (ListParts), and only the rest is sent. An upload
that the server does not know was completed with the response lost, or is restarted.
"""

import base64
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import anyio
import msgspec
from anyio import to_thread

from evsys_adapters.checkpoints.s3_connection import (
    DENIED,
    UNSUPPORTED_STATUSES,
    S3Connection,
    S3ResponseError,
)
from evsys_adapters.checkpoints.store import (
    ConflictError,
    FileIdentity,
    ProgressCallback,
    Stored,
    UploadedPart,
    UploadLedger,
    UploadPlan,
    missing_file_error,
    retrying,
)
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, RetryLaterError

MAX_PARTS: Final = 10_000
"""S3's limit."""
MAX_RESTARTS: Final = 3
"""How often an upload is restarted because its file changes."""
COMPLETE_SECONDS: Final = 600.0
"""Servers may take minutes to assemble a large object."""
_ANSWERS_TO_COMPLETE: Final = frozenset({"EntityTooSmall", "InvalidPart", "InvalidPartOrder", "MalformedXML"})
"""Codes about the parts, and not about the condition."""
MIN_BYTES_PER_SECOND: Final = 50_000
"""A slower upload of a part times out."""


class Bucket(Protocol):
    """The methods of the store that an upload needs."""

    part_bytes: int

    async def put_whole(self, expected: Stored, data: bytes) -> Stored:
        """Send a small object in one request."""
        ...

    async def existing(self, expected: Stored, *, assume_missing: bool = False) -> Stored | None:
        """Return the object if it has this content, None if there is none; raises ConflictError for other content."""
        ...


class FileUpload:
    """The execution of one `ObjectStore.put_file`."""

    def __init__(
        self,
        bucket: Bucket,
        connection: S3Connection,
        key: str,
        path: Path,
        ledger: UploadLedger,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._bucket = bucket
        self._connection = connection
        self._key = key
        self._path = path
        self._ledger = ledger
        self._on_progress = on_progress

    async def run(self) -> Stored:
        """See `ObjectStore.put_file`."""
        for _ in range(MAX_RESTARTS):
            with self._open() as file:
                source = FileIdentity.of(os.fstat(file.fileno()))
                try:
                    stored = await self._put(file, source)
                except ConflictError:
                    await self._abort()
                    raise
                except DeliveryError:
                    if self._is_unchanged(file, source):
                        raise
                    stored = None
            if stored is not None:
                await to_thread.run_sync(self._ledger.remove, self._connection.where, self._key)
                if stored.size > self._bucket.part_bytes:
                    with suppress(DeliveryError):  # the file is stored already
                        await abort_uploads(self._connection, self._key)  # leftovers of a lost ledger
                self._report_progress(stored.size, stored.size)
                return stored
            await self._abort()
        raise RetryLaterError(f"{self._path} changes while it is sent")

    async def _put(self, file: BinaryIO, source: FileIdentity) -> Stored | None:
        """Store the file; returns None if it changed."""
        plan, parts = await self._load_or_make_plan(file, source)
        expected = Stored(self._key, source.size, plan.sha256)
        if plan.upload_id is None:
            existing = await self._bucket.existing(expected, assume_missing=True)
            if existing is not None:
                return existing
            if source.size <= plan.part_bytes:
                data = await to_thread.run_sync(os.pread, file.fileno(), source.size, 0)
                return await self._bucket.put_whole(expected, data) if self._is_unchanged(file, source) else None
            await to_thread.run_sync(self._ledger.begin, plan)
            params: dict[str, Any] = {"Metadata": {"sha256": plan.sha256}}
            if self._connection.features.checks_digests:
                params["ChecksumAlgorithm"] = "SHA256"
            reply = await self._connection.call("create_multipart_upload", Key=self._key, **params)
            plan = msgspec.structs.replace(plan, upload_id=reply["UploadId"])
            await to_thread.run_sync(self._ledger.begin, plan)
        sent = await self._send(file, plan, parts)
        if not self._is_unchanged(file, source):
            return None
        completed = sent and await self._complete(plan, parts)
        existing = await self._bucket.existing(expected)
        if existing is None or not completed:
            await self._abort()
        if existing is None:
            raise RetryLaterError(f"{self._connection.where} lost the upload to {self._key}; it is restarted")
        return existing

    async def _load_or_make_plan(
        self, file: BinaryIO, source: FileIdentity
    ) -> tuple[UploadPlan, dict[int, UploadedPart]]:
        """Return the plan of the upload, and the parts that the server has."""
        where = self._connection.where
        found = await to_thread.run_sync(self._ledger.find, where, self._key)
        if found is not None and found[0].source == source:
            plan, parts = found
            confirmed = None if plan.upload_id is None else await self._confirmed_parts(plan, parts)
            if confirmed is not None:
                return plan, confirmed
            if plan.upload_id is None:  # the server may have started it
                await self._abort()
            return msgspec.structs.replace(plan, upload_id=None), {}
        if found is not None:
            await self._abort()
        part_bytes = max(self._bucket.part_bytes, -(-source.size // MAX_PARTS))
        sha256, part_digests = await digest_parts(file.fileno(), source.size, part_bytes)
        return UploadPlan(where, self._key, str(self._path), source, part_bytes, sha256, part_digests), {}

    async def _confirmed_parts(
        self, plan: UploadPlan, parts: dict[int, UploadedPart]
    ) -> dict[int, UploadedPart] | None:
        """Return the parts of the ledger that the server confirms; None if it does not know the upload."""
        try:
            server_parts = await self._connection.pages(
                "list_parts", "Parts", expect=DENIED, Key=self._key, UploadId=plan.upload_id
            )
        except S3ResponseError as error:
            if error.error_code in DENIED or error.status in UNSUPPORTED_STATUSES:
                return parts  # it confirmed each of them; if one is missing, it refuses to complete the upload
            if error.error_code != "NoSuchUpload":
                raise
            return None
        sizes = {part["PartNumber"]: (_bare_tag(part["ETag"]), part["Size"]) for part in server_parts}
        return {
            number: part
            for number, part in parts.items()
            if sizes.get(number) == (_bare_tag(part.tag), _size(plan, number))
        }

    async def _send(self, file: BinaryIO, plan: UploadPlan, parts: dict[int, UploadedPart]) -> bool:
        """Send the missing parts concurrently; after the first failure no further part is started.

        Returns:
            Whether the server still knows the upload.
        """
        missing = iter([number for number in range(1, len(plan.digests) + 1) if number not in parts])
        errors: list[DeliveryError | OSError] = []

        async def work() -> None:
            for number in missing:
                try:
                    parts[number] = await self._send_part(file.fileno(), plan, number)
                except (DeliveryError, OSError) as error:  # OSError: the ledger's disk
                    errors.append(error)
                if errors:
                    return
                self._report_progress(sum(_size(plan, each) for each in parts), plan.source.size)

        self._report_progress(sum(_size(plan, each) for each in parts), plan.source.size)
        async with anyio.create_task_group() as group:
            for _ in range(self._connection.concurrency):
                group.start_soon(work)
        if any(isinstance(each, S3ResponseError) and each.error_code == "NoSuchUpload" for each in errors):
            return False
        if errors:
            raise errors[0]
        return True

    async def _send_part(self, file: int, plan: UploadPlan, number: int) -> UploadedPart:
        """Send one part and record it."""
        size = _size(plan, number)
        reply: dict[str, Any] = await retrying()(
            self._connection.call,
            "upload_part",
            Key=self._key,
            UploadId=plan.upload_id,
            PartNumber=number,
            Body=PartBody(file, (number - 1) * plan.part_bytes, size),
            ContentLength=size,
            **self._checksum(plan, number),
            seconds=60 + size / MIN_BYTES_PER_SECOND,
        )
        part = UploadedPart(number, reply["ETag"])
        await to_thread.run_sync(self._ledger.add_part, plan, part)
        return part

    async def _complete(self, plan: UploadPlan, parts: dict[int, UploadedPart]) -> bool:
        """Complete the upload; returns False if the object has to be checked instead."""
        listed = [
            {"PartNumber": number, "ETag": part.tag, **self._checksum(plan, number)}
            for number, part in sorted(parts.items())
        ]

        async def complete(**condition: Any) -> None:
            await self._connection.call(
                "complete_multipart_upload",
                Key=self._key,
                UploadId=plan.upload_id,
                MultipartUpload={"Parts": listed},
                seconds=COMPLETE_SECONDS,
                **condition,
            )

        try:
            if self._connection.features.create_conditions:
                try:
                    return await complete(IfNoneMatch="*") is None
                except S3ResponseError as error:
                    if error.status not in UNSUPPORTED_STATUSES or error.error_code in _ANSWERS_TO_COMPLETE:
                        raise
            if await self._bucket.existing(Stored(self._key, plan.source.size, plan.sha256)) is not None:
                return False
            await complete()
        except S3ResponseError as error:
            if error.error_code not in {"NoSuchUpload", "PreconditionFailed", "InvalidPart"}:
                raise
            return False
        return True

    def _checksum(self, plan: UploadPlan, number: int) -> dict[str, Any]:
        """Return the digest of a part as a param of a request, if the server knows digests."""
        if not self._connection.features.checks_digests:
            return {}
        return {"ChecksumSHA256": base64_of(plan.digests[number - 1])}

    async def _abort(self) -> None:
        found = await to_thread.run_sync(self._ledger.find, self._connection.where, self._key)
        await abort_uploads(self._connection, self._key, found and found[0].upload_id)
        await to_thread.run_sync(self._ledger.remove, self._connection.where, self._key)

    def _open(self) -> BinaryIO:
        try:
            return self._path.open("rb")
        except FileNotFoundError as error:
            raise missing_file_error(self._path) from error

    def _is_unchanged(self, file: BinaryIO, source: FileIdentity) -> bool:
        """Whether the file is unchanged. A removed file is still open, and counts as unchanged."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            now = os.fstat(file.fileno())
        return FileIdentity.of(now) == source

    def _report_progress(self, done: int, size: int) -> None:
        if self._on_progress is not None:
            self._on_progress(done, size)


async def abort_uploads(connection: S3Connection, key: str, upload_id: str | None = None) -> None:
    """Abort all uploads to exactly this key that the server lists; a checkpoint's key has one writer.

    A missing permission is logged, and the parts stay until a rule of the bucket removes them.

    Args:
        connection: The connection.
        key: The key.
        upload_id: An upload that is known; all that is aborted if the server does not list uploads.
    """
    upload_ids = [] if upload_id is None else [upload_id]
    try:
        listed = await connection.pages("list_multipart_uploads", "Uploads", expect=DENIED, Prefix=key)
        upload_ids += [each["UploadId"] for each in listed if each["Key"] == key]
    except S3ResponseError as error:
        if error.error_code not in DENIED and error.status not in UNSUPPORTED_STATUSES:
            raise
    for each in dict.fromkeys(upload_ids):
        try:
            await connection.call("abort_multipart_upload", expect=DENIED, Key=key, UploadId=each)
        except S3ResponseError as error:
            if error.error_code == "NoSuchUpload":
                continue
            log().warning(
                "checkpoint.upload_not_aborted",
                key=key,
                where=connection.where,
                error=error.error_code,
                fix="grant s3:AbortMultipartUpload, or let a lifecycle rule of the bucket remove incomplete uploads",
            )


def base64_of(digest: str) -> str:
    """Convert a hexadecimal digest to Base64, as S3 expects it."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _bare_tag(tag: str) -> str:
    """Return an ETag without its quotes, which some servers leave out of listings."""
    return tag.strip('"')


def _size(plan: UploadPlan, number: int) -> int:
    return min(plan.part_bytes, plan.source.size - (number - 1) * plan.part_bytes)


_READ_BYTES: Final = 1 << 20


class TruncatedFileError(OSError):
    """The file ended before its part did."""


class PartBody:
    """A part of an open file as a request body; it is read while it is sent, to save memory."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._size = size
        self._read_offset = 0

    def read(self, size: int) -> bytes:
        """Read the next bytes, for signing; sending iterates instead."""
        chunk = os.pread(self._file, min(size, self._size - self._read_offset), self._offset + self._read_offset)
        self._read_offset += len(chunk)
        return chunk

    def seek(self, position: int) -> int:
        """Set the position of `read`."""
        self._read_offset = position
        return position

    def tell(self) -> int:
        """Return the position of `read`."""
        return self._read_offset

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the content in chunks."""
        done = 0
        while done < self._size:
            count = min(_READ_BYTES, self._size - done)
            chunk = await to_thread.run_sync(os.pread, self._file, count, self._offset + done)
            if not chunk:
                raise TruncatedFileError(f"{self._size - done} bytes of a part are missing")
            done += len(chunk)
            yield chunk


async def digest_parts(file: int, size: int, part_bytes: int) -> tuple[str, list[str]]:
    """Return the SHA-256 digests of the whole file and of each of its parts, in hexadecimal."""
    whole, parts = hashlib.sha256(), list[str]()
    for offset in range(0, size, part_bytes):
        parts.append(await to_thread.run_sync(_digest, file, offset, min(part_bytes, size - offset), whole.update))
    return whole.hexdigest(), parts


def _digest(file: int, offset: int, size: int, on_chunk: Callable[[bytes], None]) -> str:
    digest = hashlib.sha256()
    for start in range(offset, offset + size, _READ_BYTES):
        chunk = os.pread(file, min(_READ_BYTES, offset + size - start), start)
        digest.update(chunk)
        on_chunk(chunk)
    return digest.hexdigest()
