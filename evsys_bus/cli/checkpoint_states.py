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
from evsys_adapters.checkpoints.places import Reach
from evsys_adapters.checkpoints.removal import places
from evsys_adapters.checkpoints.spool import REFUSED, SPOOL, Done, Spool
from evsys_bus.cli.event_reader import EventReader, Wanted
from evsys_bus.cli.journals import Found, found
from evsys_bus.cli.records import CHECKPOINTS, read_run
from evsys_bus.codec import decode
from evsys_bus.context import ManifestRow
from evsys_bus.errors import CodecError
from evsys_bus.events import Checkpoint
from evsys_bus.journal import JournalReader

Here = Literal["whole", "partly", "gone", "elsewhere"]
There = Literal["uploaded", "waiting", "conflict", "pruned", "unknown"]
"""``unknown``: it was uploaded, and the record of the upload can no longer be read."""


class Remote(msgspec.Struct, frozen=True):
    """A checkpoint at one destination, or waiting to be uploaded there."""

    state: There
    url: str | None = None
    """The destination; None while it is unknown."""
    reach: Reach = Reach()
    bytes: int | None = None


class CheckpointState(msgspec.Struct):
    """One checkpoint, its local files and its uploads."""

    run: str
    folder: Path
    """The folder of the run."""
    row: ManifestRow
    local: Here
    remote: list[Remote]

    @property
    def name(self) -> str:
        """The name of the checkpoint at a destination and for ``evsys-bus fetch``."""
        return checkpoint_folder(self.row)


def checkpoint_states(asked: Path | None) -> list[CheckpointState]:
    """Return the checkpoints of a run or an experiment, grouped by run, in the order in which they were saved.

    Raises:
        click.UsageError: There is no such run.
    """
    journal, folder = _places(asked)
    rows: dict[Path, list[ManifestRow]] = {}
    for run_dir, row in _announced(journal, folder):
        known = rows.setdefault(run_dir, [])
        known[:] = [each for each in known if (each.name, each.batch) != (row.name, row.batch)] + [row]
    pruned = {} if journal is None else dict(_pruned(journal.directory))
    return [_state(run_dir, row, pruned) for run_dir, known in rows.items() for row in known]


def _places(asked: Path | None) -> tuple[Found | None, Path | None]:
    """Return the journal and the folder of the requested run; one of them may be None."""
    folder = asked if asked is not None and (asked / CHECKPOINTS).is_file() else None
    try:
        return found(asked), folder
    except click.UsageError:
        if folder is None:
            raise
        return None, folder


def _announced(journal: Found | None, folder: Path | None) -> Iterator[tuple[Path, ManifestRow]]:
    if journal is not None:
        reader = EventReader(journal.directory, Wanted(types=frozenset({"checkpoint"}), run=journal.run))
        for envelope in reader.poll():
            if isinstance(envelope.event, Checkpoint):
                recorded = Path(envelope.event.state.output_dir)
                beside = journal.directory.parent / recorded.name  # the experiment may have been moved
                run_dir = recorded if recorded.is_dir() or not beside.is_dir() else beside
                yield run_dir.absolute(), envelope.event.row
    record = None if folder is None else read_run(folder)
    if record is not None:
        yield from ((record.folder.absolute(), row) for row in record.checkpoints)


def _pruned(directory: Path) -> Iterator[tuple[tuple[str, str], str]]:
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


def _state(run_dir: Path, row: ManifestRow, pruned: dict[tuple[str, str], str]) -> CheckpointState:
    here = [_exists(place) for place in places(row)]
    local: Here = "elsewhere" if not here else "whole" if all(here) else "partly" if any(here) else "gone"
    run = component(run_dir.name)
    remote = list(_remote(run_dir, row, pruned.get((run, checkpoint_folder(row)))))
    return CheckpointState(run, run_dir, row, local, remote)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # an invalid file name, or a folder without permission to read
        return False


def _remote(run_dir: Path, row: ManifestRow, pruned: str | None) -> Iterator[Remote]:
    for folder in sorted((run_dir / SPOOL).glob("*/")):
        spool = Spool(folder)
        uploaded = [_uploaded(done, pruned) for done in spool.done(row)]
        yield from uploaded
        waiting = spool.waiting(row)
        yield from (Remote("waiting") for _ in waiting)
        if not waiting:
            yield from (Remote("unknown") for _ in spool.unreadable(row))
        yield from (Remote("conflict") for _ in folder.glob(f"{checkpoint_folder(row)}@*{REFUSED}"))


def _uploaded(done: Done, pruned: str | None) -> Remote:
    manifest = done.manifest
    gone = pruned is not None and pruned.startswith(done.url.rstrip("/"))
    state: There = "pruned" if gone else "uploaded"
    return Remote(state, done.url, done.reach, sum(file.size for file in manifest.files))
