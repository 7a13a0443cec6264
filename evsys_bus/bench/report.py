"""The results of a benchmark and the machine they were measured on, as text tables and as an SVG picture.

The picture has one panel per table and one bar per candidate, with times on a log axis. It is written directly, so that
plotting requires no package, follows the reader's light or dark setting, and is drawn for a width of 800 pixels.
"""

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Final
from xml.sax.saxutils import escape

import msgspec

from evsys_bus.bench.suite import Result, Row, Table, TargetResult

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


def describe_machine() -> Machine:
    """Describe this machine, with the installed versions of our dependencies and the peers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        python=platform.python_version(),
        cores=cores,
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
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
    machine = report.machine
    lines = [
        f"Python {machine.python}, {machine.platform}, {machine.cores} cores",
        ", ".join(f"{name} {version}" for name, version in machine.packages.items()),
        "Times are medians; ratios are medians of the ratios within each round, with the quartiles.",
    ]
    for result in report.results:
        lines += ["", f"{result.suite}   {result.promise}"]
        for table in result.tables:
            lines += ["", *_table_lines(table)]
    return "\n".join([*lines, ""])


def _table_lines(table: Table) -> list[str]:
    rows: list[tuple[str, str, str, str]] = []
    for row in table.rows:
        ratio = row.ratio
        median = "" if ratio is None else f"{ratio.median:.2f} x"
        quartiles = "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        rows.append((row.candidate, format_value(row.value.median, table.unit), median, quartiles))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        f"  {table.title}" + (f", in multiples of {table.baseline}" if table.baseline else ""),
        *(f"    {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows),
        *(f"    {absent}: not measured, {reason}" for absent, reason in table.absent.items()),
        *(_target_line(target_result) for target_result in table.target_results),
    ]


def _target_line(target_result: TargetResult) -> str:
    if target_result.met is None or target_result.measured is None:
        return f"    ----  {target_result.promise}: not measured"
    passed = "PASS" if target_result.met else "MISS"
    measured = _format_number(target_result.measured)
    return f"    {passed}  {target_result.promise}: {measured} {target_result.unit}"


_WIDTH: Final = 800
_LEFT: Final = 250
"""x of the start of the bars; the labels are left of it."""
_RIGHT: Final = 650
"""x of the end of the longest bar; the values are right of the bars."""
_ROW: Final = 26
_BAR: Final = 16

_STYLE: Final = """
  svg { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .ground { fill: #ffffff; } text { fill: #24292f; }
  .name { font-weight: 600; font-size: 17px; } .title { font-weight: 600; }
  .note { fill: #57606a; font-size: 12px; } .grid { stroke: #d8dee4; } .quartiles { stroke: #24292f; }
  .bar { fill: #9aa6b2; } .ours { fill: #0a6ebd; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; } text { fill: #e6edf3; }
    .note { fill: #9198a1; } .grid { stroke: #30363d; } .quartiles { stroke: #e6edf3; }
    .bar { fill: #59636e; } .ours { fill: #4aa3ec; }
  }
"""


def as_svg(report: Report) -> str:
    """Return the report as the text of a self-contained SVG file."""
    machine = report.machine
    caption = (
        f"Python {machine.python}, {machine.platform}, {machine.cores} cores; medians, with the quartiles as a line"
    )
    parts = [_text(24, 30, caption, "note")]
    y = 50
    for result in report.results:
        y += 28
        parts.append(_text(24, y, result.suite, "name"))
        y += 20
        parts.append(_text(24, y, result.promise, "note"))
        for table in result.tables:
            y += 32
            parts.append(_text(24, y, table.title, "title"))
            parts += _panel(table, y + 12)
            y += 12 + _ROW * len(table.rows) + 20
        y += 12
    size = f'width="{_WIDTH}" height="{y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {y}" role="img">',
            f"<title>evsys-bus bench: {escape(', '.join(result.suite for result in report.results))}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="ground" {size}/>',
            *parts,
            "</svg>\n",
        ]
    )


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels: logarithmic for times, linear from zero for counts."""

    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        if not self.log:
            return _LEFT + (_RIGHT - _LEFT) * value / self.high
        share = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        return _LEFT + (_RIGHT - _LEFT) * share

    def ticks(self) -> Iterator[float]:
        if not self.log:
            yield from (0, self.high / 2, self.high)
            return
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        yield from (10.0**decade for decade in range(first, last + 1))


def _axis(table: Table) -> _Axis:
    values = [row.value for row in table.rows]
    high = max(value.high for value in values) or 1.0
    if table.unit != "ns":
        return _Axis(0.0, high, log=False)
    # A log axis has no zero, so the shortest bar gets at least a fifth of a decade, and a tick below it.
    low = 10.0 ** math.floor(math.log10(min(value.low for value in values)) - 0.2)
    return _Axis(low, high, log=True)


def _panel(table: Table, top: float) -> Iterator[str]:
    axis = _axis(table)
    bottom = top + _ROW * len(table.rows)
    for tick in axis.ticks():
        x = axis.x(tick)
        yield f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
        yield _text(x, bottom + 14, format_value(tick, table.unit), "note", anchor="middle")
    for index, row in enumerate(table.rows):
        yield from _bar(row, table.unit, axis, top + _ROW * index)


def _bar(row: Row, unit: str, axis: _Axis, top: float) -> Iterator[str]:
    end = axis.x(row.value.median)
    middle = top + _ROW / 2
    yield _text(_LEFT - 10, middle + 4, row.candidate, anchor="end")
    yield (
        f'<rect class="bar{" ours" if row.ours else ""}" x="{_LEFT}" y="{middle - _BAR / 2}" '
        f'width="{end - _LEFT:.1f}" height="{_BAR}" rx="2"/>'
    )
    low, high = axis.x(row.value.low), axis.x(row.value.high)
    yield f'<line class="quartiles" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
    ratio = "" if row.ratio is None else f"  ({row.ratio.median:.2f} x)"
    yield _text(max(end, high) + 8, middle + 4, format_value(row.value.median, unit) + ratio)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'
