"""One logger at a steady pace in a process of its own, which contains no other threads; to be timed or killed.

The module is also that process: ``python -m evsys_bus.bench.log_process MODULE LOGGER DIRECTORY STEPS RATE END``. It
logs STEPS steps, RATE a second. Then it prints the median nanoseconds of a call (END is ``time``), or kills itself by
SIGKILL as soon as the last call has returned (END is ``die``).
"""

import importlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Final, Literal, cast

from evsys_bus.bench.dispatch import METRICS
from evsys_bus.bench.loggers import Logger

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
            [sys.executable, "-m", "evsys_bus.bench.log_process", *arguments],
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
