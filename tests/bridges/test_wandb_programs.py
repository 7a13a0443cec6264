"""Programs that are written for W&B's client, with the bridge's module in its place."""

import argparse
import json
import os
from datetime import timedelta

import numpy as np
import pytest

from evsys_adapters.bridges import wandb
from evsys_bus import Alert, ConfigUpdate, Content, Eval, RunEnd, RunStart, Summary, TrainStart, read
from support.journals import events_of, rows_of

OPTIONS = {"environment": False, "output": False}


@pytest.fixture
def init(tmp_path):
    def init(**options):
        return wandb.init(**{"project": "p", "name": "n", "dir": tmp_path, **OPTIONS, **options})

    yield init
    wandb.finish()


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "p" / "n"


def content_of(run_dir):
    return [(each.item.kind, each.item.name, each.step_idx) for each in events_of(run_dir, Content)]


def test_each_call_without_a_step_is_a_step(init, run_dir):
    with init():
        wandb.log({"loss": 1.0})
        wandb.log({"loss": 0.5}, commit=False)
        wandb.log({"acc": 0.1})
        wandb.log({"loss": 0.2})
    assert rows_of(run_dir) == [(0, {"loss": 1.0}), (1, {"loss": 0.5, "acc": 0.1}), (2, {"loss": 0.2})]


def test_a_step_collects_until_it_advances(init, run_dir):
    with init() as run:
        wandb.log({"loss": 1.0}, step=3)
        wandb.log({"acc": 0.1}, step=3)
        assert rows_of(run_dir) == []
        wandb.log({"loss": 0.5}, step=5, commit=True)
        assert run.step == 6
        wandb.log({"loss": 0.2})
    assert rows_of(run_dir) == [(3, {"loss": 1.0, "acc": 0.1}), (5, {"loss": 0.5}), (6, {"loss": 0.2})]


def test_a_step_that_goes_back_is_a_late_row(init, run_dir):
    with init() as run:
        wandb.log({"loss": 1.0}, step=3)
        wandb.log({"lag": 1.0}, step=1)
        wandb.log({"acc": 0.1}, step=3)
        assert run.step == 3
    assert rows_of(run_dir) == [(1, {"lag": 1.0}), (3, {"loss": 1.0, "acc": 0.1})]


def test_an_eval_completes_the_row_that_is_collected(init, run_dir):
    with init():
        wandb.log({"loss": 1.0}, commit=False)
        wandb.log({"val/acc": 0.5})
        assert rows_of(run_dir) == [(0, {"loss": 1.0})]
        wandb.log({"loss": 0.5})
    assert rows_of(run_dir)[1:] == [(1, {"loss": 0.5})]


def test_metrics_of_an_eval_that_come_one_by_one_are_one_eval(init, run_dir):
    with init():
        wandb.log({"val/acc": 0.5}, step=2)
        wandb.log({"val/loss": 1.5}, step=2)
        wandb.log({"val/loss": 1.0}, step=3)
    assert [(each.step_idx, each.metrics) for each in events_of(run_dir, Eval)] == [
        (2, {"acc": 0.5}),
        (2, {"acc": 0.5, "loss": 1.5}),
        (3, {"loss": 1.0}),
    ]


def test_the_axis_of_a_metric_is_recorded_beside_an_eval(init, run_dir):
    with init():
        wandb.define_metric("val/*", step_metric="epoch")
        wandb.log({"val/acc": 0.5, "epoch": 1})
        wandb.log({"val/acc": 0.6, "epoch": 2})
    assert rows_of(run_dir) == [(0, {"epoch": 1}), (1, {"epoch": 2})]


def test_nested_names_are_joined_and_numbers_of_any_type_are_numbers(init, run_dir):
    with init():
        wandb.log({"opt": {"lr": np.float32(0.5), "adam": {"beta": np.array([0.9])}}, "ok": True, "note": "text"})
    assert rows_of(run_dir) == [(0, {"opt/lr": 0.5, "opt/adam/beta": 0.9, "ok": True, "note": "text"})]


