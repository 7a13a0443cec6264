"""Fetched checkpoints: adding them to the run's record, and describing their contents."""

import errno
from pathlib import Path

import msgspec

from evsys_adapters.checkpoints.manifest import Manifest
from evsys_bus.cli.amounts import size
from evsys_bus.cli.records import CHECKPOINTS
from evsys_bus.cli.tables import counted
from evsys_bus.context import ManifestRow
from evsys_bus.training.rows import Row, RowFile


def put_on_record(folder: Path, row: ManifestRow, *, as_last: bool = False) -> None:
    """Add a checkpoint to the run's record as if it had been saved here, replacing the one of the same name and step.

    Args:
        folder: The folder of the run.
        row: The checkpoint, with local paths.
        as_last: Remove checkpoints of later steps from the record too.

    Raises:
        OSError: The record cannot be written.
    """

    def stays(each: Row) -> bool:
        batch = each.get("batch")
        later = isinstance(batch, int) and batch > row.batch
        return (each.get("name"), batch) != (row.name, row.batch) and not (as_last and later)

    file = RowFile(folder / CHECKPOINTS)
    if file.path.exists():
        file.keep(stays)
    file.append(msgspec.structs.asdict(row))
    file.flush()
    if file.waiting:  # a trainer continues without the row, but a run that is to resume from it must not
        raise OSError(errno.ENOSPC, "the record of checkpoints cannot be written", str(file.path))


def contents(manifest: Manifest) -> str:
    """Return the contents as ``4 files, 312.4 MB``."""
    return f"{counted(len(manifest.files), 'file')}, {size(total_bytes(manifest))}"


def total_bytes(manifest: Manifest) -> int:
    """Return the size of all files."""
    return sum(file.size for file in manifest.files)
