"""`Spool`: checkpoints pending upload, as hard links, so that the trainer may remove its own files.

    <run's folder>/spool/<digest of the URL>/
        <checkpoint>@<fingerprint>/              an entry, created atomically by a rename
            entry.json                           its description; rebuilt from the event if damaged
            state/..., sampler/...               the files
        <checkpoint>@<fingerprint>.done.json     the result of the upload; replaces the entry
        origin.json                              identifies this spool at the destination
        <checkpoint>@<fingerprint>.refused/      an entry that conflicts with the destination
        ledger/                                  progress of multipart uploads

The fingerprint distinguishes a repeated event from a new checkpoint of the same name, and detects changed files. Both
halves of the adapter create entries: the courier may receive the event before the hook has run.
"""

import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final, NamedTuple, Self
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import msgspec

from evsys_adapters._runs import digest, safe_name
from evsys_adapters.checkpoints.manifest import Manifest, PartName, checkpoint_folder, is_elsewhere
from evsys_adapters.checkpoints.places import Reach
from evsys_bus import where
from evsys_bus.codec import to_plain
from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.files import load_file, replace_file

SPOOL: Final = "spool"
ENTRY: Final = "entry.json"
DONE: Final = ".done.json"
REFUSED: Final = ".refused"
_ORIGIN: Final = "origin.json"
_MOST_BYTES: Final = 256 << 20
"""Maximum size of an entry or a marker; enough for the names of a million files."""
LONG_AGO_SECONDS: Final = 3600.0
_NO_LINKS: Final = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}


class SpooledFile(msgspec.Struct, frozen=True):
    """One file, as it was when the Checkpoint event was published."""

    name: str
    """Path below the entry and below the checkpoint's folder at the destination."""
    size: int
    mtime_ns: int


class Entry(msgspec.Struct, frozen=True):
    """Description of a checkpoint pending upload."""

    row: ManifestRow
    files: list[SpooledFile]
    state: str | None = None
    """See `Manifest`."""
    sampler: str | None = None
    number: int = 0
    """Counts the pending entries of one checkpoint; greater is later."""


class Done(msgspec.Struct, frozen=True):
    """A checkpoint that was uploaded."""

    url: str
    """The destination, with placeholders replaced."""
    manifest: Manifest
    reach: Reach = Reach()


class Waiting(NamedTuple):
    """An entry and its folder."""

    folder: Path
    entry: Entry | None
    """None if its ``entry.json`` is missing or damaged; `Spool.mend` rebuilds it."""

    def rewritten(self) -> str | None:
        """Return a file that has changed since the event: writing to a file changes all its hard links."""
        files = () if self.entry is None else self.entry.files
        return next((file.name for file in files if not _is_as_announced(self.folder / file.name, file)), None)


