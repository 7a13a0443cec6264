"""Amounts as people read them: bytes, ages, ranges of sequences."""

from collections.abc import Sequence
from typing import Final

from evsys_bus.cli.progress.figures import duration

_STEP: Final = 1000
_MINUTE: Final = 60


def size(count: int) -> str:
    """``312 B``, ``3.2 MB``."""
    if count < _STEP:
        return f"{count} B"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= _STEP
        if amount < _STEP:
            return f"{amount:.1f} {unit}"
    return f"{amount / _STEP:,.1f} TB"


def ago(seconds: float) -> str:
    """``4 s ago``, ``1:02:03 ago``."""
    whole = max(0, round(seconds))
    return f"{whole} s ago" if whole < _MINUTE else f"{duration(whole)} ago"


def span(first: int, last: int) -> str:
    """``81``, ``81 to 83``."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def spans(ranges: Sequence[tuple[int, int]], most: int = 10) -> str:
    """``81 to 83, 90``."""
    told = [span(first, last) for first, last in ranges[:most]]
    return ", ".join([*told, *([f"and {len(ranges) - most:,} more ranges"] if len(ranges) > most else [])])


def within(ranges: Sequence[tuple[int, int]]) -> int:
    """How many sequences there are in all of these."""
    return sum(last - first + 1 for first, last in ranges)
