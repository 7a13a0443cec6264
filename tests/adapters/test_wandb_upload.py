"""wandb_logger online: the upload, whatever the server answers, and that no process of W&B is left behind."""

import importlib.util
import os
import signal

import pytest

from evsys_bus import EventBus, RunAnnotated, build_callbacks
from evsys_bus.testing.timeline import Timeline
from support import wandb_server as wandb
from support.couriers import courier_processes
from support.journals import read_annotations
from support.waiting import wait_until

server, login = wandb.server, wandb.login
pytestmark = [pytest.mark.servers, pytest.mark.long]


def test_online_uploads_while_the_run_goes_on_and_tells_the_url(tmp_path, server, login):
    before = wandb.find_wandb_services()
    specs = [{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}]
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(specs)) as bus:
        [one.logger] = bus.callbacks
        one.start()
        one.step(0, loss=1.0)
        one.logger.mark()
        wait_until(lambda: server.rows(wandb.run_id_of(one.file)))
        one.step(1, loss=2.0)
        one.end()
        wandb.drain_logger(one.logger)
    assert wandb.metric_series(server.rows(wandb.run_id_of(one.file)), "train")["loss"] == [(0, 1.0), (1, 2.0)]
    assert one.file.with_suffix(".wandb.synced").exists()
    assert one.ctx.extras["wandb_url"] == f"{server.url}/team/p/runs/{wandb.run_id_of(one.file)}"
    wait_until(lambda: wandb.find_wandb_services() <= before)


def test_without_a_login_a_warning_names_the_fix_and_the_run_goes_on(tmp_path, server, caplog):
    specs = [{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}]
    one = wandb.Run(tmp_path, mode="online")
    with EventBus(build_callbacks(specs), drain_timeout=0.2) as bus:
        [one.logger] = bus.callbacks
        one.start()
        wait_until(lambda: "wandb.not_uploaded" in caplog.text)
        one.step(0, loss=1.0)
        one.end()
    assert "no login" in caplog.text
    assert "wandb login" in caplog.text
    assert f'wandb sync "{one.file.parent}"' in caplog.text
    assert wandb.metric_series(wandb.rows_in(one.file), "train")["loss"] == [(0, 1.0)]


SEES = """
from pathlib import Path
from evsys_bus import Callback, register_callback


@register_callback("sees_the_page", replace=True)
class Sees(Callback):
    placement = "follow"

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_step_end(self, state, step_idx, batch, metrics):
        (self.folder / f"{state.ctx.run_key}.step").write_text(state.ctx.extras.get("wandb_url", ""))

    def on_run_end(self, ctx, run_result, arm):
        (self.folder / f"{ctx.run_key}.end").write_text(ctx.extras.get("wandb_url", ""))
"""


def test_no_process_of_wandb_outlives_a_courier_that_is_killed_and_who_follows_hears_of_the_page_once(
    tmp_path, server, login, monkeypatch
):
    (tmp_path / "sees_the_page.py").write_text(SEES)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("sees_the_page")
    journal, timeline, before = tmp_path / "journal", Timeline(tmp_path, ["wide"]), wandb.find_wandb_services()
    specs = [
        {"kind": "wandb_logger", "params": {"project": "p"}},
        {"kind": "sees_the_page", "params": {"folder": str(tmp_path)}},
    ]
    with EventBus(build_callbacks(specs), journal=journal) as bus:
        wandb.publish_all(bus, timeline.start_events())
        wait_until(lambda: read_annotations(journal))
        begun, [courier] = wandb.find_wandb_services() - before, courier_processes(journal)
        [[run, asked]] = [(run, len(asked)) for run, asked in server.runs.items()]
        assert begun
        os.kill(courier, signal.SIGKILL)
        wait_until(lambda: not wandb.find_wandb_services() & begun)
        wait_until(lambda: len(server.runs[run]) > asked)  # the upload of the next courier
        wandb.publish_all(bus, *map(timeline.step_events, range(2)), timeline.end_events())
    assert bus.receipt.resume_command is None
    page = f"{server.url}/team/p/runs/{run}"
    assert read_annotations(journal) == [RunAnnotated("wide", {"wandb_url": page})]
    assert [(tmp_path / f"wide.{at}").read_text() for at in ("step", "end")] == [page, page]
    wait_until(lambda: wandb.find_wandb_services() <= before and not wandb.find_wandb_processes(tmp_path))
