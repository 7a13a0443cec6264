"""What a host plugs into the loop: something that trains, something that makes batches, something that scores.

These are Protocols: your classes need the methods, not the base class. They are near to what async training services
(Tinker and its kin) offer, so an adapter to one is usually a few lines.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from evsys_bus.context import EvalResult, LoopState, Prediction, TrainingBatch


class Backend(Protocol):
    """What trains: a client of a training service, or a model in this process."""

    async def forward_backward(self, batch: TrainingBatch) -> Mapping[str, float]:
        """Add the batch's gradients to those held, and return what was measured: the loss, accuracies, ..."""
        ...

    async def optim_step(self) -> Mapping[str, float] | None:
        """Apply the gradients held, clear them, and return what was measured, if anything: a norm, a learning rate."""
        ...

    async def save_state(self, name: str) -> str:
        """Save all that is needed to go on as if nothing had happened, optimizer included; return its path or URI.

        The checkpoint must be whole when this returns: the loop records it then, and resumes from what is recorded.
        """
        ...

    async def save_weights_for_sampler(self, name: str) -> str:
        """Save the weights alone, for inference; return their path or URI."""
        ...

    async def load_state(self, path: str) -> None:
        """Go back to what `save_state` saved."""
        ...


class SnapshotBackend(Backend, Protocol):
    """A backend that can also hand out its weights as they are now, without a file."""

    async def snapshot_for_sampler(self) -> object:
        """Something to sample from that later steps do not change: for evals that run beside the loop and land late."""
        ...


class StepBuilder(Protocol):
    """Makes the batch of a step: from a dataset, or by rolling out the policy."""

    async def build_batch(self, step_idx: int) -> TrainingBatch | None:
        """The batch of this step, 0-based; None or one without data if there is none, and the step is skipped.

        A run that is resumed starts in the middle: make the batch from the index, not from how often you were asked.
        """
        ...


class Benchmark(NamedTuple):
    """What an evaluator returns when it has more to say than a few numbers."""

    result: EvalResult
    """Its ``step`` is filled in by who asked for it."""
    predictions: list[Prediction]
    """One row per task."""


class Scorer(Protocol):
    """Scores a model. What it raises is logged, and everything else goes on."""

    @property
    def name(self) -> str:
        """What its results are called."""
        ...

    async def evaluate(self, state: LoopState) -> Mapping[str, float] | Benchmark:
        """Score ``state.backend`` as it is after ``state.step``."""
        ...


class Evaluator(Scorer, Protocol):
    """Scores the model while it trains."""

    @property
    def every(self) -> int:
        """It is due after every so many steps; 0 for never."""
        ...
