"""The results of a benchmark and the machine they were measured on, as text tables."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Final

import msgspec

from evsys_bus.bench.harness import Spread
from evsys_bus.bench.question import Answer, Table, Verdict

_PACKAGES: Final = ("evsys-bus", "msgspec", "anyio", "uvloop", "pluggy", "blinker", "pyee")


class Machine(msgspec.Struct, frozen=True):
    """The machine that the numbers were measured on."""

    python: str
    cores: int
    """How many cores this process may use."""
    platform: str
    packages: dict[str, str]
    """Installed versions, by name."""


class Report(msgspec.Struct, frozen=True):
    """The results of one call of the benchmark; what ``--json`` writes."""

    machine: Machine
    answers: list[Answer]


def this_machine(packages: Iterable[str] = ()) -> Machine:
    """Describe this machine, with the installed versions of our dependencies, the peers and ``packages``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        python=platform.python_version(),
        cores=cores,
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: version for name in (*_PACKAGES, *packages) if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_DIGITS: Final = 3


def amount(value: float, unit: str) -> str:
    """Format a value: times in a unit that suits their size (``412 ns``, ``12.3 µs``), others in their own unit."""
    if unit != "ns":
        return f"{_figure(value)} {unit}"
    for size, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if value >= size * 0.9995:  # 999.7 ns would be printed as 1e+03 ns
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} ns"


def _figure(value: float) -> str:
    """Format with three significant digits, or with all digits before the decimal point."""
    return f"{value:,.0f}" if len(f"{abs(value):.0f}") > _DIGITS else f"{value:.{_DIGITS}g}"


def as_text(report: Report) -> str:
    """Return the report as aligned text without colour or control characters, ending with a newline."""
    return "\n".join([*_head(report.machine), *(line for answer in report.answers for line in _answer(answer)), ""])


def _head(machine: Machine) -> list[str]:
    packages = [f"{name} {version}" for name, version in machine.packages.items()]
    return [
        f"Python {machine.python}, {machine.platform}, {machine.cores} cores",
        ", ".join(packages),
        "Times are medians; ratios are medians of the ratios within each round, with the quartiles.",
    ]


def _answer(answer: Answer) -> list[str]:
    lines = ["", f"{answer.question}   {answer.promise}"]
    for table in answer.tables:
        lines += ["", *_table(table)]
    return lines


def _table(table: Table) -> list[str]:
    rows = [(row.contender, amount(row.value.median, table.unit), *_ratio(row.ratio)) for row in table.rows]
    name, value, ratio = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    return [
        f"  {table.title}" + (f", in multiples of {table.floor}" if table.floor else ""),
        *(f"    {a:{name}}  {b:>{value}}  {c:>{ratio}}  {d}".rstrip() for a, b, c, d in rows),
        *(f"    {absent}: not measured, {reason}" for absent, reason in table.absent.items()),
        *(_verdict(verdict) for verdict in table.verdicts),
    ]


def _ratio(ratio: Spread | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f} x", f"{ratio.low:.2f} to {ratio.high:.2f}"


def _verdict(verdict: Verdict) -> str:
    if verdict.kept is None or verdict.measured is None:
        return f"    ----  {verdict.promise}: not measured"
    return f"    {'PASS' if verdict.kept else 'MISS'}  {verdict.promise}: {_figure(verdict.measured)} {verdict.unit}"
