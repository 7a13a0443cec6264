"""P5: how many logged steps are lost when the process is killed right after the last one.

Each candidate logs in its own process, at 1, 5 and 1,000 steps a second, and kills itself by SIGKILL as soon as the
last call has returned. Then the steps on disk are counted. Slow training loses most to buffers: at one step a second,
a buffer that is written every two minutes or every 8 kB holds the whole start of a run.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from evsys_bus.bench import loggers
from evsys_bus.bench.loggers import LogProcess, loggers_in
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult

STEPS: Final = {1: 8, 5: 40, 1_000: 5_000}
"""How many steps are logged, by steps per second."""
_SETTLE_SECONDS: Final = 2.0
"""Time for helper processes of a peer, which survive the kill and may still write."""


@dataclass(frozen=True)
class KillsSuite:
    """The suite ``kills``; counts do not depend on the effort, so each process runs once."""

    modules: tuple[str, ...]
    """Modules with ``LOGGERS``, the candidates, that a new process can import."""

    name = "kills"
    promise = "no step that was logged is lost to SIGKILL"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:  # noqa: ARG002 - counts do not depend on it
        """Count the lost steps at each rate."""
        for rate, steps in STEPS.items():
            with tempfile.TemporaryDirectory() as folder:
                yield self._measure_table(Path(folder), steps, rate)

    def _measure_table(self, folder: Path, steps: int, rate: int) -> Table:
        found = loggers_in(self.modules)
        # All run at the same time, because they mostly sleep.
        started: list[LogProcess] = []
        for name, (module, _) in found.items():
            directory = folder / str(len(started))
            directory.mkdir()
            started.append(LogProcess(module, name, directory, steps=steps, rate=rate, end="die"))
        absent: dict[str, str] = {}
        for process in started:
            package = found[process.name][1].package
            try:
                process.wait()
            except ModuleNotFoundError as error:
                if package is None:
                    raise
                absent[process.name] = f"needs {package}: {error}"
        if any(logger.package and name not in absent for name, (_, logger) in found.items()):
            time.sleep(_SETTLE_SECONDS)
        lost = {
            process.name: steps - found[process.name][1].count(process.directory)
            for process in started
            if process.name not in absent
        }
        ours = {name for name in lost if found[name][1].ours}
        return Table(
            title=f"steps lost of {steps:,}, at {rate:,} a second",
            unit="lost",
            rows=[Row(name, Spread(each, each, each), ours=name in ours) for name, each in lost.items()],
            target_results=[
                TargetResult(f"{name} loses none", lost[name], lost[name] == 0, "lost") for name in sorted(ours)
            ],
            absent=absent,
        )


KILLS: Final = KillsSuite((loggers.__name__,))
