"""``evsys-bus fetch``: downloads and verifies one checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from evsys_bus.cli.journals import RUNS
from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import Screen, color_option
from evsys_bus.cli.store_options import store_options

if TYPE_CHECKING:
    from evsys_adapters.checkpoints.places import Reach
    from evsys_bus.context import ManifestRow

_MOST_NAMED: Final = 3


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
    screen: Screen, asked: str, url: str | None, reach: "Reach", target: Path | None, record: bool, as_json: bool
) -> None:
    """Fetch a checkpoint of RUN into fetched/ in its folder; NAME as `checkpoints` shows it, by default the newest.

    Every file is verified by its digest, and files that exist already are not fetched again: after an interruption the
    same command continues. On a new machine use --from URL; RUN is then the run's name there.
    """
    run, name = _parted(asked)
    folder, key = run if run.is_dir() else RUNS / run, run.absolute().name
    if url is None:
        _refuse_experiment(run, folder)
        url, reach, recorded = _uploaded_to(run, name)
        folder = folder if run.is_dir() and recorded.name == key else recorded
        key = recorded.name
    folder = target or folder
    fetched = _fetch(url, reach, key, name, folder, screen)
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
        raise click.UsageError(f"{asked!r} is not of the form RUN@NAME")
    return Path(run), name


def _refuse_experiment(asked: Path, folder: Path) -> None:
    from evsys_bus.cli.planned import earlier_page

    page = earlier_page(folder)
    if page is not None:
        known = [str(asked / key) for key in page.runs]
        named = f"; name a run: {', '.join(known[:_MOST_NAMED])}" if known else ""
        raise click.UsageError(f"{asked} is an experiment{named}{', ...' if len(known) > _MOST_NAMED else ''}")


def _uploaded_to(run: Path, name: str | None) -> "tuple[str, Reach, Path]":
    """Return the destination that the run's folder records, its options, and that folder."""
    from evsys_bus.cli.checkpoint_states import checkpoint_states

    known_here = checkpoint_states(run)
    states = [each for each in known_here if each.folder.name == run.absolute().name]
    if not states and len({each.folder for each in known_here}) == 1:  # a journal or a folder with a single run
        states = known_here
    there = [
        (state, (remote.url, remote.reach, state.folder))
        for state in states
        for remote in state.remote
        if remote.state == "uploaded" and remote.url is not None
    ]
    named = [place for state, place in there if name in {None, state.name, state.row.name}]
    if named:
        return named[-1]
    from evsys_bus.errors import did_you_mean

    known = [state.name for state, _ in there]
    if name is not None and known:
        raise click.UsageError(f"{run} has no uploaded checkpoint {name}; {did_you_mean(name, known)}")
    raise click.UsageError(f"no upload of {run} is recorded here; give the URL of its checkpoints: --from URL")


def _fetch(url: str, reach: "Reach", run: str, name: str | None, folder: Path, screen: Screen) -> "ManifestRow":
    import anyio

    from evsys_adapters.checkpoints.manifest import FETCHED, checkpoint_folder
    from evsys_adapters.checkpoints.restore import choose, fetch
    from evsys_bus.cli.fetch_progress import fetches_shown
    from evsys_bus.cli.fetching import contents
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
