"""The manifest of an uploaded checkpoint, and the names of everything at the destination.

    <prefix>/<run>/latest.json                         names the newest checkpoint that is whole
    <prefix>/<run>/<checkpoint>/manifest.json          written last: where it is, all that it lists is there
    <prefix>/<run>/<checkpoint>/state/<name>[/...]     the file or the directory of `state_path`
    <prefix>/<run>/<checkpoint>/sampler/<name>[/...]   likewise

A name is one component that leads nowhere else; of two texts that would get the same one, the odder gets a digest.
"""

import os
import re
from pathlib import PurePosixPath
from typing import Final, Literal

import msgspec

from evsys_adapters._runs import digest, safe_name
from evsys_bus.context import ManifestRow
from evsys_bus.journal.layout import order_of

MANIFEST: Final = "manifest.json"
LATEST: Final = "latest.json"
PartName = Literal["state", "sampler"]
PARTS: Final[tuple[PartName, ...]] = ("state", "sampler")
FETCHED: Final = "fetched"
"""The folder of checkpoints that were fetched, in that of the run."""
Age = tuple[int, tuple[int, str], int]
"""Of a checkpoint at a destination: the life of its stream, the stream, and its place there."""

_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAX_NAME_BYTES: Final = 255


class StoredFile(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    name: str
    """Below the checkpoint's folder, with slashes."""
    size: int
    sha256: str
    """In hex."""


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint at the destination is made of."""

    run: str
    row: ManifestRow
    """As the trainer recorded it, with its own paths."""
    stream: str
    """Of the event that announced it; `age` says which of two checkpoints is the newer one."""
    seq: int
    files: list[StoredFile]
    state: str | None = None
    """The name of the state's file or directory below the checkpoint's folder; or its URI, where it was elsewhere."""
    sampler: str | None = None
    format: int = 1
    life: int = 0
    """Counts the streams as they came to the destination: clocks have no part in it. 0 in what 0.1.0 wrote, and in what
    came late, after checkpoints of another machine that go further."""
    origin: str = ""
    """Names the spool that it came from: the counters of its streams say which of them is the newer one."""

    @property
    def age(self) -> Age:
        """The greater, the newer."""
        return self.life, order_of(self.stream), self.seq

    def is_same_as(self, other: "Manifest") -> bool:
        """Whether both are of the same content; who announced it when does not matter."""
        mine, theirs = (
            (sorted(each.files, key=lambda file: file.name), each.row.name, each.row.batch, each.state, each.sampler)
            for each in (self, other)
        )
        return mine == theirs


class Life(msgspec.Struct, frozen=True, array_like=True):
    """A stream whose checkpoints are at the destination."""

    number: int
    origin: str = ""
    """As in `Manifest`."""


class Latest(msgspec.Struct, frozen=True):
    """The newest checkpoint of a run, and which streams the destination knows."""

    checkpoint: str
    """Its folder."""
    stream: str
    seq: int
    format: int = 1
    life: int = 0
    batch: int | None = None
    """The step after which it was saved; None in what 0.1.0 wrote."""
    lives: dict[str, Life] = {}
    """By stream, the newest ones; none in what 0.1.0 wrote."""

    @property
    def age(self) -> Age:
        """As `Manifest.age`."""
        return self.life, order_of(self.stream), self.seq


def is_elsewhere(path: str) -> bool:
    """Whether it is a URI, so nothing that could be read here; a file's own URI is a path."""
    return _URI.match(path) is not None and not path.startswith("file://")


def checkpoint_folder(row: ManifestRow) -> str:
    """The checkpoint's name with its step: a run that is stopped and goes on saves a ``final`` more than once."""
    name = component(row.name)
    return name if re.search(rf"(^|\D)0*{row.batch}$", name) else component(f"{name}-{row.batch:06d}")


def component(text: str) -> str:
    """``text`` as one component of a key: itself if it is a plain name, else what is left of it, with a digest."""
    name = safe_name(text)
    return name if name == text else f"{name}-{digest(text)}"


def key_in(*parts: str) -> str:
    """The key, from its parts; a prefix may be empty."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def inside(name: str) -> PurePosixPath | None:
    """A name from a manifest as a path that stays below its folder; None for one that might not, on any system."""
    parts = name.split("/")
    fine = all(
        part not in {"", ".", ".."}
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
        and len(os.fsencode(part)) <= _MAX_NAME_BYTES
        for part in parts
    )
    return PurePosixPath(*parts) if fine and name.isprintable() else None
