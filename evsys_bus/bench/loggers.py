"""Ways to put a step's metrics on disk, ours among them: what the questions `journal` and `kills` compare."""

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from evsys_bus.bench.dispatch import BATCH, STATE
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd
from evsys_bus.journal import JournalReader

Log = Callable[[int, dict[str, float]], object]
"""Given a step and its metrics."""

OURS: Final = "EventBus, journal"
JSON_FLUSH: Final = "json.dumps, write, flush"
JSON: Final = "json.dumps, write"
FLOOR: Final = "msgspec, os.write"
"""The least that puts a row with the system: no event, no checksum, no bounds, and nobody could read a torn one."""


@dataclass(frozen=True)
class Logger:
    """One way, set up in a directory that is there and empty."""

    open: Callable[[Path], AbstractContextManager[Log]]
    count: Callable[[Path], int]
    """How many steps are whole on disk, when the process has ended."""
    package: str | None = None
    """What must be installed for it."""
    ours: bool = False


@contextmanager
def _journal(directory: Path) -> Generator[Log, None, None]:
    with EventBus([], journal=directory / "journal") as bus:
        yield lambda step, metrics: bus.publish(StepEnd(STATE, step, BATCH, metrics))


def _count_journal(directory: Path) -> int:
    reader = JournalReader(directory / "journal")
    return sum(1 for stream in reader.streams() for _ in reader.read(stream))


@contextmanager
def _json(directory: Path) -> Generator[Log, None, None]:
    with _rows(directory).open("a") as file:

        def log(step: int, metrics: dict[str, float]) -> None:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")

        yield log


@contextmanager
def _json_flush(directory: Path) -> Generator[Log, None, None]:
    with _rows(directory).open("a") as file:

        def log(step: int, metrics: dict[str, float]) -> None:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
            file.flush()

        yield log


@contextmanager
def _floor(directory: Path) -> Generator[Log, None, None]:
    file = os.open(_rows(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    encode = msgspec.json.Encoder().encode
    try:
        yield lambda step, metrics: os.write(file, encode({"step": step, "time": time.time(), **metrics}) + b"\n")
    finally:
        os.close(file)


def _count_rows(directory: Path) -> int:
    return _rows(directory).read_bytes().count(b"\n")


def _rows(directory: Path) -> Path:
    return directory / "metrics.jsonl"


LOGGERS: Final = {
    OURS: Logger(_journal, _count_journal, ours=True),
    JSON_FLUSH: Logger(_json_flush, _count_rows),
    JSON: Logger(_json, _count_rows),
    FLOOR: Logger(_floor, _count_rows),
}
