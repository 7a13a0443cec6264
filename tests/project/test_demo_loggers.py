"""The demo, followed by tensorboard_logger and wandb_logger: both hold what the journal holds, value by value."""

import asyncio

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evsys_bus.config import build_callbacks
from evsys_bus.demo import demo_config
from evsys_bus.training import Experiment
from support import wandb_server as wandb

server, login = wandb.server, wandb.login


SPECS = [{"kind": "tensorboard_logger"}, {"kind": "wandb_logger", "params": {"project": "p", "mode": "offline"}}]


def test_what_both_hold_of_the_demo_is_what_the_journal_holds(tmp_path, server, login):
    settings = demo_config(tmp_path, steps=60, eval_every=20)
    experiment = Experiment(settings, callbacks=build_callbacks(SPECS), only_arms=["baseline", "wide"], only_seeds=[0])
    asyncio.run(experiment.run())
    [journal] = tmp_path.glob("**/journal")
    files = {file.parent.parent.parent.name: file for file in wandb.wandb_files_of(tmp_path)}
    wandb.sync_files(*files.values())
    recorded = wandb.loggers.recorded_series(journal)
    assert {run for run, _ in recorded} == files.keys() == {"baseline-s0", "wide-s0"}
    for (run, head), metrics in recorded.items():
        of_wandb = wandb.metric_series(server.rows(wandb.run_id_of(files[run])), head)
        drawn = EventAccumulator(str(journal.parent / "tensorboard" / run), size_guidance={"scalars": 0}).Reload()
        for key, points in metrics.items():
            assert wandb.is_same_series(points, of_wandb[key])
            assert [(each.step, each.value) for each in drawn.Scalars(f"{head}/{key}")] == [
                (step, pytest.approx(value)) for step, value in points
            ]
