"""P10: how long ``import evsys_bus`` and ``evsys-bus --help`` take.

Each is a whole process of this interpreter from start to end, so every number includes the start of the interpreter,
which is also shown alone. The package loads its names lazily, so importing names is measured too. Its baseline adds
asyncio, which anyio imports only when it needs to and which every program with an event loop imports anyway.
"""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from typing import Final

from evsys_bus.bench.suite import Candidate, Case, Target, TimedLoop, TimedSuite

BASELINE: Final = "import anyio, msgspec"
BASELINE_WITH_ASYNCIO: Final = "import asyncio, anyio, msgspec"
BUS: Final = "import evsys_bus"
NAMES: Final = "from evsys_bus import EventBus"
HELP: Final = "evsys-bus --help"

_PROGRAMS: Final = {
    BASELINE: ("import anyio, msgspec",),
    BASELINE_WITH_ASYNCIO: (BASELINE_WITH_ASYNCIO,),
    "interpreter alone": ("pass",),
    BUS: ("import evsys_bus",),
    NAMES: (NAMES,),
    HELP: ("from evsys_bus.cli import main; main()", "--help"),
}


@contextmanager
def python_process(*arguments: str) -> Generator[TimedLoop, None, None]:
    """Time ``python -c`` with these arguments; its exit code must be 0."""
    # Without byte code on disk every import would compile, which does not happen in an installed package.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", *arguments]

    def run(operations: int) -> int:
        started = perf_counter_ns()
        for _ in range(operations):
            subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603 - our own command
        return perf_counter_ns() - started

    yield run


IMPORTS: Final = TimedSuite(
    name="imports",
    promise="the import and the command line start about as fast as their dependencies",
    cases=(
        Case(
            title="processes, start to end",
            candidates={
                name: Candidate(partial(python_process, *program), ours=name in {BUS, NAMES, HELP})
                for name, program in _PROGRAMS.items()
            },
            baseline=BASELINE,
            targets=(
                Target(candidate=BUS, reference=BASELINE, at_most=2.0),
                Target(candidate=NAMES, reference=BASELINE_WITH_ASYNCIO, at_most=2.0),
                Target(candidate=HELP, reference=BASELINE, at_most=3.0),
            ),
            starts_processes=True,
        ),
    ),
)
