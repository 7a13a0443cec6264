"""URLs of object stores: `open_store` creates a store, and `StorePool` holds the open ones of an adapter."""

from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import anyio
import msgspec

from evsys_adapters._params import check_placeholders
from evsys_adapters._runs import experiment_folder
from evsys_adapters.checkpoints.manifest import component
from evsys_adapters.checkpoints.store import PART_BYTES, ObjectStore
from evsys_bus.errors import ConfigError

OPEN_SECONDS: Final = 60.0
_EXPERIMENT_DIR: Final = "{output_dir}"
_EXPERIMENT: Final = "{experiment}"
PLACEHOLDERS: Final = (_EXPERIMENT, _EXPERIMENT_DIR)
"""Placeholders of a URL for the name and the path of the experiment's folder."""


StoreUrl = Annotated[
    str, msgspec.Meta(pattern=r"^(s3://[^/]|file://(localhost)?[/{])", examples=["s3://bucket/{experiment}"])
]
"""URL of an object store for `open_store`; may contain placeholders."""


def check_url(url: str) -> None:
    """Check the URL's placeholders, and that the client library is installed.

    Raises:
        ValueError: A placeholder is unknown.
        ModuleNotFoundError: A package is missing; `build_callbacks` converts it to a BrokenAdapterError.
    """
    check_placeholders(url, "url", PLACEHOLDERS)
    if url.startswith("s3://") and find_spec("aiobotocore") is None:
        raise ModuleNotFoundError("s3:// needs aiobotocore", name="aiobotocore")


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


def open_store(
    url: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    path_style: bool | None = None,
    profile: str | None = None,
    concurrency: int = 4,
    part_bytes: int = PART_BYTES,
) -> tuple[ObjectStore, str]:
    """Return the store for a URL, not yet open, and the prefix of all keys in it.

    The prefix is empty or ends with a slash: the key of ``name`` is ``prefix + name``.

    Args:
        url: ``s3://bucket/prefix``, or ``file:///directory``.
        endpoint: URL of a server other than Amazon's, such as ``https://minio.example:9000``.
        path_style: Whether the bucket is part of the path instead of the host name; by default if there is an endpoint.
        profile: Profile of the user's AWS configuration.
        concurrency: How many parts of a file are sent concurrently.
        part_bytes: Size of the parts of a larger file; at least 5 MiB, as required by S3.

    Raises:
        ConfigError: The URL names no store.
        ModuleNotFoundError: aiobotocore is not installed; `build_callbacks` converts it to a BrokenAdapterError.

    Example:
        >>> store, prefix = open_store("file:///tmp/checkpoints")
        >>> prefix + "run-1/step-100.pt"
        'run-1/step-100.pt'
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        from evsys_adapters.checkpoints.folder_store import FolderStore

        return FolderStore(Path(unquote(parts.path))), ""
    if parts.scheme == "s3" and parts.netloc:
        if find_spec("aiobotocore") is None:
            raise ModuleNotFoundError('S3 needs aiobotocore; pip install "evsys-bus[s3]"', name="aiobotocore")
        from evsys_adapters.checkpoints.s3_store import S3Store

        prefix = url.removeprefix("s3://").partition("/")[2].strip("/")
        prefix = prefix and f"{prefix}/"
        store = S3Store(
            parts.netloc,
            prefix=prefix,
            endpoint=endpoint,
            region=region,
            path_style=endpoint is not None if path_style is None else path_style,
            profile=profile,
            concurrency=concurrency,
            part_bytes=part_bytes,
        )
        return store, prefix
    raise ConfigError(f"{url!r} names no object store", fix="write s3://bucket/prefix or file:///directory")
