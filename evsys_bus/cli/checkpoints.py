"""``evsys-bus checkpoints``: lists the checkpoints of a run, local and uploaded."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evsys_bus.cli.output.screen import Screen, color_option, json_option
from evsys_bus.cli.store_options import store_options

if TYPE_CHECKING:
    from evsys_adapters.checkpoints.stores import StoreOptions
    from evsys_bus.cli.checkpoint_states import CheckpointState


@click.command("checkpoints")
@click.argument("asked", metavar="[RUN]", required=False)
@store_options
@json_option
@color_option
@click.pass_obj
def command(screen: Screen, asked: str | None, url: str | None, reach: "StoreOptions", as_json: bool) -> None:
    """Show the checkpoints of RUN; without it, of the newest journal below ./runs.

    Local files are checked; the state of uploads is shown as it was recorded. With --from the destination itself is
    asked for the checkpoints of RUN, which is then the run's name there.
    """
    if url is not None:
        if asked is None:
            raise click.UsageError("--from needs RUN, the run's name at the destination")
        _show_remote(url, reach, asked, as_json=as_json)
        return
    from evsys_bus.cli.checkpoint_states import checkpoint_states

    states = checkpoint_states(None if asked is None else Path(asked))
    if not states:
        screen.note("no checkpoint is recorded")
        return
    lines = [_json(each) for each in states] if as_json else _table(states)
    click.echo("\n".join(lines))


def _table(states: "list[CheckpointState]") -> list[str]:
    from evsys_bus.cli.output.formatting import NO_VALUE, format_size, format_table
    from evsys_bus.cli.output.screen import printable, terminal_width

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


def _json(state: "CheckpointState") -> str:
    import msgspec

    row: dict[str, Any] = {
        "type": "checkpoint",
        "checkpoint": state.name,
        **msgspec.to_builtins(state, enc_hook=str),
    }
    return msgspec.json.encode(row).decode()


def _show_remote(url: str, options: "StoreOptions", run: str, *, as_json: bool) -> None:
    import anyio
    import msgspec

    from evsys_adapters.checkpoints.manifest import Manifest, checkpoint_folder
    from evsys_bus.cli.output.formatting import format_size, format_table
    from evsys_bus.cli.output.screen import printable, terminal_width
    from evsys_bus.cli.store_options import open_destination

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
