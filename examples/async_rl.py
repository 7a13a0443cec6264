"""A hand-written async RL orchestrator: rollouts, a learner and evals, each at its own pace, over one bus.

    python examples/async_rl.py [OUTPUT_DIR]

The game has eight doors, each of which hides a prize with its own probability. Workers play with the newest policy they
have seen, the learner consumes their rollouts as they arrive, and the eval of a frozen policy finishes many steps after
the step that it scores.
"""

import asyncio
import json
import math
import random
import shutil
import sys
from pathlib import Path

from evsys_bus import Callback, EventBus
from evsys_bus.context import LoopArtifacts, LoopState, ManifestRow, TrainingBatch
from evsys_bus.events import Checkpoint, Eval, Event, StepEnd, TrainEnd, TrainStart

PRIZES = [0.1, 0.3, 0.2, 0.5, 0.9, 0.4, 0.6, 0.2]  # per door: what the policy has to learn
WORKERS, ROLLOUTS_PER_STEP, PLAYS, RATE = 4, 2, 16, 0.03
EVAL_EVERY, SAVE_EVERY, GOOD_ENOUGH = 10, 20, 0.85


class RolloutEnd(Event, frozen=True):
    """A custom event; callbacks with an `on_rollout_end` method are called with its fields."""

    state: LoopState
    version: int
    plays: list[tuple[int, float]]  # door, reward


def action_probabilities(policy: list[float]) -> list[float]:
    """Return the probability with which the policy chooses each door."""
    powers = [math.exp(score) for score in policy]
    return [power / sum(powers) for power in powers]


async def play(bus: EventBus, state: LoopState, policy: list[float], out: asyncio.Queue[RolloutEnd], seed: int) -> None:
    """A worker: plays rollouts forever, each with the newest policy at its start."""
    rng = random.Random(seed)  # noqa: S311 # a game, and seeded
    while True:
        version, doors = state.step, rng.choices(range(len(PRIZES)), action_probabilities(policy), k=PLAYS)
        await asyncio.sleep(rng.uniform(0.002, 0.006))  # the environment is slow; the learner continues meanwhile
        rollout = RolloutEnd(state, version, [(door, float(rng.random() < PRIZES[door])) for door in doors])
        bus.publish(rollout)
        await out.put(rollout)


async def evaluate(bus: EventBus, state: LoopState, step_idx: int, odds: list[float]) -> None:
    """Score a frozen policy and publish the result for the step that was scored, however late."""
    await asyncio.sleep(0.04)
    bus.publish(Eval(state, step_idx, "prize", {"mean": sum(map(math.prod, zip(odds, PRIZES, strict=True)))}))


async def train(bus: EventBus, state: LoopState, rows: list[ManifestRow]) -> None:
    """The learner: each step is one REINFORCE update and makes a new version of the policy."""
    policy = [0.0] * len(PRIZES)
    rollouts: asyncio.Queue[RolloutEnd] = asyncio.Queue(maxsize=WORKERS)

    def save(name: str) -> None:
        path = state.output_dir / f"{name}.json"
        path.write_text(json.dumps(policy), encoding="utf-8")
        rows.append(ManifestRow(name, batch=state.step, state_path=str(path)))
        bus.publish(Checkpoint(state, rows[-1]))

    async with asyncio.TaskGroup() as tasks:  # ends when the last eval has finished
        workers = [tasks.create_task(play(bus, state, policy, rollouts, seed)) for seed in range(WORKERS)]
        for step_idx in range(state.num_steps):
            state.step = step_idx
            batch = TrainingBatch([await rollouts.get() for _ in range(ROLLOUTS_PER_STEP)], "reinforce")
            for rollout in batch.data:
                mean = sum(reward for _, reward in rollout.plays) / PLAYS
                for door, reward in rollout.plays:
                    policy[door] += RATE * (reward - mean)  # the gradient's other term sums to zero over a rollout
                # The reward of a version is known some steps later: publish it for the version's step, per rollout.
                bus.publish(StepEnd(state, rollout.version, batch, {"reward": mean}))
            bus.publish(StepEnd(state, step_idx, batch, {"best_odds": max(action_probabilities(policy))}))
            if (step_idx + 1) % SAVE_EVERY == 0:
                save(f"step-{step_idx:06d}")
            if (step_idx + 1) % EVAL_EVERY == 0:
                tasks.create_task(evaluate(bus, state, step_idx, action_probabilities(policy)))
            if state.stop_requested:
                break
        for worker in workers:
            worker.cancel()
    save("final")


class StopWhenGood(Callback):
    """Requests a stop, which the loop checks after each step."""

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Stop if the score is good; `step_idx` is the step that was scored, `state.step` that of the loop."""
        print(f"eval of step {step_idx} landed at step {state.step}: {eval_name} {metrics['mean']:.2f}")
        if metrics["mean"] >= GOOD_ENOUGH:
            state.request_stop(f"the {eval_name} was good enough at step {step_idx}")


class Shipping(Callback):
    """Both ways to start async work in a hook; the bus waits for both when its block ends."""

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Managed: bounded, ordered within its lane, and possible without a running event loop."""
        self.spawn(asyncio.to_thread, shutil.copy2, row.state_path, state.output_dir / "shipped", lane="copies")

    def on_rollout_end(self, state: LoopState, version: int, plays: list[tuple[int, float]]) -> None:
        """Bare: the bus adopts a task that is created in a hook."""
        line = json.dumps({"version": version, "landed": state.step, "plays": plays}) + "\n"
        asyncio.create_task(asyncio.to_thread(append, state.output_dir / "rollouts.jsonl", line))  # noqa: RUF006, TID251 # adopted


def append(path: Path, line: str) -> None:
    """Append a line; it blocks, so it is called in a thread."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


async def main(output_dir: Path) -> None:
    """Open a bus around the loop, and publish the start and the end of training, even if it fails."""
    (output_dir / "shipped").mkdir(parents=True, exist_ok=True)
    state, rows = LoopState(step=0, num_steps=400, output_dir=output_dir), list[ManifestRow]()
    async with EventBus([StopWhenGood(), Shipping()]) as bus:
        bus.publish(TrainStart(state))
        try:
            await train(bus, state, rows)
        except BaseException as error:
            state.error = error
            raise
        finally:
            bus.publish(TrainEnd(state, LoopArtifacts(str(output_dir), checkpoints=rows)))
    print(f"ended at step {state.step} of {state.num_steps}: {state.stop_reason}")
    print("published", bus.health().published)
    print(bus.receipt)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/async-rl")))
