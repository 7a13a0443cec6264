"""P10: what a program pays for ``import evsys_bus``, and a person for ``evsys-bus --help``.

Whole processes of this interpreter, start to end, so the interpreter's own start is in every number; it is shown alone
as well. The package loads its names when they are asked for, so a program's real import, with names, is judged too: by
what it stands on with asyncio, which anyio no longer imports until it must, and which every such program has anyway.
"""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from typing import Final

from evsys_bus.bench.harness import Run
from evsys_bus.bench.question import Case, Contender, Target, TimedQuestion

FLOOR: Final = "import anyio, msgspec"
FLOOR_AND_ASYNCIO: Final = "import asyncio, anyio, msgspec"
BUS: Final = "import evsys_bus"
NAMES: Final = "from evsys_bus import EventBus"
HELP: Final = "evsys-bus --help"

_PROGRAMS: Final = {
    FLOOR: ("import anyio, msgspec",),
    FLOOR_AND_ASYNCIO: (FLOOR_AND_ASYNCIO,),
    "interpreter alone": ("pass",),
    BUS: ("import evsys_bus",),
    NAMES: (NAMES,),
    HELP: ("from evsys_bus.cli import main; main()", "--help"),
}


@contextmanager
def process(*arguments: str) -> Generator[Run, None, None]:
    """A process that runs ``python -c`` with these arguments and ends well."""
    # Without byte code on disk every import would be a compilation, which is not what an installed package does.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", *arguments]

    def run(operations: int) -> int:
        begun = perf_counter_ns()
        for _ in range(operations):
            subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603 - our own command
        return perf_counter_ns() - begun

    yield run


IMPORTS: Final = TimedQuestion(
    name="imports",
    promise="P10: the import and the command line start about as fast as what they stand on",
    cases=(
        Case(
            title="processes, start to end",
            contenders={
                name: Contender(partial(process, *program), ours=name in {BUS, NAMES, HELP})
                for name, program in _PROGRAMS.items()
            },
            floor=FLOOR,
            targets=(
                Target(of=BUS, to=FLOOR, at_most=2.0),
                Target(of=NAMES, to=FLOOR_AND_ASYNCIO, at_most=2.0),
                Target(of=HELP, to=FLOOR, at_most=3.0),
            ),
            starts_processes=True,
        ),
    ),
)
