"""The command line: one module per command, imported only when the command runs.

This module owns the list of commands and runs one command line, from its arguments to its exit code:

    0 ok · 1 the training code raised · 2 usage or config · 3 local environment · 4 remote
    5 deliveries pending (--strict) · 130 interrupted
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

import click

from evsys_bus.cli.output.screen import Screen

COMMAND_GROUPS: Final[Mapping[str, Mapping[str, str]]] = {
    "Train": {
        "demo": "trains three small networks on handwritten digits, in seconds",
        "init": "writes the files of a new experiment, or of a package with an adapter",
        "check": "checks an experiment file and shows what it would run; starts nothing",
        "run": "runs an experiment file",
        "schema": "prints a JSON schema of experiment files, for editors",
    },
    "Look at a run": {
        "runs": "lists runs: states, differing config keys, metrics",
        "show": "shows a run or an experiment, or compares runs",
        "tail": "shows the events of a live or finished journal",
        "dash": "shows runs in the browser; starts, finds or stops the dashboard",
        "logs": "shows the tracebacks of failed runs, and the warnings of couriers",
        "status": "shows the streams of a journal, their writers, and the progress of each adapter",
        "journal": "verifies, repairs or exports a journal",
    },
    "Deliver": {
        "sync": "delivers what is pending",
        "follow": "runs an adapter beside a live run, in this process",
        "replay": "delivers a recorded run to any adapter",
        "forget": "removes an adapter from a journal whose config no longer has it",
        "checkpoints": "lists the checkpoints of a run, local and uploaded",
        "fetch": "downloads a checkpoint and verifies it",
    },
    "This machine": {
        "adapters": "lists the kinds of callbacks; with KIND its schema, defaults and an example",
        "doctor": "checks Python, packages, disk and environment of this machine",
        "bench": "measures dispatch latency and costs on this machine, as a table and a plot",
        "explain": "shows the help page of an error code",
    },
}
"""What each command does, by group and name. The click command is ``command`` in ``evsys_bus.cli.<name>``."""
COMMANDS: Final[Mapping[str, str]] = {
    name: text for commands in COMMAND_GROUPS.values() for name, text in commands.items()
}
COMMANDS_GROUP: Final = "evsys_bus.commands"
"""The entry-point group of commands in other packages: ``name = "module:command"``."""
_IN_ADAPTERS: Final = frozenset({"checkpoints", "dash", "fetch"})
"""Commands of the table that come from the package ``evsys_adapters``, by the entry-point group."""


class _StdoutClosed(Exception):  # noqa: N818 # it is no error
    """The reader of stdout has closed it."""


class LazyGroup(click.Group):
    """A click group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in display order."""
        del ctx
        return list({**COMMANDS, **_installed_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None where there is none of this name."""
        del ctx
        if cmd_name in COMMANDS and cmd_name not in _IN_ADAPTERS:
            return importlib.import_module(f"evsys_bus.cli.{cmd_name}").command
        module, _, attribute = _installed_commands().get(cmd_name, "").partition(":")
        return getattr(importlib.import_module(module), attribute) if module else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, and suggest the nearest name for an unknown one, which click cannot do here."""
        name = args[0]
        is_known = name in COMMANDS or name.startswith("-") or name in self.list_commands(ctx)
        if not is_known and not ctx.resilient_parsing:
            from evsys_bus.errors import closest_word

            near = closest_word(name, self.list_commands(ctx))
            ctx.fail(f'there is no command "{name}"{f"; did you mean {near}?" if near else ""}')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a closed stdout is not reported as an error, as click would do."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _StdoutClosed from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list in ``--help``; click's own version would import every command for its help text."""
        del ctx
        width = max(map(len, COMMANDS))
        for group, commands in COMMAND_GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(f"{name:<{width}}", text) for name, text in commands.items()])
        others = {name: target for name, target in _installed_commands().items() if name not in COMMANDS}
        if others:
            with formatter.section("Of installed packages"):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", f"a command of {target.partition('.')[0]}")
                        for name, target in others.items()
                    ]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples; click's own epilog wraps them."""
        del ctx
        with formatter.section("Examples"):
            formatter.write_dl(_EXAMPLES)


_EXAMPLES: Final = [
    ("evsys-bus demo", "everything once, with a live view"),
    ("evsys-bus run sweep.yaml", "an experiment; --dry-run and --resume too"),
    ("evsys-bus status runs/sweep", "what has arrived where"),
    ("evsys-bus explain EB101", "what an error means"),
]


def _installed_commands() -> dict[str, str]:
    """Return the commands of installed packages, from name to ``module:command``, without importing any.

    The files are read directly: importlib.metadata takes longer to import than all of ``--help``.
    """
    commands: dict[str, str] = {}
    for folder in sys.path:
        try:
            packages = [
                each.path for each in os.scandir(folder or ".") if each.name.endswith((".dist-info", ".egg-info"))
            ]
        except OSError:  # an archive, or a folder that is missing
            continue
        for package in packages:
            try:
                with open(f"{package}/entry_points.txt", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 # faster than pathlib
                    text = file.read()
            except OSError:  # most packages have none
                continue
            _, group, rest = text.partition(f"[{COMMANDS_GROUP}]\n")
            for line in rest.partition("\n[")[0].splitlines() if group else ():
                name, equals, target = line.partition("=")
                if equals:
                    commands.setdefault(name.strip(), target.partition("[")[0].strip())
    return commands


def _print_version(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"evsys-bus {version('evsys-bus')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it.")
def root() -> None:
    """Event bus for training loops: callbacks and loggers that never stall, kill or lose a run."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code."""
    screen = Screen()
    try:
        outcome = root.main(list(arguments), prog_name="evsys-bus", standalone_mode=False, obj=screen)
    except click.ClickException as error:
        from evsys_bus.cli.output.errors import report_usage

        return report_usage(error, screen)
    except _StdoutClosed:
        outcome = 0
    except (click.Abort, KeyboardInterrupt):
        screen.note("interrupted")
        return 130
    except Exception as error:
        from evsys_bus.cli.output.errors import report

        return report(error, screen)
    stdout: TextIO | None = sys.stdout
    if stdout is not None:  # the caller may have closed it: `>&-`
        try:
            stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """The ``evsys-bus`` command."""
    sys.exit(run(sys.argv[1:]))
