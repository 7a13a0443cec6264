"""P3: what five loggers cost the training loop per step with ``placement: follow``, compared with inline.

Progress, CSV, local files, TensorBoard and W&B offline. With ``follow`` the loop only records the step in the journal;
the courier process delivers what was recorded at the same time.
"""

import contextlib
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from evsys_bus.bench.dispatch import BATCH, METRICS
from evsys_bus.bench.suite import Candidate, Case, Target, TimedLoop, TimedSuite
from evsys_bus.bus import EventBus
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.config.spec import Placement
from evsys_bus.context import LogContext, LoopState
from evsys_bus.events import StepEnd

MAX_RATIO: Final = 1 / 50
_PACKAGES: Final = ("tensorboardX", "wandb")


@contextmanager
def _publish_steps(placement: Placement) -> Generator[TimedLoop, None, None]:
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, Path(os.devnull).open("w") as devnull:
        directory = Path(name)
        state = LoopState(0, 1_000_000, directory / "run", ctx=LogContext(directory, run_key="run"))
        journal = directory / "journal" if placement == "follow" else None
        step = 0

        params: dict[str, dict[str, Any]] = {
            "print_progress": {},
            "csv_metrics": {"out_path": str(directory / "metrics.csv")},
            "local_logger": {},
            "tensorboard_logger": {},
            "wandb_logger": {"project": "bench", "mode": "offline"},
        }
        with EventBus(
            build_callbacks([CallbackSpec(kind, each, placement=placement) for kind, each in params.items()]),
            journal=journal,
            drain_timeout=0.1,
            linger_seconds=0.1,
        ) as bus:

            def run(operations: int) -> int:
                nonlocal step
                with contextlib.redirect_stdout(devnull):
                    started = perf_counter_ns()
                    for step_idx in range(step, step + operations):
                        bus.publish(StepEnd(state, step_idx, BATCH, METRICS))
                    elapsed = perf_counter_ns() - started
                step += operations
                return elapsed

            run(1)  # the first step imports modules, which is not part of the cost of a step
            yield run


ALL_LOGGERS: Final = TimedSuite(
    name="all-loggers",
    promise="five loggers that are followed cost the loop at most a fiftieth of what they cost it inline",
    cases=(
        Case(
            title="a step of 8 metrics: progress, CSV, local files, TensorBoard, W&B offline",
            candidates={
                "inline": Candidate(partial(_publish_steps, "inline"), package="evsys-bus[tensorboard,wandb]"),
                "followed": Candidate(
                    partial(_publish_steps, "follow"), package="evsys-bus[tensorboard,wandb]", ours=True
                ),
            },
            baseline="inline",
            targets=(Target(candidate="followed", reference="inline", at_most=MAX_RATIO),),
        ),
    ),
)
