"""``evsys-bus demo``: runs a short experiment on real data."""

import time
from pathlib import Path

import click

from evsys_bus.cli.check import load_plan
from evsys_bus.cli.options import build_command_line, dash_option, output_dir_option, running_options
from evsys_bus.cli.output.progress import ProgressMode
from evsys_bus.cli.output.screen import Screen
from evsys_bus.cli.run import RunOptions, train
from evsys_bus.demo import DEMO_FILE


@click.command("demo")
@output_dir_option("Default: runs/demo-<time>.")
@dash_option
@running_options
@click.pass_obj
def command(
    screen: Screen,
    output_dir: Path | None,
    dash: bool,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    sets: tuple[str, ...],
    resume: bool,
    strict: bool,
    progress: ProgressMode,
    as_json: bool,
    log_level: int | None,
) -> int:
    """Train small networks on scikit-learn's handwritten digits: several arms, two seeds each, in seconds.

    It is an experiment file like any other: examples/digits.yaml.
    """
    if resume and output_dir is None:
        raise click.UsageError("--resume needs --output-dir, the experiment to continue")
    from evsys_bus.demo.digits_run import require_demo_extra

    require_demo_extra()
    folder = output_dir or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    plan = load_plan(DEMO_FILE, sets=sets, arms=arms, seeds=seeds, output_dir=folder)
    resume_command = build_command_line("demo", output_dir=folder, set=sets, arm=arms, seed=seeds)
    options = RunOptions(resume, strict, progress, as_json, resume_command, log_level, dash=dash)
    return train(plan, options, screen)
