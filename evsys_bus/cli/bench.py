"""``evsys-bus bench``: prints a table to stdout and progress to stderr, and writes a plot."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from evsys_bus.bench.question import Effort, Question

DOC: Final = """Measure latency and costs on this machine, compared with the alternatives that are installed.

SUITE is any of dispatch, imports, costs, journal, shapes, kills, growth, couriers, lag, lateness, all-loggers;
without one, all of them run, which takes ten minutes.
Quote the ratios: they come from one interleaved run, while absolute times depend on the machine and its load.
"""


def bench_command(questions: "Callable[[], Mapping[str, Question]]", *, doc: str) -> click.Command:
    """Return a command that runs any of these suites; ``questions`` is called when the command runs."""

    @click.command(name="bench", help=doc)
    @click.argument("names", metavar="[SUITE]...", nargs=-1)
    @click.option("--rounds", type=click.IntRange(min=2), help="Rounds of samples; more rounds, steadier medians.")
    @click.option("--quick", is_flag=True, help="A fraction of the time; too inaccurate for quoting.")
    @click.option("--svg", type=_FILE, default="bench.svg", show_default=True, help="File to write the plot to.")
    @click.option("--json", "json_path", type=_FILE, help="File to write all measurements to.")
    @click.option("--strict", is_flag=True, help="Exit with 1 if a target is missed.")
    def bench(
        names: tuple[str, ...], rounds: int | None, quick: bool, svg: Path, json_path: Path | None, strict: bool
    ) -> None:
        import msgspec

        from evsys_bus.bench.plot import as_svg
        from evsys_bus.bench.question import ask
        from evsys_bus.bench.report import Report, as_text, this_machine

        asked = _chosen(questions(), names)
        effort = _effort(rounds, quick)
        answers = [ask(question, effort, lambda text: click.echo(text, err=True)) for question in asked]
        report = Report(this_machine(), answers)
        svg.write_text(as_svg(report), encoding="utf-8")
        if json_path is not None:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        click.echo(as_text(report))
        click.echo(f"plot: {svg.resolve()}")
        if strict and any(answer.missed for answer in answers):
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


def _chosen(questions: "Mapping[str, Question]", names: tuple[str, ...]) -> "list[Question]":
    from evsys_bus.errors import did_you_mean

    for name in names:
        if name not in questions:
            raise click.UsageError(f'there is no suite "{name}"; {did_you_mean(name, questions)}')
    return [questions[name] for name in names or questions]


def _effort(rounds: int | None, quick: bool) -> "Effort":
    from evsys_bus.bench.question import Effort

    if rounds is not None:
        return Effort(rounds=rounds, process_rounds=rounds)
    return Effort(rounds=15, process_rounds=5) if quick else Effort(rounds=150, process_rounds=25)


def _shipped() -> "Mapping[str, Question]":
    from evsys_bus.bench.all_loggers import ALL_LOGGERS
    from evsys_bus.bench.catching_up import CATCHING_UP
    from evsys_bus.bench.costs import COSTS
    from evsys_bus.bench.dispatch import DISPATCH
    from evsys_bus.bench.growth import GROWTH
    from evsys_bus.bench.imports import IMPORTS
    from evsys_bus.bench.journal import JOURNAL
    from evsys_bus.bench.kills import KILLS
    from evsys_bus.bench.lag import LAG
    from evsys_bus.bench.lateness import LATENESS
    from evsys_bus.bench.leaving import LEAVING
    from evsys_bus.bench.shapes import SHAPES

    asked: list[Question] = [DISPATCH, IMPORTS, COSTS, JOURNAL, SHAPES, KILLS, GROWTH, CATCHING_UP, LAG, LATENESS]
    asked += [LEAVING, ALL_LOGGERS]
    return {question.name: question for question in asked}


command: Final = bench_command(_shipped, doc=DOC)
