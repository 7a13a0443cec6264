"""A side eval: every checkpoint is scored concurrently with the loop, and the score is published as an Eval.

python examples/side_eval.py [OUTPUT_DIR]
"""

import asyncio
import json
import random
import sys
from pathlib import Path

from evsys_bus import Callback, EventBus
from evsys_bus.context import LoopArtifacts, LoopState, ManifestRow
from evsys_bus.events import Checkpoint, Eval, TrainEnd, TrainStart

STEPS, SAVE_EVERY = 60, 10
Point = tuple[float, float]


class SideEval(Callback):
    """Scores saved checkpoints, not the model in training, which has moved on when the score is known."""

    def __init__(self, bus: EventBus, points: list[Point]) -> None:
        self.bus = bus
        self.points = points

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Spawn the scoring; tasks of one lane run one after another."""
        self.spawn(self.score, state, row, lane="side-eval", timeout=60)

    async def score(self, state: LoopState, row: ManifestRow) -> None:
        """Score a checkpoint and publish from the task; `row.batch` is the step that was saved."""
        x, y = json.loads(await asyncio.to_thread(Path(row.state_path or "").read_text, encoding="utf-8"))
        await asyncio.sleep(0.01)  # a real one takes longer
        right = [(x * px + y * py > 0) == (px + 2 * py > 0) for px, py in self.points]
        self.bus.publish(Eval(state, row.batch, "held-out", {"accuracy": sum(right) / len(right)}))


class PrintingCallback(Callback):
    """Prints the side evals, which arrive like any other."""

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Print a score: it arrives late, but in order."""
        print(f"{eval_name} of step {step_idx}, at step {state.step}: {metrics['accuracy']:.2f}")


async def main(output_dir: Path) -> None:
    """Train a perceptron to classify on which side of a line a point lies."""
    rng = random.Random(1)  # noqa: S311 # points, and seeded
    points = [(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(400)]
    state = LoopState(step=0, num_steps=STEPS, output_dir=output_dir)
    x, y = 2.0, -2.0
    async with EventBus([PrintingCallback()]) as bus:
        bus.add(SideEval(bus, points[STEPS:]))
        bus.publish(TrainStart(state))
        for step_idx, (px, py) in enumerate(points[:STEPS]):
            state.step = step_idx
            wrong = (px + 2 * py > 0) - (x * px + y * py > 0)
            x, y = x + wrong * px / 4, y + wrong * py / 4
            if (step_idx + 1) % SAVE_EVERY == 0:
                path = output_dir / f"step-{step_idx:06d}.json"
                path.write_text(json.dumps([x, y]), encoding="utf-8")
                bus.publish(Checkpoint(state, ManifestRow(path.stem, batch=step_idx, state_path=str(path))))
            await asyncio.sleep(0.001)  # a step
        await bus.drain()  # so that the last evals arrive before TrainEnd; the end of the block would wait for them too
        bus.publish(TrainEnd(state, LoopArtifacts(str(output_dir), total_requested_steps=STEPS)))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/side-eval")
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(folder))
