"""The manifest of an uploaded checkpoint, and the naming scheme of the destination.

    <prefix>/<run>/latest.json                         names the newest complete checkpoint
    <prefix>/<run>/<checkpoint>/manifest.json          written last: all objects that it lists exist
    <prefix>/<run>/<checkpoint>/state/<name>[/...]     the file or directory of `state_path`
    <prefix>/<run>/<checkpoint>/sampler/<name>[/...]   likewise

A name is one safe path component; a text that had to be changed for that also gets a digest.
"""

import os
import re
from pathlib import PurePosixPath
from typing import Final, Literal

import msgspec

from evsys_adapters.common.hook_arguments import safe_name
from evsys_bus.context import ManifestRow
from evsys_bus.journal.layout import stream_sort_key
from evsys_bus.location import short_digest

MANIFEST: Final = "manifest.json"
LATEST: Final = "latest.json"
PartName = Literal["state", "sampler"]
PARTS: Final[tuple[PartName, ...]] = ("state", "sampler")
FETCHED: Final = "fetched"
"""The folder for fetched checkpoints inside that of the run."""
SortKey = tuple[int, tuple[int, str], int]
"""Orders checkpoints at a destination: the life of the stream, the stream, and the position in it."""

_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAX_NAME_BYTES: Final = 255
MAX_FOLDERS: Final = 400
"""Folders within each other, at most; Python creates and removes them recursively."""


class StoredFile(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    name: str
    """Path below the checkpoint's folder, with slashes."""
    size: int
    sha256: str
    """In hexadecimal."""
    key: str = ""
    """Key of the object below the checkpoint's folder; empty if it is the name, which can be too long for a key."""

    @property
    def object_name(self) -> str:
        """The last part of the object's key, below the checkpoint's folder."""
        return self.key or self.name


class Manifest(msgspec.Struct, frozen=True, rename={"generation": "life"}):
    """The contents of a checkpoint at the destination."""

    run: str
    row: ManifestRow
    """The trainer's record, with its own paths."""
    stream: str
    """Stream of the Checkpoint event; `sort_key` orders checkpoints."""
    seq: int
    files: list[StoredFile]
    state: str | None = None
    """Name of the state's file or directory below the checkpoint's folder; or its URI if it is remote."""
    sampler: str | None = None
    format: int = 1
    generation: int = 0
    """Number of the stream at the destination, in order of arrival and independent of clocks. 0 in manifests of
    0.1.0, and in those that arrived late, after checkpoints of another machine with more steps."""
    origin: str = ""
    """Identifies the spool that it came from; streams of one spool are ordered by their counters."""
    left_out: dict[str, str] = {}
    """Files that could not be uploaded, such as sockets and links that lead to nothing, with the reasons."""

    @property
    def sort_key(self) -> SortKey:
        """Sort key: greater is newer."""
        return self.generation, stream_sort_key(self.stream), self.seq

    def is_same_as(self, other: "Manifest") -> bool:
        """Whether both have the same content, regardless of the event that announced it."""
        mine, theirs = (
            (sorted(each.files, key=lambda file: file.name), each.row.name, each.row.batch, each.state, each.sampler)
            for each in (self, other)
        )
        return mine == theirs


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """A stream with checkpoints at the destination."""

    number: int
    origin: str = ""
    """See `Manifest`."""


class Latest(msgspec.Struct, frozen=True, rename={"generation": "life", "generations": "lives"}):
    """The newest checkpoint of a run, and the streams known at the destination."""

    checkpoint: str
    """Its folder."""
    stream: str
    seq: int
    format: int = 1
    generation: int = 0
    batch: int | None = None
    """The step after which it was saved; None in records of 0.1.0."""
    generations: dict[str, Generation] = {}
    """By stream, the newest ones; empty in records of 0.1.0."""

    @property
    def sort_key(self) -> SortKey:
        """Sort key: greater is newer."""
        return self.generation, stream_sort_key(self.stream), self.seq


def is_remote_uri(path: str) -> bool:
    """Whether the path is a remote URI; a ``file://`` URI is local."""
    return _URI.match(path) is not None and not path.startswith("file://")


def checkpoint_folder(row: ManifestRow) -> str:
    """Return the checkpoint's name with its step: a resumed run saves ``final`` more than once."""
    name = component(row.name)
    return name if re.search(rf"(^|\D)0*{row.batch}$", name) else component(f"{name}-{row.batch:06d}")


def component(text: str) -> str:
    """Return ``text`` as one component of a key: unchanged if it is a plain name, else sanitized and with a digest."""
    name = safe_name(text)
    return name if name == text else f"{name}-{short_digest(text)}"


def join_key(*parts: str) -> str:
    """Join the parts of a key; a prefix may be empty."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def safe_relative_path(name: str) -> PurePosixPath | None:
    """Return a name from a manifest as a path below its folder; None for a name that could escape it on any system."""
    parts = name.split("/")
    is_safe = len(parts) <= MAX_FOLDERS and all(
        part not in {"", ".", ".."}
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
        and len(os.fsencode(part)) <= _MAX_NAME_BYTES
        for part in parts
    )
    return PurePosixPath(*parts) if is_safe and name.isprintable() else None
