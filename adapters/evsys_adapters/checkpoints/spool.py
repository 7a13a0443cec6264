"""`Spool`: checkpoints that wait to be uploaded, as hard links, so that the trainer may rotate its own files.

    <run's folder>/spool/<digest of the URL>/
        <checkpoint>@<fingerprint>/              an entry: appears whole, by a rename
            entry.json                           what it is
            state/..., sampler/...               the files
        <checkpoint>@<fingerprint>.done.json     what became of it; its entry is gone then
        <checkpoint>@<fingerprint>.refused/      an entry that is in conflict with what is at the destination
        ledger/                                  how far multipart uploads have got

The fingerprint tells a checkpoint that is announced again from one that was saved again under the same name. Both
halves make entries: the journal may hand the event to the courier before the hook has run.
"""

import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import msgspec

from evsys_adapters._runs import digest, safe_name
from evsys_adapters.checkpoints.manifest import Manifest, PartName, checkpoint_folder, is_elsewhere
from evsys_adapters.checkpoints.places import Reach
from evsys_bus.codec import to_plain
from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log

SPOOL: Final = "spool"
ENTRY: Final = "entry.json"
DONE: Final = ".done.json"
REFUSED: Final = ".refused"
LONG_AGO_SECONDS: Final = 3600.0
_NO_LINKS: Final = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}


class SpooledFile(msgspec.Struct, frozen=True):
    """One file, as it was when the checkpoint was announced."""

    name: str
    """Below the entry, and below the checkpoint's folder at the destination."""
    size: int
    mtime_ns: int


class Entry(msgspec.Struct, frozen=True):
    """A checkpoint that waits."""

    row: ManifestRow
    files: list[SpooledFile]
    state: str | None = None
    """As in `Manifest`."""
    sampler: str | None = None


class Done(msgspec.Struct, frozen=True):
    """A checkpoint that is at the destination."""

    url: str
    """The destination, placeholders filled in."""
    manifest: Manifest
    reach: Reach = Reach()


class Waiting(NamedTuple):
    """An entry and where it is."""

    folder: Path
    entry: Entry

    def rewritten(self) -> str | None:
        """A file that is no longer what was announced: whoever writes into a file writes into all its links."""
        for file in self.entry.files:
            try:
                now = (self.folder / file.name).stat()
            except FileNotFoundError:
                return file.name
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                return file.name
        return None


class Spool:
    """What one run has to upload to one destination."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder

    @classmethod
    def of(cls, run_dir: str | os.PathLike[str], url: str) -> Self:
        """That of a run and a destination, as `checkpoint_upload` was told of it."""
        return cls(Path(run_dir) / SPOOL / digest(url))

    @property
    def ledger(self) -> Path:
        """Where the uploads in parts are accounted for."""
        return self.folder / "ledger"

    def keep(self, row: ManifestRow, parts: Iterable[PartName]) -> Waiting | None:
        """Have the checkpoint's files here, whoever else removes them; None if just these were uploaded already.

        Raises:
            OSError: A file is gone, or cannot be linked.
        """
        sources, entry = _gathered(row, parts)
        folder = self.folder / f"{checkpoint_folder(entry.row)}@{_fingerprint(sources, entry)}"
        done = self._marker(folder)
        if not folder.is_dir() and not done.exists():
            self._make(folder, sources, entry)
        if done.exists():  # also where the other half was faster, and has gone all the way
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return Waiting(folder, entry)

    def waiting(self, row: ManifestRow | None = None) -> list[Waiting]:
        """What waits of this checkpoint, or of all, oldest first."""
        found = [
            (folder.stat().st_mtime_ns, Waiting(folder, msgspec.json.decode(entry.read_bytes(), type=Entry)))
            for folder in self._entries(row, "")
            if (entry := folder / ENTRY).is_file() and not self._marker(folder).exists()
        ]
        return [waiting for _, waiting in sorted(found, key=lambda each: each[0])]

    def done(self, row: ManifestRow | None = None) -> list[Done]:
        """What was uploaded of this checkpoint, or of all."""
        return [msgspec.json.decode(path.read_bytes(), type=Done) for path in self._entries(row, DONE)]

    def finish(self, waiting: Waiting, done: Done) -> None:
        """The checkpoint is at the destination, and verified: say so, then let go of its files."""
        temporary = self.folder / f".{uuid4().hex}"
        temporary.write_bytes(msgspec.json.encode(done))
        temporary.replace(self._marker(waiting.folder))
        self.drop(waiting)

    def sweep(self) -> None:
        """Remove what was begun long ago, by a process that was killed over it."""
        for path in self.folder.glob(".*"):
            if time.time() - path.lstat().st_mtime > LONG_AGO_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def drop(waiting: Waiting) -> None:
        """Let go of an entry's files."""
        shutil.rmtree(waiting.folder, ignore_errors=True)

    @staticmethod
    def set_aside(waiting: Waiting) -> None:
        """It cannot be uploaded: keep its files for a person to look at, and try no more."""
        aside = waiting.folder.with_name(f"{waiting.folder.name}{REFUSED}")
        shutil.rmtree(aside, ignore_errors=True)
        waiting.folder.rename(aside)

    def _marker(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}{DONE}")

    def _entries(self, row: ManifestRow | None, suffix: str) -> Iterator[Path]:
        wanted = None if row is None else checkpoint_folder(_written(row))
        for path in sorted(self.folder.glob(f"[!.]*@????????{suffix}")):
            if wanted in {None, path.name.rpartition("@")[0]}:
                yield path

    def _make(self, folder: Path, sources: "list[_Source]", entry: Entry) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        making = self.folder / f".{uuid4().hex}"
        began, copied = time.monotonic(), 0
        made: set[str] = set()
        try:
            making.mkdir(mode=0o700)
            for source, file in zip(sources, entry.files, strict=True):
                target = f"{making}/{file.name}"
                above = target.rpartition("/")[0]
                if above not in made:
                    os.makedirs(above, exist_ok=True)  # noqa: PTH103 # as in `_files`
                    made.add(above)
                copied += 0 if _linked(source.path, target) else file.size
            (making / ENTRY).write_bytes(msgspec.json.encode(entry))
            making.rename(folder)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            if not folder.is_dir():  # the other half was not faster either
                raise
        if copied:
            log().warning(
                "checkpoint.copied",
                checkpoint=folder.name,
                bytes=copied,
                seconds=round(time.monotonic() - began, 3),
                why="it cannot be hard-linked into the run's folder",
                fix="save checkpoints on the file system of the run's folder",
            )