class Spool:
    """The pending uploads of one run to one destination."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder

    @classmethod
    def of(cls, run_dir: str | os.PathLike[str], url: str) -> Self:
        """Return the spool for a run's folder and the URL configured for `checkpoint_upload`."""
        return cls(where.local_path(run_dir, "output_dir") / SPOOL / digest(url))

    @property
    def origin(self) -> str:
        """Identifier of this spool at the destination; created by the first upload."""
        path = self.folder / _ORIGIN
        known = load_file(path, msgspec.json.Decoder(str).decode, set_aside=True)
        if known is None:
            known = token_hex(8)
            replace_file(path, msgspec.json.encode(known))
        return known

    @property
    def ledger(self) -> Path:
        """Directory of the `UploadLedger`."""
        return self.folder / "ledger"

    def keep(self, row: ManifestRow, parts: Iterable[PartName]) -> Waiting | None:
        """Link the checkpoint's files into the spool; returns None if exactly these were uploaded already.

        Raises:
            OSError: A file is missing, or cannot be linked.
        """
        sources, entry = _gathered(row, parts)
        folder = self.folder / f"{checkpoint_folder(entry.row)}@{_fingerprint(sources, entry)}"
        if not folder.is_dir() and not self._is_done(folder):
            numbers = [each.entry.number for each in self.waiting(row) if each.entry is not None]
            self._make(folder, sources, msgspec.structs.replace(entry, number=1 + max(numbers, default=0)))
        if self._is_done(folder):  # or the other half has created and uploaded it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return Waiting(folder, _entry_in(folder) or entry)

    def waiting(self, row: ManifestRow | None = None) -> list[Waiting]:
        """Return the pending entries of this checkpoint, or of all, oldest first; includes damaged ones."""
        found: list[tuple[int, int, Waiting]] = []
        for folder in self._entries(row, ""):
            with suppress(FileNotFoundError, NotADirectoryError):  # the other process has finished it meanwhile
                if stat.S_ISDIR(folder.lstat().st_mode) and _done_in(self._marker(folder)) is None:
                    entry = _entry_in(folder)
                    number = 0 if entry is None else entry.number
                    found.append((number, folder.stat().st_mtime_ns, Waiting(folder, entry)))
        return [waiting for *_, waiting in sorted(found, key=lambda each: each[:2])]

    def mend(self, waiting: Waiting, row: ManifestRow, parts: Iterable[PartName]) -> Waiting:
        """Repair an entry: link missing files again, and rebuild a damaged ``entry.json``.

        Args:
            waiting: The entry.
            row: The checkpoint from its event.
            parts: Which parts are uploaded.

        Raises:
            FileNotFoundError: A file is neither here nor, unchanged, at its original path; or the list of files cannot
                be rebuilt.
        """
        folder, entry = waiting
        if entry is None:
            entry = _rebuilt(folder, row, tuple(parts))
            if entry is None:
                what = f"{ENTRY} is damaged, and the remaining files differ from those of the checkpoint event"
                raise FileNotFoundError(errno.ENOENT, what, str(folder / ENTRY))
        for file in entry.files:
            if not (folder / file.name).exists():
                source = _source_of(row, file)
                if source is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / file.name))
                _put(source, f"{folder}/{file.name}")
        if waiting.entry is None:
            load_file(folder / ENTRY, _decode_entry, set_aside=True, most_bytes=_MOST_BYTES)
            replace_file(folder / ENTRY, msgspec.json.encode(entry))
            log().info("checkpoint.entry_rebuilt", checkpoint=folder.name)
        return Waiting(folder, entry)

    def done(self, row: ManifestRow | None = None) -> list[Done]:
        """Return the records of uploads of this checkpoint, or of all, except for unreadable ones (`unreadable`)."""
        found = (_done_in(path) for path in self._entries(row, DONE))
        return [each for each in found if each is not None]

    def unreadable(self, row: ManifestRow | None = None) -> list[Path]:
        """Return the unreadable records of uploads of this checkpoint, or of all."""
        return [path for path in self._entries(row, DONE) if _done_in(path) is None]

    def finish(self, waiting: Waiting, done: Done) -> None:
        """Record that the checkpoint was uploaded and verified, then remove its entry."""
        self.note(self._marker(waiting.folder), done)
        self.drop(waiting)

    @staticmethod
    def note(marker: Path, done: Done) -> None:
        """Write the record of an upload, replacing a damaged one."""
        _done_in(marker, set_aside=True)
        replace_file(marker, msgspec.json.encode(done))

    def sweep(self) -> None:
        """Remove temporary folders of processes that were killed long ago."""
        for path in self.folder.glob(".*"):
            if time.time() - path.lstat().st_mtime > LONG_AGO_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def drop(waiting: Waiting) -> None:
        """Remove an entry."""
        shutil.rmtree(waiting.folder, ignore_errors=True)

    @staticmethod
    def set_aside(waiting: Waiting) -> None:
        """Quarantine an entry that cannot be uploaded, for inspection by the user."""
        aside = waiting.folder.with_name(f"{waiting.folder.name}{REFUSED}")
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(FileNotFoundError):  # it was removed meanwhile
            waiting.folder.rename(aside)

    def _marker(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}{DONE}")

    def _is_done(self, folder: Path) -> bool:
        return _done_in(self._marker(folder), set_aside=True) is not None

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
                copied += 0 if _put(source.path, target) else file.size
            replace_file(making / ENTRY, msgspec.json.encode(entry))
            making.rename(folder)
            OsDisk().sync_path(str(self.folder))
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            if not folder.is_dir():  # unless the other half created it meanwhile
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
    """Resolved path, without symbolic links."""
    found: os.stat_result


