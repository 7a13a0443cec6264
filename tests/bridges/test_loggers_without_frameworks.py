"""The writers and loggers that need no framework; and programs with them that are killed and started again."""

import itertools
import pickle
import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from omegaconf import OmegaConf

from benchmarks.frameworks import steps_in_csv, steps_in_journal
from evsys_adapters import CsvMetricsCallback, TensorBoardLoggerCallback
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.bridges.tensorboard import SummaryWriter
from evsys_adapters.bridges.tinker_cookbook import EvsysBusLogger as TinkerLogger
from evsys_adapters.bridges.torchtune import EvsysBusLogger as TorchtuneLogger
from evsys_bus import Content, Eval, RunEnd, TrainStart, build_callbacks, read
from support.journals import events_of, rows_of

OPTIONS = {"environment": False, "output": False}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def writer(run_dir):
    with SummaryWriter(run_dir, **OPTIONS) as writer:
        yield writer


def test_the_tags_of_a_step_are_one_row_in_every_form_of_the_call(writer, run_dir):
    writer.add_scalar("loss", np.float32(0.5), 0)
    writer.add_scalar("acc", 0.1, global_step=np.int64(0), walltime=1.0, new_style=True)
    writer.add_scalars("lr", {"a": 1, "b": np.array([2.0])}, 0)
    writer.add_scalar(tag="Reward / Total", value=3.0, timestep=1)
    writer.close()
    assert rows_of(run_dir) == [
        (0, {"loss": 0.5, "acc": 0.1, "lr/a": 1, "lr/b": 2.0}),
        (1, {"Reward / Total": 3.0}),
    ]


def test_tags_of_an_eval_are_one_eval_a_step(writer, run_dir):
    writer.add_scalar("val/loss", 0.5, 3)
    writer.add_scalar("val/acc", 0.1, 3)
    writer.add_scalar("val/acc", 0.2, 4)
    assert [(each.step_idx, each.metrics) for each in events_of(run_dir, Eval)] == [
        (3, {"loss": 0.5}),
        (3, {"loss": 0.5, "acc": 0.1}),
        (4, {"acc": 0.2}),
    ]


def test_values_without_a_step_are_counted_by_tag(writer, run_dir):
    for value in range(2):
        writer.add_scalar("loss", value)
        writer.add_scalar("acc", -value)
    writer.close()
    assert rows_of(run_dir) == [(0, {"loss": 0, "acc": 0}), (1, {"loss": 1, "acc": -1})]


def test_pictures_sounds_texts_and_histograms_are_content(writer, run_dir):
    writer.add_text("text", "t", 1)
    writer.add_image("chw", np.full((3, 4, 5), 0.5), 1)
    writer.add_image("hwc", np.zeros((4, 5, 3), np.uint8), 1, dataformats="HWC")
    writer.add_image("hw", np.full((4, 5), 2.0), 1)
    writer.add_images("grid", np.zeros((9, 3, 4, 5)), 1)
    writer.add_video("video", np.zeros((1, 2, 3, 4, 4)), 1)
    writer.add_audio("audio", np.zeros((1, 10)), 1, sample_rate=8000)
    writer.add_histogram("histogram", np.arange(10), 1, bins="auto")
    writer.add_histogram_raw("raw", 0.5, 2.5, 3, 4, 6, [0.0, 1.0, 2.0, float("inf")], [0, 1, 1, 1], 1)
    assert writer.bridge.failures == 0
    items = {each.item.name: each.item for each in events_of(run_dir, Content)}
    assert {name: item.data for name, item in items.items() if item.kind == "image"} == {
        "chw": {"width": 5, "height": 4},
        "hwc": {"width": 5, "height": 4},
        "hw": {"width": 5, "height": 4},
        "grid": {"width": 40, "height": 8},
    }
    assert items["raw"].data == {"edges": [0.5, 1.0, 2.0, 2.5], "counts": [1, 1, 1]}
    assert {"text", "video", "audio", "histogram"} < items.keys()


def test_the_raw_histogram_of_tensorboard_fits(writer, run_dir):
    limits = [*itertools.accumulate(itertools.repeat(1.1, 1500), lambda a, b: a * b, initial=1e-12)]
    writer.add_histogram_raw("h", 0.0, 1e50, 1500, 0, 0, limits, [1] * len(limits))
    data = events_of(run_dir, Content)[0].item.data
    assert sum(data["counts"]) == len(limits)
    assert len(data["edges"]) == len(data["counts"]) + 1 <= 513


