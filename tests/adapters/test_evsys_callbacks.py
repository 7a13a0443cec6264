"""Moving from EvSys' loop: its callbacks run on a bus, and ours run in a loop with states and contexts of its own."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evsys_adapters import callbacks
from evsys_adapters.callbacks import (
    Callback,
    CsvMetricsCallback,
    DebugLoggerCallback,
    EarlyStoppingCallback,
    EvsysLoggerCallback,
    LocalLoggerCallback,
    LogContext,
    PrintProgressCallback,
    TensorBoardLoggerCallback,
    WandbLoggerCallback,
    build_callbacks,
    dispatch,
)
from evsys_bus import (
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    Eval,
    EvalResult,
    EventBus,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    GroupStart,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Rollout,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainData,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from support.programs import run_python

REFERENCE_NAMES = {
    "Callback",
    "CsvMetricsCallback",
    "EarlyStoppingCallback",
    "DebugLoggerCallback",
    "EvsysLoggerCallback",
    "LocalLoggerCallback",
    "LogContext",
    "LoopState",
    "PrintProgressCallback",
    "TensorBoardLoggerCallback",
    "WandbLoggerCallback",
    "build_callbacks",
    "dispatch",
}


class WrittenForTheReference(Callback):
    """Every hook, as the reference's loop calls it; reads attributes only."""

    def __init__(self):
        self.calls = []

    def on_experiment_start(self, ctx):
        ctx.ids["experiment_id"] = "e1"
        self.calls.append(("experiment_start", str(ctx.output_dir)))

    def on_group_start(self, ctx, group_name):
        ctx.ids[f"group:{group_name}"] = "g1"
        self.calls.append(("group_start", group_name))

    def on_run_start(self, ctx):
        ctx.ids["run_id"] = "r1"
        self.calls.append(("run_start", ctx.run_key, ctx.run_config["lr"]))

    def on_train_data(self, ctx, rows):
        self.calls.append(("train_data", ctx.run_key, len(rows)))

    def on_train_start(self, state):
        self.calls.append(("train_start", state.step, state.num_steps))

    def on_rollout(self, state, step_idx, rollouts, rollout_items=()):
        self.calls.append(("rollout", step_idx, [each["reward"] for each in rollouts], list(rollout_items)))

    def on_step_end(self, state, step_idx, batch, metrics):
        metrics["derived"] = metrics["loss"] * 2
        self.calls.append(("step_end", step_idx, len(batch.rollouts), list(batch.rollout_items), metrics["loss"]))

    def on_checkpoint(self, state, row):
        self.calls.append(("checkpoint", row.name, row.batch))

    def on_eval(self, state, step_idx, eval_name, metrics):
        state.request_stop()
        self.calls.append(("eval", step_idx, eval_name, metrics["acc"]))

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.calls.append(("benchmark_eval", eval_result.name, len(predictions), step))

    def on_train_end(self, state, artifacts):
        self.calls.append(("train_end", artifacts.as_dict()["total_requested_steps"]))

    def on_run_end(self, ctx, run_result, arm):
        self.calls.append(("run_end", run_result.status, arm.eval("math").metrics, arm.score("acc")))

    def on_experiment_end(self, ctx, result):
        self.calls.append(("experiment_end", result.status))


EXPECTED_CALLS = [
    "experiment_start",
    "group_start",
    "run_start",
    "train_data",
    "train_start",
    "rollout",
    "step_end",
    "checkpoint",
    "eval",
    "benchmark_eval",
    "train_end",
    "run_end",
    "experiment_end",
]


def values(folder):
    """The values of one small experiment, of our classes."""
    ctx = LogContext(output_dir=folder, run_key="arm", run_config={"lr": 0.1}, group_name="g")
    state = LoopState(step=0, num_steps=3, output_dir=folder / "arm", ctx=ctx)
    evaluated = EvalResult("math", metrics={"acc": 0.5})
    arm = ArmResult("arm", evals=[evaluated], eval_metrics={"acc": 0.5})
    return ctx, state, evaluated, arm


def test_the_module_has_the_names_of_the_reference():
    assert set(callbacks.__all__) >= REFERENCE_NAMES
    assert all(getattr(callbacks, name) is not None for name in callbacks.__all__)
    assert callbacks.logger.name == "evsys_adapters.callbacks"


