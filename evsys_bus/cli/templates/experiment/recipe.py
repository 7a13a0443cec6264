"""A recipe makes the parts of one run: the model, its batches, and what is evaluated. Replace the model by yours."""

import asyncio
import json
import random
from pathlib import Path
from typing import Annotated, Any

import msgspec

from evsys_bus import EvalResult, TrainingBatch
from evsys_bus.training import Benchmark, RunComponents, RunPlan


class Params(msgspec.Struct, frozen=True):
    """Parameters of a run; the experiment file sets them, and `evsys-bus check` validates them against this class."""

    steps: Annotated[int, msgspec.Meta(ge=1)] = 200
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.01


class Line:
    """Fits w and b of y = 3 x + 1."""

    def __init__(self, lr: float, seed: int, folder: Path) -> None:
        self.lr = lr
        self.folder = folder
        self.w, self.b = random.Random(seed).uniform(-1, 1), 0.0
        self.gradient = (0.0, 0.0)

    async def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        """Compute the gradient and return the metrics of the step."""
        rows: list[tuple[float, float]] = batch.data
        errors = [(x, self.w * x + self.b - y) for x, y in rows]
        self.gradient = (
            sum(2 * error * x for x, error in errors) / len(errors),
            sum(2 * error for _, error in errors) / len(errors),
        )
        await asyncio.sleep(0.001)  # in place of a remote backend
        return {"loss": sum(error**2 for _, error in errors) / len(errors)}

    async def optim_step(self) -> None:
        """Apply the gradient."""
        self.w -= self.lr * self.gradient[0]
        self.b -= self.lr * self.gradient[1]

    async def save_state(self, name: str) -> str:
        """Save everything that a resumed run needs; return a path or a URI."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"w": self.w, "b": self.b}))
        return str(path)

    async def save_weights_for_sampler(self, name: str) -> str:
        """Save weights for inference; here the state has them."""
        return await self.save_state(name)

    async def load_state(self, path: str) -> None:
        """Continue from a saved state."""
        state: dict[str, float] = json.loads(Path(path).read_text())
        self.w, self.b = state["w"], state["b"]


class Batches:
    """Builds the batch of a step; the same step always has the same batch, so that a resumed run sees no other."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def build_batch(self, step_idx: int) -> TrainingBatch:
        """Return the batch of one step."""
        numbers = random.Random(f"{self.seed} {step_idx}")
        xs = [numbers.uniform(-1, 1) for _ in range(16)]
        return TrainingBatch(data=[(x, 3 * x + 1 + numbers.gauss(0, 0.1)) for x in xs])


class LineTest:
    """Evaluates a run after its training."""

    name = "line-test"

    async def evaluate(self, state: Any) -> Benchmark:
        """Return the metrics of the trained model."""
        model: Line = state.backend
        error = abs(model.w - 3) + abs(model.b - 1)
        return Benchmark(EvalResult(self.name, metrics={"error": error}), predictions=[])


def make_run(params: Params, run: RunPlan) -> RunComponents:
    """Return the parts of one run."""
    return RunComponents(
        backend=Line(params.lr, run.seed, run.run_dir / "states"),
        step_builder=Batches(run.seed),
        num_steps=params.steps,
        benchmarks=[LineTest()],
    )
