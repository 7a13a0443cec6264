"""wandb_logger online, where the server answers with errors or not at all: a warning with the fix, nothing lost."""

import pytest

from evsys_bus import EventBus
from support import wandb_server as wandb
from support.waiting import wait_until

server, login = wandb.server, wandb.login
pytestmark = pytest.mark.servers


def meets_silence(folder, caplog, **params):
    """What a run leaves that goes on although its server does not answer."""
    before = wandb.find_wandb_services()
    one = wandb.Run(folder, mode="online", patience_seconds=0.2, **params)
    one.logger.placement = "inline"
    with EventBus([one.logger], drain_timeout=0.5) as bus:
        one.start()
        one.step(0, loss=1.0)
        wait_until(lambda: "wandb.not_uploaded" in caplog.text)
        one.step(1, loss=2.0)
        one.end()
        wandb.drain_logger(one.logger, seconds=0.5)
    assert bus.receipt.seconds < 0.5 + 1
    assert "the server does not answer, or answers with errors" in caplog.text
    assert f'check network and base_url; it is tried again; then: wandb sync "{one.file.parent}"' in caplog.text
    assert wandb.metric_series(wandb.rows_in(one.file), "train")["loss"] == [(0, 1.0), (1, 2.0)]
    wait_until(lambda: wandb.find_wandb_services() <= before)
    return one.file


def test_a_server_that_answers_500_is_a_warning_and_the_command_finishes_it(tmp_path, server, login, caplog):
    server.status = 500
    file = meets_silence(tmp_path, caplog)
    assert server.request_count
    server.status = 200
    wandb.sync_by_command(file)
    assert wandb.metric_series(server.rows(wandb.run_id_of(file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize(
    "url", [wandb.unused_url, lambda: "http://no-such-host.invalid"], ids=["refused", "no such name"]
)
def test_without_a_network_the_run_goes_on_and_sync_sends_it_once_there_is_one(tmp_path, server, login, caplog, url):
    file = meets_silence(tmp_path, caplog, base_url=url())
    assert not server.request_count
    wandb.sync_files(file)
    assert wandb.metric_series(server.rows(wandb.run_id_of(file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]


def test_a_server_that_answers_403_is_a_warning_and_the_upload_goes_on_when_it_no_longer_does(
    tmp_path, server, login, caplog
):
    server.status = 403
    one = wandb.Run(tmp_path, mode="online")
    one.logger.placement = "inline"
    with EventBus([one.logger]):
        one.start()
        one.step(0, loss=1.0)
        wait_until(lambda: "wandb.not_uploaded" in caplog.text)
        server.status = 200
        one.step(1, loss=2.0)
        one.end()
        wandb.drain_logger(one.logger)
    assert "check the login" in caplog.text
    assert wandb.metric_series(server.rows(wandb.run_id_of(one.file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]
