"""What the parts cost: building an event, callbacks that do not override a hook, spawning tasks, awaiting them."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Final

import anyio

from evsys_bus.bench.dispatch import BATCH, METRICS, STATE, publish
from evsys_bus.bench.suite import Candidate, Case, Target, TimedLoop, TimedSuite
from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, LogContext, LoopState, RunResult, TrainingBatch
from evsys_bus.events import StepEnd

TASKS: Final = 200
"""How many tasks one operation spawns."""


@dataclass
class _PlainStep:
    state: LoopState
    step_idx: int
    batch: TrainingBatch
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _FrozenStep:
    state: LoopState
    step_idx: int
    batch: TrainingBatch
    metrics: dict[str, float]


@contextmanager
def _build_events(
    kind: Callable[[LoopState, int, TrainingBatch, dict[str, float]], object],
) -> Generator[TimedLoop, None, None]:
    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            kind(state, i, batch, metrics)
        return perf_counter_ns() - started

    yield run


@contextmanager
def _build_dicts() -> Generator[TimedLoop, None, None]:
    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            _ = {"state": state, "step_idx": i, "batch": batch, "metrics": metrics}
        return perf_counter_ns() - started

    yield run


class _RunEndCallback(Callback):
    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Do nothing."""


@dataclass
class _Timings:
    """Clock readings of one operation."""

    started: int = 0
    submitted: int = 0
    """When every task had been spawned."""
    finished: int = 0
    """When every task was done and the block that owns them was left."""


async def _no_op() -> None:
    pass


async def _create_task(timings: _Timings) -> None:
    timings.started = perf_counter_ns()
    tasks = [
        asyncio.create_task(_no_op())  # noqa: TID251 - the baseline
        for _ in range(TASKS)
    ]
    timings.submitted = perf_counter_ns()
    await asyncio.gather(*tasks)  # noqa: TID251 - the baseline
    timings.finished = perf_counter_ns()


async def _asyncio_task_group(timings: _Timings) -> None:
    async with asyncio.TaskGroup() as group:
        timings.started = perf_counter_ns()
        for _ in range(TASKS):
            group.create_task(_no_op())
        timings.submitted = perf_counter_ns()
    timings.finished = perf_counter_ns()


async def _anyio_task_group(timings: _Timings) -> None:
    async with anyio.create_task_group() as group:
        timings.started = perf_counter_ns()
        for _ in range(TASKS):
            group.start_soon(_no_op)
        timings.submitted = perf_counter_ns()
    timings.finished = perf_counter_ns()


async def _bus_spawn(timings: _Timings) -> None:
    async with EventBus() as bus:
        timings.started = perf_counter_ns()
        for _ in range(TASKS):
            bus.spawn(_no_op)
        timings.submitted = perf_counter_ns()
    timings.finished = perf_counter_ns()


@contextmanager
def _run_on_loop(
    block: Callable[[_Timings], Awaitable[None]], elapsed: Callable[[_Timings], int]
) -> Generator[TimedLoop, None, None]:
    with asyncio.Runner() as runner:

        async def repeat(operations: int) -> int:
            total = 0
            for _ in range(operations):
                timings = _Timings()
                await block(timings)
                total += elapsed(timings)
            return total

        yield lambda operations: runner.run(repeat(operations))


_SPAWNERS: Final = {
    "asyncio.create_task": _create_task,
    "asyncio.TaskGroup": _asyncio_task_group,
    "anyio start_soon": _anyio_task_group,
    "EventBus.spawn": _bus_spawn,
}


def _task_case(title: str, elapsed: Callable[[_Timings], int]) -> Case:
    return Case(
        title=title,
        candidates={
            name: Candidate(partial(_run_on_loop, block, elapsed), ours=block is _bus_spawn)
            for name, block in _SPAWNERS.items()
        },
        baseline="asyncio.create_task",
    )


_NO_CALLBACKS: Final = "a bus without callbacks"
_NON_LISTENING_CALLBACKS: Final = "a bus with 8 of them"

COSTS: Final = TimedSuite(
    name="costs",
    promise="The parts: a callback that does not override a hook costs nothing; the rest is for the record",
    cases=(
        Case(
            title="build one StepEnd",
            candidates={
                "dict": Candidate(_build_dicts),
                "StepEnd": Candidate(partial(_build_events, StepEnd), ours=True),
                "dataclass": Candidate(partial(_build_events, _PlainStep)),
                "frozen dataclass with slots": Candidate(partial(_build_events, _FrozenStep)),
            },
            baseline="dict",
        ),
        Case(
            title="publish one StepEnd to callbacks that do not listen to it",
            candidates={
                _NO_CALLBACKS: Candidate(partial(publish, 0), ours=True),
                _NON_LISTENING_CALLBACKS: Candidate(partial(publish, 8, _RunEndCallback), ours=True),
            },
            baseline=_NO_CALLBACKS,
            targets=(Target(candidate=_NON_LISTENING_CALLBACKS, reference=_NO_CALLBACKS, at_most=1.1),),
        ),
        _task_case(f"hand over {TASKS} tasks that do nothing", lambda timings: timings.submitted - timings.started),
        _task_case(
            f"hand over {TASKS} tasks that do nothing, and wait for them",
            lambda timings: timings.finished - timings.started,
        ),
    ),
)
