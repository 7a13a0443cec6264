"""Fetching a checkpoint: verified file by file, resumable, and never outside the folder that it was to go to."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import anyio
import msgspec

from evsys_adapters.checkpoints import durable
from evsys_adapters.checkpoints.copying import clear, partial_of
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import MANIFEST, Manifest, checkpoint_folder, inside, is_elsewhere
from evsys_adapters.checkpoints.store import DamagedError, MissingError, Stored
from evsys_bus.context import ManifestRow
from evsys_bus.errors import DeliveryError, did_you_mean

AT_A_TIME: Final = 4
Told = Callable[[int, int], None]
"""Is called with the bytes that are here, and the bytes in all."""


async def choose(destination: Destination, name: str | None) -> Manifest:
    """The checkpoint of this name, the newest where several have it; None for what `latest` names.

    Raises:
        MissingError: There is none.
        DeliveryError, OSError: As the store does.
    """
    if name is None:
        latest = await destination.latest()
        name = None if latest is None else latest.checkpoint
    there = await destination.manifests()
    found = [each for each in there if name in {checkpoint_folder(each.row), each.row.name}]
    if found:
        return found[-1]
    known = [checkpoint_folder(each.row) for each in there]
    what = "no checkpoint" if name is None else f"no checkpoint {name}"
    raise MissingError(
        f"there is {what} below {destination.run_key}",
        fix=did_you_mean(name or "", known) or "look at the prefix, and at the run's name: they are parts of the key",
    )


async def newest_state(destination: Destination) -> Manifest | None:
    """What training goes on from: what `latest` names or, if that has no full state, the newest one that has.

    None where there is no such checkpoint.

    Raises:
        MissingError: `latest` names what is not there, and there is nothing else.
        DeliveryError, OSError: As the store does.
    """
    latest = await destination.latest()
    named = None if latest is None else await destination.manifest(latest.checkpoint)
    if named is not None and named.state is not None:
        return named
    there = await destination.manifests()
    if latest is not None and not there:
        raise MissingError(
            f"there is no checkpoint {latest.checkpoint} below {destination.run_key}, though latest.json names it",
            fix="look at the prefix: what was uploaded was removed since",
        )
    return next((each for each in reversed(there) if each.state is not None), None)


async def fetch(destination: Destination, manifest: Manifest, target: Path, told: Told | None = None) -> ManifestRow:
    """Have the checkpoint in ``target/<checkpoint>``; the row that names it there.

    What is there already, with the right digest, is not fetched again; of a file that is there in part, the rest is.

    Raises:
        DamagedError: A name would lead out of the folder, or an object is not what the manifest says.
        DeliveryError, OSError: As the store does.
    """
    folder = checkpoint_folder(manifest.row)
    root = target / folder
    paths = {file.name: _path(root, file.name) for file in manifest.files}
    row = msgspec.structs.replace(
        manifest.row, state_path=_place(root, manifest.state), sampler_path=_place(root, manifest.sampler)
    )
    begun = {partial_of(paths[file.name], file.sha256) for file in manifest.files}
    await anyio.to_thread.run_sync(clear, root, {*paths.values(), *begun})
    total, done = sum(file.size for file in manifest.files), dict.fromkeys(paths, 0)
    files = iter(manifest.files)
    failed: list[Exception] = []

    async def work() -> None:
        for file in files:  # shared: each takes the next one
            path, key = paths[file.name], destination.key(folder, file.name)

            def see(count: int, _: int, name: str = file.name) -> None:
                done[name] = count
                if told is not None:
                    told(sum(done.values()), total)

            try:
                if not await anyio.to_thread.run_sync(_is_there, root, path, file.size, file.sha256):
                    await destination.store.get_file(key, path, stored=Stored(key, file.size, file.sha256), told=see)
                see(file.size, file.size)
            except (DeliveryError, OSError) as error:
                failed.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(AT_A_TIME):
            group.start_soon(work)
    if failed:
        raise failed[0]
    root.mkdir(parents=True, exist_ok=True)
    durable.replace(root / MANIFEST, msgspec.json.encode(manifest))
    return row


def _path(root: Path, name: str) -> Path:
    plain = inside(name)
    if plain is None:
        raise DamagedError(
            f"the manifest has a file named {name!r}, which would not stay in {root}",
            fix="trust nothing that this manifest lists: it was not written by evsys-bus",
        )
    return root / plain


def _place(root: Path, name: str | None) -> str | None:
    return name if name is None or is_elsewhere(name) else str(_path(root, name).absolute())


def _is_there(root: Path, path: Path, size: int, sha256: str) -> bool:
    """Whether the file is here; if not, its folder is, and truly below the root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise DamagedError(f"{path.parent} is a link that leads out of {root}", fix="fetch into an empty folder")
    return (
        path.is_file() and not path.is_symlink() and path.stat().st_size == size and durable.sha256_of(path) == sha256
    )
