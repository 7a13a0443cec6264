"""wandb_logger behind a courier that is killed: by W&B's own reader every row is there, and there once."""

import importlib.util
import math
import os
import signal
import time
from pathlib import Path

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart
from evsys_bus.context import LoopArtifacts

SPEC = importlib.util.spec_from_file_location("wandb_server", Path(__file__).with_name("wandb_server.py"))
assert SPEC is not None
assert SPEC.loader is not None
wandb = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(wandb)


@pytest.fixture
def server(tmp_path, monkeypatch):
    yield from wandb.served(tmp_path, monkeypatch)


@pytest.fixture
def login(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", wandb.KEY)


def test_three_kills_of_the_courier_lose_no_row_and_double_none(tmp_path, server, login, program):
    journal = tmp_path / "journal"
    with EventBus([], journal=journal) as bus:
        state = LoopState(step=0, num_steps=900, output_dir=tmp_path / "run")
        bus.publish(TrainStart(state))
        for step in range(900):
            metrics = {"loss": math.nan if step % 7 == 0 else 1 / (step + 1), "n": step}
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
        bus.publish(TrainEnd(state, LoopArtifacts()))

    def size():
        return sum(file.stat().st_size for file in wandb.files_of(tmp_path))

    for kill in (1, 2, 3):
        process, before = program(wandb.COURIER, str(journal), "offline", "0.002"), size()
        while process.poll() is None and size() < before + 20_000:
            time.sleep(0.001)
        assert process.poll() is None, f"it ended before kill {kill}: {process.communicate()}"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = program(wandb.COURIER, str(journal), "offline", "0.002")
    assert last.wait(15) == 0, last.communicate()
    [file] = wandb.files_of(tmp_path)
    wandb.sync(file)
    rows = server.rows(wandb.id_of(file))
    [metrics] = wandb.recorded(journal).values()
    assert len(rows) == 900
    assert all(wandb.same(points, wandb.series(rows, "train")[key]) for key, points in metrics.items())
