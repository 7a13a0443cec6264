"""States and steps of a run, like those that a loop publishes."""

from pathlib import Path

from evsys_bus import LogContext, LoopState, StepEnd, TrainingBatch


def state_of(folder: str | Path, run: str = "run", step: int = 0, num_steps: int = 100) -> LoopState:
    """Make the state of a run, with its context; the run's directory is in ``folder``."""
    context = LogContext(output_dir=folder, run_key=run)
    return LoopState(step=step, num_steps=num_steps, output_dir=Path(folder, run), ctx=context)


def step_end(folder: str | Path, step: int = 0, run: str = "run", **metrics: float) -> StepEnd:
    """Make a `StepEnd` of a run whose directory is in ``folder``."""
    return StepEnd(state_of(folder, run, step), step, TrainingBatch(), metrics)
