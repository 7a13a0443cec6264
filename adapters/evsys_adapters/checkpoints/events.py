"""What uploading and pruning have on record: published by their delivery halves, into the courier's own stream."""

from typing import Literal

from evsys_bus.events import Event


class UploadProgress(Event, frozen=True):
    """How far an upload has got; every few seconds while one goes on."""

    run: str
    checkpoint: str
    """The folder of the checkpoint at the destination."""
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None = None
    """None while nothing is known of the rate."""
    url: str = ""
    """The destination of the checkpoint."""


class CheckpointUploaded(Event, frozen=True):
    """The manifest of a checkpoint is at the destination, and was read back; `latest` names it, or a newer one."""

    run: str
    checkpoint: str
    batch: int
    """The 0-based step after which it was saved."""
    url: str
    """Where its manifest is."""
    files: int
    bytes: int
    seconds: float
    """From the first file to the manifest, in the process that finished it."""


class CheckpointConflict(Event, frozen=True):
    """Something else is under a key of the checkpoint; it stays, and what was to be uploaded stays in the spool."""

    run: str
    checkpoint: str
    batch: int
    url: str
    """The destination of the checkpoint."""
    why: str


class CheckpointPruned(Event, frozen=True):
    """A checkpoint was removed, or would have been."""

    run: str
    checkpoint: str
    batch: int
    where: Literal["local", "remote"]
    paths: list[str]
    """What was removed: paths, or the URL of the checkpoint's folder."""
    dry_run: bool = False
    """Nothing was removed: the rules were only to be tried."""
