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
    Latest,
    Life,
    Manifest,
    checkpoint_folder,
    inside,
    key_in,
)
from evsys_adapters.checkpoints.store import ConflictError, DamagedError, MissingError, ObjectStore
from evsys_bus.errors import ParkedError, RetryLaterError
from evsys_bus.journal.layout import order_of

_T = TypeVar("_T")
_MOST_LIVES: Final = 1000
"""Maximum number of streams listed in `latest`."""
_LATEST: Final = msgspec.json.Decoder(Latest)
_MANIFEST: Final = msgspec.json.Decoder(Manifest)


class Destination:
    """The checkpoints of one run at a destination.

    Args:
        store: An open store.
        prefix: Prefix of all keys.
        run: The run's folder name, one path component.
    """

    def __init__(self, store: ObjectStore, prefix: str, run: str) -> None:
        self.store: Final = store
        self.run_key: Final = key_in(prefix, run)
        """Key of the run's folder."""
        self._known: dict[str, Manifest] = {}  # manifests are immutable
        self.damaged: set[str] = set()
        """Folders whose manifest exists but is invalid, as of the last call of `manifests`."""

    def key(self, folder: str, *names: str) -> str:
        """Return the key of an object below a checkpoint's folder."""
        return key_in(self.run_key, folder, *names)

    async def manifest(self, folder: str) -> Manifest | None:
        """Return the manifest of a checkpoint; None if it is missing, invalid, or names another checkpoint.

        Raises:
            DeliveryError, OSError: Raised by the store; the same applies to all methods.
        """
        found = _decoded(_MANIFEST, await self._read(self.key(folder, MANIFEST)))
        return found if found is not None and checkpoint_folder(found.row) == folder else None

    async def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first."""
        inside = f"{self.run_key}/"
        names = [each.key.removeprefix(inside) for each in await self.store.names(inside)]
        folders = {name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")}
        for folder in sorted(folders - set(self._known)):
            found = await self.manifest(folder)
            if found is not None:
                self._known[folder] = found
        self.damaged = folders - set(self._known)
        return sorted((self._known[each] for each in folders if each in self._known), key=lambda each: each.age)

    async def latest(self) -> Latest | None:
        """Return the record of the newest checkpoint."""
        return _decoded(_LATEST, await self._read(self.key(LATEST)))

    async def publish(self, manifest: Manifest, *, follows: int = -1) -> Manifest:
        """Write the manifest, verify it, and point `latest` to it unless that names a newer one.

        Args:
            manifest: Its life is assigned here.
            follows: The largest life of a fetched checkpoint that the run was resumed from.

        Returns:
            The manifest, with its life.

        Raises:
            ConflictError: There is a manifest of another checkpoint.
        """
        folder = checkpoint_folder(manifest.row)
        standing = await self._standing()
        manifest = msgspec.structs.replace(manifest, life=_life_of(manifest, standing, follows))
        there = await self.manifest(folder)
        if there is None:
            await self.store.put_bytes(self.key(folder, MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
            verified = await self.manifest(folder)
            if verified is None or not verified.is_same_as(manifest):
                raise RetryLaterError(f"{self.key(folder, MANIFEST)} differs from what was written")
        elif not there.is_same_as(manifest):
            raise ConflictError(f"{self.key(folder, MANIFEST)} is the manifest of another checkpoint")
        await self._move_latest(manifest, standing)
        return manifest

    async def remove(self, manifest: Manifest) -> None:
        """Remove a checkpoint: first its manifest, then the objects listed in it, and no others."""
        folder = checkpoint_folder(manifest.row)
        await self.store.delete(self.key(folder, MANIFEST))
        self._known.pop(folder, None)
        for file in manifest.files:
            if inside(file.name) is not None:
                await self.store.delete(self.key(folder, file.name))

    async def _standing(self) -> Latest | None:
        """Return `latest`, rebuilt from the manifests if missing, damaged or of 0.1.0; None without checkpoints."""
        latest = await self.latest()
        if latest is not None and latest.lives:
            return latest
        there: list[Manifest] = []
        with suppress(ParkedError):  # without permission to list, rely on `latest`
            there = await self.manifests()
        lives = {each.stream: Life(each.life, each.origin) for each in there if each.life or not each.origin}
        if latest is not None:
            lives.setdefault(latest.stream, Life(latest.life))
        if there and (latest is None or latest.age <= there[-1].age):
            newest = there[-1]
            folder, batch = checkpoint_folder(newest.row), newest.row.batch
            latest = Latest(folder, newest.stream, newest.seq, life=newest.life, batch=batch)
        return None if latest is None else msgspec.structs.replace(latest, lives=lives)

    async def _move_latest(self, manifest: Manifest, standing: Latest | None) -> None:
        """Point `latest` to this checkpoint unless it names a newer one, and add its stream."""

        def change(before: bytes | None) -> bytes | None:
            latest = _decoded(_LATEST, before)
            known = standing if latest is None or not latest.lives else latest
            moved = _moved(known, manifest)
            return None if moved == latest else msgspec.json.encode(moved)

        while not await self.store.change_bytes(self.key(LATEST), change):
            # The store replaces unconditionally: another process may have replaced `latest` at the same time;
            # it has written its manifest before.
            newest = manifest
            with suppress(ParkedError):
                newest = max(await self.manifests(), key=lambda each: each.age, default=manifest)
            if newest.age <= manifest.age:
                return
            manifest = newest

    async def _read(self, key: str) -> bytes | None:
        try:
            return await self.store.get_bytes(key)
        except (MissingError, DamagedError):
            return None


def _life_of(manifest: Manifest, latest: Latest | None, follows: int) -> int:
    """Return the life of the manifest's stream; 0 if it is older than all numbered streams."""
    if latest is None:
        return 1
    known = latest.lives.get(manifest.stream)
    if known is not None:
        return known.number
    order = order_of(manifest.stream)
    here = {stream: life for stream, life in latest.lives.items() if life.origin and life.origin == manifest.origin}
    later = [(order_of(stream), life.number) for stream, life in here.items() if order_of(stream) > order]
    if later:
        return min(later)[1]
    elsewhere = any(life.origin not in {"", manifest.origin} for life in latest.lives.values())
    further = latest.batch is None or manifest.row.batch > latest.batch
    if elsewhere and not further and follows < latest.life:
        return max((life.number for life in here.values()), default=0)
    return 1 + max((life.number for life in latest.lives.values()), default=0)


def _moved(latest: Latest | None, manifest: Manifest) -> Latest:
    """Return `latest` updated for this checkpoint."""
    lives = {} if latest is None else dict(latest.lives)
    if manifest.life:
        lives.setdefault(manifest.stream, Life(manifest.life, manifest.origin))
    if len(lives) > _MOST_LIVES:
        lives = dict(sorted(lives.items(), key=lambda each: each[1].number)[-_MOST_LIVES:])
    if latest is not None and manifest.age <= latest.age:
        return msgspec.structs.replace(latest, lives=lives)
    folder, batch = checkpoint_folder(manifest.row), manifest.row.batch
    return Latest(folder, manifest.stream, manifest.seq, life=manifest.life, batch=batch, lives=lives)


def _decoded(decoder: "msgspec.json.Decoder[_T]", content: bytes | None) -> "_T | None":
    try:
        return None if content is None else decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
