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
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final, NamedTuple, Self
from uuid import uuid4

import msgspec

from evsys_adapters.checkpoints.manifest import PARTS, Manifest, PartName, checkpoint_folder, is_remote_uri
from evsys_adapters.checkpoints.source_files import SPOOL_FOLDER, SourceFile, UnusableSourceError, files_of, local_path
from evsys_adapters.checkpoints.store_urls import StoreOptions
from evsys_adapters.common.hook_arguments import safe_name
from evsys_bus import location
from evsys_bus.codec import to_builtins
from evsys_bus.codec.decode import convert_value
from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.files import load_file, replace_file

ENTRY_NAME: Final = "entry.json"
RECORD_SUFFIX: Final = ".done.json"
REFUSED_SUFFIX: Final = ".refused"
_ORIGIN: Final = "origin.json"
_MAX_BYTES: Final = 256 << 20
"""Maximum size of an entry or a marker; enough for the names of a million files."""
_LOG_NAME: Final = re.compile(r"\.(log|jsonl|csv|tsv|txt|out|err|wandb)$|tfevents")
_RETRIES: Final = 2
"""If the trainer removes a file while they are listed and linked."""
_MAX_SHOWN: Final = 5
STALE_SECONDS: Final = 3600.0
_UNREADABLE: Final = {errno.EACCES, errno.EPERM}
_NO_LINKS: Final = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}


class SpooledFile(msgspec.Struct, frozen=True):
    """One file, as it was when the Checkpoint event was published."""

    name: str
    """Path below the entry and below the checkpoint's folder at the destination."""
    size: int
    mtime_ns: int


class SpoolEntry(msgspec.Struct, frozen=True):
    """Description of a checkpoint pending upload."""

    row: ManifestRow
    files: list[SpooledFile]
    state: str | None = None
    """See `Manifest`."""
    sampler: str | None = None
    number: int = 0
    """Counts the pending entries of one checkpoint; greater is later."""
    left_out: dict[str, str] = {}
    """See `Manifest`."""


class UploadRecord(msgspec.Struct, frozen=True, rename={"store_options": "reach"}):
    """A checkpoint that was uploaded."""

    url: str
    """The destination, with placeholders replaced."""
    manifest: Manifest
    store_options: StoreOptions = StoreOptions()


class PendingUpload(NamedTuple):
    """An entry and its folder."""

    folder: Path
    entry: SpoolEntry | None
    """None if its ``entry.json`` is missing or damaged; `Spool.repair` rebuilds it."""

    def changed_files(self) -> list[SpooledFile]:
        """Return the files that have changed since the event: writing to a file changes all its hard links."""
        files = () if self.entry is None else self.entry.files
        return [file for file in files if not self.is_as_announced(file)]

    def is_as_announced(self, file: SpooledFile) -> bool:
        """Whether a file is unchanged since the event."""
        return _is_as_announced(self.folder / file.name, file)

    def is_growing_log(self, file: SpooledFile) -> bool:
        """Whether a changed file is one of a directory, has the name of a log, and has only grown."""
        with suppress(OSError):
            is_longer = (self.folder / file.name).stat().st_size > file.size
            return is_longer and file.name.count("/") > 1 and _LOG_NAME.search(file.name) is not None
        return False


