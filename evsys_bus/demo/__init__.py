"""The demo: a real training run over the bus, on real data, in a few seconds, with nothing to download.

It shows how an orchestrator uses the pieces: a bus around it all, the reference loop, and a benchmark afterwards.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from evsys_bus.bus import EventBus
from evsys_bus.context import EvalResult, LogContext, LoopArtifacts
from evsys_bus.errors import TrainingError
from evsys_bus.events import BenchmarkEval
from evsys_bus.training import TrainingLoop


class DemoResult(msgspec.Struct, frozen=True):
    """How the demo went."""

    artifacts: LoopArtifacts
    test: EvalResult
    """The held-out images, after training."""
    steps_done: int
    seconds: float
    """Everything but the imports."""


async def run_demo(
    output_dir: Path, callbacks: Iterable[object] = (), *, num_steps: int = 1000, seed: int = 0, resume: bool = False
) -> DemoResult:
    """Train on the handwritten digits, then score the held-out ones; the seed decides every number but the times.

    Raises:
        TrainingError: numpy or scikit-learn is missing, or ``output_dir`` cannot be used.
    """
    try:
        from threadpoolctl import threadpool_limits

        from evsys_bus.demo.digits import DigitBatches, DigitBenchmark, DigitNetwork, load_split
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"the demo needs {error.name}, which is not installed",
            fix="pip install 'evsys-bus[demo]'   or   uv add 'evsys-bus[demo]'",
        ) from error

    began = time.perf_counter()
    split = load_split(seed)
    batches = DigitBatches(split.train, seed)
    network = DigitNetwork(output_dir / "checkpoints", seed)
    ctx = LogContext(output_dir=output_dir.parent, run_key=output_dir.name, run_config={"seed": seed})
    every = max(num_steps // 6, 1)
    # On matrices this small, more BLAS threads than one only cost; and the sums come out the same everywhere.
    with threadpool_limits(limits=1):
        async with EventBus(callbacks) as bus:
            artifacts = await TrainingLoop(
                network,
                batches,
                num_steps=num_steps,
                evaluators=[DigitBenchmark("digits-val", split.val, tag="val", every=every)],
                bus=bus,
                ctx=ctx,
                save_every=every,
                steps_per_epoch=batches.steps_per_epoch,
                resume=resume,
            ).run()
            result, predictions = DigitBenchmark("digits-test", split.test, tag="test").score(network)
            bus.publish(BenchmarkEval(ctx, result, predictions))
    return DemoResult(artifacts, result, artifacts.checkpoints[-1].batch + 1, time.perf_counter() - began)
