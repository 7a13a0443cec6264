"""`CheckpointUploadCallback`: has every checkpoint at a bucket or in another folder, and the loop waits for none.

It owns the inline half, which makes hard links; the delivery half, which uploads them, is `checkpoints.upload_sink`.
"""

from typing import Any, ClassVar

from evsys_adapters._params import checked
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.upload_config import CheckpointUploadConfig
from evsys_adapters.checkpoints.upload_sink import UploadSink
from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, ManifestRow
from evsys_bus.diagnostics import log


class CheckpointUploadCallback(Callback):
    """Uploads the files and directories that Checkpoint events name, by a courier.

    They are hard-linked into ``spool/`` in the run's folder when they are announced, so the trainer may remove its own
    at once; it must write every checkpoint to new files, though, never into those of an earlier one. A checkpoint is
    at the destination once its ``manifest.json`` is; ``latest.json`` names the newest. What lies elsewhere already (a
    path that is a URI) is recorded in the manifest, and not uploaded.

    Example:
        >>> upload = CheckpointUploadCallback("s3://bucket/{experiment}", checkpoints=1000, what="state")
        >>> [upload.config.wants(ManifestRow(name, batch=batch)) for name, batch in [("a", 499), ("b", 999)]]
        [False, True]
    """

    name: ClassVar[str] = "checkpoint_upload"
    Config: ClassVar[type | None] = CheckpointUploadConfig
    delivery: ClassVar[type | None] = UploadSink

    def __init__(self, url: str, **params: Any) -> None:
        """Any: as `CheckpointUploadConfig` has them; they are checked."""
        self.config = checked(CheckpointUploadConfig, {"url": url, **params})

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Link its files, before the trainer can remove them."""
        if not self.config.wants(row):
            return
        try:
            Spool.of(state.output_dir, self.config.url).keep(row, self.config.parts)
        except OSError as error:  # the delivery half tries as well, and makes it a dead letter if it cannot either
            log().warning("checkpoint.not_linked", checkpoint=row.name, error=str(error))
