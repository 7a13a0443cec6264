"""wandb_logger online: the upload, whatever the server answers, and that no process of W&B is left behind."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from evsys_bus import EventBus, build_callbacks
from evsys_bus.testing.timeline import Timeline

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


def test_online_uploads_while_the_run_goes_on_and_tells_the_url(tmp_path, server, login):
    before = wandb.cores()
    specs = [{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}]
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(specs)) as bus:
        [one.logger] = bus.callbacks
        one.start()
        one.step(0, loss=1.0)
        one.logger.mark()
        wandb.until(lambda: server.rows(wandb.id_of(one.file)))
        one.step(1, loss=2.0)
        one.end()
    assert wandb.series(server.rows(wandb.id_of(one.file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]
    assert one.file.with_suffix(".wandb.synced").exists()
    assert one.ctx.extras["wandb_url"] == f"{server.url}/team/p/runs/{wandb.id_of(one.file)}"
    wandb.until(lambda: wandb.cores() <= before)


def test_without_a_login_a_warning_names_the_fix_and_the_run_goes_on(tmp_path, server, caplog):
    specs = [{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}]
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(specs), drain_timeout=1.0) as bus:
        [one.logger] = bus.callbacks
        one.start()
        wandb.until(lambda: "wandb.not_uploaded" in caplog.text)
        one.step(0, loss=1.0)
        one.end()
    assert "no login" in caplog.text
    assert "wandb login" in caplog.text
    assert f'wandb sync "{one.file.parent}"' in caplog.text
    assert wandb.series(wandb.rows_in(one.file), "train")["loss"] == [(0, 1.0)]


def test_no_process_of_wandb_outlives_a_courier_that_is_killed(tmp_path, server, login, program):
    before = wandb.cores()
    with EventBus([], journal=tmp_path / "journal") as bus:
        wandb.publish(bus, Timeline(tmp_path).starts())
    process = program(wandb.COURIER, str(tmp_path / "journal"), "online", "0.002", "stay")
    wandb.until(lambda: server.runs)
    begun = wandb.cores() - before  # another worker's may be among them; they end as well
    assert begun
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wandb.until(lambda: not (wandb.cores() & begun) and not wandb.processes(tmp_path))