class Spool:
    """The pending uploads of one run to one destination."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder

    @classmethod
    def of(cls, run_dir: str | os.PathLike[str], url: str) -> Self:
        """Return the spool for a run's folder and the URL configured for `checkpoint_upload`."""
        return cls(location.local_path(run_dir, "output_dir") / SPOOL_FOLDER / location.short_digest(url))

    @property
    def origin(self) -> str:
        """Identifier of this spool at the destination; created by the first upload."""
        path = self.folder / _ORIGIN
        known = load_file(path, msgspec.json.Decoder(str).decode, quarantine=True)
        if known is None:
            known = token_hex(8)
            replace_file(path, msgspec.json.encode(known))
        return known

    @property
    def ledger(self) -> Path:
        """Directory of the `UploadLedger`."""
        return self.folder / "ledger"

    def add(self, row: ManifestRow, parts: Iterable[PartName]) -> PendingUpload | None:
        """Link the checkpoint's files into the spool; returns None if exactly these were uploaded already.

        Raises:
            FileNotFoundError: A file is missing.
            UnusableSourceError: The checkpoint cannot be read.
            OSError: The spool cannot be written.
        """
        for _ in range(_RETRIES):
            with suppress(FileNotFoundError):  # a temporary file of the trainer, or the whole checkpoint
                return self._add(row, parts)
        return self._add(row, parts)

    def _add(self, row: ManifestRow, parts: Iterable[PartName]) -> PendingUpload | None:
        sources, entry = _collect_files(row, parts, self._run_dir)
        folder = self.folder / f"{checkpoint_folder(entry.row)}@{_fingerprint(sources, entry)}"
        if not folder.is_dir() and not self._is_uploaded(folder):
            numbers = [each.entry.number for each in self.pending(row) if each.entry is not None]
            self._make_entry(folder, sources, msgspec.structs.replace(entry, number=1 + max(numbers, default=0)))
        if self._is_uploaded(folder):  # or the other half has created and uploaded it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return PendingUpload(folder, _load_entry(folder) or entry)

    def pending(self, row: ManifestRow | None = None) -> list[PendingUpload]:
        """Return the pending entries of this checkpoint, or of all, oldest first; includes damaged ones."""
        found: list[tuple[int, int, PendingUpload]] = []
        for folder in self._entries(row, ""):
            with suppress(FileNotFoundError, NotADirectoryError):  # the other process has finished it meanwhile
                if stat.S_ISDIR(folder.lstat().st_mode) and _load_record(self._marker(folder)) is None:
                    entry = _load_entry(folder)
                    number = 0 if entry is None else entry.number
                    found.append((number, folder.stat().st_mtime_ns, PendingUpload(folder, entry)))
        return [pending for *_, pending in sorted(found, key=lambda each: each[:2])]

    def repair(self, pending: PendingUpload, row: ManifestRow, parts: Iterable[PartName]) -> PendingUpload:
        """Repair an entry: link missing files again, and rebuild a damaged ``entry.json``.

        Args:
            pending: The entry.
            row: The checkpoint from its event.
            parts: Which parts are uploaded.

        Raises:
            FileNotFoundError: A file is neither here nor, unchanged, at its original path; or the list of files cannot
                be rebuilt.
        """
        folder, entry = pending
        if entry is None:
            entry = _rebuild_entry(folder, row, tuple(parts), self._run_dir)
            if entry is None:
                what = f"{ENTRY_NAME} is damaged, and the remaining files differ from those of the checkpoint event"
                raise FileNotFoundError(errno.ENOENT, what, str(folder / ENTRY_NAME))
        for file in entry.files:
            if not (folder / file.name).exists():
                source = _find_source(row, file)
                if source is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / file.name))
                _link_or_copy(source, f"{folder}/{file.name}")
        if pending.entry is None:
            load_file(folder / ENTRY_NAME, _decode_entry, quarantine=True, max_bytes=_MAX_BYTES)
            replace_file(folder / ENTRY_NAME, msgspec.json.encode(entry))
            log().info("checkpoint.entry_rebuilt", checkpoint=folder.name)
        return PendingUpload(folder, entry)

    def uploaded(self, row: ManifestRow | None = None) -> list[UploadRecord]:
        """Return the records of uploads of this checkpoint, or of all, except for unreadable ones (`unreadable`)."""
        found = (_load_record(path) for path in self._entries(row, RECORD_SUFFIX))
        return [each for each in found if each is not None]

    def unreadable(self, row: ManifestRow | None = None) -> list[Path]:
        """Return the unreadable records of uploads of this checkpoint, or of all."""
        return [path for path in self._entries(row, RECORD_SUFFIX) if _load_record(path) is None]

    def finish(self, pending: PendingUpload, record: UploadRecord) -> None:
        """Record that the checkpoint was uploaded and verified, then remove its entry."""
        self.write_record(self._marker(pending.folder), record)
        self.remove(pending)

    @staticmethod
    def write_record(marker: Path, record: UploadRecord) -> None:
        """Write the record of an upload, replacing a damaged one."""
        _load_record(marker, quarantine=True)
        replace_file(marker, msgspec.json.encode(record))

    def remove_stale(self) -> None:
        """Remove temporary folders of processes that were killed long ago."""
        for path in self.folder.glob(".*"):
            if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def remove(pending: PendingUpload) -> None:
        """Remove an entry."""
        shutil.rmtree(pending.folder, ignore_errors=True)

    @staticmethod
    def quarantine(pending: PendingUpload) -> None:
        """Quarantine an entry that cannot be uploaded, for inspection by the user."""
        quarantined = pending.folder.with_name(f"{pending.folder.name}{REFUSED_SUFFIX}")
        shutil.rmtree(quarantined, ignore_errors=True)
        with suppress(FileNotFoundError):  # it was removed meanwhile
            pending.folder.rename(quarantined)

    @property
    def _run_dir(self) -> Path:
        return self.folder.parent.parent

    def _marker(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}{RECORD_SUFFIX}")

    def _is_uploaded(self, folder: Path) -> bool:
        return _load_record(self._marker(folder), quarantine=True) is not None

    def _entries(self, row: ManifestRow | None, suffix: str) -> Iterator[Path]:
        requested = None if row is None else checkpoint_folder(as_manifest_row(row))
        for path in sorted(self.folder.glob(f"[!.]*@????????{suffix}")):
            if requested in {None, path.name.rpartition("@")[0]}:
                yield path

    def _make_entry(self, folder: Path, sources: list[SourceFile], entry: SpoolEntry) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.folder / f".{uuid4().hex}"
        start, copied = time.monotonic(), 0
        made: set[str] = set()
        try:
            temporary.mkdir(mode=0o700)
            linked: list[SpooledFile] = []
            for source, file in zip(sources, entry.files, strict=True):
                target = f"{temporary}/{file.name}"
                parent = target.rpartition("/")[0]
                if parent not in made:
                    os.makedirs(parent, exist_ok=True)  # noqa: PTH103 # as in `files_of`
                    made.add(parent)
                try:
                    copied += 0 if _link_or_copy(source.path, target) else file.size
                    linked.append(file)
                except OSError as error:
                    if error.errno not in _UNREADABLE or error.filename != source.path:
                        raise
                    entry.left_out[file.name] = str(error.strerror)
            entry = msgspec.structs.replace(entry, files=linked)
            replace_file(temporary / ENTRY_NAME, msgspec.json.encode(entry))
            temporary.rename(folder)
            OsDisk().sync_path(str(self.folder))
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.is_dir():  # unless the other half created it meanwhile
                raise
        if entry.left_out:
            log().warning(
                "checkpoint.files_left_out",
                checkpoint=folder.name,
                files=len(entry.left_out),
                why=dict(list(entry.left_out.items())[:_MAX_SHOWN]),
                fix="save only files that can be read; the others are uploaded",
            )
        if copied:
            log().warning(
                "checkpoint.copied",
                checkpoint=folder.name,
                bytes=copied,
                seconds=round(time.monotonic() - start, 3),
                why="it cannot be hard-linked into the run's folder",
                fix="save checkpoints on the file system of the run's folder",
            )


