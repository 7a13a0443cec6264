"""What the parts cost: building an event, callbacks that do not override a hook, spawning tasks, awaiting them."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Final

import anyio

from evsys_bus.bench.dispatch import BATCH, METRICS, STATE
from evsys_bus.bench.harness import Run
from evsys_bus.bench.question import Case, Contender, Target, TimedQuestion
from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, LogContext, LoopState, RunResult, TrainingBatch
from evsys_bus.events import StepEnd

TASKS: Final = 200
"""How many tasks one operation spawns."""


@dataclass
class _Plain:
    state: LoopState
    step_idx: int
    batch: TrainingBatch
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Frozen:
    state: LoopState
    step_idx: int
    batch: TrainingBatch
    metrics: dict[str, float]


@contextmanager
def _building(kind: Callable[[LoopState, int, TrainingBatch, dict[str, float]], object]) -> Generator[Run, None, None]:
    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        begun = perf_counter_ns()
        for i in range(operations):
            kind(state, i, batch, metrics)
        return perf_counter_ns() - begun

    yield run


@contextmanager
def _building_a_dict() -> Generator[Run, None, None]:
    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        begun = perf_counter_ns()
        for i in range(operations):
            _ = {"state": state, "step_idx": i, "batch": batch, "metrics": metrics}
        return perf_counter_ns() - begun

    yield run


class _OnlyRunEnd(Callback):
    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Do nothing."""


@contextmanager
def _publishing_past(k: int) -> Generator[Run, None, None]:
    with EventBus([_OnlyRunEnd() for _ in range(k)]) as bus:

        def run(operations: int) -> int:
            state, batch, metrics = STATE, BATCH, METRICS
            begun = perf_counter_ns()
            for i in range(operations):
                bus.publish(StepEnd(state, i, batch, metrics))
            return perf_counter_ns() - begun

        yield run


@dataclass
class _Laps:
    """Clock readings of one operation."""

    begun: int = 0
    handed_over: int = 0
    """When every task had been spawned."""
    finished: int = 0
    """When every task was done and the block that owns them was left."""


async def _nothing() -> None:
    pass


async def _create_task(laps: _Laps) -> None:
    laps.begun = perf_counter_ns()
    tasks = [
        asyncio.create_task(_nothing())  # noqa: TID251 - the baseline
        for _ in range(TASKS)
    ]
    laps.handed_over = perf_counter_ns()
    await asyncio.gather(*tasks)  # noqa: TID251 - the baseline
    laps.finished = perf_counter_ns()


async def _asyncio_group(laps: _Laps) -> None:
    async with asyncio.TaskGroup() as group:
        laps.begun = perf_counter_ns()
        for _ in range(TASKS):
            group.create_task(_nothing())
        laps.handed_over = perf_counter_ns()
    laps.finished = perf_counter_ns()


async def _anyio_group(laps: _Laps) -> None:
    async with anyio.create_task_group() as group:
        laps.begun = perf_counter_ns()
        for _ in range(TASKS):
            group.start_soon(_nothing)
        laps.handed_over = perf_counter_ns()
    laps.finished = perf_counter_ns()


async def _bus(laps: _Laps) -> None:
    async with EventBus() as bus:
        laps.begun = perf_counter_ns()
        for _ in range(TASKS):
            bus.spawn(_nothing)
        laps.handed_over = perf_counter_ns()
    laps.finished = perf_counter_ns()


@contextmanager
def _on_a_loop(block: Callable[[_Laps], Awaitable[None]], taken: Callable[[_Laps], int]) -> Generator[Run, None, None]:
    with asyncio.Runner() as runner:

        async def repeat(operations: int) -> int:
            total = 0
            for _ in range(operations):
                laps = _Laps()
                await block(laps)
                total += taken(laps)
            return total

        yield lambda operations: runner.run(repeat(operations))


_WAYS: Final = {
    "asyncio.create_task": _create_task,
    "asyncio.TaskGroup": _asyncio_group,
    "anyio start_soon": _anyio_group,
    "EventBus.spawn": _bus,
}


def _tasks(title: str, taken: Callable[[_Laps], int]) -> Case:
    return Case(
        title=title,
        contenders={
            name: Contender(partial(_on_a_loop, block, taken), ours=block is _bus) for name, block in _WAYS.items()
        },
        floor="asyncio.create_task",
    )


_NOBODY: Final = "a bus without callbacks"
_DEAF: Final = "a bus with 8 of them"

COSTS: Final = TimedQuestion(
    name="costs",
    promise="The parts: a callback that does not override a hook costs nothing; the rest is for the record",
    cases=(
        Case(
            title="build one StepEnd",
            contenders={
                "dict": Contender(_building_a_dict),
                "StepEnd": Contender(partial(_building, StepEnd), ours=True),
                "dataclass": Contender(partial(_building, _Plain)),
                "frozen dataclass with slots": Contender(partial(_building, _Frozen)),
            },
            floor="dict",
        ),
        Case(
            title="publish one StepEnd to callbacks that do not listen to it",
            contenders={
                _NOBODY: Contender(partial(_publishing_past, 0), ours=True),
                _DEAF: Contender(partial(_publishing_past, 8), ours=True),
            },
            floor=_NOBODY,
            targets=(Target(of=_DEAF, to=_NOBODY, at_most=1.1),),
        ),
        _tasks(f"hand over {TASKS} tasks that do nothing", lambda laps: laps.handed_over - laps.begun),
        _tasks(f"hand over {TASKS} tasks that do nothing, and wait for them", lambda laps: laps.finished - laps.begun),
    ),
)
