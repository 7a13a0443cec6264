"""Fetched checkpoints: adding them to the run's record, and describing their contents."""

import errno
from pathlib import Path

import msgspec

from evsys_adapters.checkpoints.manifest import Manifest
from evsys_bus.cli.output.formatting import format_size, pluralize
from evsys_bus.cli.records import CHECKPOINTS
from evsys_bus.context import ManifestRow
from evsys_bus.training.row_file import Row, RowFile


def record_checkpoint(folder: Path, row: ManifestRow, *, replace_later: bool = False) -> None:
    """Add a checkpoint to the run's record as if it had been saved here, replacing the one of the same name and step.

    Args:
        folder: The folder of the run.
        row: The checkpoint, with local paths.
        replace_later: Remove checkpoints of later steps from the record too.

    Raises:
        OSError: The record cannot be written.
    """

    def is_retained(each: Row) -> bool:
        batch = each.get("batch")
        later = isinstance(batch, int) and batch > row.batch
        return (each.get("name"), batch) != (row.name, row.batch) and not (replace_later and later)

    file = RowFile(folder / CHECKPOINTS)
    if file.path.exists():
        file.retain(is_retained)
    file.append(msgspec.structs.asdict(row))
    file.flush()
    if file.pending:  # a trainer continues without the row, but a run that is to resume from it must not
        raise OSError(errno.ENOSPC, "the record of checkpoints cannot be written", str(file.path))


def describe_contents(manifest: Manifest) -> str:
    """Return the contents as ``4 files, 312.4 MB``."""
    return f"{pluralize(len(manifest.files), 'file')}, {format_size(total_bytes(manifest))}"


def total_bytes(manifest: Manifest) -> int:
    """Return the size of all files."""
    return sum(file.size for file in manifest.files)
