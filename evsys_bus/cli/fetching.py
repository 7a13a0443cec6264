"""Checkpoints that are fetched: where they lie in a run's folder, how they come on its record, how they are told."""

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
    """As the trainer would have, had it saved this here; what is on record under that name gives way.

    Args:
        folder: The run's.
        row: The checkpoint, with its paths here.
        as_last: What is on record of later steps gives way too.

    Raises:
        OSError: The disk does not take it.
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
    if file.waiting:  # a trainer goes on without; what is to begin from this row must not
        raise OSError(errno.ENOSPC, "the record of checkpoints cannot be written", str(file.path))


def contents(manifest: Manifest) -> str:
    """``4 files, 312.4 MB``."""
    return f"{counted(len(manifest.files), 'file')}, {size(total_bytes(manifest))}"


def total_bytes(manifest: Manifest) -> int:
    """Of all its files."""
    return sum(file.size for file in manifest.files)