def test_hyperparameters_are_config_and_results_are_summary(writer, run_dir):
    writer.add_hparams({"lr": 0.1, "net": "mlp"}, {"hparam/acc": 0.9})
    writer.close()
    run = read(run_dir)
    assert (run.config, run.summary) == ({"lr": 0.1, "net": "mlp"}, {"hparam/acc": 0.9})


def test_what_is_not_carried_is_said_once(writer, caplog):
    for _ in range(2):
        writer.add_graph(object(), verbose=True)
        writer.add_embedding(np.zeros((2, 2)), metadata=["a", "b"])
        writer.add_mesh("m", None)
        writer.add_pr_curve("pr", None, None, 0)
    assert sum("bridge.not_carried" in each.getMessage() for each in caplog.records) == 4


def test_a_writer_never_raises_and_may_be_off(run_dir, tmp_path):
    with SummaryWriter(tmp_path / "off", write_to_disk=False, **OPTIONS) as off:
        off.add_scalar("loss", 1.0, 0)
    assert not (tmp_path / "off").exists()
    with SummaryWriter(logdir=run_dir, **OPTIONS) as writer:
        assert writer.log_dir == writer.get_logdir() == str(run_dir)
        writer.add_scalar("loss", object(), "x")
        writer.add_figure("figure", object(), 1)
        writer.flush()
        assert writer.bridge.failures == 2


def test_purge_step_replaces_the_rows_from_there_on(run_dir):
    for first, purge in ((0, None), (2, 2)):
        writer = SummaryWriter(run_dir, purge_step=purge, **OPTIONS)
        writer.add_text("settings", "x", 0)
        for step in range(first, 4):
            writer.add_scalar("loss", step, step)
        writer.bridge.finish(ValueError("nan"))
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [0, 2]


def test_the_logger_of_tinker_cookbook_writes_a_run(run_dir):
    @dataclass
    class Config:
        lr: float = 0.1

    logger = TinkerLogger(run_dir, **OPTIONS)
    logger.log_hparams(Config())
    logger.log_metrics({"loss": 1.0, "test/acc": 0.5}, step=0)
    logger.log_metrics({"time/step": 2.0}, step=0)
    logger.log_metrics({"loss": 0.5})
    logger.log_long_text("rollout", "long")
    logger.sync()
    assert logger.get_logger_url() == run_dir.as_uri()
    logger.close()
    assert rows_of(run_dir) == [(0, {"loss": 1.0, "time/step": 2.0}), (1, {"loss": 0.5})]
    assert read(run_dir).config == {"lr": 0.1}
    assert [each.metrics for each in events_of(run_dir, Eval)] == [{"acc": 0.5}]
    assert [each.item.name for each in events_of(run_dir, Content)] == ["rollout"]


def test_the_logger_of_torchtune_writes_a_run(run_dir):
    logger = TorchtuneLogger(log_dir=run_dir, **OPTIONS)
    logger.log_config(OmegaConf.create({"model": {"lora": 8}, "rank": "${model.lora}"}))
    logger.log("loss", np.array(1.0), 1)
    logger.log_dict({"lr": np.float32(0.5), "tokens": 10}, step=1)
    logger.close()
    assert rows_of(run_dir) == [(1, {"loss": 1.0, "lr": 0.5, "tokens": 10})]
    assert read(run_dir).config == {"model": {"lora": 8}, "rank": 8}
    assert [each.run_result.status for each in events_of(run_dir, RunEnd)] == ["completed"]


