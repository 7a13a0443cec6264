"""Fetching a checkpoint: every file verified, resumable, and never outside the target folder."""

import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Final

import anyio
import msgspec

from evsys_adapters.checkpoints.copying import is_partial, partial_of, remove_partials, sha256_of
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import MANIFEST, Manifest, checkpoint_folder, is_remote_uri, safe_relative_path
from evsys_adapters.checkpoints.store import (
    MAX_SMALL_BYTES,
    ConflictError,
    DamagedError,
    MissingError,
    Stored,
    check_size,
)
from evsys_bus.context import ManifestRow
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError, did_you_mean
from evsys_bus.files import load_file, replace_file

IN_PROGRESS_MANIFEST: Final = ".manifest.json"
"""Manifest of a fetch in progress; renamed to `MANIFEST` once it is complete."""
_DIGEST: Final = re.compile("[0-9a-f]{64}")
MAX_CONCURRENT_FILES: Final = 4
ProgressCallback = Callable[[int, int], None]
"""Called with the fetched bytes and the total bytes."""


async def choose_checkpoint(destination: Destination, name: str | None) -> Manifest:
    """Return the newest checkpoint with this name; None selects the one named by `latest`.

    If `latest` is missing, damaged, or names a removed checkpoint, the newest manifest is used.

    Raises:
        DamagedError: Its manifest exists but is invalid.
        MissingError: There is no such checkpoint.
        DeliveryError, OSError: Raised by the store.
    """
    latest = await destination.latest() if name is None else None
    available = await destination.manifests()
    requested = name if latest is None else latest.checkpoint
    found = [each for each in available if requested in {checkpoint_folder(each.row), each.row.name}]
    found = found or (available if name is None else [])
    if found:
        return found[-1]
    known = [checkpoint_folder(each.row) for each in available]
    if requested in destination.damaged or (name is None and destination.damaged):
        folder = min(destination.damaged) if requested is None else requested
        raise DamagedError(
            f"{destination.key(folder, MANIFEST)} is damaged",
            fix=did_you_mean("", known) if known else "upload the checkpoint again, under another name",
        )
    what = "no checkpoint" if name is None else f"no checkpoint {name}"
    raise MissingError(
        f"there is {what} below {destination.run_key}",
        fix=did_you_mean(name or "", known) or "check the prefix and the run's name: they are parts of the key",
    )


async def newest_state(destination: Destination) -> Manifest | None:
    """Return the checkpoint to resume from: that of `latest` or, if it lacks a full state, the newest one with it.

    Returns None if there is no such checkpoint.

    Raises:
        MissingError: `latest` names a missing checkpoint, and there is no other.
        DeliveryError, OSError: Raised by the store.
    """
    latest = await destination.latest()
    named = None if latest is None else await destination.manifest(latest.checkpoint)
    if named is not None and named.state is not None:
        return named
    available = await destination.manifests()
    if latest is not None and not available:
        raise MissingError(
            f"there is no checkpoint {latest.checkpoint} below {destination.run_key}, though latest.json names it",
            fix="check the prefix: the uploaded checkpoint may have been removed",
        )
    return next((each for each in reversed(available) if each.state is not None), None)


async def fetch_checkpoint(
    destination: Destination, manifest: Manifest, target: Path, on_progress: ProgressCallback | None = None
) -> ManifestRow:
    """Fetch the checkpoint into ``target/<checkpoint>``; returns the row with local paths.

    Existing files with the right digest are not fetched again, and partial files are resumed. Manifest, object sizes
    and free disk space are checked before anything is copied.

    Raises:
        DamagedError: The manifest is invalid, a name would leave the folder, or an object differs from the manifest.
        ConflictError: The folder contains something else; it is left unchanged.
        RetryLaterError: There is not enough disk space.
        DeliveryError, OSError: Raised by the store.
    """
    folder = checkpoint_folder(manifest.row)
    root = target / folder
    _check(manifest)
    paths = {file.name: _path(root, file.name) for file in manifest.files}
    row = msgspec.structs.replace(
        manifest.row, state_path=_local_path(root, manifest.state), sampler_path=_local_path(root, manifest.sampler)
    )
    await _compare_sizes(destination, manifest)
    await anyio.to_thread.run_sync(_prepare, root, manifest, paths)
    total, fetched_bytes, done = sum(file.size for file in manifest.files), 0, dict.fromkeys(paths, 0)
    files = iter(manifest.files)
    errors: list[Exception] = []

    async def work() -> None:
        for file in files:  # shared: each worker takes the next one
            path, key = paths[file.name], destination.key(folder, file.object_name)

            def on_file_progress(count: int, _: int, name: str = file.name) -> None:
                nonlocal fetched_bytes
                fetched_bytes += count - done[name]
                done[name] = count
                if on_progress is not None:
                    on_progress(fetched_bytes, total)

            try:
                if not await anyio.to_thread.run_sync(_is_present, root, path, file.size, file.sha256):
                    await destination.store.get_file(
                        key, path, stored=Stored(key, file.size, file.sha256), on_progress=on_file_progress
                    )
                on_file_progress(file.size, file.size)
            except (DeliveryError, OSError) as error:
                errors.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(MAX_CONCURRENT_FILES):
            group.start_soon(work)
    if errors:
        raise errors[0]
    await anyio.to_thread.run_sync(_finish, root, manifest)
    return row


