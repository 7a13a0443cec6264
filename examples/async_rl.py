"""A hand-written async RL orchestrator: rollouts, a learner and evals, each at its own pace, over one bus.

    python examples/async_rl.py [OUTPUT_DIR]

The game: eight doors, each hides a prize more or less often. Workers play with the policy they last saw, the learner
takes what they bring as it comes, and an eval of a frozen policy lands many steps after the step it is of.
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

PRIZES = [0.1, 0.3, 0.2, 0.5, 0.9, 0.4, 0.6, 0.2]  # how often; this is what the policy has to find out
WORKERS, ROLLOUTS_PER_STEP, PLAYS, RATE = 4, 2, 16, 0.03
EVAL_EVERY, SAVE_EVERY, GOOD_ENOUGH = 10, 20, 0.85


class RolloutEnd(Event, frozen=True):
    """An event of our own; callbacks that have an `on_rollout_end` are called with its fields."""

    state: LoopState
    version: int
    plays: list[tuple[int, float]]  # door, reward


def chances(policy: list[float]) -> list[float]:
    """How likely the policy is to take each door."""
    powers = [math.exp(score) for score in policy]
    return [power / sum(powers) for power in powers]


async def play(bus: EventBus, state: LoopState, policy: list[float], out: asyncio.Queue[RolloutEnd], seed: int) -> None:
    """A worker: rollout after rollout, each with the newest policy there is when it begins."""
    dice = random.Random(seed)  # noqa: S311 # a game, and seeded
    while True:
        version, doors = state.step, dice.choices(range(len(PRIZES)), chances(policy), k=PLAYS)
        await asyncio.sleep(dice.uniform(0.002, 0.006))  # the environment takes its time, and the learner goes on
        rollout = RolloutEnd(state, version, [(door, float(dice.random() < PRIZES[door])) for door in doors])
        bus.publish(rollout)
        await out.put(rollout)


async def evaluate(bus: EventBus, state: LoopState, step_idx: int, odds: list[float]) -> None:
    """Score a frozen policy; the result is published at the step it is of, however late."""
    await asyncio.sleep(0.04)
    bus.publish(Eval(state, step_idx, "prize", {"mean": sum(map(math.prod, zip(odds, PRIZES, strict=True)))}))


async def train(bus: EventBus, state: LoopState, rows: list[ManifestRow]) -> None:
    """The learner. One step is one update, by REINFORCE, and makes a new version of the policy."""
    policy = [0.0] * len(PRIZES)
    rollouts: asyncio.Queue[RolloutEnd] = asyncio.Queue(maxsize=WORKERS)

    def save(name: str) -> None:
        path = state.output_dir / f"{name}.json"
        path.write_text(json.dumps(policy), encoding="utf-8")
        rows.append(ManifestRow(name, batch=state.step, state_path=str(path)))
        bus.publish(Checkpoint(state, rows[-1]))

    async with asyncio.TaskGroup() as tasks:  # left when the last eval has landed
        workers = [tasks.create_task(play(bus, state, policy, rollouts, seed)) for seed in range(WORKERS)]
        for step_idx in range(state.num_steps):
            state.step = step_idx
            batch = TrainingBatch([await rollouts.get() for _ in range(ROLLOUTS_PER_STEP)], "reinforce")
            for rollout in batch.data:
                mean = sum(reward for _, reward in rollout.plays) / PLAYS
                for door, reward in rollout.plays:
                    policy[door] += RATE * (reward - mean)  # the gradient's other term sums to zero over a rollout
                # What a version earned is known some steps later: a row at its own step, one for each rollout of it.
                bus.publish(StepEnd(state, rollout.version, batch, {"reward": mean}))
            bus.publish(StepEnd(state, step_idx, batch, {"best_odds": max(chances(policy))}))
            if (step_idx + 1) % SAVE_EVERY == 0:
                save(f"step-{step_idx:06d}")
            if (step_idx + 1) % EVAL_EVERY == 0:
                tasks.create_task(evaluate(bus, state, step_idx, chances(policy)))
            if state.stop_requested:
                break
        for worker in workers:
            worker.cancel()
    save("final")


class StopWhenGood(Callback):
    """Asks for an end; the loop looks after its current step."""

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """`step_idx` is the step that was scored; the loop is at `state.step` by now."""
        print(f"eval of step {step_idx} landed at step {state.step}: {eval_name} {metrics['mean']:.2f}")
        if metrics["mean"] >= GOOD_ENOUGH:
            state.request_stop(f"the {eval_name} was good enough at step {step_idx}")


class Shipping(Callback):
    """Both ways to start async work in a hook; the bus waits for either when its block is left."""

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Managed: bounded, in order within its lane, and possible where no event loop runs."""
        self.spawn(asyncio.to_thread, shutil.copy2, row.state_path, state.output_dir / "shipped", lane="copies")

    def on_rollout_end(self, state: LoopState, version: int, plays: list[tuple[int, float]]) -> None:
        """Bare: the bus adopts a task that is made inside a hook."""
        line = json.dumps({"version": version, "landed": state.step, "plays": plays}) + "\n"
        asyncio.create_task(asyncio.to_thread(append, state.output_dir / "rollouts.jsonl", line))  # noqa: RUF006, TID251 # adopted


def append(path: Path, line: str) -> None:
    """In a thread, for it blocks."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


async def main(output_dir: Path) -> None:
    """What stands around every loop: an open bus, its beginning, and its end, also when it fails."""
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
    print("receipt", bus.receipt)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/async-rl")))
