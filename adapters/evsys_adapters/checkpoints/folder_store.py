"""`FolderStore`: objects as files of a directory, on a network file system or instead of S3 in tests."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, Final

from anyio import to_thread

from evsys_adapters.checkpoints.copying import (
    CHUNK_BYTES,
    MAX_BLOCKING_BYTES,
    HashingWriter,
    copy_into,
    full_disk_as_retry,
    move_into_place,
    partial_path,
    sha256_of,
)
from evsys_adapters.checkpoints.store import (
    MAX_SMALL_BYTES,
    ConflictError,
    DamagedError,
    FileIdentity,
    MissingError,
    ProgressCallback,
    RefusedError,
    Stored,
    UploadLedger,
    UploadPlan,
    check_key,
    check_size,
    missing_file_error,
)
from evsys_bus.disk import OsDisk
from evsys_bus.errors import ParkedError, RetryLaterError
from evsys_bus.files import DamagedFileError, FileLock, load_file, read_file, replace_file

_SMALL_BYTES: Final = 256 << 10
_LOCK_SECONDS: Final = 30.0


class FolderStore:
    """An `ObjectStore` of files: the key is the path below the directory. Digests are computed on request.

    Two processes that write different content to one key at the same moment are not detected: the file system has no
    conditional replacement.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.where = f"file://{directory}"

    async def open(self) -> None:
        """See `ObjectStore.open`."""

    async def probe(self) -> None:
        """See `ObjectStore.probe`."""
        key = f".probe-{os.getpid()}"
        try:
            await self.put_bytes(key, b"evsys-bus was here", replace=True)
            await self.delete(key)
        except OSError as error:
            raise ParkedError(
                f"{self._directory} cannot be written: {error.strerror}",
                fix="mount it, or let this user write there",
            ) from error

    async def put_file(
        self, key: str, path: Path, *, ledger: UploadLedger, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.put_file`. An interrupted copy is restarted."""
        target = self._path(key)
        stored = await to_thread.run_sync(self._put_small, key, path)
        if stored is not None:
            if on_progress is not None:
                on_progress(stored.size, stored.size)
            return stored
        await to_thread.run_sync(self._abort_upload, key, ledger)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise missing_file_error(path) from error
        with file:
            source = FileIdentity.of(os.fstat(file.fileno()))
            if target.exists():
                sha256 = await to_thread.run_sync(sha256_of, path)
                stored = await to_thread.run_sync(self._require_same, key, source.size, sha256)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial_file = partial_path(target, token_hex(6))
                ledger.begin(UploadPlan(self.where, key, str(path), source, upload_id=str(partial_file)))
                with full_disk_as_retry(self.where), partial_file.open("wb") as out:
                    writer = HashingWriter(out.fileno(), self.where)
                    await _read(file, source.size, on_progress, writer)
                    await to_thread.run_sync(writer.finish)
                    stored = writer.as_stored(key)
                    if FileIdentity.of(os.fstat(file.fileno())) != source:
                        raise RetryLaterError(f"{path} changed while it was copied")
                    await to_thread.run_sync(move_into_place, partial_file, target)
        ledger.remove(self.where, key)
        if on_progress is not None:
            on_progress(stored.size, stored.size)
        return stored

    async def put_bytes(self, key: str, data: bytes, *, replace: bool = False) -> Stored:
        """See `ObjectStore.put_bytes`."""
        return await to_thread.run_sync(self._put_bytes, key, data, replace)

    async def get_file(
        self, key: str, path: Path, *, stored: Stored | None = None, on_progress: ProgressCallback | None = None
    ) -> Stored:
        """See `ObjectStore.get_file`. Without ``stored`` only the size is verified."""
        try:
            file = os.fdopen(OsDisk().open_read(str(self._path(key))), "rb")
        except FileNotFoundError as error:
            raise self._missing_error(key) from error
        with file:
            size = os.fstat(file.fileno()).st_size
            check_size(key, size, stored, self.where)
            return await copy_into(
                path, Stored(key, size), stored, self.where, on_progress, partial(_read, file, size, on_progress)
            )

    async def change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        """See `ObjectStore.change_bytes`. Uses a lock of the folder, which must work between the processes."""
        return await to_thread.run_sync(self._change_bytes, key, change)

    async def get_bytes(self, key: str, *, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """See `ObjectStore.get_bytes`."""
        path = self._path(key)
        try:
            return await to_thread.run_sync(lambda: read_file(path, max_bytes=max_bytes))
        except FileNotFoundError as error:
            raise self._missing_error(key) from error
        except DamagedFileError as error:
            raise DamagedError(f"{path} cannot be used: {error}", fix="it was not written by evsys-bus") from error

    async def names(self, prefix: str) -> list[Stored]:
        """See `ObjectStore.names`."""
        return await to_thread.run_sync(lambda: sorted(self._names(prefix), key=lambda each: each.key))

    async def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        path = self._path(key)
        if not path.parent.resolve().is_relative_to(self._directory.resolve()):
            raise RefusedError(f"{path} is behind a link that leaves {self._directory}", fix="remove it by hand")
        await to_thread.run_sync(partial(path.unlink, missing_ok=True))

    async def abort_abandoned(self, prefix: str, ledger: UploadLedger) -> int:
        """See `ObjectStore.abort_abandoned`."""
        return await to_thread.run_sync(self._abort_abandoned, prefix, ledger)

    async def close(self) -> None:
        """See `ObjectStore.close`."""

    def _put_small(self, key: str, path: Path) -> Stored | None:
        """Store a small file without the ledger, whose entries take longer than such a copy; None for a large file."""
        try:
            with path.open("rb") as file:
                source = FileIdentity.of(os.fstat(file.fileno()))
                if source.size > _SMALL_BYTES:
                    return None
                data = file.read(source.size + 1)
                if len(data) != source.size or FileIdentity.of(os.fstat(file.fileno())) != source:
                    raise RetryLaterError(f"{path} changed while it was copied")
        except FileNotFoundError as error:
            raise missing_file_error(path) from error
        return self._put_bytes(key, data, replace=False)

    def _put_bytes(self, key: str, data: bytes, replace: bool) -> Stored:
        path, sha256 = self._path(key), hashlib.sha256(data).hexdigest()
        if path.exists() and not replace:
            return self._require_same(key, len(data), sha256)
        with full_disk_as_retry(self.where):
            replace_file(path, data, mode=0o666)
        return Stored(key, len(data), sha256)

    def _change_bytes(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bool:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY
        lock = FileLock.acquire_exclusive(path.parent, flags=flags, timeout_seconds=_LOCK_SECONDS, disk=OsDisk())
        if lock is None:
            raise RetryLaterError(f"another process has locked {path.parent} for {_LOCK_SECONDS:g} s")
        with lock, full_disk_as_retry(self.where):
            changed = change(load_file(path, bytes, quarantine=True))
            if changed is not None:
                replace_file(path, changed, mode=0o666)
            return lock.is_held or changed is None

    def _names(self, prefix: str) -> Iterator[Stored]:
        for folder, _, files in os.walk(self._directory / prefix.rpartition("/")[0]):
            for name in files:
                path = Path(folder, name)
                key = path.relative_to(self._directory).as_posix()
                if key.startswith(prefix) and not name.endswith(".partial"):
                    size = _size(path)
                    if size is not None:
                        yield Stored(key, size)

    def _abort_abandoned(self, prefix: str, ledger: UploadLedger) -> int:
        plans = ledger.uploads_under(self.where, prefix)
        for plan in plans:  # copies are never resumed, so all of them are abandoned
            self._abort_upload(plan.key, ledger)
        return len(plans)

    def _abort_upload(self, key: str, ledger: UploadLedger) -> None:
        found = ledger.find(self.where, key)
        if found is not None and found[0].upload_id is not None:
            Path(found[0].upload_id).unlink(missing_ok=True)
        ledger.remove(self.where, key)

    def _require_same(self, key: str, size: int, sha256: str) -> Stored:
        """Return the object if it has this content; raises ConflictError otherwise."""
        path = self._path(key)
        if path.stat().st_size != size or sha256_of(path) != sha256:
            raise ConflictError(f"{path} has other content", fix="store this run under another prefix, or move it away")
        return Stored(key, size, sha256)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._directory / key

    def _missing_error(self, key: str) -> MissingError:
        return MissingError(f"{self._path(key)} does not exist", fix="see what is stored: evsys-bus checkpoints RUN")


def _size(path: Path) -> int | None:
    """Return the file's size; None if it was removed meanwhile, or is a dangling link."""
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise


async def _read(file: BinaryIO, size: int, on_progress: ProgressCallback | None, writer: HashingWriter) -> None:
    """Add the missing content of an open file to the copy."""
    while await to_thread.run_sync(_read_chunk, file, writer):
        if on_progress is not None:
            on_progress(writer.size, max(size, writer.size))


def _read_chunk(file: BinaryIO, writer: HashingWriter) -> bool:
    """Add a bounded amount, so that a cancellation does not wait long; returns whether there was any."""
    file.seek(writer.size)
    before = writer.size
    while writer.size - before < MAX_BLOCKING_BYTES and (chunk := file.read(CHUNK_BYTES)):
        writer.add(chunk)
    return writer.size > before
