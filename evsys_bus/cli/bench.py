"""``evsys-bus bench``: prints a table to stdout and progress to stderr, and writes a plot if asked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from evsys_bus.bench.suite import Budget, Suite

DOC: Final = """Measure latency and costs on this machine, compared with the alternatives that are installed.

SUITE is any of dispatch, imports, costs, journal, shapes, kills, growth, couriers, lag, lateness, all-loggers;
without one, all of them run, which takes ten minutes.
Quote the ratios: they come from one interleaved run, while absolute times depend on the machine and its load.
"""


def bench_command(load_suites: "Callable[[], Mapping[str, Suite]]", *, doc: str) -> click.Command:
    """Return a command that runs any of these suites; ``suites`` is called when the command runs."""

    @click.command(name="bench", help=doc)
    @click.argument("names", metavar="[SUITE]...", nargs=-1)
    @click.option("--rounds", type=click.IntRange(min=2), help="Rounds of samples; more rounds, steadier medians.")
    @click.option("--quick", is_flag=True, help="A fraction of the time; too inaccurate for quoting.")
    @click.option("--svg", type=_FILE, help="File to write a plot to.")
    @click.option("--json", "json_path", type=_FILE, help="File to write all measurements to.")
    @click.option("--strict", is_flag=True, help="Exit with 1 if a target is missed.")
    def bench(
        names: tuple[str, ...], rounds: int | None, quick: bool, svg: Path | None, json_path: Path | None, strict: bool
    ) -> None:
        import msgspec

        from evsys_bus.bench.report import Report, as_svg, as_text, describe_machine
        from evsys_bus.bench.suite import run_suite
        from evsys_bus.errors import did_you_mean

        known = load_suites()
        for name in names:
            if name not in known:
                raise click.UsageError(f'there is no suite "{name}"; {did_you_mean(name, known)}')
        suites = [known[name] for name in names or known]
        budget = _make_budget(rounds, quick)
        results = [run_suite(suite, budget, lambda text: click.echo(text, err=True)) for suite in suites]
        report = Report(describe_machine(), results)
        if svg is not None:
            svg.write_text(as_svg(report), encoding="utf-8")
        if json_path is not None:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        click.echo(as_text(report))
        if svg is not None:
            click.echo(f"plot: {svg.resolve()}")
        if strict and any(result.missed_targets for result in results):
            raise click.exceptions.Exit(1)

    return bench


class _OutputFile(click.Path):
    """A path to write to; a missing folder is an error before the measurements, not after them."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(str(value), param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}", param, ctx)
        return path


_FILE: Final = _OutputFile()


def _make_budget(rounds: int | None, quick: bool) -> "Budget":
    from evsys_bus.bench.suite import Budget

    if rounds is not None:
        return Budget(rounds=rounds, process_rounds=rounds)
    return Budget(rounds=15, process_rounds=5) if quick else Budget(rounds=150, process_rounds=25)


def _load_suites() -> "Mapping[str, Suite]":
    from evsys_bus.bench.all_loggers import ALL_LOGGERS
    from evsys_bus.bench.costs import COSTS
    from evsys_bus.bench.couriers import EXIT_LATENCY, THROUGHPUT
    from evsys_bus.bench.dispatch import DISPATCH
    from evsys_bus.bench.imports import IMPORTS
    from evsys_bus.bench.journal import JOURNAL
    from evsys_bus.bench.kills import KILLS
    from evsys_bus.bench.memory_growth import BACKLOG_MEMORY, MEMORY_GROWTH
    from evsys_bus.bench.shapes import SHAPES
    from evsys_bus.bench.wakeup_latency import WAKEUP_LATENCY

    suites: list[Suite] = [
        DISPATCH,
        IMPORTS,
        COSTS,
        JOURNAL,
        SHAPES,
        KILLS,
        MEMORY_GROWTH,
        THROUGHPUT,
        BACKLOG_MEMORY,
        WAKEUP_LATENCY,
    ]
    suites += [EXIT_LATENCY, ALL_LOGGERS]
    return {suite.name: suite for suite in suites}


command: Final = bench_command(_load_suites, doc=DOC)
