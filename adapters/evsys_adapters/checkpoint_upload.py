"""`CheckpointUploadCallback`: copies every checkpoint to a bucket or another folder without blocking the loop.

The inline half creates hard links; the delivery half, `checkpoints.upload_sink`, uploads them.
"""

from typing import Any, ClassVar

from evsys_adapters._params import validate_params
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.upload_config import CheckpointUploadConfig
from evsys_adapters.checkpoints.upload_sink import UploadSink
from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, ManifestRow
from evsys_bus.diagnostics import log


class CheckpointUploadCallback(Callback):
    """Uploads the files and directories named by Checkpoint events, in a courier.

    They are hard-linked into ``spool/`` in the run's folder when the event is published, so the trainer may remove its
    own files at once; but it must write every checkpoint to new files, never into those of an earlier one. A checkpoint
    is complete at the destination once its ``manifest.json`` exists; ``latest.json`` names the newest. Paths that are
    remote URIs are recorded in the manifest and not uploaded.

    Example:
        >>> upload = CheckpointUploadCallback("s3://bucket/{experiment}", checkpoints=1000, what="state")
        >>> [upload.config.wants(ManifestRow(name, batch=batch)) for name, batch in [("a", 499), ("b", 999)]]
        [False, True]
    """

    name: ClassVar[str] = "checkpoint_upload"
    Config: ClassVar[type | None] = CheckpointUploadConfig
    delivery: ClassVar[type | None] = UploadSink

    def __init__(self, url: str, **params: Any) -> None:
        """Validate the parameters against `CheckpointUploadConfig`."""
        self.config = validate_params(CheckpointUploadConfig, {"url": url, **params})

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Link the checkpoint's files before the trainer can remove them."""
        if not self.config.wants(row):
            return
        try:
            Spool.of(state.output_dir, self.config.url).add(row, self.config.parts)
        except OSError as error:  # the delivery half tries again, and rejects the event if it fails too
            log().warning("checkpoint.not_linked", checkpoint=row.name, error=str(error))

    @staticmethod
    def fetch_before_resume(*args: Any) -> None:
        """Fetch what runs continue from; ``evsys-bus run --resume`` calls it once with all specs and runs."""
        from evsys_adapters.commands.resume import fetch_newest

        fetch_newest(*args)