def local_path(path: str) -> Path:
    """Return the local path of a path or ``file://`` URI."""
    return Path(unquote(urlsplit(path).path)) if path.startswith("file://") else Path(path)


def _gathered(row: ManifestRow, parts: Iterable[PartName]) -> tuple[list[_Source], Entry]:
    """Collect the files of a checkpoint and their names in the spool."""
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
    """Return the row as decoded from the journal, so that both halves use the same names."""
    return msgspec.convert(to_plain(row)[0], ManifestRow)


def _files(root: Path) -> Iterator[tuple[str, _Source]]:
    """Yield the files below a directory with their relative names; for a file, itself with an empty name."""
    found = os.stat(root)  # noqa: PTH116 # strings from here on: for many files, a Path costs more than its link
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
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return _Source(path, found)


def _plain(name: str) -> str:
    """Return a file's name as one component of a key; hidden files keep their name."""
    bare = name.removeprefix(".")
    return name if safe_name(bare) == bare else f"{safe_name(name)}-{digest(name)}"


def _put(source: str, target: str) -> bool:
    """Link a file, or copy it and return False if links are not possible."""
    try:
        try:
            os.link(source, target)
        except FileNotFoundError:
            os.makedirs(target.rpartition("/")[0], exist_ok=True)  # noqa: PTH103 # as in `_files`
            os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)
        OsDisk().sync_path(target)
        return False
    return True


_decode_entry: Final = msgspec.json.Decoder(Entry).decode
_decode_done: Final = msgspec.json.Decoder(Done).decode


def _entry_in(folder: Path) -> Entry | None:
    return load_file(folder / ENTRY, _decode_entry, set_aside=False, most_bytes=_MOST_BYTES)


def _done_in(marker: Path, *, set_aside: bool = False) -> Done | None:
    return load_file(marker, _decode_done, set_aside=set_aside, most_bytes=_MOST_BYTES)


def _is_as_announced(path: str | Path, file: SpooledFile) -> bool:
    try:
        now = os.stat(path)  # noqa: PTH116 # as in `_files`
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(now.st_mode) and (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns)


def _source_of(row: ManifestRow, file: SpooledFile) -> str | None:
    """Return the original path of an entry's file if it is unchanged."""
    for part, path in (("state", row.state_path), ("sampler", row.sampler_path)):
        if path is None or is_elsewhere(path):
            continue
        root = local_path(path)
        name = file.name.removeprefix(f"{part}/{safe_name(root.name)}")
        if name != file.name and name[:1] in {"", "/"} and _is_as_announced(f"{root}{name}", file):
            return os.path.realpath(f"{root}{name}")
    return None


def _rebuilt(folder: Path, row: ManifestRow, parts: tuple[PartName, ...]) -> Entry | None:
    """Rebuild an entry from the original files, or from those in the entry, if the fingerprint matches."""
    for found in (row, _in_spool(folder, row, parts)):
        with suppress(OSError):
            sources, entry = _gathered(found, parts)
            if folder.name.endswith(f"@{_fingerprint(sources, entry)}"):
                return msgspec.structs.replace(entry, row=_written(row))
    return None


def _in_spool(folder: Path, row: ManifestRow, parts: tuple[PartName, ...]) -> ManifestRow:
    """Return the row with the paths of the files in an entry."""
    state, sampler = row.state_path, row.sampler_path
    here: dict[str, str] = {}
    for part, path in (("state", state), ("sampler", sampler)):
        if path is not None and part in parts and not is_elsewhere(path):
            here.setdefault(path, str(folder / part / safe_name(local_path(path).name)))
    paths = [None if path is None else here.get(path, path) for path in (state, sampler)]
    return msgspec.structs.replace(row, state_path=paths[0], sampler_path=paths[1])


def _fingerprint(sources: list[_Source], entry: Entry) -> str:
    known = [
        (file.name, file.size, file.mtime_ns, at.found.st_ino) for file, at in zip(entry.files, sources, strict=True)
    ]
    return hashlib.blake2s(repr((known, entry.state, entry.sampler)).encode(), digest_size=4).hexdigest()