class _Source(NamedTuple):
    path: str
    """The file itself, no symbolic link."""
    found: os.stat_result


def local_path(path: str) -> Path:
    """The path of what is here."""
    return Path(unquote(urlsplit(path).path)) if path.startswith("file://") else Path(path)


def _gathered(row: ManifestRow, parts: Iterable[PartName]) -> tuple[list[_Source], Entry]:
    """The files of a checkpoint, and what they will be called."""
    written = _written(row)
    sources: list[_Source] = []
    files: list[SpooledFile] = []
    names: dict[str, str] = {}
    placed: dict[str, str] = {}
    for part in parts:
        path = row.state_path if part == "state" else row.sampler_path
        if path is None:
            continue
        if path not in placed:
            if is_elsewhere(path):
                placed[path] = str(written.state_path if part == "state" else written.sampler_path)
            else:
                root = local_path(path)
                placed[path] = f"{part}/{safe_name(root.name)}"
                for relative, source in _files(root):
                    sources.append(source)
                    name = f"{placed[path]}/{relative}" if relative else placed[path]
                    files.append(SpooledFile(name, source.found.st_size, source.found.st_mtime_ns))
        names[part] = placed[path]
    return sources, Entry(written, files, names.get("state"), names.get("sampler"))


def _written(row: ManifestRow) -> ManifestRow:
    """The row as it comes out of the journal, so that both halves give it the same name."""
    return msgspec.convert(to_plain(row)[0], ManifestRow)


def _files(root: Path) -> Iterator[tuple[str, _Source]]:
    """The files below a directory with their names in it; or the file itself, with an empty one."""
    found = os.stat(root)  # noqa: PTH116 # texts from here on: a Path for each of many files costs more than its link
    if stat.S_ISDIR(found.st_mode):
        yield from _below(os.fspath(root), "", ((found.st_dev, found.st_ino),))
    else:
        yield "", _source(os.path.realpath(root), found)


def _below(folder: str, names: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, _Source]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path  # os.link would link the link
        at, name = os.stat(path), f"{names}{_plain(entry.name)}"  # noqa: PTH116 # as above
        if not stat.S_ISDIR(at.st_mode):
            yield name, _source(path, at)
        elif (at.st_dev, at.st_ino) not in above:  # else a link leads back up
            yield from _below(path, f"{name}/", (*above, (at.st_dev, at.st_ino)))


def _source(path: str, found: os.stat_result) -> _Source:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file that could be uploaded", path)
    return _Source(path, found)


def _plain(name: str) -> str:
    """A file's name as one component of a key; hidden files keep theirs."""
    bare = name.removeprefix(".")
    return name if safe_name(bare) == bare else f"{safe_name(name)}-{digest(name)}"


def _linked(source: str, target: str) -> bool:
    """Link it; where that cannot be, copy it, and return False."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)
        return False
    return True


def _fingerprint(sources: list[_Source], entry: Entry) -> str:
    known = [
        (file.name, file.size, file.mtime_ns, at.found.st_ino) for file, at in zip(entry.files, sources, strict=True)
    ]
    return hashlib.blake2s(repr((known, entry.state, entry.sampler)).encode(), digest_size=4).hexdigest()
