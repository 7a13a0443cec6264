"""`Destination`: the checkpoints of one run in an object store, and in which order what is written there.

A checkpoint is there once its manifest is. So the manifest is written last and removed first, and `latest` names only
what was read back.
"""

from typing import Final, TypeVar

import msgspec

from evsys_adapters.checkpoints.manifest import LATEST, MANIFEST, Latest, Manifest, checkpoint_folder, key_in
from evsys_adapters.checkpoints.store import ConflictError, DamagedError, MissingError, ObjectStore
from evsys_bus.errors import RetryLaterError

_T = TypeVar("_T")
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

    def key(self, folder: str, *names: str) -> str:
        """The key of something below a checkpoint's folder."""
        return key_in(self.run_key, folder, *names)

    async def manifest(self, folder: str) -> Manifest | None:
        """The manifest of a checkpoint; None where it is not there, or is none.

        Raises:
            DeliveryError, OSError: As the store does; so do all methods.
        """
        return _decoded(_MANIFEST, await self._read(self.key(folder, MANIFEST)))

    async def manifests(self) -> list[Manifest]:
        """Those of all checkpoints, the oldest first."""
        inside = f"{self.run_key}/"
        names = [each.key.removeprefix(inside) for each in await self.store.names(inside)]
        folders = {name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")}
        for folder in sorted(folders - set(self._known)):
            found = await self.manifest(folder)
            if found is not None:
                self._known[folder] = found
        return sorted((self._known[each] for each in folders if each in self._known), key=lambda each: each.age)

    async def latest(self) -> Latest | None:
        """The newest checkpoint, as it stands there."""
        return _decoded(_LATEST, await self._read(self.key(LATEST)))

    async def publish(self, manifest: Manifest) -> None:
        """Write the manifest, read it back, and then let `latest` name it, unless it names a newer one.

        Raises:
            ConflictError: The manifest of another one is there.
        """
        folder = checkpoint_folder(manifest.row)
        there = await self.manifest(folder)
        if there is None:
            await self.store.put_bytes(self.key(folder, MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
            verified = await self.manifest(folder)
            if verified is None or not verified.is_same_as(manifest):
                raise RetryLaterError(f"{self.key(folder, MANIFEST)} is not what was written")
        elif not there.is_same_as(manifest):
            raise ConflictError(f"{self.key(folder, MANIFEST)} is the manifest of another checkpoint")
        latest = await self.latest()
        if latest is None or (latest.stream, latest.seq) < manifest.age:
            moved = Latest(folder, manifest.stream, manifest.seq)
            await self.store.put_bytes(self.key(LATEST), msgspec.json.encode(moved), replace=True)

    async def remove(self, folder: str) -> int:
        """Remove a checkpoint, its manifest first; how many objects there were."""
        await self.store.delete(self.key(folder, MANIFEST))
        names = await self.store.names(f"{self.key(folder)}/")
        for each in names:
            await self.store.delete(each.key)
        return len(names) + 1

    async def _read(self, key: str) -> bytes | None:
        try:
            return await self.store.get_bytes(key)
        except (MissingError, DamagedError):
            return None


def _decoded(decoder: "msgspec.json.Decoder[_T]", content: bytes | None) -> "_T | None":
    try:
        return None if content is None else decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
