"""Protocols that a host implements for the loop: a backend, a step builder, evaluators and benchmarks.

Your classes need the methods, not the base class. The methods resemble those of async training services such as
Tinker, so an adapter to one is usually a few lines.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from evsys_bus.context import EvalResult, LoopState, Prediction, TrainingBatch


class Backend(Protocol):
    """Trains the model: a client of a training service, or a model in this process."""

    async def forward_backward(self, batch: TrainingBatch) -> Mapping[str, float]:
        """Accumulate the gradients of the batch, and return metrics: the loss, accuracies, ..."""
        ...

    async def optim_step(self) -> Mapping[str, float] | None:
        """Apply and clear the accumulated gradients, and return metrics, if any: a norm, a learning rate."""
        ...

    async def save_state(self, name: str) -> str:
        """Save the complete training state, including the optimizer; return its path or URI.

        The checkpoint must be complete when this returns: the loop then records it, and may resume from it.
        """
        ...

    async def save_weights_for_sampler(self, name: str) -> str:
        """Save only the weights, for inference; return their path or URI."""
        ...

    async def load_state(self, path: str) -> None:
        """Load a state that `save_state` saved."""
        ...


class SnapshotBackend(Backend, Protocol):
    """A backend that can also provide its current weights without a file."""

    async def snapshot_for_sampler(self) -> object:
        """Return a sampler that later steps do not change, for evals that run concurrently with the loop."""
        ...


class StepBuilder(Protocol):
    """Builds the batch of a step: from a dataset, or by rolling out the policy."""

    async def build_batch(self, step_idx: int) -> TrainingBatch | None:
        """Return the batch of a 0-based step; None or a batch without data skips the step.

        A resumed run does not start at step 0: derive the batch from the index, not from the number of calls.
        """
        ...


class Benchmark(NamedTuple):
    """The result of an evaluator that returns more than a few numbers."""

    result: EvalResult
    """The caller sets its ``step``."""
    predictions: list[Prediction]
    """One row per task."""


class Scorer(Protocol):
    """Scores a model. Its errors are logged and do not stop the run."""

    @property
    def name(self) -> str:
        """Name of its results."""
        ...

    async def evaluate(self, state: LoopState) -> Mapping[str, float] | Benchmark:
        """Score ``state.backend`` as it is after ``state.step``."""
        ...


class Evaluator(Scorer, Protocol):
    """Scores the model during training."""

    @property
    def every(self) -> int:
        """Steps between evaluations; 0 for never."""
        ...
