"""Text for people: numbers, sizes and durations, and rows in columns.

Tables are without boxes and colours, so that ``cut`` can read them. On a terminal that is too narrow they are laid out
differently, so that no word is broken.
"""

import math
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from evsys_bus.cli.output.screen import cell_width, printable, wrap

if TYPE_CHECKING:
    from evsys_bus.context import Spread

NO_VALUE: Final = "-"
"""Shown where there is no value yet."""
_UNIT_FACTOR: Final = 1000
_MINUTE: Final = 60
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
_MIN_WHOLE_RATE: Final = 10
GAP: Final = "   "
_INNER: Final = "  "
_NARROW_GAP: Final = "  "
_MIN_LAST_COLUMNS: Final = 30
"""The last column of a table is not made narrower than this."""
_MIN_WHOLE: Final = 1000
_TINY: Final = 1e-3
_MAX_RANGES: Final = 10
_MIN_WRAP_COLUMNS: Final = 20
"""A column of text is not made narrower than this."""


def format_size(count: int) -> str:
    """Return a number of bytes as ``312 B`` or ``3.2 MB``."""
    if count < _UNIT_FACTOR:
        return f"{count} B"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= _UNIT_FACTOR
        if amount < _UNIT_FACTOR:
            return f"{amount:.1f} {unit}"
    return f"{amount / _UNIT_FACTOR:,.1f} TB"


def format_size_progress(done: int, total: int) -> str:
    """Return ``212/400 MB`` or ``0.21/3.10 GB``: both numbers in the unit of the total, with three digits."""
    unit = format_size(total).rpartition(" ")[2]
    scale = _UNIT_FACTOR ** _UNITS.index(unit)
    digits = 0 if unit == "B" else 2 if total < 10 * scale else 1 if total < 100 * scale else 0
    return f"{done / scale:,.{digits}f}/{total / scale:,.{digits}f} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """Return a rate as ``53 MB/s`` or ``5.3 MB/s``."""
    amount, _, unit = format_size(round(bytes_per_second)).partition(" ")
    whole = float(amount.replace(",", "")) >= _MIN_WHOLE_RATE
    return f"{amount.partition('.')[0] if whole else amount} {unit}/s"


def format_duration(seconds: float | None) -> str:
    """Return a duration as ``0:42``, ``1:02:03`` or ``3d 04:05``."""
    if seconds is None or not math.isfinite(seconds):
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_age(seconds: float) -> str:
    """Return an age as ``4 s ago`` or ``1:02:03 ago``."""
    whole = max(0, round(seconds))
    return f"{whole} s ago" if whole < _MINUTE else f"{format_duration(whole)} ago"


def format_time(at: float | str) -> str:
    """Return a time as ``2026-11-30T13:31:16+01:00``: local, with its offset from UTC.

    Args:
        at: Seconds since the epoch, or an ISO 8601 time; a text that is none is returned as it is.
    """
    try:
        moment = datetime.fromisoformat(at) if isinstance(at, str) else datetime.fromtimestamp(at)  # noqa: DTZ006 # made local below
    except (ValueError, OverflowError, OSError):
        return str(at)
    return moment.astimezone().isoformat(timespec="seconds")


def format_short_time(at: float) -> str:
    """Return a time as ``11-30 13:31:16``, local: for lists that are as long as a journal or a log."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at))


def format_range(first: int, last: int) -> str:
    """Return an inclusive range as ``81`` or ``81 to 83``."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def format_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Return inclusive ranges as ``81 to 83, 90``; ranges after the first few are counted."""
    parts = [format_range(first, last) for first, last in ranges[:_MAX_RANGES]]
    if len(ranges) > _MAX_RANGES:
        parts.append(f"and {len(ranges) - _MAX_RANGES:,} more ranges")
    return ", ".join(parts)


