"""States and steps of a run, as a loop would publish them."""

from pathlib import Path

from evsys_bus import LogContext, LoopState, StepEnd, TrainingBatch


def state_of(folder: str | Path, run: str = "run", step: int = 0, num_steps: int = 100) -> LoopState:
    """The state of a run in its folder below ``folder``, with its context."""
    context = LogContext(output_dir=folder, run_key=run)
    return LoopState(step=step, num_steps=num_steps, output_dir=Path(folder, run), ctx=context)


def step_end(folder: str | Path, step: int = 0, run: str = "run", **metrics: float) -> StepEnd:
    """The end of a step of a run below ``folder``."""
    return StepEnd(state_of(folder, run, step), step, TrainingBatch(), metrics)
