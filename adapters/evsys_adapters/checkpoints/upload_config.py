"""Parameters of `checkpoint_upload`, shared by its two halves."""

from importlib.util import find_spec
from typing import Annotated, Final, Literal

import msgspec

from evsys_adapters._params import check_placeholders
from evsys_adapters.checkpoints.manifest import PARTS, PartName
from evsys_adapters.checkpoints.stores import PLACEHOLDERS, StoreOptions
from evsys_bus.context import ManifestRow

FINAL: Final = "final"

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


class CheckpointUploadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `CheckpointUploadCallback`."""

    url: StoreUrl
    """Destination: ``s3://bucket/prefix`` or ``file:///folder``; a run's checkpoints go into a folder named after
    it. ``{experiment}`` is replaced by the name of the experiment's folder, ``{output_dir}`` by its path."""
    checkpoints: Literal["all", "final"] | Annotated[int, msgspec.Meta(ge=1)] = "all"
    """Which checkpoints: ``all``, ``final``, or those saved after every this many steps and the final one."""
    what: Literal["state", "sampler", "both"] = "both"
    """The full state, the weights for inference, or both."""
    endpoint: str | None = None
    """URL of a server with the S3 API other than Amazon's: ``http://host:9000``."""
    region: str | None = None
    path_style: bool | None = None
    """Whether the bucket is part of the path of a request instead of the host name."""
    profile: str | None = None
    """Profile of the AWS configuration with the credentials; secrets are never given here."""
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Maximum number of concurrent transfers of files and parts."""
    part_bytes: Annotated[int, msgspec.Meta(ge=5 << 20)] = 16 << 20
    """A larger file is sent in parts of this size; after a crash only unfinished parts are sent again."""
    progress_seconds: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """Interval of progress events during an upload."""

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts of a checkpoint that are uploaded."""
        return PARTS if self.what == "both" else (self.what,)

    def wants(self, row: ManifestRow) -> bool:
        """Whether this checkpoint is uploaded."""
        if self.checkpoints == "all" or row.name == FINAL:
            return True
        return isinstance(self.checkpoints, int) and (row.batch + 1) % self.checkpoints == 0

    @property
    def store_options(self) -> StoreOptions:
        """Connection options of the destination."""
        names = StoreOptions.__struct_fields__
        return StoreOptions(**{name: getattr(self, name) for name in names})
