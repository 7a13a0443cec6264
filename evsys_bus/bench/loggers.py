"""Ways to write the metrics of a step to disk, including ours: the candidates of the suites `journal` and `kills`.

The module is also a process in which one of them logs at a steady pace, without other threads, to be timed or killed:
``python -m evsys_bus.bench.loggers MODULE LOGGER DIRECTORY STEPS RATE END``. It logs STEPS steps, RATE a second. Then
it prints the median nanoseconds of a call (END is ``time``), or kills itself by SIGKILL as soon as the last call has
returned (END is ``die``).
"""

import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, cast

import msgspec

from evsys_bus.bench.dispatch import BATCH, METRICS, STATE, NoOp
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd
from evsys_bus.journal import JournalReader, OsDisk, frame
from evsys_bus.journal.reader import SegmentScan

Log = Callable[[int, dict[str, float]], object]
"""Logs one step and its metrics."""

OURS: Final = "EventBus, journal"
JSON_FLUSH: Final = "json.dumps, write, flush"
JSON: Final = "json.dumps, write"
K: Final = 8
PACED: Final = f"EventBus, journal, {K} callbacks"
PACED_BASELINE: Final = f"bare loop over {K}, encode, CRC, os.write"
"""The least that any journal does: build the event, call its hooks, encode, frame with a checksum, write."""
BASELINE: Final = "msgspec, os.write"
"""The least that hands a row to the system: no event, checksum or limits, and a torn row could not be read."""


class RawState(msgspec.Struct, gc=False, omit_defaults=True):
    """A `LoopState` as it is recorded."""

    step: int
    num_steps: int
    output_dir: str
    stop_requested: bool = False
    stop_reason: str | None = None
    error: str | None = None
    run: str | None = None


class RawBatch(msgspec.Struct, gc=False, omit_defaults=True):
    """A `TrainingBatch` as it is recorded."""

    loss_fn: str | None = None
    loss_fn_config: dict[str, Any] | None = None
    metrics: dict[str, float] = {}


class RawStep(msgspec.Struct, gc=False, tag="step_end"):
    """A `StepEnd` as it is recorded."""

    state: RawState
    step_idx: int
    batch: RawBatch
    metrics: dict[str, float]


class RawRecord(msgspec.Struct, gc=False):
    """A record of the journal, built without copies, checks or limits."""

    stream: str
    seq: int
    time: float
    run: str | None
    rank: int
    event: RawStep


@dataclass(frozen=True)
class Logger:
    """One way to log, opened in an existing empty directory."""

    open: Callable[[Path], AbstractContextManager[Log]]
    count: Callable[[Path], int]
    """Counts the complete steps on disk, after the process has ended."""
    package: str | None = None
    """The package that it requires."""
    ours: bool = False


@contextmanager
def _journal(directory: Path, callbacks: int = 0) -> Generator[Log, None, None]:
    with EventBus([NoOp() for _ in range(callbacks)], journal=directory / "journal") as bus:
        yield lambda step, metrics: bus.publish(StepEnd(STATE, step, BATCH, metrics))


def _count_journal(directory: Path) -> int:
    reader = JournalReader(directory / "journal")
    return sum(1 for stream in reader.streams() for _ in reader.read(stream))


@contextmanager
def _json(directory: Path, *, flush: bool) -> Generator[Log, None, None]:
    with _rows_path(directory).open("a") as file:

        def log(step: int, metrics: dict[str, float]) -> None:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
            if flush:
                file.flush()

        yield log


