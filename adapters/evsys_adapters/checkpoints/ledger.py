"""`UploadLedger`: which uploads are under way and what they have sent, on disk before anybody relies on it.

One file per upload, whose first line is its `Plan` and every further one a part that the store has. A torn last line is
a part that is sent again. The ledger knows no store: it is asked by where an object goes, and its key.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec

from evsys_adapters.checkpoints import durable
from evsys_bus.files import load_file, replace_file


class Source(msgspec.Struct, frozen=True):
    """What tells a file's content from another one without reading it."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """That of the file with this status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def source_of(path: str) -> Source | None:
    """That of the file which stands there, if one does."""
    try:
        return Source.of(Path(path).stat())
    except FileNotFoundError:
        return None


class Plan(msgspec.Struct, frozen=True):
    """An upload, as it was begun."""

    where: str
    """The store."""
    key: str
    path: str
    source: Source
    part_bytes: int = 0
    sha256: str = ""
    """Of the whole."""
    digests: list[str] = []
    """Of the parts."""
    upload: str | None = None
    """What the store calls the upload; None while it was not yet heard."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A part that the store has."""

    number: int
    """From 1 on."""
    tag: str
    """What the store calls its content."""


class UploadLedger:
    """The uploads under way, in a directory of their own. One process at a time writes it.

    Its methods block for as long as the disk does.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def begin(self, plan: Plan) -> None:
        """Have the upload on record, in place of an earlier one to the same key."""
        file = self._file(plan.where, plan.key)
        _read(file, set_aside=True)
        replace_file(file, _write(plan) + b"\n")

    def finished(self, plan: Plan, part: Part) -> None:
        """Have it on record that the store has the part."""
        handle = os.open(self._file(plan.where, plan.key), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        with os.fdopen(handle, "ab") as file:  # buffered: all of it is written, or it raises
            file.write(b"\n" + _write(part))  # a torn line before it is ended by this
            durable.sync(file)

    def find(self, where: str, key: str) -> tuple[Plan, dict[int, Part]] | None:
        """The upload to the key, and the parts that the store has, by number."""
        return _read(self._file(where, key), set_aside=True)

    def under(self, where: str, prefix: str) -> list[Plan]:
        """The uploads to keys that begin so."""
        found = (_read(path) for path in self._directory.glob("*.upload"))
        return [each[0] for each in found if each and each[0].where == where and each[0].key.startswith(prefix)]

    def forget(self, where: str, key: str) -> None:
        """The upload to the key is done with."""
        with suppress(IsADirectoryError, PermissionError, NotADirectoryError):  # no file of ours; it is set aside
            self._file(where, key).unlink(missing_ok=True)

    def _file(self, where: str, key: str) -> Path:
        name = hashlib.sha256(f"{where}\0{key}".encode()).hexdigest()[:32]
        return self._directory / f"{name}.upload"


def _read(path: Path, *, set_aside: bool = False) -> tuple[Plan, dict[int, Part]] | None:
    """What an upload has on record; None where that is missing or damaged, so that it is begun again."""
    return load_file(path, _decode, set_aside=set_aside)


def _decode(content: bytes) -> tuple[Plan, dict[int, Part]]:
    first, *lines = content.split(b"\n")
    plan = _plan(first)
    parts: dict[int, Part] = {}
    for line in filter(None, lines):
        try:
            part = _part(line)
        except msgspec.DecodeError:
            continue  # torn; the part is sent again
        parts[part.number] = part
    return plan, parts


_write: Final = msgspec.json.Encoder().encode
_plan: Final = msgspec.json.Decoder(Plan).decode
_part: Final = msgspec.json.Decoder(Part).decode
