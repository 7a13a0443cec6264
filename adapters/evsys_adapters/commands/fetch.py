"""``evsys-bus fetch``: downloads and verifies one checkpoint."""

import errno
from pathlib import Path
from typing import Final

import anyio
import click
import msgspec

from evsys_adapters.checkpoints.manifest import FETCHED, Manifest, checkpoint_folder
from evsys_adapters.checkpoints.restore import choose_checkpoint, fetch_checkpoint
from evsys_adapters.checkpoints.store_urls import StoreOptions
from evsys_adapters.commands.checkpoints import checkpoint_states, open_destination, store_options
from evsys_bus.cli.output.formatting import format_size, pluralize
from evsys_bus.cli.output.progress import show_fetches
from evsys_bus.cli.output.screen import Screen, color_option, json_option
from evsys_bus.cli.output.transfers import make_byte_counter
from evsys_bus.cli.records import CHECKPOINTS, RUNS, load_previous_experiment
from evsys_bus.context import ManifestRow
from evsys_bus.errors import did_you_mean
from evsys_bus.run_files import Row, RowFile

_MAX_NAMED: Final = 3


@click.command("fetch")
@click.argument("asked", metavar="RUN[@NAME]")
@store_options
@click.option("--to", "target", type=click.Path(path_type=Path), help="The run's folder; default: RUN or runs/RUN.")
@click.option(
    "--record", is_flag=True, help="Add it to checkpoints.jsonl there, so that `run --resume` continues from it."
)
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen, asked: str, url: str | None, reach: StoreOptions, target: Path | None, record: bool, as_json: bool
) -> None:
    """Fetch a checkpoint of RUN into fetched/ in its folder; NAME as `checkpoints` shows it, by default the newest.

    Every file is verified by its digest, and files that exist already are not fetched again: after an interruption the
    same command continues. On a new machine use --from URL; RUN is then the run's name there.
    """
    run, name = _split_name(asked)
    folder, key = run if run.is_dir() else RUNS / run, run.absolute().name
    if url is None:
        previous = load_previous_experiment(folder)
        if previous is not None:
            known = [str(run / key) for key in previous.runs]
            named = f"; name a run: {', '.join(known[:_MAX_NAMED])}" if known else ""
            raise click.UsageError(f"{run} is an experiment{named}{', ...' if len(known) > _MAX_NAMED else ''}")
        url, reach, recorded = _find_upload(run, name)
        folder = folder if run.is_dir() and recorded.name == key else recorded
        key = recorded.name
    folder = target or folder
    fetched = _fetch_checkpoint(url, reach, key, name, folder, screen)
    if record:
        record_checkpoint(folder, fetched)
    if as_json:
        click.echo(msgspec.json.encode({"type": "fetched", **msgspec.structs.asdict(fetched)}).decode())
        return
    click.echo("\n".join(filter(None, (fetched.state_path, fetched.sampler_path))))


def _split_name(argument: str) -> tuple[Path, str | None]:
    run, at, name = argument.rpartition("@")
    if not at or Path(argument).exists():
        return Path(argument), None
    if not run or not name:
        raise click.UsageError(f"{argument!r} is not of the form RUN@NAME")
    return Path(run), name


def _find_upload(run: Path, name: str | None) -> tuple[str, StoreOptions, Path]:
    """Return the destination that the run's folder records, its options, and that folder."""
    all_states = checkpoint_states(run)
    states = [each for each in all_states if each.folder.name == run.absolute().name]
    if not states and len({each.folder for each in all_states}) == 1:  # a journal or a folder with a single run
        states = all_states
    uploads = [
        (state, (remote.url, remote.store_options, state.folder))
        for state in states
        for remote in state.remote
        if remote.state == "uploaded" and remote.url is not None
    ]
    named = [location for state, location in uploads if name in {None, state.name, state.row.name}]
    if named:
        return named[-1]

    known = [state.name for state, _ in uploads]
    if name is not None and known:
        raise click.UsageError(f"{run} has no uploaded checkpoint {name}; {did_you_mean(name, known)}")
    raise click.UsageError(f"no upload of {run} is recorded here; give the URL of its checkpoints: --from URL")


def _fetch_checkpoint(
    url: str, options: StoreOptions, run: str, name: str | None, folder: Path, screen: Screen
) -> ManifestRow:
    async def download() -> ManifestRow:
        async with open_destination(url, options, run) as destination:
            manifest = await choose_checkpoint(destination, name)
            with show_fetches("auto", screen) as on_transfer:
                on_bytes = make_byte_counter(run, checkpoint_folder(manifest.row), on_transfer)
                row = await fetch_checkpoint(destination, manifest, folder / FETCHED, on_bytes)
            screen.note(f"{row.name} after step {row.batch:,}: {describe_contents(manifest)}, verified")
            return row

    return anyio.run(download)


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
