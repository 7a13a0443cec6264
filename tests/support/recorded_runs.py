"""Recording small runs: trainings that end, fail, are killed or go on, each with a journal of its own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evsys_bus import (
    ArmResult,
    Eval,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from evsys_bus import *
    folder = Path(sys.argv[1])
    ctx = LogContext(folder.parent, run_key=folder.name, run_config={"lr": 0.5, "arm": "killed", "seed": 3})
    state = LoopState(0, 100, folder, ctx=ctx)
    bus = EventBus([], journal=folder / "journal")
    bus.__enter__()
    bus.publish(RunStart(ctx))
    bus.publish(TrainStart(state))
    for step in range(12):
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 12.0 - step}))
    print("ready", flush=True)
    if len(sys.argv) > 2:
        signal.pause()
    os.kill(os.getpid(), 9)
"""
"""A program that records 12 steps of the run in a folder, and kills itself; with another argument it waits before."""


def record_run(
    folder: Path,
    losses: Iterable[float] = (3.0, 1.0, 2.0),
    *,
    config: dict[str, Any] | None = None,
    status: str = "completed",
    error: str | None = None,
    first_step: int = 0,
    num_steps: int = 3,
    evals: dict[int, float] | None = None,
    group: str | None = None,
) -> Path:
    """Record a run with these losses, from the first step on; its folder is returned."""
    ctx = LogContext(folder.parent, run_key=folder.name, run_config=config or {}, group_name=group)
    state = LoopState(first_step, num_steps, folder, ctx=ctx)
    folder.mkdir(parents=True, exist_ok=True)
    with EventBus([], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step, loss in enumerate(losses, start=first_step):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": loss, "lr": 0.125}))
            if step in (evals or {}):
                bus.publish(Eval(state, step, "val", {"acc": (evals or {})[step]}))
        state.error = None if error is None else ArithmeticError(error)
        bus.publish(TrainEnd(state, LoopArtifacts(str(folder))))
        bus.publish(RunEnd(ctx, RunResult(status=status, error=error), ArmResult(folder.name)))  # pyright: ignore[reportArgumentType]
    return folder
