"""Formatting of sizes, rates, durations and ranges of sequences for people."""

import math
from collections.abc import Sequence
from typing import Final

NO_VALUE: Final = "-"
"""Shown where there is no value yet."""
_UNIT_FACTOR: Final = 1000
_MINUTE: Final = 60
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
_MIN_WHOLE_RATE: Final = 10


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


def format_range(first: int, last: int) -> str:
    """Return an inclusive range as ``81`` or ``81 to 83``."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def format_ranges(ranges: Sequence[tuple[int, int]], limit: int = 10) -> str:
    """Return inclusive ranges as ``81 to 83, 90``."""
    parts = [format_range(first, last) for first, last in ranges[:limit]]
    return ", ".join([*parts, *([f"and {len(ranges) - limit:,} more ranges"] if len(ranges) > limit else [])])


def count_in_ranges(ranges: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers these inclusive ranges hold."""
    return sum(last - first + 1 for first, last in ranges)
