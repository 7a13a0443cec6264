"""``evsys-bus checkpoints``: lists the checkpoints of a run, local and uploaded.

Read from the journal, from ``checkpoints.jsonl`` and from the spool in the run's folder, without any network access;
with ``--from`` the destination itself is asked.
"""

import functools
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import anyio
import click
import msgspec

from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointPruned
from evsys_adapters.checkpoints.manifest import Manifest, checkpoint_folder, component
from evsys_adapters.checkpoints.removal import local_paths
from evsys_adapters.checkpoints.spool import REFUSED_SUFFIX, SPOOL_FOLDER, Spool
from evsys_adapters.checkpoints.store_urls import StoreOptions, StorePool, join_url
from evsys_bus.cli.events import EventFilter, EventReader
from evsys_bus.cli.output.formatting import NO_VALUE, format_size, format_table
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable, terminal_width
from evsys_bus.cli.records import CHECKPOINTS, find_journal, read_run
from evsys_bus.codec import decode
from evsys_bus.context import ManifestRow
from evsys_bus.errors import BrokenAdapterError, CodecError
from evsys_bus.events import Checkpoint
from evsys_bus.journal import JournalReader
from evsys_bus.reading import JournalLocation

LocalState = Literal["whole", "partly", "gone", "elsewhere"]
RemoteState = Literal["uploaded", "waiting", "conflict", "pruned", "unknown"]
"""``unknown``: it was uploaded, and the record of the upload can no longer be read."""
_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])


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


def store_options(command: _CommandT) -> _CommandT:
    """Add ``--from`` (argument ``url``) and the connection options (argument ``options``) to a command."""

    @functools.wraps(command)
    def with_store_options(
        *args: Any, endpoint: str | None, region: str | None, path_style: bool | None, profile: str | None, **rest: Any
    ) -> object:
        options = StoreOptions(endpoint=endpoint, region=region, path_style=path_style, profile=profile)
        return command(*args, reach=options, **rest)

    wrapped: Callable[..., Any] = with_store_options
    for option in (
        click.option("--profile", metavar="NAME", help="The profile of the AWS configuration with the credentials."),
        click.option(
            "--path-style/--host-style",
            default=None,
            help="Address the bucket by path or by host.",
        ),
        click.option("--region", metavar="NAME", help="The region of the bucket."),
        click.option("--endpoint", metavar="URL", help="The URL of an S3-compatible server other than Amazon's."),
        click.option("--from", "url", metavar="URL", help="Where to look: s3://bucket/prefix or file:///folder."),
    ):
        wrapped = option(wrapped)
    return cast("_CommandT", wrapped)


@click.command("checkpoints")
@click.argument("asked", metavar="[RUN]", required=False)
@store_options
@json_option
@color_option
@click.pass_obj
def command(screen: Screen, asked: str | None, url: str | None, reach: StoreOptions, as_json: bool) -> None:
    """Show the checkpoints of RUN; without it, of the newest journal below ./runs.

    Local files are checked; the state of uploads is shown as it was recorded. With --from the destination itself is
    asked for the checkpoints of RUN, which is then the run's name there.
    """
    if url is not None:
        if asked is None:
            raise click.UsageError("--from needs RUN, the run's name at the destination")
        _show_remote(url, reach, asked, as_json=as_json)
        return

    states = checkpoint_states(None if asked is None else Path(asked))
    if not states:
        screen.note("no checkpoint is recorded")
        return
    if as_json:
        for each in states:
            row = {"type": "checkpoint", "checkpoint": each.name} | msgspec.to_builtins(each, enc_hook=str)
            click.echo(msgspec.json.encode(row).decode())
        return
    click.echo("\n".join(_table(states)))


def _table(states: list[CheckpointState]) -> list[str]:
    rows = [["run", "checkpoint", "after step", "here", "there", "size", "destination"]]
    for each in states:
        remote = each.remote[0] if each.remote else None
        rows.append(
            [
                each.run,
                each.name,
                f"{each.row.batch:,}",
                each.local,
                ", ".join(dict.fromkeys(found.state for found in each.remote)) or NO_VALUE,
                NO_VALUE if remote is None or remote.bytes is None else format_size(remote.bytes),
                ", ".join(dict.fromkeys(found.url for found in each.remote if found.url)) or NO_VALUE,
            ]
        )
    return format_table([[printable(cell) for cell in row] for row in rows], terminal_width(sys.stdout))


def _show_remote(url: str, options: StoreOptions, run: str, *, as_json: bool) -> None:
    async def load_manifests() -> list[Manifest]:
        async with open_destination(url, options, run) as destination:
            return await destination.manifests()

    found = anyio.run(load_manifests)
    if as_json:
        rows = [
            {"type": "checkpoint", "checkpoint": checkpoint_folder(each.row)} | msgspec.to_builtins(each)
            for each in found
        ]
        click.echo("\n".join(msgspec.json.encode(row).decode() for row in rows), nl=bool(rows))
        return
    rows = [["checkpoint", "after step", "files", "size"]]
    for each in found:
        total = format_size(sum(file.size for file in each.files))
        rows.append([checkpoint_folder(each.row), f"{each.row.batch:,}", f"{len(each.files):,}", total])
    click.echo("\n".join(format_table([[printable(cell) for cell in row] for row in rows], terminal_width(sys.stdout))))


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
    return [_read_checkpoint_state(run_dir, row, pruned) for run_dir, known in rows.items() for row in known]


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


def _read_checkpoint_state(run_dir: Path, row: ManifestRow, pruned: dict[tuple[str, str], str]) -> CheckpointState:
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
        for done in spool.uploaded(row):
            is_pruned = pruned is not None and pruned.startswith(join_url(done.url))
            size = sum(file.size for file in done.manifest.files)
            yield RemoteCopy("pruned" if is_pruned else "uploaded", done.url, done.store_options, size)
        pending = spool.pending(row)
        yield from (RemoteCopy("waiting") for _ in pending)
        if not pending:
            yield from (RemoteCopy("unknown") for _ in spool.unreadable(row))
        yield from (RemoteCopy("conflict") for _ in folder.glob(f"{checkpoint_folder(row)}@*{REFUSED_SUFFIX}"))


@asynccontextmanager
async def open_store(url: str, options: StoreOptions) -> AsyncGenerator[Callable[[str], Destination]]:
    """Open the store at this URL within the block; yields a function from a run to its destination. Read-only.

    Raises:
        ConfigError, DeliveryError, OSError: The store raised it.
        BrokenAdapterError: The client library of the store is not installed.
    """
    pool = StorePool(options)
    try:
        try:
            opened = await pool.get(url, probe=False)
        except ModuleNotFoundError as error:
            fix = "pip install 'evsys-bus[s3]'   or   uv add 'evsys-bus[s3]'"
            what = f"{url} cannot be reached from here"
            raise BrokenAdapterError(what, why=f"{error.name} is not installed", fix=fix) from error
        yield lambda run: Destination(opened.store, opened.prefix, component(run))
    finally:
        await pool.close()


@asynccontextmanager
async def open_destination(url: str, options: StoreOptions, run: str) -> AsyncGenerator[Destination]:
    """Open the destination of one run at this URL within the block; raises what `open_store` does."""
    async with open_store(url, options) as destination_of:
        yield destination_of(run)
