"""`Destination`: the checkpoints of one run in an object store, and the order of writes there.

A checkpoint exists once its manifest does. So the manifest is written last and removed first, and `latest` names only
checkpoints that were read back.

The order of checkpoints does not depend on clocks. Each journal stream gets a number at the destination, its life: one
more than the largest one, assigned with its first checkpoint. A known stream keeps its number; an earlier stream of the
same journal is ordered by the journal's counters; and a stream from another machine that did not resume from here
counts as older until it has more steps.
"""

from contextlib import suppress
from typing import Final, TypeVar

import msgspec

from evsys_adapters.checkpoints.manifest import (
    LATEST,
    MANIFEST,
    Generation,
    Latest,
    Manifest,
    checkpoint_folder,
    join_key,
    safe_relative_path,
)
from evsys_adapters.checkpoints.store import ConflictError, DamagedError, MissingError, ObjectStore
from evsys_bus.errors import ParkedError, RetryLaterError
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal.layout import stream_sort_key

_T = TypeVar("_T")
_MAX_GENERATIONS: Final = 1000
"""Maximum number of streams listed in `latest`."""
_LATEST_DECODER: Final = msgspec.json.Decoder(Latest)
_MANIFEST_DECODER: Final = msgspec.json.Decoder(Manifest)


class Destination:
    """The checkpoints of one run at a destination.

    Args:
        store: An open store.
        prefix: Prefix of all keys.
        run: The run's folder name, one path component.
    """

    def __init__(self, store: ObjectStore, prefix: str, run: str) -> None:
        self.store: Final = store
        self.run_key: Final = join_key(prefix, run)
        """Key of the run's folder."""
        self._cached_manifests: dict[str, Manifest] = {}  # manifests are immutable
        self.damaged: set[str] = set()
        """Folders whose manifest exists but is invalid, as of the last call of `manifests`."""

    def key(self, folder: str, *names: str) -> str:
        """Return the key of an object below a checkpoint's folder."""
        return join_key(self.run_key, folder, *names)

    async def manifest(self, folder: str) -> Manifest | None:
        """Return the manifest of a checkpoint; None if it is missing, invalid, or names another checkpoint.

        Raises:
            DeliveryError, OSError: Raised by the store; the same applies to all methods.
        """
        found = _decode_or_none(_MANIFEST_DECODER, await self._read(self.key(folder, MANIFEST)))
        return found if found is not None and checkpoint_folder(found.row) == folder else None

    async def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first."""
        run_prefix = f"{self.run_key}/"
        names = [each.key.removeprefix(run_prefix) for each in await self.store.names(run_prefix)]
        folders = {name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")}
        for folder in sorted(folders - set(self._cached_manifests)):
            found = await self.manifest(folder)
            if found is not None:
                self._cached_manifests[folder] = found
        self.damaged = folders - set(self._cached_manifests)
        return sorted(
            (self._cached_manifests[each] for each in folders if each in self._cached_manifests),
            key=lambda each: each.sort_key,
        )

    async def latest(self) -> Latest | None:
        """Return the record of the newest checkpoint."""
        return _decode_or_none(_LATEST_DECODER, await self._read(self.key(LATEST)))

    async def publish(self, manifest: Manifest, *, resumed_from: int = -1) -> Manifest:
        """Write the manifest, verify it, and point `latest` to it unless that names a newer one.

        Args:
            manifest: Its life is assigned here.
            resumed_from: The largest life of a fetched checkpoint that the run was resumed from.

        Returns:
            The manifest, with its life.

        Raises:
            ConflictError: There is a manifest of another checkpoint.
        """
        folder = checkpoint_folder(manifest.row)
        existing_latest = await self._existing_latest()
        manifest = msgspec.structs.replace(manifest, generation=_generation_of(manifest, existing_latest, resumed_from))
        existing = await self.manifest(folder)
        if existing is None:
            await self.store.put_bytes(self.key(folder, MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
            verified = await self.manifest(folder)
            if verified is None or not verified.is_same_as(manifest):
                raise RetryLaterError(f"{self.key(folder, MANIFEST)} differs from what was written")
        elif not existing.is_same_as(manifest):
            raise ConflictError(f"{self.key(folder, MANIFEST)} is the manifest of another checkpoint")
        await self._update_latest(manifest, existing_latest)
        return manifest

    async def remove(self, manifest: Manifest) -> None:
        """Remove a checkpoint: first its manifest, then the objects listed in it, and no others."""
        folder = checkpoint_folder(manifest.row)
        await self.store.delete(self.key(folder, MANIFEST))
        self._cached_manifests.pop(folder, None)
        for file in manifest.files:
            if safe_relative_path(file.object_name) is not None:
                await self.store.delete(self.key(folder, file.object_name))

    async def _existing_latest(self) -> Latest | None:
        """Return `latest`, rebuilt from the manifests if missing, damaged or of 0.1.0; None without checkpoints."""
        latest = await self.latest()
        if latest is not None and latest.generations:
            return latest
        existing: list[Manifest] = []
        with suppress(ParkedError):  # without permission to list, rely on `latest`
            existing = await self.manifests()
        generations = {
            each.stream: Generation(each.generation, each.origin)
            for each in existing
            if each.generation or not each.origin
        }
        if latest is not None:
            generations.setdefault(latest.stream, Generation(latest.generation))
        if existing and (latest is None or latest.sort_key <= existing[-1].sort_key):
            newest = existing[-1]
            folder, batch = checkpoint_folder(newest.row), newest.row.batch
            latest = Latest(folder, newest.stream, newest.seq, generation=newest.generation, batch=batch)
        return None if latest is None else msgspec.structs.replace(latest, generations=generations)

    async def _update_latest(self, manifest: Manifest, existing_latest: Latest | None) -> None:
        """Point `latest` to this checkpoint unless it names a newer one, and add its stream."""

        def change(content: bytes | None) -> bytes | None:
            latest = _decode_or_none(_LATEST_DECODER, content)
            known = existing_latest if latest is None or not latest.generations else latest
            updated = _updated_latest(known, manifest)
            return None if updated == latest else msgspec.json.encode(updated)

        while not await self.store.change_bytes(self.key(LATEST), change):
            # The store replaces unconditionally: another process may have replaced `latest` at the same time;
            # it has written its manifest before.
            newest = manifest
            with suppress(ParkedError):
                newest = max(await self.manifests(), key=lambda each: each.sort_key, default=manifest)
            if newest.sort_key <= manifest.sort_key:
                return
            manifest = newest

    async def _read(self, key: str) -> bytes | None:
        try:
            return await self.store.get_bytes(key)
        except (MissingError, DamagedError):
            return None


def _generation_of(manifest: Manifest, latest: Latest | None, resumed_from: int) -> int:
    """Return the life of the manifest's stream; 0 if it is older than all numbered streams."""
    if latest is None:
        return 1
    known = latest.generations.get(manifest.stream)
    if known is not None:
        return known.number
    order = stream_sort_key(manifest.stream)
    own = {
        stream: generation
        for stream, generation in latest.generations.items()
        if generation.origin and generation.origin == manifest.origin
    }
    later = [
        (stream_sort_key(stream), generation.number)
        for stream, generation in own.items()
        if stream_sort_key(stream) > order
    ]
    if later:
        return min(later)[1]
    has_other_origins = any(
        generation.origin not in {"", manifest.origin} for generation in latest.generations.values()
    )
    is_further = latest.batch is None or manifest.row.batch > latest.batch
    if has_other_origins and not is_further and resumed_from < latest.generation:
        return max((generation.number for generation in own.values()), default=0)
    return 1 + max((generation.number for generation in latest.generations.values()), default=0)


def _updated_latest(latest: Latest | None, manifest: Manifest) -> Latest:
    """Return `latest` updated for this checkpoint."""
    generations = {} if latest is None else dict(latest.generations)
    if manifest.generation:
        generations.setdefault(manifest.stream, Generation(manifest.generation, manifest.origin))
    if len(generations) > _MAX_GENERATIONS:
        generations = dict(sorted(generations.items(), key=lambda each: each[1].number)[-_MAX_GENERATIONS:])
    if latest is not None and manifest.sort_key <= latest.sort_key:
        return msgspec.structs.replace(latest, generations=generations)
    folder, batch = checkpoint_folder(manifest.row), manifest.row.batch
    return Latest(
        folder, manifest.stream, manifest.seq, generation=manifest.generation, batch=batch, generations=generations
    )


def _decode_or_none(decoder: "msgspec.json.Decoder[_T]", content: bytes | None) -> "_T | None":
    try:
        return None if content is None else decoder.decode(content)
    except DECODE_ERRORS:
        return None
