"""The recorded checkpoints of a run or an experiment, and where each of them is.

Read from the journal, from ``checkpoints.jsonl`` and from the spool in the run's folder, without any network access.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import click
import msgspec

from evsys_adapters.checkpoints.events import CheckpointPruned
from evsys_adapters.checkpoints.manifest import checkpoint_folder, component
from evsys_adapters.checkpoints.removal import local_paths
from evsys_adapters.checkpoints.spool import REFUSED_SUFFIX, SPOOL_FOLDER, Spool, UploadRecord
from evsys_adapters.checkpoints.stores import StoreOptions
from evsys_bus.cli.events import EventFilter, EventReader
from evsys_bus.cli.records import CHECKPOINTS, JournalLocation, find_journal, read_run
from evsys_bus.codec import decode
from evsys_bus.context import ManifestRow
from evsys_bus.errors import CodecError
from evsys_bus.events import Checkpoint
from evsys_bus.journal import JournalReader

LocalState = Literal["whole", "partly", "gone", "elsewhere"]
RemoteState = Literal["uploaded", "waiting", "conflict", "pruned", "unknown"]
"""``unknown``: it was uploaded, and the record of the upload can no longer be read."""


class RemoteCopy(msgspec.Struct, frozen=True, rename={"store_options": "reach"}):
    """A checkpoint at one destination, or waiting to be uploaded there."""

    state: RemoteState
    url: str | None = None
    """The destination; None while it is unknown."""
    store_options: StoreOptions = StoreOptions()
    bytes: int | None = None


class CheckpointState(msgspec.Struct):
    """One checkpoint, its local files and its uploads."""

    run: str
    folder: Path
    """The folder of the run."""
    row: ManifestRow
    local: LocalState
    remote: list[RemoteCopy]

    @property
    def name(self) -> str:
        """The name of the checkpoint at a destination and for ``evsys-bus fetch``."""
        return checkpoint_folder(self.row)


def checkpoint_states(requested: Path | None) -> list[CheckpointState]:
    """Return the checkpoints of a run or an experiment, grouped by run, in the order in which they were saved.

    Raises:
        click.UsageError: There is no such run.
    """
    journal, folder = _find_sources(requested)
    rows: dict[Path, list[ManifestRow]] = {}
    for run_dir, row in _read_announced(journal, folder):
        known = rows.setdefault(run_dir, [])
        known[:] = [each for each in known if (each.name, each.batch) != (row.name, row.batch)] + [row]
    pruned = {} if journal is None else dict(_read_pruned(journal.directory))
    return [_checkpoint_state(run_dir, row, pruned) for run_dir, known in rows.items() for row in known]


def _find_sources(requested: Path | None) -> tuple[JournalLocation | None, Path | None]:
    """Return the journal and the folder of the requested run; one of them may be None."""
    folder = requested if requested is not None and (requested / CHECKPOINTS).is_file() else None
    try:
        return find_journal(requested), folder
    except click.UsageError:
        if folder is None:
            raise
        return None, folder


def _read_announced(journal: JournalLocation | None, folder: Path | None) -> Iterator[tuple[Path, ManifestRow]]:
    if journal is not None:
        reader = EventReader(journal.directory, EventFilter(types=frozenset({"checkpoint"}), run=journal.run))
        for envelope in reader.poll():
            if isinstance(envelope.event, Checkpoint):
                recorded = Path(envelope.event.state.output_dir)
                sibling = journal.directory.parent / recorded.name  # the experiment may have been moved
                run_dir = recorded if recorded.is_dir() or not sibling.is_dir() else sibling
                yield run_dir.absolute(), envelope.event.row
    record = None if folder is None else read_run(folder)
    if record is not None:
        yield from ((record.folder.absolute(), row) for row in record.checkpoints)


def _read_pruned(directory: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ``((run, checkpoint), url)`` for everything that was pruned from a destination."""
    reader = JournalReader(directory)
    for stream in reader.streams("c"):
        for record in reader.read(stream):
            if b"checkpoint_pruned" not in record.payload:
                continue
            with suppress(CodecError):
                event = decode(record.payload).event
                if not isinstance(event, CheckpointPruned) or event.where != "remote" or event.dry_run:
                    continue
                if event.paths:
                    yield (event.run, event.checkpoint), event.paths[0]


def _checkpoint_state(run_dir: Path, row: ManifestRow, pruned: dict[tuple[str, str], str]) -> CheckpointState:
    present = [_exists(path) for path in local_paths(row)]
    local: LocalState = (
        "elsewhere" if not present else "whole" if all(present) else "partly" if any(present) else "gone"
    )
    run = component(run_dir.name)
    remote = list(_remote_copies(run_dir, row, pruned.get((run, checkpoint_folder(row)))))
    return CheckpointState(run, run_dir, row, local, remote)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # an invalid file name, or a folder without permission to read
        return False


def _remote_copies(run_dir: Path, row: ManifestRow, pruned: str | None) -> Iterator[RemoteCopy]:
    for folder in sorted((run_dir / SPOOL_FOLDER).glob("*/")):
        spool = Spool(folder)
        uploaded = [_uploaded_copy(done, pruned) for done in spool.uploaded(row)]
        yield from uploaded
        pending = spool.pending(row)
        yield from (RemoteCopy("waiting") for _ in pending)
        if not pending:
            yield from (RemoteCopy("unknown") for _ in spool.unreadable(row))
        yield from (RemoteCopy("conflict") for _ in folder.glob(f"{checkpoint_folder(row)}@*{REFUSED_SUFFIX}"))


def _uploaded_copy(record: UploadRecord, pruned: str | None) -> RemoteCopy:
    manifest = record.manifest
    is_pruned = pruned is not None and pruned.startswith(record.url.rstrip("/"))
    state: RemoteState = "pruned" if is_pruned else "uploaded"
    return RemoteCopy(state, record.url, record.store_options, sum(file.size for file in manifest.files))