def test_config_is_of_any_type_and_may_change(init, run_dir):
    config = argparse.Namespace(lr=0.1, layers=[1, 2])
    with init(config=config, group="g", job_type="train", tags="a1", notes="why") as run:
        assert run.config.lr == wandb.config["lr"] == 0.1
        wandb.config.update(argparse.Namespace(wd=1), allow_val_change=True)
        wandb.config.batch = 8
        wandb.config.setdefaults({"batch": 9, "seed": 1})
        assert dict(wandb.config) == {"lr": 0.1, "layers": [1, 2], "wd": 1, "batch": 8, "seed": 1}
        assert (run.tags, run.notes, run.group, run.job_type) == (("a1",), "why", "g", "train")
    recorded = events_of(run_dir, RunStart)[0].ctx.run_config
    assert recorded == {"lr": 0.1, "layers": [1, 2], "wandb": {"project": "p", "group": "g", "job_type": "train"}}
    assert [each.config for each in events_of(run_dir, ConfigUpdate)] == [{"wd": 1}, {"batch": 8}, {"seed": 1}]


def test_the_summary_has_the_last_values_and_what_is_set(init, run_dir):
    with init() as run:
        wandb.log({"loss": 0.5})
        assert wandb.summary["loss"] == 0.5
        run.summary["best"] = np.float64(0.1)
        run.summary.update({"n": 2})
    assert [each.values for each in events_of(run_dir, Summary)] == [{"best": 0.1}, {"n": 2}]


def test_pictures_tables_and_sounds_are_content_of_their_step(init, run_dir):
    frame = np.zeros((4, 4, 3), np.uint8)
    table = wandb.Table(columns=["text", "image"])
    table.add_data("a", wandb.Image(frame))
    with init() as run:
        wandb.log({"image": wandb.Image(frame, caption="c"), "loss": 1.0})
        wandb.log({"images": [wandb.Image(np.full((4, 4), 0.5)), wandb.Image(np.full((3, 4, 4), -0.5))]})
        wandb.log({"table": table, "html": wandb.Html("<b>x</b>"), "histogram": wandb.Histogram([1, 2, 3])})
        wandb.log({"counted": wandb.Histogram(np_histogram=np.histogram([1, 2, 3])), "array": np.arange(100.0)})
        wandb.log({"audio": wandb.Audio(np.zeros(10), sample_rate=8000)})
        wandb.log({"video": wandb.Video(np.zeros((2, 3, 4, 4), np.uint8), fps=2)})
        assert run.bridge.failures == 0
    assert content_of(run_dir) == [
        ("image", "image", 0),
        ("image", "images/0", 1),
        ("image", "images/1", 1),
        ("image", "table/image", 2),
        ("table", "table", 2),
        ("html", "html", 2),
        ("histogram", "histogram", 2),
        ("histogram", "array", 3),
        ("histogram", "counted", 3),
        ("audio", "audio", 4),
        ("video", "video", 5),
    ]


def test_a_picture_is_that_of_the_moment_it_was_made(init, run_dir):
    frame = np.zeros((4, 4, 3), np.uint8)
    images = [wandb.Image(frame)]
    frame[:] = 255
    images.append(wandb.Image(frame))
    with init():
        wandb.log({"frames": images})
    first, second = (each.item.digest for each in events_of(run_dir, Content))
    assert first != second


def test_an_artifact_has_its_files_and_metadata(init, run_dir, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    artifact = wandb.Artifact("ds", type="dataset", metadata={"n": 1})
    artifact.add_dir(str(tmp_path / "data"), name="raw")
    with artifact.new_file("notes/b.txt") as file:
        file.write("b")
    with init() as run:
        run.log_artifact(artifact, aliases=["latest"]).wait()
        wandb.log_artifact(tmp_path / "data" / "a.txt", name="one", type="file")
        assert wandb.save(str(tmp_path / "data" / "*"), base_path=str(tmp_path)) == [str(tmp_path / "data" / "a.txt")]
    items = [each.item for each in events_of(run_dir, Content)]
    assert [(each.name, each.artifact_type) for each in items] == [
        ("ds", "dataset"),
        ("one", "file"),
        ("data/a.txt", "file"),
    ]
    manifest = json.loads((run_dir / items[0].path / "manifest.json").read_text())
    assert {"raw/a.txt", "notes/b.txt"} <= {each["path"] for each in manifest["files"]}
    assert read(run_dir).summary["artifact/ds"] == {"metadata": {"n": 1}, "aliases": ["latest"]}


def test_alerts_of_one_title_are_rare(init, run_dir):
    with init():
        wandb.alert("lag", "x", level=wandb.AlertLevel.WARN)
        wandb.alert("lag", "y", level="ERROR", wait_duration=timedelta(minutes=1))
        wandb.alert("lag", "z", level="ERROR", wait_duration=0)
    assert [(each.text, each.level) for each in events_of(run_dir, Alert)] == [("x", "warning"), ("z", "error")]


def test_watch_says_once_that_it_does_nothing(init, caplog):
    with init() as run:
        wandb.watch(object(), log="all")
        run.watch(object())
        run.unwatch()
    assert sum("bridge.not_carried" in each.getMessage() for each in caplog.records) == 1


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (wandb.finish, "completed"),
        (lambda: wandb.finish(exit_code=3), "failed"),
        (lambda: wandb.run.__exit__(None, ValueError("nan"), None), "failed"),
        (lambda: wandb.run.__exit__(None, KeyboardInterrupt(), None), "cancelled"),
    ],
)
def test_a_run_ends_as_the_program_says(init, run_dir, end, status):
    init()
    end()
    assert wandb.run is None
    assert [each.run_result.status for each in events_of(run_dir, RunEnd)] == [status]


