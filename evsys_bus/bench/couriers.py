"""Waiting for the courier processes of a benchmarked bus, which outlive it briefly and write to its journal."""

import os
import time
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from evsys_bus.delivery.states import read_state
from evsys_bus.journal import OsDisk, layout

_STATE: Final = ".state.json"
_PATIENCE_SECONDS: Final = 20.0


def wait_for_their_end(journal: Path) -> None:
    """Wait until no courier process of this journal runs; only then can its directory be removed."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while any(map(_runs, _pids(journal))) and time.monotonic() < until:
        time.sleep(0.01)


def _pids(journal: Path) -> set[int]:
    files = (journal / layout.COURIERS).glob(f"*{_STATE}")
    states = [read_state(OsDisk(), str(journal), unquote(file.name.removesuffix(_STATE))) for file in files]
    return {state.pid for state in states if state is not None} - {os.getpid()}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
