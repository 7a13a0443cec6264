"""`StorePool`: the open destinations of an adapter, each probed before its first use."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

import anyio
import msgspec

from evsys_adapters._runs import experiment_folder
from evsys_adapters.checkpoints.manifest import component
from evsys_adapters.checkpoints.store import ObjectStore, open_store

OPEN_SECONDS: Final = 60.0
_EXPERIMENT_DIR: Final = "{output_dir}"
_EXPERIMENT: Final = "{experiment}"
PLACEHOLDERS: Final = (_EXPERIMENT, _EXPERIMENT_DIR)
"""Placeholders of a URL for the name and the path of the experiment's folder."""


class StoreOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Connection options of destinations, without secrets."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    profile: str | None = None
    concurrency: int = 4
    part_bytes: int = 16 << 20


class OpenedStore(NamedTuple):
    """An open destination."""

    store: ObjectStore
    prefix: str
    """Prefix of all keys."""


class StorePool:
    """Opens each URL once.

    Args:
        options: Options for all of them.
    """

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._open: dict[str, OpenedStore] = {}

    async def get(self, url: str, *, probe: bool = True) -> OpenedStore:
        """Return the open destination.

        Args:
            url: Without placeholders.
            probe: Whether to check first that it can be written.

        Raises:
            DeliveryError, OSError, ConfigError: It cannot be reached, rejects the credentials, or the URL is invalid.
        """
        if url not in self._open:
            store, prefix = open_store(url, **msgspec.structs.asdict(self._options))
            async with AsyncExitStack() as unless_open:
                unless_open.push_async_callback(store.close)
                with anyio.fail_after(OPEN_SECONDS):
                    await store.open()
                    if probe:
                        await store.probe()
                unless_open.pop_all()
            self._open[url] = OpenedStore(store, prefix)
        return self._open[url]

    async def close(self) -> None:
        """Close all destinations."""
        while self._open:
            await self._open.popitem()[1].store.close()


def has_placeholders(url: str) -> bool:
    """Whether the URL depends on the run."""
    return _EXPERIMENT_DIR in url or _EXPERIMENT in url


def url_for(url: str, handle: object) -> str:
    """Replace the placeholders of the URL: the path and the name of the experiment's folder.

    Args:
        url: With or without placeholders.
        handle: The state or the context of a run, of any class.
    """
    return expand_url(url, experiment_folder(handle))


def expand_url(url: str, folder: Path) -> str:
    """Replace the placeholders for an experiment's folder."""
    folder = folder.absolute()
    return url.replace(_EXPERIMENT_DIR, quote(str(folder))).replace(_EXPERIMENT, component(folder.name))
