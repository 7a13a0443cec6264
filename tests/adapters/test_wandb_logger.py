"""wandb_logger: what W&B's own reader finds in its files is what the journal holds, whatever happened in between."""

import json
import math
import subprocess
import sys

import pytest

from evsys_adapters import WandbLoggerCallback
from evsys_bus import EventBus, build_callbacks
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.tasks import run_in_new_loop
from evsys_bus.testing import conformance
from evsys_bus.testing.timeline import Timeline
from support import wandb_server as wandb

server, login = wandb.server, wandb.login

test_it_conforms = conformance(
    lambda _: WandbLoggerCallback("p", mode="offline", clock=lambda: 1.0, new_id=lambda: "abcdefgh")
)


@pytest.fixture
def run(tmp_path, server):
    return wandb.Run(tmp_path)


def test_what_wandb_reads_is_what_the_journal_holds(tmp_path, server, login):
    timeline = Timeline(tmp_path)
    odd = [{"loss": math.nan, "n": 3}, {"loss": math.inf, "b": 1e300}, {"loss": -0.0, "word": "up"}, {"l.r": 1 / 3}]
    specs = [{"kind": "wandb_logger", "params": {"project": "p", "mode": "offline"}}]
    with EventBus(build_callbacks(specs), journal=tmp_path / "journal") as bus:
        wandb.publish_all(
            bus,
            timeline.start_events(),
            *(timeline.step_events(step, row) for step, row in enumerate(odd)),
            timeline.end_events(),
        )
    assert [each.pending for each in bus.receipt.deliveries] == [0]
    assert server.request_count == 0
    files = {file.parent.parent.parent.name: file for file in wandb.wandb_files_of(tmp_path)}
    assert files.keys() == {"wide", "narrow"}
    wandb.sync_files(*files.values())
    for (name, head), metrics in wandb.loggers.recorded_series(tmp_path / "journal").items():
        found = wandb.metric_series(server.rows(wandb.run_id_of(files[name])), head)
        assert metrics.keys() <= found.keys()
        assert all(wandb.is_same_series(points, found[key]) for key, points in metrics.items())


def test_a_recorded_run_replays_into_it(tmp_path, server):
    with EventBus([], journal=tmp_path / "journal") as bus:
        wandb.publish_all(bus, Timeline(tmp_path).all_events())
    courier = Courier(
        tmp_path / "journal", "replay", WandbLoggerCallback("p", mode="offline"), DeliveryPolicy(), persistent=False
    )
    courier.finish()
    run_in_new_loop(courier.run)
    for file in wandb.wandb_files_of(tmp_path):
        assert wandb.metric_series(wandb.rows_in(file), "train")["loss"] == [
            (step, 0.5 / (step + 1)) for step in range(4)
        ]


def test_a_resumed_run_is_the_same_run_and_what_is_run_again_replaces_what_was(run, tmp_path):
    run.start()
    for step in range(10):
        run.step(step, loss=1.0)
    run.eval(8, accuracy=0.1)
    run.end()
    file = run.file
    again = wandb.Run(tmp_path)
    again.start(step=6)
    for step in range(6, 12):
        again.step(step, loss=2.0)
    again.eval(8, accuracy=0.9)
    again.end()
    assert again.file == file
    rows = wandb.rows_in(file)
    assert sum(each.HasField("exit") for each in wandb.records_in(file)) == 1
    assert wandb.metric_series(rows, "train")["loss"] == [(step, 1.0 if step < 6 else 2.0) for step in range(12)]
    assert wandb.metric_series(rows, "eval/held out")["accuracy"] == [(8, 0.9)]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))


def test_each_metric_is_drawn_over_the_step_of_its_own_stream(run):
    run.start()
    run.step(0, loss=1.0)
    run.eval(0, accuracy=1.0)
    run.end()
    found = wandb.records_in(run.file)
    defined = {each.metric.name: each.metric.step_metric for each in found if each.HasField("metric")}
    over = {"train/loss": "train/step", "eval/held out/accuracy": "eval/held out/step"}
    assert defined == {"train/step": "", "eval/held out/step": "", **over}


def test_R12_an_eval_that_comes_again_replaces_the_one_before(run):
    run.start()
    run.eval(0, "tasks", accuracy=0.5, f1=math.nan)
    run.benchmark(0, "tasks", accuracy=0.5, f1=math.nan)
    run.eval(4, "tasks", accuracy=0.25)
    run.eval(4, "tasks", accuracy=0.75)
    run.eval(0, "tasks", accuracy=0.125)
    run.end()
    found = wandb.metric_series(wandb.rows_in(run.file), "eval/tasks")
    assert found["accuracy"] == [(0, 0.125), (4, 0.75)]
    assert repr(found["f1"]) == "[(0, nan)]"


def test_log_every_leaves_steps_out_but_never_the_last(run):
    run.logger = WandbLoggerCallback("p", mode="offline", log_every=40)
    run.start()
    for step in range(100):
        run.step(step, loss=1.0)
    run.end()
    assert [step for step, _ in wandb.metric_series(wandb.rows_in(run.file), "train")["loss"]] == [0, 40, 80, 99]


