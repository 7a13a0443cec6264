"""A synchronous loop that fits a line to points, while its checkpoints are copied in the background.

    python examples/sync_loop.py [OUTPUT_DIR]

No event loop runs here, so the bus is entered with `with`, and tasks that hooks spawn run on a thread of the bus.
"""

import asyncio
import json
import random
import shutil
import sys
from pathlib import Path

from evsys_bus import Callback, EventBus
from evsys_bus.context import LoopArtifacts, LoopState, ManifestRow, TrainingBatch
from evsys_bus.events import Checkpoint, StepEnd, TrainEnd, TrainStart

STEPS, BATCH, RATE, SAVE_EVERY = 300, 16, 0.2, 100


class Upload(Callback):
    """Copies every checkpoint to another folder; the loop never waits for it."""

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Spawn slow work: a coroutine function, then its arguments."""
        self.spawn(self.upload, Path(row.state_path or ""), state.output_dir / "shipped", lane="uploads", timeout=10)

    async def upload(self, path: Path, destination: Path) -> None:
        """Copy in a thread, because blocking work would delay the other tasks."""
        await asyncio.to_thread(shutil.copy2, path, destination)
        print(f"shipped {path.name}")


def main(output_dir: Path) -> None:
    """Minimize the squared error by stochastic gradient descent; the points are around y = 3x - 1."""
    (output_dir / "shipped").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)  # noqa: S311 # points, and seeded
    state = LoopState(step=0, num_steps=STEPS, output_dir=output_dir)
    slope = intercept = 0.0
    with EventBus([Upload()]) as bus:
        bus.publish(TrainStart(state))
        for step_idx in range(STEPS):
            state.step = step_idx
            points = [(x, 3 * x - 1 + rng.gauss(0, 0.1)) for x in (rng.random() for _ in range(BATCH))]
            errors = [(slope * x + intercept - y, x) for x, y in points]
            slope -= RATE * 2 * sum(error * x for error, x in errors) / BATCH
            intercept -= RATE * 2 * sum(error for error, _ in errors) / BATCH
            loss = sum(error**2 for error, _ in errors) / BATCH
            bus.publish(StepEnd(state, step_idx, TrainingBatch(points, "squared_error"), {"loss": loss}))
            if (step_idx + 1) % SAVE_EVERY == 0:
                path = output_dir / f"step-{step_idx:06d}.json"
                path.write_text(json.dumps([slope, intercept]), encoding="utf-8")
                bus.publish(Checkpoint(state, ManifestRow(path.stem, batch=step_idx, state_path=str(path))))
        bus.publish(TrainEnd(state, LoopArtifacts(str(output_dir), total_requested_steps=STEPS)))
    print(f"y = {slope:.2f} x {intercept:+.2f}")
    print(bus.receipt)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sync-loop"))
