"""`Destination`: the checkpoints of one run in an object store, and in which order what is written there.

A checkpoint is there once its manifest is. So the manifest is written last and removed first, and `latest` names only
what was read back.

Which checkpoint is the newer one no clock decides. Each stream of a journal gets a number at the destination, its life:
one more than the largest, when its first checkpoint comes. A stream that is known keeps its own, one that an earlier
stream of the same journal is ordered by their counters, and what comes from another machine, without having been gone
on from what is here, is older until it has gone further.
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
"""That `latest` lists."""
_LATEST: Final = msgspec.json.Decoder(Latest)
_MANIFEST: Final = msgspec.json.Decoder(Manifest)


class Destination:
    """Where the checkpoints of one run are.

    Args:
        store: Open.
        prefix: Of all keys.
        run: The folder of the run, one component.
    """

    def __init__(self, store: ObjectStore, prefix: str, run: str) -> None:
        self.store: Final = store
        self.run_key: Final = key_in(prefix, run)
        """The key of the run's folder."""
        self._known: dict[str, Manifest] = {}  # a manifest never changes
        self.damaged: set[str] = set()
        """Folders whose manifest is there and cannot be used, as `manifests` found them."""

    def key(self, folder: str, *names: str) -> str:
        """The key of something below a checkpoint's folder."""
        return key_in(self.run_key, folder, *names)

    async def manifest(self, folder: str) -> Manifest | None:
        """The manifest of a checkpoint; None where it is not there, or is none, or that of another one.

        Raises:
            DeliveryError, OSError: As the store does; so do all methods.
        """
        found = _decoded(_MANIFEST, await self._read(self.key(folder, MANIFEST)))
        return found if found is not None and checkpoint_folder(found.row) == folder else None

    async def manifests(self) -> list[Manifest]:
        """Those of all checkpoints, the oldest first."""
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
        """The newest checkpoint, as it stands there."""
        return _decoded(_LATEST, await self._read(self.key(LATEST)))

    async def publish(self, manifest: Manifest, *, follows: int = -1) -> Manifest:
        """Write the manifest, read it back, and then let `latest` name it, unless it names a newer one.

        Args:
            manifest: Its life is found out here.
            follows: The greatest life of a checkpoint from which the run was gone on, where that was fetched.

        Returns:
            The manifest, with its life.

        Raises:
            ConflictError: The manifest of another one is there.
        """
        folder = checkpoint_folder(manifest.row)
        standing = await self._standing()
        manifest = msgspec.structs.replace(manifest, life=_life_of(manifest, standing, follows))
        there = await self.manifest(folder)
        if there is None:
            await self.store.put_bytes(self.key(folder, MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
            verified = await self.manifest(folder)
            if verified is None or not verified.is_same_as(manifest):
                raise RetryLaterError(f"{self.key(folder, MANIFEST)} is not what was written")
        elif not there.is_same_as(manifest):
            raise ConflictError(f"{self.key(folder, MANIFEST)} is the manifest of another checkpoint")
        await self._move_latest(manifest, standing)
        return manifest

    async def remove(self, manifest: Manifest) -> None:
        """Remove a checkpoint: its manifest first, then the objects that this names, and no others."""
        folder = checkpoint_folder(manifest.row)
        await self.store.delete(self.key(folder, MANIFEST))
        self._known.pop(folder, None)
        for file in manifest.files:
            if inside(file.name) is not None:
                await self.store.delete(self.key(folder, file.name))

    async def _standing(self) -> Latest | None:
        """`latest`, made of the manifests where it is missing, damaged, or of 0.1.0; None where nothing is here."""
        latest = await self.latest()
        if latest is not None and latest.lives:
            return latest
        there: list[Manifest] = []
        with suppress(ParkedError):  # who may not list goes by what `latest` says
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
        """Have `latest` name this one, unless it names a newer one, and know its stream."""

        def change(before: bytes | None) -> bytes | None:
            latest = _decoded(_LATEST, before)
            known = standing if latest is None or not latest.lives else latest
            moved = _moved(known, manifest)
            return None if moved == latest else msgspec.json.encode(moved)

        while not await self.store.change_bytes(self.key(LATEST), change):
            # The store replaces without looking at what is there: somebody else may have done so at the same time, and
            # has written a manifest before.
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
    """The life of its stream; 0 where it is older than whatever has one."""
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
    """What `latest` says once this one is here."""
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
