"""The command line: one file per command, each imported only when it is called.

This module owns the list of commands, how errors are told, and the exit codes:

    0 ok · 1 the training code raised · 2 usage or config · 3 local environment · 130 interrupted
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import click

COMMANDS: Final[Mapping[str, str]] = {
    "demo": "train a small network on handwritten digits, over the bus, in seconds",
    "adapters": "the kinds of callbacks there are; with KIND its schema, defaults and an example",
    "bench": "dispatch latency and costs on this machine, as a table and a plot",
}
"""What each command does. The command itself is ``command`` in ``evsys_bus.cli.<name>``."""


class LazyGroup(click.Group):
    """A group that knows what its commands do without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order in which they are shown."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"evsys_bus.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``; click's own would import every command for its help text."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"evsys-bus {version('evsys-bus')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it.")
def root() -> None:
    """Event bus for training loops: callbacks and loggers that never stall, kill or lose a run."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code."""
    try:
        outcome = root.main(list(arguments), prog_name="evsys-bus", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        return _told(error)
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """The ``evsys-bus`` command."""
    sys.exit(run(sys.argv[1:]))


def _told(error: Exception) -> int:
    """Tell the error on stderr; ours in their own shape, a stranger's with its traceback."""
    from evsys_bus.errors import ConfigError, EvsysBusError, HookError, TrainingError

    if not isinstance(error, EvsysBusError):
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        return 1
    click.echo(str(error), err=True)
    if isinstance(error.__cause__, OSError | ImportError):
        return 3
    return 2 if isinstance(error, ConfigError | HookError | TrainingError) else 1