def _collect_files(row: ManifestRow, parts: Iterable[PartName], run_dir: Path) -> tuple[list[SourceFile], SpoolEntry]:
    """Collect the files of a checkpoint and their names in the spool."""
    journaled = as_manifest_row(row)
    sources: list[SourceFile] = []
    files: list[SpooledFile] = []
    names: dict[str, str] = {}
    placed_names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for part in parts:
        path = _path_of(row, part)
        if path is None:
            continue
        if path not in placed_names:
            if is_remote_uri(path):
                placed_names[path] = str(journaled.state_path if part == "state" else journaled.sampler_path)
            else:
                root = local_path(path)
                placed_names[path] = f"{part}/{safe_name(root.name)}"
                for relative, found in files_of(root, run_dir):
                    name = f"{placed_names[path]}/{relative}" if relative else placed_names[path]
                    if isinstance(found, str):
                        left_out[name] = found
                        continue
                    sources.append(found)
                    files.append(SpooledFile(name, found.status.st_size, found.status.st_mtime_ns))
        names[part] = placed_names[path]
    if left_out and not files:
        name, why = next(iter(left_out.items()))
        raise UnusableSourceError(0, f"none of its files can be uploaded, as {name}: {why}", journaled.name)
    return sources, SpoolEntry(journaled, files, names.get("state"), names.get("sampler"), left_out=left_out)


