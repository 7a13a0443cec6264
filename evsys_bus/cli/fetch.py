"""``evsys-bus fetch``: one checkpoint, downloaded and verified."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option
from evsys_bus.cli.store_options import store_options

if TYPE_CHECKING:
    from evsys_adapters.checkpoints.places import Reach
    from evsys_bus.context import ManifestRow


@click.command("fetch")
@click.argument("asked", metavar="RUN[@NAME]")
@store_options
@click.option("--to", "target", type=click.Path(path_type=Path), help="The run's folder; default: RUN, or runs/RUN.")
@click.option(
    "--record", is_flag=True, help="Add it to checkpoints.jsonl there, so that `run --resume` begins with it."
)
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen, asked: str, url: str | None, reach: "Reach", target: Path | None, record: bool, as_json: bool
) -> None:
    """Fetch a checkpoint of RUN into fetched/ in its folder; NAME as `checkpoints` shows it, by default the newest.

    Every file is verified by its digest, and what is there already is not fetched again: after an interruption the same
    command goes on. On a new machine say --from URL; RUN is then the run's name there.
    """
    run, name = _parted(asked)
    if url is None:
        url, reach = _uploaded_to(run, name)
    folder = target or (run if run.is_dir() else Path("runs") / run.name)
    fetched = _fetch(url, reach, run.absolute().name, name, folder, screen)
    if record:
        from evsys_bus.cli.fetching import put_on_record

        put_on_record(folder, fetched)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode({"type": "fetched", **msgspec.structs.asdict(fetched)}).decode())
        return
    click.echo("\n".join(filter(None, (fetched.state_path, fetched.sampler_path))))


def _parted(asked: str) -> tuple[Path, str | None]:
    run, at, name = asked.rpartition("@")
    if not at or Path(asked).exists():
        return Path(asked), None
    if not run or not name:
        raise click.UsageError(f"{asked!r} is no RUN@NAME")
    return Path(run), name


def _uploaded_to(run: Path, name: str | None) -> "tuple[str, Reach]":
    """Where it was uploaded to, as the run's folder has it on record."""
    from evsys_bus.cli.checkpoint_states import checkpoint_states

    states = [each for each in checkpoint_states(run) if each.folder.name == run.absolute().name]
    there = [
        (state, remote.url, remote.reach)
        for state in states
        for remote in state.remote
        if remote.state == "uploaded" and remote.url is not None
    ]
    named = [(url, reach) for state, url, reach in there if name in {None, state.name, state.row.name}]
    if named:
        return named[-1]
    from evsys_bus.errors import did_you_mean

    known = [state.name for state, _, _ in there]
    if name is not None and known:
        raise click.UsageError(f"{run} has no uploaded checkpoint {name}; {did_you_mean(name, known)}")
    raise click.UsageError(f"no upload of {run} is on record here; say where its checkpoints are: --from URL")


def _fetch(url: str, reach: "Reach", run: str, name: str | None, folder: Path, screen: Screen) -> "ManifestRow":
    import anyio

    from evsys_adapters.checkpoints.manifest import checkpoint_folder
    from evsys_adapters.checkpoints.restore import choose, fetch
    from evsys_bus.cli.fetch_progress import fetches_shown
    from evsys_bus.cli.fetching import FETCHED, contents
    from evsys_bus.cli.progress.transfers import metered
    from evsys_bus.cli.store_options import at_destination

    async def go() -> "ManifestRow":
        async with at_destination(url, reach, run) as destination:
            manifest = await choose(destination, name)
            with fetches_shown("auto", screen) as tell:
                told = metered(run, checkpoint_folder(manifest.row), tell)
                row = await fetch(destination, manifest, folder / FETCHED, told)
            screen.note(f"{row.name} after step {row.batch:,}: {contents(manifest)}, verified")
            return row

    return anyio.run(go)
