"""The recipe of the demo: builds the parts of a run from the parameters of an arm."""

import functools
from typing import Annotated

import msgspec

from evsys_bus.errors import TrainingError
from evsys_bus.training import RunComponents, RunPlan


class DigitsRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of an arm of the demo."""

    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.003
    """Learning rate of Adam."""
    hidden: Annotated[int, msgspec.Meta(ge=1)] = 128
    """Units of the hidden layer."""
    steps: Annotated[int, msgspec.Meta(ge=1)] = 600
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 64
    eval_every: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Validate and save a checkpoint every this many steps; 0 for never."""
    split_seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Determines which images are held out: the same for every run, so that runs can be compared."""


def recipe(params: DigitsRun, run: RunPlan) -> RunComponents:
    """Build a network, its batches and two benchmarks; the seed of the run determines every number but the times.

    Raises:
        TrainingError: numpy or scikit-learn is missing.
    """
    require_demo_extra()
    from evsys_bus.demo.digits import DigitBatches, DigitBenchmark, DigitNetwork, load_split

    _limit_blas_threads()
    split = load_split(params.split_seed)
    batches = DigitBatches(split.train, run.seed, params.batch_size)
    return RunComponents(
        backend=DigitNetwork(run.run_dir / "checkpoints", run.seed, hidden=params.hidden, lr=params.lr),
        step_builder=batches,
        num_steps=params.steps,
        evaluators=[DigitBenchmark("digits-val", split.val, tag="val", every=params.eval_every)],
        benchmarks=[DigitBenchmark("digits-test", split.test, tag="test")],
        save_every=params.eval_every,
        steps_per_epoch=batches.steps_per_epoch,
    )


def require_demo_extra() -> None:
    """Check that the packages of the demo are installed.

    Raises:
        TrainingError: numpy or scikit-learn is missing.
    """
    try:
        import numpy as np
        import sklearn
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"the demo needs {error.name}, which is not installed",
            fix="pip install 'evsys-bus[demo]'   or   uv add 'evsys-bus[demo]'",
        ) from error
    del np, sklearn


@functools.cache
def _limit_blas_threads() -> None:
    """Limit BLAS to one thread for the whole process: faster on matrices this small, and sums are reproducible."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1)