@pytest.mark.parametrize("horizon", [None, math.inf, 10**6])
def test_log_every_logs_the_last_step_of_a_run_without_a_known_end(run, horizon):
    run.logger = WandbLoggerCallback("p", mode="offline", log_every=30)
    run.state.num_steps = horizon
    run.start()
    for step in range(50):
        run.step(step, loss=step / 2)
    run.logger.close()
    assert wandb.metric_series(wandb.rows_in(run.file), "train")["loss"] == [(0, 0.0), (30, 15.0), (49, 24.5)]
    for step in range(50, 62):
        run.step(step, loss=step / 2)
    run.end()
    assert [step for step, _ in wandb.metric_series(wandb.rows_in(run.file), "train")["loss"]] == [0, 30, 49, 60, 61]


def test_a_prefix_is_put_only_before_names_without_one(run):
    run.start()
    names = ["loss", "train/grad_norm", "rollout/length", "train/step", "step"]
    run.logger.on_step_end(run.state, 0, None, {name: float(n) for n, name in enumerate(names)})
    run.eval(0, "val", **{"accuracy": 0.5, "eval/val/f1": 0.25})
    run.end()
    train, val = wandb.rows_in(run.file)
    ours = {"_step", "_timestamp", "_runtime"}
    named = {"train/loss", "train/grad_norm", "rollout/length", "train/metrics.step", "train/metrics.train/step"}
    assert train.keys() - ours == {"train/step", *named}
    assert (train["train/step"], train["train/grad_norm"], train["rollout/length"]) == (0, 1.0, 2.0)
    assert val.keys() - ours == {"eval/val/step", "eval/val/accuracy", "eval/val/f1"}
    found = wandb.records_in(run.file)
    assert {each.metric.step_metric for each in found if each.metric.name == "rollout/length"} == {"train/step"}


def test_a_step_may_be_a_float_that_is_whole(run):
    run.start()
    run.step(3.0, loss=1.0)
    run.end()
    assert wandb.metric_series(wandb.rows_in(run.file), "train")["loss"] == [(3, 1.0)]


def test_a_loop_that_calls_no_start_and_no_end_leaves_a_complete_file(run):
    for step in range(3):
        run.step(step, loss=step + 0.5)
    run.logger.close()
    assert wandb.metric_series(wandb.rows_in(run.file), "train")["loss"] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    run.logger.close()
    assert len(wandb.rows_in(run.file)) == 3


def test_constructing_imports_no_wandb_and_touches_no_file(tmp_path):
    program = (
        "import sys; from evsys_adapters import WandbLoggerCallback; WandbLoggerCallback('p');"
        "sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_rows_larger_than_a_block_are_read_by_wandb(run, server, login):
    sizes = [32_760 - 7 * n for n in range(12)] + [70_000, 140_000]
    run.start()
    for step, size in enumerate(sizes):
        run.step(step, text="x" * size)
    run.end()
    wandb.sync_files(run.file)
    assert [
        len(text) for _, text in wandb.metric_series(server.rows(wandb.run_id_of(run.file)), "train")["text"]
    ] == sizes


def test_offline_says_nothing_asks_nobody_and_leaves_no_process(tmp_path, server, capfd):
    before = wandb.find_wandb_services()
    specs = [{"kind": "wandb_logger", "params": {"project": "p", "mode": "offline"}, "placement": "inline"}]
    with EventBus(build_callbacks(specs)) as bus:
        wandb.publish_all(bus, Timeline(tmp_path).all_events())
    assert capfd.readouterr() == ("", "")
    assert server.request_count == 0
    assert wandb.find_wandb_services() <= before


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_the_environment_may_ask_for_less(tmp_path, server, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    one = wandb.Run(tmp_path, mode="online")
    one.start()
    one.step(0, loss=1.0)
    one.end()
    assert len(wandb.wandb_files_of(tmp_path)) == (mode == "offline")
    assert server.request_count == 0


def test_the_server_is_told_what_the_run_is_what_stands_for_it_and_its_predictions(run, server, login):
    run.logger = WandbLoggerCallback("p", mode="offline", max_pred_rows=2)
    run.start()
    run.step(7, loss=1.0)
    run.benchmark(3, predictions=[{"task_id": n, "output": "a|b"} for n in range(5)], accuracy=0.5)
    run.benchmark(None, "after training", accuracy=0.25)
    run.end()
    wandb.sync_files(run.file)
    [told, *_] = server.runs[wandb.run_id_of(run.file)]
    assert (told["project"], told["groupName"], told["jobType"]) == ("p", "arms", "train")
    assert (told["displayName"], told["notes"]) == ("run", "It learns.")
    assert json.loads(told["config"])["lr"] == {"value": 0.1}
    assert "secret" not in told["config"]
    rows = wandb.rows_in(run.file)
    assert server.summary["final/after training/accuracy"] == 0.25
    assert server.summary["train/loss"] == 1.0
    assert not any("final" in key for row in rows for key in row)
    [(step, row)] = wandb.metric_series(rows, "eval/tasks")["predictions"]
    table = json.loads(server.files[row["path"]])
    assert (step, row["_type"], row["nrows"]) == (3, "table-file", 2)
    assert (table["columns"], table["data"]) == (["task_id", "output"], [[0, "a|b"], [1, "a|b"]])
    assert table["caption"] == row["caption"] == "2 of 5 predictions"


def test_late_and_repeated_steps_are_all_kept(run):
    run.start()
    for step in (0, 1, 5, 2, 5, 3):
        run.step(step, loss=float(step))
    run.end()
    assert wandb.metric_series(wandb.rows_in(run.file), "train")["loss"] == [(n, float(n)) for n in (0, 1, 2, 3, 5, 5)]
