"""wandb_logger behind a courier that is killed: by W&B's own readers every row is there, and there once."""

import math
import os
import shutil
import subprocess
import sys

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart
from evsys_bus.context import LoopArtifacts
from support import TESTS
from support import wandb_server as wandb

server, login = wandb.server, wandb.login
pytestmark = pytest.mark.servers


STEPS = 900
READER = TESTS / "wandb_datastore.py"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run whose courier was killed three times."""
    folder = tmp_path_factory.mktemp("killed")
    journal = folder / "journal"
    with EventBus([], journal=journal) as bus:
        state = LoopState(step=0, num_steps=STEPS, output_dir=folder / "run")
        bus.publish(TrainStart(state))
        for step in range(STEPS):
            metrics = {"loss": math.nan if step % 7 == 0 else 1 / (step + 1), "n": step}
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
        bus.publish(TrainEnd(state, LoopArtifacts()))

    def size():
        return sum(file.stat().st_size for file in wandb.wandb_files_of(folder))

    adapter = "WandbLoggerCallback('p', mode='offline', flush_secs=0)"
    wandb.loggers.deliver_with_kills(journal, "wandb.proto.wandb_internal_pb2", adapter, size, 20_000)
    return folder


@pytest.mark.long
def test_three_kills_of_the_courier_lose_no_row_and_double_none(killed, server, login):
    [file] = wandb.wandb_files_of(killed)
    wandb.sync_files(file)
    rows = server.rows(wandb.run_id_of(file))
    [metrics] = wandb.loggers.recorded_series(killed / "journal").values()
    assert len(rows) == STEPS
    assert all(wandb.is_same_series(points, wandb.metric_series(rows, "train")[key]) for key, points in metrics.items())


@pytest.mark.long
def test_the_python_reader_that_wandb_had_finds_them_too(killed):
    uv = shutil.which("uv")
    if not (uv or os.environ.get("CI")):
        pytest.skip("uv is not here, which brings that reader")
    # It goes before the W&B of this environment, for this one process.
    command = [uv or "uv", "run", "--no-project", "--with", "wandb==0.24.*", "python", str(READER), str(killed)]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and "wandb_datastore" not in done.stderr and not os.environ.get("CI"):
        pytest.skip(f"that reader cannot be had here: {done.stderr.splitlines()[-1]}")
    assert f"{STEPS} rows; of the journal {2 * STEPS} values, {len(range(0, STEPS, 7))} of them NaN" in done.stdout
    assert done.stdout.endswith("every value is there exactly once\n"), done.stdout + done.stderr
