"""An asynchronous RL loop: steps come late and again, evals 50 steps late and out of order; no logger loses a point."""

import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evsys_bus import (
    BenchmarkEval,
    Eval,
    EvalResult,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from support import wandb_server as wandb

server, login = wandb.server, wandb.login


STEPS, LATE = 300, 50


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run in which learner, rollouts and evals go at their own pace, followed by both loggers."""
    folder = tmp_path_factory.mktemp("async-rl")
    ctx = LogContext(folder).for_run("rl")
    state = LoopState(step=0, num_steps=STEPS, output_dir=ctx.run_dir, ctx=ctx)
    specs = [
        {"kind": "tensorboard_logger"},
        {"kind": "wandb_logger", "params": {"project": "p", "mode": "offline"}},
    ]
    order = random.Random(7)
    due = {}
    with EventBus(build_callbacks(specs), journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(STEPS + LATE + 10):
            if step < STEPS:
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1 / (step + 1)}))
                if step % 10 == 0:
                    due.setdefault(step + LATE + order.randrange(-9, 10), []).append(step)
                if step % 40 == 39:  # a rollout that was on its way when the learner went on
                    bus.publish(StepEnd(state, step - 20, TrainingBatch(), {"loss": -1.0}))
            for at in due.pop(step, []):
                bus.publish(Eval(state, at, "win rate", {"wins": at / STEPS}))
                result = EvalResult("win rate", metrics={"wins": at / STEPS}, step=at)
                bus.publish(BenchmarkEval(ctx, result, [], step=at))
        bus.publish(TrainEnd(state, LoopArtifacts()))
    assert not due
    assert [each.pending for each in bus.receipt.deliveries] == [0, 0]
    return folder


LATE_STEPS = [(step - 20, -1.0) for step in range(39, STEPS, 40)]
LOSSES = sorted([(step, 1 / (step + 1)) for step in range(STEPS)] + LATE_STEPS)
WINS = [(step, step / STEPS) for step in range(0, STEPS, 10)]


def test_tensorboard_has_every_point_at_its_step(trained):
    found = EventAccumulator(str(trained / "tensorboard" / "rl"), size_guidance={"scalars": 0})
    found.Reload()
    wins = [(each.step, each.value) for each in found.Scalars("eval/win rate/wins")]
    losses = sorted((each.step, each.value) for each in found.Scalars("train/loss"))
    assert wins == [(step, pytest.approx(value)) for step, value in WINS]
    assert losses == [(step, pytest.approx(value)) for step, value in LOSSES]


def test_wandb_has_every_point_at_its_step_by_its_own_reader(trained, server, login):
    [file] = wandb.wandb_files_of(trained)
    wandb.sync_files(file)
    rows = server.rows(wandb.run_id_of(file))
    assert wandb.metric_series(rows, "eval/win rate")["wins"] == WINS
    assert sorted(wandb.metric_series(rows, "train")["loss"]) == LOSSES