def _path_of(row: ManifestRow, part: PartName) -> str | None:
    """Return the path of a part; a trainer may give an object for it."""
    path: str | os.PathLike[str] | None = row.state_path if part == "state" else row.sampler_path
    return None if path is None else os.fsdecode(path)


def as_manifest_row(row: ManifestRow) -> ManifestRow:
    """Return the row, of any class, as decoded from the journal, so that both halves use the same names."""
    return convert_value(to_builtins(row)[0], ManifestRow)


def _link_or_copy(source: str, target: str) -> bool:
    """Link a file, or copy it and return False if links are not possible."""
    try:
        try:
            os.link(source, target)
        except FileNotFoundError:
            os.makedirs(target.rpartition("/")[0], exist_ok=True)  # noqa: PTH103 # as in `files_of`
            os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)
        OsDisk().sync_path(target)
        return False
    return True


_decode_entry: Final = msgspec.json.Decoder(SpoolEntry).decode
_decode_record: Final = msgspec.json.Decoder(UploadRecord).decode


def _load_entry(folder: Path) -> SpoolEntry | None:
    return load_file(folder / ENTRY_NAME, _decode_entry, quarantine=False, max_bytes=_MAX_BYTES)


def _load_record(marker: Path, *, quarantine: bool = False) -> UploadRecord | None:
    return load_file(marker, _decode_record, quarantine=quarantine, max_bytes=_MAX_BYTES)


def _is_as_announced(path: str | Path, file: SpooledFile) -> bool:
    try:
        now = os.stat(path)  # noqa: PTH116 # as in `files_of`
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(now.st_mode) and (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns)


def _find_source(row: ManifestRow, file: SpooledFile) -> str | None:
    """Return the original path of an entry's file if it is unchanged."""
    for part in PARTS:
        path = _path_of(row, part)
        if path is None or is_remote_uri(path):
            continue
        root = local_path(path)
        name = file.name.removeprefix(f"{part}/{safe_name(root.name)}")
        if name != file.name and name[:1] in {"", "/"} and _is_as_announced(f"{root}{name}", file):
            return os.path.realpath(f"{root}{name}")
    return None


def _rebuild_entry(folder: Path, row: ManifestRow, parts: tuple[PartName, ...], run_dir: Path) -> SpoolEntry | None:
    """Rebuild an entry from the original files, or from those in the entry, if the fingerprint matches."""
    for found in (row, _row_in_spool(folder, row, parts)):
        with suppress(OSError):
            sources, entry = _collect_files(found, parts, run_dir)
            if folder.name.endswith(f"@{_fingerprint(sources, entry)}"):
                return msgspec.structs.replace(entry, row=as_manifest_row(row))
    return None


def _row_in_spool(folder: Path, row: ManifestRow, parts: tuple[PartName, ...]) -> ManifestRow:
    """Return the row with the paths of the files in an entry."""
    state, sampler = _path_of(row, "state"), _path_of(row, "sampler")
    here: dict[str, str] = {}
    for part, path in (("state", state), ("sampler", sampler)):
        if path is not None and part in parts and not is_remote_uri(path):
            here.setdefault(path, str(folder / part / safe_name(local_path(path).name)))
    paths = [None if path is None else here.get(path, path) for path in (state, sampler)]
    return msgspec.structs.replace(row, state_path=paths[0], sampler_path=paths[1])


def _fingerprint(sources: list[SourceFile], entry: SpoolEntry) -> str:
    known = [
        (file.name, file.size, file.mtime_ns, source.status.st_ino)
        for file, source in zip(entry.files, sources, strict=True)
    ]
    return location.short_digest(repr((known, entry.state, entry.sampler)))
