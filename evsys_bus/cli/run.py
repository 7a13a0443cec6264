"""``evsys-bus run``: runs an experiment file."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evsys_bus.cli.options import build_command_line, output_dir_option, running_options
from evsys_bus.cli.output.screen import Screen

if TYPE_CHECKING:
    from evsys_bus.cli.output.progress import ProgressMode


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@output_dir_option("Default: the file's output_dir, or runs/<name>.")
@click.option("--dry-run", is_flag=True, help="Show the runs, and start nothing.")
@running_options
@click.pass_obj
def command(
    screen: Screen,
    file: Path,
    output_dir: Path | None,
    dry_run: bool,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    sets: tuple[str, ...],
    resume: bool,
    strict: bool,
    progress: "ProgressMode",
    as_json: bool,
) -> int:
    """Run the experiment that FILE describes.

    Progress goes to stderr, the result to stdout. The first Ctrl-C stops the runs after the current step, with a
    checkpoint; --resume continues from there.
    """
    from evsys_bus.cli.experiment_plan import load_plan, plan_json, plan_lines

    plan = load_plan(file, sets=sets, arms=arms, seeds=seeds, output_dir=output_dir)
    if dry_run:
        click.echo("\n".join(plan_json(plan) if as_json else plan_lines(plan)))
        return 0
    from evsys_bus.cli.session import RunOptions, train

    resume_command = build_command_line("run", file, set=sets, arm=arms, seed=seeds, output_dir=output_dir)
    return train(plan, RunOptions(resume, strict, progress, as_json, resume_command), screen)
