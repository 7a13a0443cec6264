"""``evsys-bus check``: validates an experiment file and shows its runs; nothing is started."""

from pathlib import Path

import click

from evsys_bus.cli.options import set_option
from evsys_bus.cli.output.screen import color_option, json_option


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
@color_option
def command(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Check the experiment that FILE describes, and show what it would run.

    All errors are reported in one pass, each with its line. Nothing is started or written.
    """
    from evsys_bus.cli.experiment_plan import load_plan, plan_json, plan_lines

    plan = load_plan(file, sets=sets)
    click.echo("\n".join(plan_json(plan) if as_json else plan_lines(plan)))
