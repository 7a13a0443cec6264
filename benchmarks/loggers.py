"""Experiment trackers as peers in the suites ``journal`` and ``kills``; left out where they are not installed.

Each is called as its documentation shows and configured to store everything on this machine.
"""

import os
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from evsys_bus.bench.dispatch import METRICS
from evsys_bus.bench.loggers import Log, Logger

TENSORBOARD: Final = "tensorboardX"
WANDB: Final = "wandb, offline"

# Types of the peers are Any, because pyright runs where they are not installed.


@contextmanager
def _tensorboard(directory: Path) -> Generator[Log, None, None]:
    from tensorboardX import SummaryWriter

    writer: Any = SummaryWriter(str(directory))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


def _count_tensorboard(directory: Path) -> int:
    """Count the steps of which every scalar was written."""
    from tensorboardX.proto.event_pb2 import Event

    seen: dict[int, int] = {}
    for path in directory.glob("events.*"):
        for record in _tensorboard_records(path.read_bytes()):
            event: Any = Event.FromString(record)
            for _ in event.summary.value:
                seen[event.step] = seen.get(event.step, 0) + 1
    return sum(count >= len(METRICS) for count in seen.values())


def _tensorboard_records(content: bytes) -> Iterator[bytes]:
    """Read TFRecords (length, its checksum, the record, its checksum) up to the first truncated one."""
    offset = 0
    while offset + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        end = offset + 12 + length
        if end + 4 > len(content):
            return
        yield content[offset + 12 : end]
        offset = end + 4


@contextmanager
def _wandb(directory: Path) -> Generator[Log, None, None]:
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    import wandb

    settings: Any = wandb.Settings(silent=True, x_disable_stats=True)
    run: Any = wandb.init(project="bench", mode="offline", dir=str(directory), settings=settings)
    try:
        yield lambda step, metrics: run.log(metrics, step=step)
    finally:
        run.finish()


def _count_wandb(directory: Path) -> int:
    """Count the history records in the file of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = (
        Record.FromString(record) for path in directory.rglob("*.wandb") for record in _wandb_records(path.read_bytes())
    )
    return sum(record.WhichOneof("record_type") == "history" for record in records)


def _wandb_records(content: bytes, header_bytes: int = 7, block_bytes: int = 32_768) -> Iterator[bytes]:
    """Read a LevelDB log (blocks of fragments with checksum, length and kind) up to the first truncated record."""
    offset, record = header_bytes, b""
    while offset + header_bytes <= len(content):
        remaining = block_bytes - offset % block_bytes
        if remaining < header_bytes:
            offset += remaining
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        end = offset + header_bytes + length
        if end > len(content) or kind not in {1, 2, 3, 4}:  # whole, first, middle, last
            return
        fragment = content[offset + header_bytes : end]
        record = fragment if kind in {1, 2} else record + fragment
        if kind in {1, 4}:
            yield record
        offset = end


LOGGERS: Final = {
    TENSORBOARD: Logger(_tensorboard, _count_tensorboard, "tensorboardX"),
    WANDB: Logger(_wandb, _count_wandb, "wandb"),
}