PROGRAMS = {
    "wandb": """
        import evsys_adapters.bridges.wandb as wandb
        wandb.init(project="p", path="run", callbacks=callbacks, environment=False, output=False)
        def log(step):
            wandb.log({"loss": 1.0}, step=step)
            wandb.log({"acc": 0.5, "val/acc": 0.1}, step=step)
    """,
    "wandb_without_steps": """
        import evsys_adapters.bridges.wandb as wandb
        wandb.init(project="p", path="run", callbacks=callbacks, environment=False, output=False)
        first = 0
        def log(step):
            wandb.log({"loss": 1.0}, commit=False)
            wandb.log({"acc": 0.5})
    """,
    "tensorboard": """
        from evsys_adapters.bridges.tensorboard import SummaryWriter
        writer = SummaryWriter("run", callbacks=callbacks, environment=False, output=False)
        writer.add_text("settings", "lr = 0.1")
        def log(step):
            writer.add_scalar("loss", 1.0, step)
            writer.add_scalar("acc", 0.5, step)
            writer.add_scalar("val/acc", 0.1, step)
    """,
    "tinker_cookbook": """
        from evsys_adapters.bridges.tinker_cookbook import EvsysBusLogger
        logger = EvsysBusLogger("run", callbacks=callbacks, environment=False, output=False)
        logger.log_hparams({"lr": 0.1})
        logger.log_long_text("prompt", "text")
        def log(step):
            logger.log_metrics({"loss": 1.0}, step)
            logger.log_metrics({"acc": 0.5}, step)
    """,
    "torchtune": """
        from evsys_adapters.bridges.torchtune import EvsysBusLogger
        logger = EvsysBusLogger("run", callbacks=callbacks, environment=False, output=False)
        def log(step):
            logger.log_dict({"loss": 1.0, "acc": 0.5}, step)
    """,
}
KILLED = """
        import json, os, sys
        from pathlib import Path
        from benchmarks.framework_trainings import Killer
        from evsys_bus import build_callbacks
        kill_at = int(sys.argv[1])
        table = {"kind": "csv_metrics", "params": {"out_path": "{run_dir}/metrics.csv"}, "placement": "follow"}
        callbacks = [Killer(kill_at or None), *build_callbacks([table])]
        checkpoint = Path("checkpoint")
        first = int(checkpoint.read_text()) if checkpoint.exists() else 0
"""
LOOP = """
        for step in range(first, 20):
            log(step)
            if step % 5 == 4:
                checkpoint.write_text(str(step + 1))
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_killed_and_started_again_is_one_run_with_each_step_once(name, program, tmp_path):
    kill_at = random.Random().randrange(1, 20)
    killed = program(KILLED + PROGRAMS[name] + LOOP, str(kill_at))
    _, err = killed.communicate(timeout=20)
    assert killed.returncode == -9, err
    again = program(KILLED + PROGRAMS[name] + LOOP, "0")
    _, err = again.communicate(timeout=20)
    assert again.returncode == 0, err
    assert "bridge.failed" not in err
    run = tmp_path / "run"
    assert steps_in_journal(run) == steps_in_csv(run) == [*range(20)], f"killed at row {kill_at}"
    assert {"acc", "loss"} <= read(run).metrics.keys()
    assert [*read(run).metrics["acc"].steps] == [*range(20)]
    assert read(run).state == "completed"
    assert not run.with_name("run-2").exists()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", "completed"),
        ("sys.exit(0)", "completed"),
        ("sys.exit(3)", "failed"),
        ("sys.exit('no data')", "failed"),
        ("raise ValueError('nan')", "failed"),
        ("raise KeyboardInterrupt", "cancelled"),
        ("os.kill(os.getpid(), 15)", "cancelled"),
    ],
)
def test_a_program_that_never_closes_its_writer_ends_its_run(end, status, program, tmp_path):
    done = program(f"""
        import os, sys
        from evsys_adapters.bridges.tensorboard import SummaryWriter
        writer = SummaryWriter("run", environment=False, output=False)
        writer.add_scalar("loss", 1.0, 0)
        {end}
    """)
    _, err = done.communicate(timeout=20)
    assert [each.run_result.status for each in events_of(tmp_path / "run", RunEnd)] == [status], err
    assert "never_left" not in err


@pytest.mark.parametrize("module", ["wandb", "tensorboard", "tinker_cookbook", "torchtune"])
def test_a_bridge_imports_no_framework(module, program):
    names = ("torch", "tensorboardX", "wandb", "numpy", "tinker_cookbook", "torchtune", "omegaconf")
    done = program(
        f"import sys, evsys_adapters.bridges.{module}\nprint([each for each in {names} if each in sys.modules])"
    )
    assert done.communicate(timeout=20)[0].strip() == "[]", sys.executable


def test_a_pickled_or_copied_bridge_has_callbacks_of_the_same_arguments(run_dir, tmp_path):
    spec = {"kind": "csv_metrics", "params": {"out_path": "{run_dir}/followed.csv"}, "placement": "follow"}
    loggers = [CsvMetricsCallback("{run_dir}/m.csv", delimiter=";"), TensorBoardLoggerCallback()]
    bridge = StepBridge(run_dir, callbacks=[*loggers, *build_callbacks([spec])], **OPTIONS)
    bridge.log({"loss": 1.0}, 0)
    other = pickle.loads(pickle.dumps(bridge)).copy_for(tmp_path / "other")
    bridge.complete()
    other.log({"loss": 0.5}, 3)
    bus = other.run.bus
    other.complete()
    assert (run_dir / "m.csv").read_text() == "step;loss\n0;1.0\n"
    assert (tmp_path / "other" / "m.csv").read_text() == "step;loss\n3;0.5\n"
    assert (tmp_path / "other" / "followed.csv").read_text() == "step,loss\n3,0.5\n"
    assert {each.name for each in bus.receipt.deliveries} == {"csv_metrics", "tensorboard_logger"}