def _check(manifest: Manifest) -> None:
    """Check the manifest's consistency.

    Raises:
        DamagedError: It is inconsistent.
    """
    names = [file.name for file in manifest.files]
    above = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
    conflicting = next(
        (name for name in names if name in above or name.split("/")[0] in {MANIFEST, IN_PROGRESS_MANIFEST}), None
    )
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if conflicting is not None or repeated is not None:
        raise _invalid_manifest_error(f"lists {conflicting if repeated is None else repeated!r} more than once")
    for file in manifest.files:
        if file.size < 0:
            raise _invalid_manifest_error(f"gives {file.name!r} a size of {file.size} bytes")
        if not _DIGEST.fullmatch(file.sha256):
            raise _invalid_manifest_error(f"has no digest of {file.name!r}")


async def _compare_sizes(destination: Destination, manifest: Manifest) -> None:
    """Compare the sizes in the store with the manifest before anything is copied.

    Raises:
        DamagedError: An object has another size.
        MissingError: There is no such object.
    """
    folder, store = checkpoint_folder(manifest.row), destination.store
    try:
        sizes = {each.key: each.size for each in await store.names(f"{destination.key(folder)}/")}
    except ParkedError:  # without permission to list, each object is requested
        return
    for file in manifest.files:
        key = destination.key(folder, file.object_name)
        if key not in sizes:
            raise MissingError(f"{key} is not in {store.where}", fix="fetch another checkpoint: this one is incomplete")
        check_size(key, sizes[key], Stored(key, file.size, file.sha256), store.where)


def _prepare(root: Path, manifest: Manifest, paths: Mapping[str, Path]) -> None:
    """Prepare the folder: check that it holds nothing else, and that there is enough disk space."""
    for folder in (root.parent, root, *{above for path in paths.values() for above in _folders_between(root, path)}):
        if folder.is_symlink() and not folder.resolve().is_relative_to(root.parent.parent.resolve()):
            raise _escape_error(folder, root)
    _refuse_other(root, manifest, paths)
    root.mkdir(parents=True, exist_ok=True)
    if len({unicodedata.normalize("NFD", name).casefold() for name in paths}) < len(paths) and _ignores_case(root):
        raise DamagedError(
            "it has files whose names are the same on this file system", fix="fetch it to another file system"
        )
    partials = {file.name: partial_of(paths[file.name], file.sha256) for file in manifest.files}
    remove_partials(root, {*paths.values(), *partials.values()})
    present_bytes = sum(
        min(file.size, max(_size(paths[file.name]), _size(partials[file.name]))) for file in manifest.files
    )
    needed, free = sum(file.size for file in manifest.files) - present_bytes, shutil.disk_usage(root).free
    if needed > free:
        raise RetryLaterError(f"no room in {root}: {needed:,} bytes are needed, and {free:,} are free")
    replace_file(root / IN_PROGRESS_MANIFEST, msgspec.json.encode(manifest), mode=0o666)


def _finish(root: Path, manifest: Manifest) -> None:
    replace_file(root / MANIFEST, msgspec.json.encode(manifest), mode=0o666)
    (root / IN_PROGRESS_MANIFEST).unlink(missing_ok=True)


def _refuse_other(root: Path, manifest: Manifest, paths: Mapping[str, Path]) -> None:
    """Check that the folder contains only this checkpoint, complete or partial.

    Raises:
        ConflictError: It contains something else.
    """
    if not root.is_dir():
        if root.exists():
            raise _conflict_error(root, root)
        return
    for name in (MANIFEST, IN_PROGRESS_MANIFEST):
        known = load_file(root / name, _decode, quarantine=False, max_bytes=MAX_SMALL_BYTES)
        if known is not None and checkpoint_folder(known.row) == root.name:
            return
    names_by_path = {path: name for name, path in paths.items()}
    digests = {file.name: (file.size, file.sha256) for file in manifest.files}
    for above, _, names in os.walk(root):
        for path in (Path(above, name) for name in names):
            if path in {root / MANIFEST, root / IN_PROGRESS_MANIFEST} or is_partial(path):
                continue
            size, sha256 = digests[names_by_path[path]] if path in names_by_path else (-1, "")
            if not _has_content(path, size, sha256):
                raise _conflict_error(root, path)


def _conflict_error(root: Path, path: Path) -> ConflictError:
    return ConflictError(
        f"{root} is not a fetched checkpoint: {path} is in the way", fix="move it away, or give another --to"
    )


def _invalid_manifest_error(what: str) -> DamagedError:
    return DamagedError(
        f"the manifest {what}", fix="do not trust the files that it lists: it was not written by evsys-bus"
    )


def _escape_error(path: Path, root: Path) -> DamagedError:
    return DamagedError(f"{path} is a link that leaves {root}", fix="fetch into an empty folder")


def _folders_between(root: Path, path: Path) -> list[Path]:
    """Return the folders from the root down to the path."""
    return [above for above in path.parents if above != root and above.is_relative_to(root)]


def _ignores_case(root: Path) -> bool:
    """Whether the file system ignores the case of names."""
    probe = root / f".probe-a-{token_hex(4)}"
    probe.touch()
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _path(root: Path, name: str) -> Path:
    plain = safe_relative_path(name)
    if plain is None:
        raise _invalid_manifest_error(f"has a file named {name!r}, which would not stay in {root}")
    return root / plain


def _local_path(root: Path, name: str | None) -> str | None:
    return name if name is None or is_remote_uri(name) else str(_path(root, name).absolute())


def _is_present(root: Path, path: Path, size: int, sha256: str) -> bool:
    """Whether the file is present; if not, its folder is created and checked to be below the root."""
    for _ in range(2):  # before and after the folder is created
        if not path.parent.resolve().is_relative_to(root.resolve()):
            raise _escape_error(path.parent, root)
        path.parent.mkdir(parents=True, exist_ok=True)
    return _has_content(path, size, sha256)


def _has_content(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size and sha256_of(path) == sha256


_decode: Final = msgspec.json.Decoder(Manifest).decode