def test_an_open_run_is_returned_unless_another_is_requested(init):
    first = init()
    assert init(name="other") is first
    second = init(name="other", reinit=True)
    assert (wandb.run, first.bridge.run) == (second, None)
    third = init(name="third", reinit="create_new")
    third.log({"x": 1})
    assert wandb.run is second
    third.finish()


def test_a_disabled_run_writes_nothing(init, run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with init(config={"lr": 1}) as run:
        wandb.log({"loss": 1.0})
        wandb.log({"image": wandb.Image(np.zeros((4, 4)))})
        wandb.summary["best"] = 1
        assert wandb.config.lr == 1
        assert run.disabled
    assert not run_dir.exists()


def test_settings_and_variables_name_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-env")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with wandb.init(settings=wandb.Settings(run_name="a/b", run_tags=["x"]), **OPTIONS) as run:
        assert (run.name, run.project, run.tags) == ("a/b", "from-env", ("x",))
    assert (tmp_path / "from-env" / "a-b" / "run.json").exists()


def test_what_is_not_there_is_an_error_that_names_what_is(init):
    with pytest.raises(AttributeError, match=r"no 'Api'; it has AlertLevel, Artifact.* watch"):
        wandb.Api  # noqa: B018
    with init() as run, pytest.raises(AttributeError, match=r"no 'use_artifact'; it has alert.* watch"):
        run.use_artifact("x")
    assert set(wandb.__all__) == set(dir(wandb))
    assert wandb.login() is True
    with pytest.raises(wandb.Error, match=r"wandb\.init"):
        wandb.log({})


def test_nothing_raises_into_the_training(init, caplog):
    with init() as run:
        wandb.log({"video": wandb.Video(np.zeros((1,)))})
        wandb.log({"loss": 1.0}, step="two")
        wandb.save("/nowhere/*")
        run.log_artifact("/nowhere")
        assert run.bridge.failures == 3
    assert sum("bridge.failed" in each.getMessage() for each in caplog.records) == 1


def test_a_forked_worker_writes_nothing(init, run_dir):
    init()
    wandb.log({"loss": 1.0})
    child = os.fork()
    if not child:
        wandb.log({"loss": 2.0})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    wandb.log({"loss": 0.5})
    wandb.finish()
    assert rows_of(run_dir) == [(0, {"loss": 1.0}), (1, {"loss": 0.5})]


def test_a_run_that_was_not_complete_goes_on_behind_its_rows_if_it_is_resumed(init, run_dir):
    for resume in (None, "allow"):
        init(resume=resume)
        for _ in range(3):
            wandb.log({"loss": 1.0})
        assert wandb.run.resumed == (resume is not None)
        wandb.finish(exit_code=1)
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [0, 3]
    assert [step for step, _ in rows_of(run_dir)] == [0, 1, 2, 3, 4, 5]


def test_content_before_the_first_row_of_a_resumed_program_removes_nothing(init, run_dir):
    for first in (0, 2):
        init()
        wandb.log({"info": wandb.Html("x")})
        for step in range(first, 4):
            wandb.log({"loss": step}, step=step)
        wandb.finish(exit_code=1)
    assert [*read(run_dir).metrics["loss"].steps] == [0, 1, 2, 3]
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [0, 4, 2]
