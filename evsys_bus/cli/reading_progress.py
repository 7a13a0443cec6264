"""Progress of reading a whole journal: a bar on stderr if it is a terminal."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from evsys_bus.cli.output.screen import Screen, is_terminal
from evsys_bus.journal import Disk, OsDisk

_MIN_BYTES_FOR_BAR: Final = 32 << 20
"""Smaller journals are read in a moment."""


class _ProgressDisk(OsDisk):
    """The real disk; reports how many bytes were read."""

    def __init__(self, on_read: Callable[[int], object]) -> None:
        self._on_read = on_read

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read, and report the number of bytes."""
        data = super().read(path, offset, size)
        self._on_read(len(data))
        return data


@contextmanager
def disk_with_progress(directory: Path, what: str, screen: Screen, *, times: int = 1) -> Generator[Disk]:
    """Yield a disk whose reads advance a progress bar.

    Args:
        directory: The journal.
        what: The label of the bar.
        screen: The terminal.
        times: How often the whole journal will be read.
    """
    total = sum(each.stat().st_size for each in directory.glob("*/*.seg")) * times
    if total < _MIN_BYTES_FOR_BAR or not is_terminal(sys.stderr):
        yield OsDisk()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not screen.uses_color(sys.stderr))
    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, refresh_per_second=8) as progress:
        task = progress.add_task(what, total=total)
        yield _ProgressDisk(lambda count: progress.advance(task, count))
