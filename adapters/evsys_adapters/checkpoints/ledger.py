"""`UploadLedger`: records uploads in progress and the parts already sent, synced to disk before they are relied on.

One file per upload: its first line is the `UploadPlan`, every further line a part that the store has. A torn last line
means that the part is sent again. The ledger is independent of stores: uploads are looked up by store name and key.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec

from evsys_bus.files import load_file, replace_file


class FileIdentity(msgspec.Struct, frozen=True):
    """Metadata that identify a file's content without reading it."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the identity from a file status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def identity_of(path: str) -> FileIdentity | None:
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
        _read(file, set_aside=True)
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
        return _read(self._file(where, key), set_aside=True)

    def uploads_under(self, where: str, prefix: str) -> list[UploadPlan]:
        """Return the uploads to keys with this prefix."""
        found = (_read(path) for path in self._directory.glob("*.upload"))
        return [each[0] for each in found if each and each[0].where == where and each[0].key.startswith(prefix)]

    def remove(self, where: str, key: str) -> None:
        """Remove the record of the upload to the key."""
        with suppress(IsADirectoryError, PermissionError, NotADirectoryError):  # not a file of ours; it is quarantined
            self._file(where, key).unlink(missing_ok=True)

    def _file(self, where: str, key: str) -> Path:
        name = hashlib.sha256(f"{where}\0{key}".encode()).hexdigest()[:32]
        return self._directory / f"{name}.upload"


def _read(path: Path, *, set_aside: bool = False) -> tuple[UploadPlan, dict[int, UploadedPart]] | None:
    """Return the record of an upload; None if it is missing or damaged, so that the upload is restarted."""
    return load_file(path, _decode, quarantine=set_aside)


def _decode(content: bytes) -> tuple[UploadPlan, dict[int, UploadedPart]]:
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
