"""What `checkpoint_upload` can be told; both of its halves are."""

from importlib.util import find_spec
from typing import Annotated, Final, Literal

import msgspec

from evsys_adapters._params import check_placeholders
from evsys_adapters.checkpoints.manifest import PARTS, PartName
from evsys_adapters.checkpoints.places import PLACEHOLDERS, Reach
from evsys_bus.context import ManifestRow

FINAL: Final = "final"

StoreUrl = Annotated[
    str, msgspec.Meta(pattern=r"^(s3://[^/]|file://(localhost)?[/{])", examples=["s3://bucket/{experiment}"])
]
"""Names an object store, as `open_store` takes it, but for placeholders."""


def check_url(url: str) -> None:
    """See that its placeholders mean something, and that what speaks to such a store is installed.

    Raises:
        ValueError: One of them means nothing.
        ModuleNotFoundError: A package is missing; `build_callbacks` makes a BrokenAdapterError of it.
    """
    check_placeholders(url, "url", PLACEHOLDERS)
    if url.startswith("s3://") and find_spec("aiobotocore") is None:
        raise ModuleNotFoundError("s3:// needs aiobotocore", name="aiobotocore")


class CheckpointUploadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `CheckpointUploadCallback` can be told."""

    url: StoreUrl
    """Where to: ``s3://bucket/prefix`` or ``file:///folder``; a run's checkpoints go into a folder named after it.
    ``{experiment}`` stands for the name of the experiment's folder, ``{output_dir}`` for its path."""
    checkpoints: Literal["all", "final"] | Annotated[int, msgspec.Meta(ge=1)] = "all"
    """Which: ``all``, ``final``, or those saved after every so many steps and the final one."""
    what: Literal["state", "sampler", "both"] = "both"
    """The full state, the weights for inference, or both."""
    endpoint: str | None = None
    """Of a server that speaks S3, where it is not Amazon's: ``http://host:9000``."""
    region: str | None = None
    path_style: bool | None = None
    """Whether the bucket stands in the path of a request, and not in the name of its host."""
    profile: str | None = None
    """Of the AWS configuration, whose credentials are used; secrets themselves are never given here."""
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Files, and parts of a file, on their way at a time."""
    part_bytes: Annotated[int, msgspec.Meta(ge=5 << 20)] = 16 << 20
    """A file that is larger goes in parts of this size, and after a crash only unfinished parts are sent again."""
    progress_seconds: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """How often an upload under way says how far it has got."""

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def parts(self) -> tuple[PartName, ...]:
        """What of a checkpoint is uploaded."""
        return PARTS if self.what == "both" else (self.what,)

    def wants(self, row: ManifestRow) -> bool:
        """Whether this checkpoint is uploaded."""
        if self.checkpoints == "all" or row.name == FINAL:
            return True
        return isinstance(self.checkpoints, int) and (row.batch + 1) % self.checkpoints == 0

    @property
    def reach(self) -> Reach:
        """How the destination is reached."""
        names = Reach.__struct_fields__
        return Reach(**{name: getattr(self, name) for name in names})