@contextmanager
def _baseline(directory: Path) -> Generator[Log, None, None]:
    file = os.open(_rows_path(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    encode = msgspec.json.Encoder().encode
    try:
        yield lambda step, metrics: os.write(file, encode({"step": step, "time": time.time(), **metrics}) + b"\n")
    finally:
        os.close(file)


@contextmanager
def _paced_baseline(directory: Path) -> Generator[Log, None, None]:
    file = os.open(_rows_path(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    pack, folder = msgspec.msgpack.Encoder().encode, str(STATE.output_dir)
    hooks = [NoOp().on_step_end for _ in range(K)]

    def log(step: int, metrics: dict[str, float]) -> None:
        now = time.time()
        event = StepEnd(STATE, step, BATCH, metrics)
        for hook in hooks:
            hook(STATE, step, BATCH, metrics)
        state = RawState(event.state.step, event.state.num_steps, folder)
        raw = RawStep(state, event.step_idx, RawBatch(), event.metrics)
        os.write(file, frame.pack(step + 1, pack(RawRecord("r0-bench", step + 1, now, None, 0, raw))))

    try:
        yield log
    finally:
        os.close(file)


def _count_frames(directory: Path) -> int:
    return sum(isinstance(piece, frame.Frame) for piece in SegmentScan(OsDisk(), str(_rows_path(directory))).frames())


def _count_rows(directory: Path) -> int:
    return _rows_path(directory).read_bytes().count(b"\n")


def _rows_path(directory: Path) -> Path:
    return directory / "metrics.jsonl"


LOGGERS: Final = {
    OURS: Logger(_journal, _count_journal, ours=True),
    PACED: Logger(partial(_journal, callbacks=K), _count_journal, ours=True),
    PACED_BASELINE: Logger(_paced_baseline, _count_frames),
    JSON_FLUSH: Logger(partial(_json, flush=True), _count_rows),
    JSON: Logger(partial(_json, flush=False), _count_rows),
    BASELINE: Logger(_baseline, _count_rows),
}


_START_TIMEOUT_SECONDS: Final = 60.0
_WARM_UP_DIVISOR: Final = 5
"""The first fifth of the calls is not timed."""


def loggers_in(modules: tuple[str, ...]) -> Mapping[str, tuple[str, Logger]]:
    """Return the ``LOGGERS`` of these modules, by name, each with the name of its module."""
    found: dict[str, tuple[str, Logger]] = {}
    for module in modules:
        loggers = cast("Mapping[str, Logger]", importlib.import_module(module).LOGGERS)
        found |= {name: (module, logger) for name, logger in loggers.items()}
    return found


class LogProcess:
    """A running process of this module."""

    def __init__(
        self, module: str, name: str, directory: Path, *, steps: int, rate: int, end: Literal["time", "die"]
    ) -> None:
        self.name = name
        self.directory = directory
        self._timeout = _START_TIMEOUT_SECONDS + 2 * steps / rate
        self._end = end
        arguments = [module, name, str(directory), str(steps), str(rate), end]
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "evsys_bus.bench.loggers", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> str:
        """Wait for the process to end and return the last line that it printed.

        Raises:
            ModuleNotFoundError: The logger's package is not installed.
            RuntimeError: The process failed.
        """
        stdout, stderr = self._process.communicate(timeout=self._timeout)
        if self._process.returncode != (-signal.SIGKILL if self._end == "die" else 0):
            kind, _, message = stderr.strip().rpartition("\n")[2].partition(": ")
            if kind == "ModuleNotFoundError":
                raise ModuleNotFoundError(message)
            raise RuntimeError(f"{self.name} did not reach its last step:\n{stderr}")
        return stdout.strip().rpartition("\n")[2]


def _log_steps(logger: Logger, directory: Path, steps: int, rate: int, end: str) -> None:
    elapsed: list[int] = []
    with logger.open(directory) as log:
        due = time.perf_counter()
        values = Random(1)  # noqa: S311 # values with as many digits as real metrics
        for step in range(steps):
            metrics = {name: values.random() for name in METRICS}
            due += 1 / rate
            time.sleep(max(due - time.perf_counter(), 0))
            started = time.perf_counter_ns()
            log(step, metrics)
            elapsed.append(time.perf_counter_ns() - started)
        if end == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout.write(f"\n{statistics.median(elapsed[steps // _WARM_UP_DIVISOR :])}\n")


if __name__ == "__main__":
    module, name, directory, steps, rate, end = sys.argv[1:]
    _log_steps(loggers_in((module,))[name][1], Path(directory), int(steps), int(rate), end)
