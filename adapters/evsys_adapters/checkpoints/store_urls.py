"""URLs of object stores: `open_store` creates a store, and `StorePool` holds the open ones of an adapter."""

from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, NamedTuple, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import anyio
import msgspec

from evsys_adapters.checkpoints.manifest import component
from evsys_adapters.checkpoints.store import PART_BYTES, ObjectStore
from evsys_adapters.common.hook_arguments import experiment_folder
from evsys_adapters.common.params import check_placeholders
from evsys_bus.errors import ConfigError

OPEN_SECONDS: Final = 60.0
_EXPERIMENT_DIR: Final = "{output_dir}"
_EXPERIMENT: Final = "{experiment}"
PLACEHOLDERS: Final = (_EXPERIMENT, _EXPERIMENT_DIR)
"""Placeholders of a URL for the name and the path of the experiment's folder."""


StoreUrl = Annotated[str, msgspec.Meta(examples=["s3://bucket/{experiment}"])]
"""URL of an object store for `open_store`; may contain placeholders."""

_OPTIONS: Final = ("endpoint", "region", "path_style", "profile")
"""Options of `open_store` that an ``s3://`` URL may have as its query."""
_KNOWN: Final = "there is s3:// for every store with the S3 API, and file:// for folders"
_WAYS: Final = {
    "gs": "write s3://bucket/prefix?endpoint=https://storage.googleapis.com, with an HMAC key of the bucket's project "
    "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "r2": "write s3://bucket/prefix?endpoint=https://ACCOUNT.r2.cloudflarestorage.com&region=auto, with an API token",
    "b2": "write s3://bucket/prefix?endpoint=https://s3.REGION.backblazeb2.com&region=REGION, with an application key",
    "http": "write s3://bucket/prefix?endpoint=https://HOST if it has the S3 API",
    "az": "mount the container, as with blobfuse2, and write file:///its/folder; or put a gateway with the S3 API "
    "before it",
    "hf": "write file:///a/folder, and upload from there, as with `hf upload-large-folder`",
    "memory": "write file:///tmp/a/folder; what is only in memory is no copy of a checkpoint",
    "file": "write file:///a/folder; a folder of another machine has to be mounted",
    "s3": "write s3://bucket/prefix",
    "": "write s3://bucket/prefix, or file:///a/folder with an absolute path",
}
_SAME_WAY: Final = {
    "gcs": "gs",
    "https": "http",
    "abfs": "az",
    "abfss": "az",
    "adl": "az",
    "azure": "az",
    "wasb": "az",
    "wasbs": "az",
    "s3a": "s3",
    "s3n": "s3",
    "ram": "memory",
}


def way_for(url: str) -> str | None:
    """Return what to write instead of a URL that names no object store; None if it names one."""
    scheme, _, rest = url.partition("://")
    if not _:
        return _WAYS[scheme.partition(":")[0] if scheme.startswith(("s3:", "file:")) else ""]
    if scheme == "s3" and rest.partition("/")[0].partition("?")[0]:
        unknown = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True) if name not in _OPTIONS]
        return f"after `?` there may be {', '.join(_OPTIONS)}, and not {unknown[0]}" if unknown else None
    if scheme == "file" and rest.removeprefix("localhost").startswith(("/", "{")):
        return None
    return _WAYS.get(_SAME_WAY.get(scheme.lower(), scheme.lower()), _WAYS[""])


def check_url(url: str) -> None:
    """Check the URL and its placeholders, and that the client library is installed; in a Config's ``__post_init__``.

    Raises:
        ValueError: It names no object store, or a placeholder is unknown.
        ModuleNotFoundError: A package is missing; `build_callbacks` converts it to a BrokenAdapterError.
    """
    way = way_for(url)
    if way is not None:
        raise ValueError(f"{url!r} names no object store: {_KNOWN}; {way} - at `$.url`")
    check_placeholders(url, "url", PLACEHOLDERS)
    if url.startswith("s3://") and find_spec("aiobotocore") is None:
        raise ModuleNotFoundError("s3:// needs aiobotocore", name="aiobotocore")


class ConnectionParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a destination is reached: the params that every adapter with a destination has."""

    endpoint: str | None = None
    """URL of a server with the S3 API other than Amazon's: ``http://host:9000``."""
    region: str | None = None
    """The region of the bucket."""
    path_style: bool | None = None
    """Whether the bucket is part of the path of a request instead of the host name."""
    profile: str | None = None
    """Profile of the AWS configuration with the credentials; secrets are never given here."""


class StoreOptions(ConnectionParams, frozen=True, omit_defaults=True):
    """How destinations are reached and files are sent, without secrets."""

    concurrency: int = 4
    part_bytes: int = 16 << 20

    @classmethod
    def of(cls, params: ConnectionParams) -> Self:
        """Return the options among the params of an adapter."""
        return cls(**{name: getattr(params, name) for name in cls.__struct_fields__ if hasattr(params, name)})


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


def join_url(url: str, *names: str) -> str:
    """Return the URL of what has these names below a destination, for display: without options."""
    return "/".join((url.partition("?")[0].rstrip("/"), *names))


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
        url: ``s3://bucket/prefix``, or ``file:///directory``. An S3 URL may have the options ``endpoint``, ``region``,
            ``path_style`` and ``profile`` as its query, which take precedence.
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
    way = way_for(url)
    if way is not None:
        raise ConfigError(f"{url!r} names no object store: {_KNOWN}", fix=way)
    parts = urlsplit(url)
    if parts.scheme == "file":
        from evsys_adapters.checkpoints.folder_store import FolderStore

        return FolderStore(Path(unquote(parts.path))), ""
    if find_spec("aiobotocore") is None:
        raise ModuleNotFoundError('S3 needs aiobotocore; pip install "evsys-bus[s3]"', name="aiobotocore")
    from evsys_adapters.checkpoints.s3_store import S3Store

    options = dict(parse_qsl(parts.query))
    endpoint = options.get("endpoint", endpoint)
    if "path_style" in options:
        path_style = options["path_style"].lower() not in {"false", "no", "0"}
    prefix = url.removeprefix("s3://").partition("?")[0].partition("/")[2].strip("/")
    prefix = prefix and f"{prefix}/"
    store = S3Store(
        parts.netloc,
        prefix=prefix,
        endpoint=endpoint,
        region=options.get("region", region),
        path_style=endpoint is not None if path_style is None else path_style,
        profile=options.get("profile", profile),
        concurrency=concurrency,
        part_bytes=part_bytes,
    )
    return store, prefix
