"""The suites of ``evsys-bus bench`` with frameworks and experiment trackers as peers, and some more suites.

usage: uv run --group peers python -m benchmarks journal

Name the suites to run, or none for all of them. The group installs gigabytes; missing peers are left out.
"""

from collections.abc import Mapping
from pathlib import Path

import click

from benchmarks import loggers as heavy
from benchmarks.dashboard import DashboardSuite
from benchmarks.evsys_logger import EvsysLoggerSuite
from benchmarks.frameworks import FRAMEWORKS, FrameworkRuns
from benchmarks.relay import RelaySuite
from benchmarks.survival import TaskSurvival
from benchmarks.upload_steps import UploadSteps
from benchmarks.uploads import Uploads
from evsys_bus.bench.all_loggers import ALL_LOGGERS
from evsys_bus.bench.costs import COSTS
from evsys_bus.bench.couriers import EXIT_LATENCY, THROUGHPUT
from evsys_bus.bench.dispatch import LIGHT_PEERS, dispatch_suite
from evsys_bus.bench.imports import IMPORTS
from evsys_bus.bench.journal import JOURNAL, MIN_RATIOS, JournalSuite
from evsys_bus.bench.kills import KILLS, KillsSuite
from evsys_bus.bench.memory_growth import BACKLOG_MEMORY, MEMORY_GROWTH
from evsys_bus.bench.shapes import SHAPES
from evsys_bus.bench.suite import Suite
from evsys_bus.bench.wakeup_latency import WAKEUP_LATENCY
from evsys_bus.cli.bench import bench_command

_DASHBOARD = DashboardSuite()


def _set_of_dashboard(_: click.Context, option: click.Parameter, value: object) -> None:
    setattr(_DASHBOARD, option.name or "", value)


def _suites() -> Mapping[str, Suite]:
    dispatch = dispatch_suite(LIGHT_PEERS | FRAMEWORKS, {"pluggy": 8, "lightning": 30, "composer": 80})
    journal = JournalSuite((*JOURNAL.modules, heavy.__name__), {**MIN_RATIOS, heavy.TENSORBOARD: 1, heavy.WANDB: 1})
    kills = KillsSuite((*KILLS.modules, heavy.__name__))
    suites: tuple[Suite, ...] = (
        dispatch,
        IMPORTS,
        COSTS,
        journal,
        SHAPES,
        kills,
        MEMORY_GROWTH,
        THROUGHPUT,
        BACKLOG_MEMORY,
        EXIT_LATENCY,
        WAKEUP_LATENCY,
        ALL_LOGGERS,
        TaskSurvival(),
        Uploads(),
        UploadSteps(),
        EvsysLoggerSuite(),
        RelaySuite(),
        FrameworkRuns(),
        _DASHBOARD,
    )
    return {suite.name: suite for suite in suites}


def _command() -> click.Command:
    command = bench_command(_suites, doc="Run the suites of `evsys-bus bench` against heavier peers, and some more.")
    for name, kind, text in (
        ("points", click.IntRange(min=20_000), "Points of `dashboard`; ten million, with --quick one."),
        (
            "figures",
            click.Path(dir_okay=False, path_type=Path),
            "Markdown file to write the figures of `dashboard` to.",
        ),
    ):
        command.params.append(
            click.Option([f"--{name}"], type=kind, help=text, expose_value=False, callback=_set_of_dashboard)
        )
    return command


if __name__ == "__main__":
    _command()()
