"""How many of 200 uploads that a callback starts in the very last hook are finished when the program ends.

Each scenario, a way to start them and a way to end, runs in its own process. An upload waits 50 ms and then appends one
byte to a file, so the size of the file is the number of finished uploads. The bus must finish all of them.

As a script, this file is one of these processes: ``survival.py SCENARIO FILE``.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from evsys_bus import Callback, EventBus, ExperimentEnd, ExperimentResult, LogContext
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult

UPLOADS: Final = 200
UPLOAD_SECONDS: Final = 0.05
DEADLINE: Final = 60.0

Upload = Callable[[], Coroutine[Any, Any, None]]
Scenario = Callable[[Upload], Coroutine[Any, Any, None]]


async def bare_create_task(upload: Upload) -> None:
    """The main coroutine returns; ``asyncio.run`` cancels the unfinished tasks."""
    _bare_tasks.update(asyncio.create_task(upload()) for _ in range(UPLOADS))  # noqa: TID251 - what the reference advises


async def task_group(upload: Upload) -> None:
    """The block ends normally."""
    async with asyncio.TaskGroup() as group:
        _start_uploads(group, upload)


async def task_group_body_raises(upload: Upload) -> None:
    """The training fails after the hook."""
    async with asyncio.TaskGroup() as group:
        _start_uploads(group, upload)
        await _fail_training()


async def task_group_sigterm(upload: Upload) -> None:
    """The scheduler ends the job by SIGTERM."""
    async with asyncio.TaskGroup() as group:
        _start_uploads(group, upload)
        await _receive_sigterm()


def _start_uploads(group: asyncio.TaskGroup, upload: Upload) -> None:
    for _ in range(UPLOADS):
        group.create_task(upload())


class AdoptedUploads(Callback):
    """Starts the uploads with a bare ``create_task``, as the reference implementation advises."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:  # noqa: ARG002 - the signature of the hook
        """Start all uploads and keep no reference to them."""
        for _ in range(UPLOADS):
            asyncio.create_task(self.upload())  # noqa: TID251, RUF006 - the bus adopts them


class SpawnedUploads(AdoptedUploads):
    """Starts the uploads with `Callback.spawn`."""

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:  # noqa: ARG002 - the signature of the hook
        """Start all uploads."""
        for _ in range(UPLOADS):
            self.spawn(self.upload)


def bus_scenario(kind: type[AdoptedUploads], ending: Callable[[], Awaitable[None]]) -> Scenario:
    """Make a scenario that publishes the last event and then ends by ``ending``."""

    async def scenario(upload: Upload) -> None:
        async with EventBus([kind(upload)]) as bus:
            bus.publish(ExperimentEnd(LogContext(output_dir=Path()), ExperimentResult("survival")))
            await ending()

    return scenario


async def _end_normally() -> None:
    pass


async def _fail_training() -> None:
    await asyncio.sleep(0.01)
    raise ValueError("the training failed")


async def _receive_sigterm() -> None:
    await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(DEADLINE)


_bare_tasks: set[asyncio.Task[Any]] = set()
SCENARIOS: Final[dict[str, Scenario]] = {
    "asyncio.run, bare create_task": bare_create_task,
    "asyncio.TaskGroup": task_group,
    "asyncio.TaskGroup, body raises": task_group_body_raises,
    "asyncio.TaskGroup, SIGTERM": task_group_sigterm,
    "evsys-bus, adopted create_task": bus_scenario(AdoptedUploads, _end_normally),
    "evsys-bus, adopted, body raises": bus_scenario(AdoptedUploads, _fail_training),
    "evsys-bus, adopted, SIGTERM": bus_scenario(AdoptedUploads, _receive_sigterm),
    "evsys-bus, spawn": bus_scenario(SpawnedUploads, _end_normally),
    "evsys-bus, spawn, body raises": bus_scenario(SpawnedUploads, _fail_training),
    "evsys-bus, spawn, SIGTERM": bus_scenario(SpawnedUploads, _receive_sigterm),
}


def count_finished(scenario: str) -> int:
    """Run the scenario in a process and return how many uploads it finished."""
    with tempfile.NamedTemporaryFile() as finished:
        command = [sys.executable, __file__, scenario, finished.name]
        # Several scenarios end with an error, so exit code and traceback are ignored.
        subprocess.run(command, check=False, capture_output=True, timeout=DEADLINE)  # noqa: S603 - our own command
        return Path(finished.name).stat().st_size


class TaskSurvival:
    """The suite ``survival``; counts do not depend on the effort, so each process runs once."""

    name = "survival"
    promise = f"Of {UPLOADS} uploads of {UPLOAD_SECONDS * 1000:.0f} ms started in the last hook, all are finished"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:  # noqa: ARG002 - counts do not depend on it
        """Count the finished uploads of every scenario."""
        counts = {scenario: count_finished(scenario) for scenario in SCENARIOS}
        ours = {scenario: count for scenario, count in counts.items() if scenario.startswith("evsys-bus")}
        yield Table(
            title="uploads finished, by how they were started and how the program ended",
            unit=f"of {UPLOADS}",
            rows=[Row(name, Spread(count, count, count), ours=name in ours) for name, count in counts.items()],
            target_results=[
                TargetResult(f"{name} finishes every upload", count, count == UPLOADS, f"of {UPLOADS}")
                for name, count in ours.items()
            ],
        )


if __name__ == "__main__":
    with Path(sys.argv[2]).open("ab", buffering=0) as sink:

        async def _upload() -> None:
            await asyncio.sleep(UPLOAD_SECONDS)
            sink.write(b"x")

        asyncio.run(SCENARIOS[sys.argv[1]](_upload))
