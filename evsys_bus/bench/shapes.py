"""P11: what steps of the shapes that real programs publish cost, compared with the step of the other suites.

A host program has its own batches and states, or none; its metrics contain strings, numpy numbers, short lists and
small dicts; its state changes from step to step. Each shape is published to a bus with a journal and compared with a
`StepEnd` that has our own handles and eight floats.
"""

import math
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any, Final

from evsys_bus.bench.dispatch import BATCH, METRICS
from evsys_bus.bench.suite import Candidate, Case, Target, TimedLoop, TimedSuite
from evsys_bus.bus import EventBus
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.events import StepEnd

BENCHMARKED: Final = "the benchmarked step"
_ROOT: Final = Path("run").absolute()
_WARM_UP: Final = 300
"""Steps before anything is timed: the first ones compile encoders that the later ones use."""

StepFactory = Callable[[int], StepEnd]
"""Makes the event of a step; what a real program creates anew for each step is created anew here too."""


@dataclass
class HostState:
    """A state class of a host program, unrelated to `LoopState`, some of whose fields cannot be encoded."""

    step: int = 0
    num_steps: int = 1_000
    output_dir: Path = _ROOT / "run"
    epoch: int = 0
    tokens: int = 0
    loss: float = 0.0
    model: object = field(default_factory=object)
    phase: str = "warm"


@dataclass
class OwnLoopState(LoopState):
    """A subclass of `LoopState` with more fields."""

    epoch: int = 0
    phase: str = "warm"


class HostBatch:
    """A batch class of a host program with no attribute of `TrainingBatch`."""

    def __init__(self) -> None:
        self.ids = [1, 2, 3]


@dataclass
class HostBatchWithMetrics:
    """A batch class of a host program with some attributes of `TrainingBatch`."""

    ids: list[int] = field(default_factory=list[int])
    loss_fn: str = "grpo"
    metrics: dict[str, float] = field(default_factory=lambda: {"tokens": 4096.0})


_STATE: Final = LoopState(0, 1_000, _ROOT / "run", ctx=LogContext(_ROOT, run_key="run"))


def _steps(state: Any = _STATE, batch: Any = BATCH, metrics: dict[str, Any] = METRICS) -> StepFactory:
    """Return a factory of steps that differ from the benchmarked one in what is given here."""
    return lambda step: StepEnd(state, step, batch, metrics)


def _steps_with_changing_state() -> StepFactory:
    state: Any = HostState()

    def make(step: int) -> StepEnd:
        state.step, state.tokens, state.loss = step, 4_096 * step, 1 / (1 + step)
        return StepEnd(state, step, BATCH, METRICS)

    return make


def _stopped_state() -> LoopState:
    state = replace(_STATE)
    state.request_stop("no improvement")
    return state


def _steps_with_numpy_metrics(kind: str) -> StepFactory:
    import numpy as np

    make: Callable[[float], Any] = getattr(np, kind)
    return _steps(metrics={name: make(value) for name, value in METRICS.items()})


_MAX_RATIOS: Final[dict[str, tuple[Callable[[], StepFactory], float]]] = {
    "batch None": (lambda: _steps(batch=None), 2),
    "batch a dict": (lambda: _steps(batch={"input_ids": [1, 2], "labels": [3]}), 2),
    "batch of the host's own": (lambda: _steps(batch=HostBatch()), 2),
    "batch of the host's own, with metrics": (lambda: _steps(batch=HostBatchWithMetrics()), 2),
    "batch with metrics and loss_fn_config": (
        lambda: _steps(batch=TrainingBatch(None, "grpo", {"clip": 0.2}, {"tokens": 4096.0})),
        2,
    ),
    "state None": (lambda: _steps(None), 2),
    "state of the host's own": (lambda: _steps(HostState()), 2),
    "state of the host's own, changing": (_steps_with_changing_state, 2),
    "state a plain object": (lambda: _steps(SimpleNamespace(step=0, num_steps=9, output_dir=str(_ROOT))), 2),
    "state in a relative folder": (
        lambda: _steps(SimpleNamespace(step=0, num_steps=9, output_dir="run")),
        2,
    ),
    "state a subclass of LoopState": (lambda: _steps(OwnLoopState(0, 1_000, _ROOT, phase="main")), 2),
    "state with a reason to stop": (lambda: _steps(_stopped_state()), 2),
    "num_steps None": (lambda: _steps(LoopState(0, None, _ROOT)), 2),  # pyright: ignore[reportArgumentType]
    "metrics of numpy, float32": (partial(_steps_with_numpy_metrics, "float32"), 2),
    "metrics of numpy, float64": (partial(_steps_with_numpy_metrics, "float64"), 2),
    "None, NaN, a text and a bool among metrics": (
        lambda: _steps(metrics={**METRICS, "none": None, "nan": math.nan, "text": "warm", "bool": True}),
        2,
    ),
    "a list among metrics": (lambda: _steps(metrics={**METRICS, "lengths": [12, 7, 31]}), 3),
    "a dict among metrics": (lambda: _steps(metrics={**METRICS, "reward": {"math": 0.5, "code": 0.25}}), 3),
    "a dict of dicts and lists among metrics": (
        lambda: _steps(metrics={**METRICS, "reward": {"math": {"easy": 0.5, "hard": 0.1}, "code": [0.25, 0.5]}}),
        3,
    ),
}
"""How each shape is made, and the highest ratio of its cost to the benchmarked step."""


@contextmanager
def _publish_shape(make: Callable[[], StepFactory]) -> Generator[TimedLoop, None, None]:
    step = make()
    with tempfile.TemporaryDirectory() as directory, EventBus([], journal=Path(directory, "journal")) as bus:

        def run(operations: int) -> int:
            started = perf_counter_ns()
            for i in range(operations):
                bus.publish(step(i))
            return perf_counter_ns() - started

        run(_WARM_UP)
        yield run


SHAPES: Final = TimedSuite(
    name="shapes",
    promise="a step of any shape is on record for about the cost of the benchmarked one",
    cases=(
        Case(
            title="a step on record",
            candidates={BENCHMARKED: Candidate(partial(_publish_shape, _steps), ours=True)}
            | {
                name: Candidate(partial(_publish_shape, make), "numpy" if "numpy" in name else None, ours=True)
                for name, (make, _) in _MAX_RATIOS.items()
            },
            baseline=BENCHMARKED,
            targets=tuple(
                Target(candidate=name, reference=BENCHMARKED, at_most=max_ratio)
                for name, (_, max_ratio) in _MAX_RATIOS.items()
            ),
        ),
    ),
)
