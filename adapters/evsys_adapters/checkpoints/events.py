"""Events published by the delivery halves of uploading and pruning, into the courier's own stream."""

from typing import Literal

from evsys_bus.events import Event


class UploadProgress(Event, frozen=True):
    """Progress of an upload, published every few seconds."""

    run: str
    checkpoint: str
    """The checkpoint's folder at the destination."""
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None = None
    """None while the rate is unknown."""
    url: str = ""
    """Destination of the checkpoint."""


class CheckpointUploaded(Event, frozen=True):
    """The manifest of a checkpoint was written and verified; `latest` names it or a newer one."""

    run: str
    checkpoint: str
    batch: int
    """The 0-based step after which it was saved."""
    url: str
    """URL of its manifest."""
    files: int
    bytes: int
    seconds: float
    """From the first file to the manifest, in the process that finished the upload."""


class CheckpointConflict(Event, frozen=True):
    """A key of the checkpoint holds other content, which is left unchanged; the checkpoint stays in the spool."""

    run: str
    checkpoint: str
    batch: int
    url: str
    """Destination of the checkpoint."""
    why: str


class CheckpointPruned(Event, frozen=True):
    """A checkpoint was removed, or would have been in a dry run."""

    run: str
    checkpoint: str
    batch: int
    where: Literal["local", "remote"]
    paths: list[str]
    """The removed paths, or the URL of the checkpoint's folder."""
    dry_run: bool = False
    """Whether this was a dry run, so that nothing was removed."""