def count_in_ranges(ranges: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers these inclusive ranges hold."""
    return sum(last - first + 1 for first, last in ranges)


def format_number(value: float) -> str:
    """Format a number with about four digits; the width depends on its magnitude only, so that columns do not move."""
    magnitude = abs(value)
    if magnitude == 0 or not math.isfinite(value):
        return f"{value:g}"
    if magnitude >= 1e6 or 0 < magnitude < _TINY:  # noqa: PLR2004 # plain digits are hard to read beyond
        return f"{value:.2e}"
    if magnitude >= _MIN_WHOLE:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(magnitude)}f}"


def format_value(value: object) -> str:
    """Format the value of a metric: integers with all digits, other numbers as by `format_number`."""
    if value is None:
        return NO_VALUE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else format_number(value)


def format_counts(counts: Iterable[tuple[int, str]]) -> list[str]:
    """Return the counts that are not zero, each with its word, as ``120 owed``."""
    return [f"{count:,} {word}" for count, word in counts if count]


def format_progress(done: int, total: int | None, separator: str = "/") -> str:
    """Return ``120/1,000``, or only the first number if the total is unknown."""
    return f"{done:,}" if total is None else f"{done:,}{separator}{total:,}"


def format_event_rate(per_second: float) -> str:
    """Return ``1,204/s``."""
    return f"{per_second:,.0f}/s"


def format_seconds(seconds: float) -> str:
    """Return a short duration as ``1.2s``."""
    return f"{seconds:.1f}s"


def format_mean_sd(spread: "Spread | None", *, sd: bool = True) -> str:
    """Format mean ± standard deviation of the finite values."""
    if spread is None or spread.mean is None:
        return NO_VALUE
    if spread.sd is None or not sd:
        return format_number(spread.mean)
    magnitude = abs(spread.mean)
    if magnitude >= _MIN_WHOLE or 0 < magnitude < _TINY:
        return f"{format_number(spread.mean)} ± {format_number(spread.sd)}"
    return f"{format_number(spread.mean)} ± {spread.sd:.{_decimals(magnitude)}f}"


def _decimals(magnitude: float) -> int:
    if magnitude < 0.1:  # noqa: PLR2004 # as below
        return 5 if magnitude >= 0.01 else 6  # noqa: PLR2004 # as below
    return 3 if magnitude < 10 else 2 if magnitude < 100 else 1  # noqa: PLR2004 # four digits in all


def summarize_error(error: str | None) -> str:
    """Return the most informative line of an error: the last one of a traceback, else the first."""
    lines = [line.strip() for line in (error or "no reason given").strip().splitlines()] or [""]
    return printable(lines[-1] if lines[0].startswith("Traceback") else lines[0])


def format_columns(rows: Sequence[Sequence[str]], *, indent: str = "", gap: str = GAP) -> list[str]:
    """Return one line per row; every column but the last is as wide as its widest cell."""
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(map(cell_width, column)) for column in zip(*rows, strict=True)] if rows else []
    lines: list[str] = []
    for row in rows:
        cells = [cell + " " * (width - cell_width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + gap.join(cells)).rstrip())
    return lines


def format_table(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return `format_columns` with a head row.

    If the width is too small, columns move together, then texts in the last one are wrapped, and at last each row is
    returned as ``head cell`` pairs.
    """
    wrapped = rows
    if width is not None and rows:
        taken = sum(max(map(cell_width, column)) for column in list(zip(*rows, strict=True))[:-1])
        available = max(_MIN_LAST_COLUMNS, width - taken - len(_NARROW_GAP) * (len(rows[0]) - 1))
        wrapped = [line for row in rows for line in _wrap_last_cell(row, available)]
    for lines in (
        format_columns(rows),
        format_columns(rows, gap=_NARROW_GAP),
        format_columns(wrapped, gap=_NARROW_GAP),
    ):
        if width is None or not rows or all(cell_width(line) <= width for line in lines):
            return lines
    heads, *rest = rows
    stacked: list[str] = []
    for row in rest:
        pairs = [f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True) if cell]
        stacked += [f"{heads[0]} {row[0]}", *_pack(pairs, width or 0)]
    return stacked


def _wrap_last_cell(row: Sequence[str], width: int) -> list[list[str]]:
    """Return the row, and rows with the rest of its last cell."""
    *cells, last = row
    first, *more = wrap(last, width)
    return [[*cells, first], *([*("" for _ in cells), line.removeprefix(_INNER)] for line in more)]


def format_facts(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return `format_columns` of names and texts; long texts are wrapped in their column."""
    available = 0 if width is None or not rows else width - max(cell_width(name) for name, _ in rows) - len(GAP)
    if available < _MIN_WRAP_COLUMNS:
        return format_columns(rows)
    wrapped: list[list[str]] = []
    for name, text in rows:
        first, *more = wrap(text, available)
        wrapped += [[name, first], *(["", line.removeprefix(_INNER)] for line in more)]
    return format_columns(wrapped)


def pluralize(count: int, noun: str) -> str:
    """Return ``1 arm`` or ``5 arms``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _pack(pairs: Sequence[str], width: int) -> list[str]:
    """Put as many pairs on each indented line as fit, at least one."""
    lines: list[str] = []
    for pair in pairs:
        longer = f"{lines[-1]}{GAP}{pair}" if lines else ""
        if lines and cell_width(longer) <= width:
            lines[-1] = longer
        else:
            lines += wrap(pair, width, indent=_INNER)
    return lines