def test_importing_the_module_imports_no_vendor():
    source = "import sys, evsys_adapters.callbacks; print([m for m in ('wandb', 'tensorboardX') if m in sys.modules])"
    assert run_python(source).stdout == "[]\n", sys.executable


def test_a_callback_for_the_references_loop_runs_unchanged_on_a_bus(tmp_path):
    callback = WrittenForTheReference()
    ctx, state, evaluated, arm = values(tmp_path)
    batch = TrainingBatch(rollouts=[{"reward": 1.0}], rollout_items=["task-1"])
    with EventBus([callback], journal=tmp_path / "journal") as bus:
        bus.publish(ExperimentStart(ctx))
        bus.publish(GroupStart(ctx, "g"))
        bus.publish(RunStart(ctx))
        bus.publish(TrainData(ctx, [{"text": "a"}, {"text": "b"}]))
        bus.publish(TrainStart(state))
        bus.publish(Rollout(state, 0, [{"reward": 1.0}], ["task-1"]))
        bus.publish(StepEnd(state, 0, batch, {"loss": 1.0}))
        bus.publish(Checkpoint(state, ManifestRow("step-0")))
        bus.publish(Eval(state, 0, "val", {"acc": 0.5}))
        bus.publish(BenchmarkEval(ctx, evaluated, [{"task_id": "t"}], step=0))
        bus.publish(TrainEnd(state, LoopArtifacts(total_requested_steps=3)))
        bus.publish(RunEnd(ctx, RunResult(), arm))
        bus.publish(ExperimentEnd(ctx, ExperimentResult("e")))
    assert [call[0] for call in callback.calls] == EXPECTED_CALLS
    assert callback.calls[5:7] == [("rollout", 0, [1.0], ["task-1"]), ("step_end", 0, 1, ["task-1"], 1.0)]
    assert callback.calls[-2] == ("run_end", "completed", {"acc": 0.5}, 0.5)
    assert state.stop_requested
    assert ctx.ids == {"experiment_id": "e1", "group:g": "g1", "run_id": "r1"}


class HostObject(SimpleNamespace):
    """An object of a loop that knows none of our classes."""

    def request_stop(self, reason=None):
        self.stop_requested = True


def run_host_loop(chosen, folder):
    """The reference's loop in outline, which hands out objects of its own and calls hooks with `dispatch`."""
    ctx = HostObject(
        output_dir=folder,
        config=HostObject(name="e", metadata={"hypothesis": "it works"}),
        store=None,
        run_key="arm",
        run_config={"lr": 0.1},
        group_name=None,
        ids={},
        extras={},
    )
    state = HostObject(
        step=0,
        num_steps=4,
        output_dir=folder / "arm",
        backend=None,
        log_store=None,
        checkpoint_mgr=None,
        stop_requested=False,
        ctx=ctx,
    )
    (folder / "arm").mkdir(parents=True)
    dispatch(chosen, "on_experiment_start", ctx)
    dispatch(chosen, "on_run_start", ctx)
    dispatch(chosen, "on_train_data", ctx, [{"text": "a"}])
    dispatch(chosen, "on_train_start", state)
    for step in range(state.num_steps):
        state.step = step
        batch = HostObject(data=[1], loss_fn="ce", loss_fn_config=None, metrics={}, rollouts=[{"reward": 1.0}])
        dispatch(chosen, "on_rollout", state, step, [{"reward": 1.0}], rollout_items=["t"])
        dispatch(chosen, "on_step_end", state, step, batch, {"loss": 1.0 / (step + 1)})
        dispatch(chosen, "on_eval", state, step, "val", {"acc": 0.5})
        if state.stop_requested:
            break
    dispatch(chosen, "on_checkpoint", state, HostObject(name="final", batch=step, epoch=0, state_path=None))
    result = HostObject(name="math", benchmark_id=None, metrics={"acc": 0.5}, breakdowns={}, tags=["val"], step=None)
    dispatch(chosen, "on_benchmark_eval", ctx, result, [{"task_id": "t", "reward": 1.0}], step=None)
    dispatch(chosen, "on_train_end", state, HostObject(run_dir=str(folder / "arm"), checkpoints=[]))
    arm = HostObject(name="arm", status="completed", metrics={}, eval_metrics={}, evals=[], error=None)
    dispatch(chosen, "on_run_end", ctx, HostObject(run_id=None, status="completed", metrics={}, error=None), arm)
    dispatch(chosen, "on_experiment_end", ctx, HostObject(name="e", status="completed", arms=[], conclusion="yes"))
    return state


