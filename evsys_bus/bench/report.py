"""The results of a benchmark and the machine they were measured on, as text tables."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Final

import msgspec

from evsys_bus.bench.harness import Spread
from evsys_bus.bench.suite import Result, Table, TargetResult

_PACKAGES: Final = ("evsys-bus", "msgspec", "anyio", "uvloop", "pluggy", "blinker", "pyee")


class Machine(msgspec.Struct, frozen=True):
    """The machine that the numbers were measured on."""

    python: str
    cores: int
    """How many cores this process may use."""
    platform: str
    packages: dict[str, str]
    """Installed versions, by name."""


class Report(msgspec.Struct, frozen=True, rename={"results": "answers"}):
    """The results of one call of the benchmark; what ``--json`` writes."""

    machine: Machine
    results: list[Result]


def describe_machine(packages: Iterable[str] = ()) -> Machine:
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


def format_value(value: float, unit: str) -> str:
    """Format a value: times in a unit that suits their size (``412 ns``, ``12.3 µs``), others in their own unit."""
    if unit != "ns":
        return f"{_format_number(value)} {unit}"
    for size, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if value >= size * 0.9995:  # 999.7 ns would be printed as 1e+03 ns
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} ns"


def _format_number(value: float) -> str:
    """Format with three significant digits, or with all digits before the decimal point."""
    return f"{value:,.0f}" if len(f"{abs(value):.0f}") > _DIGITS else f"{value:.{_DIGITS}g}"


def as_text(report: Report) -> str:
    """Return the report as aligned text without colour or control characters, ending with a newline."""
    return "\n".join(
        [*_header_lines(report.machine), *(line for result in report.results for line in _result_lines(result)), ""]
    )


def _header_lines(machine: Machine) -> list[str]:
    packages = [f"{name} {version}" for name, version in machine.packages.items()]
    return [
        f"Python {machine.python}, {machine.platform}, {machine.cores} cores",
        ", ".join(packages),
        "Times are medians; ratios are medians of the ratios within each round, with the quartiles.",
    ]


def _result_lines(result: Result) -> list[str]:
    lines = ["", f"{result.suite}   {result.promise}"]
    for table in result.tables:
        lines += ["", *_table_lines(table)]
    return lines


def _table_lines(table: Table) -> list[str]:
    rows = [
        (row.candidate, format_value(row.value.median, table.unit), *_ratio_columns(row.ratio)) for row in table.rows
    ]
    name, value, ratio = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    return [
        f"  {table.title}" + (f", in multiples of {table.baseline}" if table.baseline else ""),
        *(f"    {a:{name}}  {b:>{value}}  {c:>{ratio}}  {d}".rstrip() for a, b, c, d in rows),
        *(f"    {absent}: not measured, {reason}" for absent, reason in table.absent.items()),
        *(_target_line(target_result) for target_result in table.target_results),
    ]


def _ratio_columns(ratio: Spread | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f} x", f"{ratio.low:.2f} to {ratio.high:.2f}"


def _target_line(target_result: TargetResult) -> str:
    if target_result.met is None or target_result.measured is None:
        return f"    ----  {target_result.promise}: not measured"
    passed = "PASS" if target_result.met else "MISS"
    measured = _format_number(target_result.measured)
    return f"    {passed}  {target_result.promise}: {measured} {target_result.unit}"
