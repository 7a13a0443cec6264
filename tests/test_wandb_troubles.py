"""wandb_logger online, where the server answers with errors: a warning with the fix, and nothing lost."""

import importlib.util
from pathlib import Path

import pytest

from evsys_bus import EventBus, build_callbacks

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


SPECS = [{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}]


def test_a_server_that_answers_500_is_a_warning_and_sync_finishes_it(tmp_path, server, login, caplog):
    before = wandb.cores()
    server.status = 500
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(SPECS), drain_timeout=1.0) as bus:
        [one.logger] = bus.callbacks
        one.start()
        one.step(0, loss=1.0)
        wandb.until(lambda: "wandb.not_uploaded" in caplog.text)
        one.step(1, loss=2.0)
        one.end()
    assert "the server does not answer, or answers with errors" in caplog.text
    assert f'wandb sync "{one.file.parent}"' in caplog.text
    wandb.until(lambda: wandb.cores() <= before)
    server.status = 200
    wandb.sync(one.file)
    assert wandb.series(server.rows(wandb.id_of(one.file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]


def test_a_server_that_answers_403_is_a_warning_and_the_upload_goes_on_when_it_no_longer_does(
    tmp_path, server, login, caplog
):
    server.status = 403
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(SPECS)) as bus:
        [one.logger] = bus.callbacks
        one.start()
        one.step(0, loss=1.0)
        wandb.until(lambda: "wandb.not_uploaded" in caplog.text)
        server.status = 200
        one.step(1, loss=2.0)
        one.end()
    assert "check the login" in caplog.text
    assert wandb.series(server.rows(wandb.id_of(one.file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]