def test_our_callbacks_run_in_a_loop_with_objects_of_its_own(tmp_path, capsys, caplog):
    chosen = build_callbacks(
        [
            {"kind": "print_progress", "params": {}},
            {"kind": "csv_metrics", "params": {"out_path": str(tmp_path / "metrics.csv")}},
            {"kind": "early_stopping", "params": {"metric": "acc", "patience": 2}},
            {"kind": "debug_logger", "params": {}},
            {"kind": "local_logger", "params": {}},
        ]
    )
    state = run_host_loop(chosen, tmp_path / "e")
    assert state.stop_requested
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    logs = tmp_path / "e" / "arm" / "logs"
    rows = [json.loads(line) for line in (logs / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (logs / "conclusion.md").exists()
    assert re.search(r"loss", capsys.readouterr().out)
    assert not [each for each in caplog.records if "failed" in each.getMessage()]


def test_our_file_loggers_run_in_a_loop_with_objects_of_its_own(tmp_path, caplog):
    chosen = [WandbLoggerCallback(mode="offline"), TensorBoardLoggerCallback()]
    run_host_loop(chosen, tmp_path / "e")
    for each in chosen:
        each.close()
    assert [*(tmp_path / "e").rglob("*.wandb")]
    assert [*(tmp_path / "e").rglob("events.out.tfevents.*")]
    assert not [each for each in caplog.records if "failed" in each.getMessage()]


@pytest.mark.parametrize(
    "kind", [PrintProgressCallback, CsvMetricsCallback, EarlyStoppingCallback, DebugLoggerCallback, LocalLoggerCallback]
)
def test_a_built_in_can_be_subclassed_as_in_the_reference(kind):
    assert issubclass(kind, Callback)
    assert kind.name
    assert kind.Config


def test_the_logger_of_evsys_takes_no_argument():
    assert isinstance(EvsysLoggerCallback(), Callback)


def test_a_project_of_wandb_is_named_after_the_experiment_and_said_once(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    callback = WandbLoggerCallback(mode="offline")
    for key in ("a", "b"):
        ctx = LogContext(output_dir=tmp_path / "my:experiment", run_key=key)
        callback.on_run_start(ctx)
        callback.on_run_end(ctx, RunResult(), ArmResult(key))
    callback.close()
    said = [each.getMessage() for each in caplog.records if "wandb.project" in each.getMessage()]
    assert len(said) == 1
    assert "my-experiment" in said[0]


def test_artifacts_are_plain_data_and_an_arm_finds_its_evals():
    artifacts = LoopArtifacts("run", checkpoints=[ManifestRow("final", 3)], total_requested_steps=4)
    assert json.loads(json.dumps(artifacts.as_dict()))["checkpoints"][0]["name"] == "final"
    evals = [EvalResult("math", metrics={"acc": n}, step=step) for n, step in ((1.0, 3), (2.0, None), (3.0, 7))]
    arm = ArmResult("arm", metrics={"loss": 0.1, "acc": 0.2}, eval_metrics={"acc": 2.0}, evals=evals)
    assert arm.eval("math") is evals[1]
    assert arm.eval("code") is None
    assert (arm.score("acc"), arm.score("loss"), arm.score("f1")) == (2.0, 0.1, None)


def test_a_hook_may_log_metrics_to_the_log_store(tmp_path):
    from evsys_bus.run_files import RowFile

    state = LoopState(step=0, num_steps=1, output_dir=tmp_path, log_store=RowFile(tmp_path / "metrics.jsonl"))
    state.log_store.log_metrics(3, {"loss": 1.0, "step": 9})
    state.log_store.flush()
    assert json.loads(Path(tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 1.0}
