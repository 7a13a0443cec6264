"""Waiting for the courier processes of a benchmarked bus, which outlive it briefly and write to its journal."""

import os
import time
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from evsys_bus.delivery.status_files import read_status
from evsys_bus.journal import OsDisk, layout

_STATE_SUFFIX: Final = ".state.json"
_TIMEOUT_SECONDS: Final = 20.0


def wait_for_courier_exit(journal: Path) -> None:
    """Wait until no courier process of this journal runs; only then can its directory be removed."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while any(map(_is_running, _courier_pids(journal))) and time.monotonic() < deadline:
        time.sleep(0.01)


def _courier_pids(journal: Path) -> set[int]:
    files = (journal / layout.COURIERS).glob(f"*{_STATE_SUFFIX}")
    states = [read_status(OsDisk(), str(journal), unquote(file.name.removesuffix(_STATE_SUFFIX))) for file in files]
    return {state.pid for state in states if state is not None} - {os.getpid()}


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
