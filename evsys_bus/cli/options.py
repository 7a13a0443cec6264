"""Options shared by several commands, and reconstruction of a command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from evsys_bus.cli.output.screen import color_option, json_option

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
PROGRESS_MODES: Final = ["auto", "live", "plain", "json", "off"]

set_option: Final = click.option(
    "--set", "sets", multiple=True, metavar="A.B=C", help="Override a value of the file: --set run.lr=1e-3; repeatable."
)


progress_option: Final = click.option(
    "--progress",
    type=click.Choice(PROGRESS_MODES),
    default="auto",
    show_default=True,
    help="How progress is shown on stderr. auto: live on a terminal, plain otherwise.",
)
timeout_option: Final = click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on an adapter once it has accepted no events for this long.",
)


def running_options(command: _CommandT) -> _CommandT:
    """Add the options of every command that starts an experiment."""
    for option in (
        color_option,
        json_option,
        progress_option,
        click.option(
            "--strict",
            is_flag=True,
            help="Exit with 5 if an event was not delivered, or a callback's task did not finish.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Continue from the output directory, or from checkpoints that checkpoint_upload has uploaded.",
        ),
        set_option,
        click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Only this seed; repeatable."),
        click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable."),
    ):
        command = option(command)
    return command


def output_dir_option(help_text: str) -> Callable[[_CommandT], _CommandT]:
    """Return the option ``--output-dir``."""
    return click.option("--output-dir", type=click.Path(path_type=Path, file_okay=True), help=help_text)


def build_command_line(*words: object, **options: Any) -> list[str]:
    """Return the command line with these arguments and options."""
    line = ["evsys-bus", *map(str, words)]
    for name, value in options.items():
        values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
        for each in values:
            if each is not None:
                line += [f"--{name.replace('_', '-')}", str(each)]
    return line
