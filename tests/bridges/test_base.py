"""What all bridges share: ranks, forks, repeated starts, late config, errors. The frameworks' own trainers are in
test_frameworks.py."""

import json
import os
import pickle

import pytest

from evsys_adapters.bridges import RunBridge, isolated
from evsys_bus import Checkpoint, ConfigUpdate, Eval, EvsysBusError, RunEnd, RunStart, StepEnd, TrainStart
from support.journals import events_of
from support.programs import run_python

OPTIONS = {"environment": False, "output": False}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def bridge(run_dir):
    bridge = RunBridge(run_dir, **OPTIONS)
    yield bridge
    bridge.finish()


class Hook:
    """A framework's callback, reduced to one hook."""

    def __init__(self, bridge):
        self.bridge = bridge

    @isolated
    def on_log(self, metrics, step):
        self.bridge.log(metrics, step)
        return "logged"


def status_of(run_dir):
    return json.loads((run_dir / "run.json").read_text())["status"]


def test_a_training_is_a_run_with_its_config_rows_evals_and_checkpoints(bridge, run_dir, tmp_path):
    bridge.start(0, config={"lr": 0.1}, num_steps=2)
    bridge.log({"loss": 1.0, "eval_loss": 2.0}, 0)
    bridge.log({"loss": 0.5}, 1)
    bridge.checkpoint(tmp_path / "checkpoint-1", 1)
    bridge.end()
    bridge.finish()
    assert events_of(run_dir, RunStart)[0].ctx.run_config == {"lr": 0.1}
    assert [(each.step_idx, each.metrics) for each in events_of(run_dir, StepEnd)] == [
        (0, {"loss": 1.0}),
        (1, {"loss": 0.5}),
    ]
    assert [(each.eval_name, each.metrics) for each in events_of(run_dir, Eval)] == [("eval", {"loss": 2.0})]
    assert [each.row.name for each in events_of(run_dir, Checkpoint)] == ["checkpoint-1"]
    assert [each.run_result.status for each in events_of(run_dir, RunEnd)] == ["completed"]


def test_what_comes_with_the_metrics_of_an_eval_is_no_row(bridge, run_dir):
    bridge.start(0)
    bridge.log({"val/acc": 0.9, "epoch": 1.0}, 7)
    bridge.finish()
    assert events_of(run_dir, StepEnd) == []
    assert [(each.eval_name, each.step_idx, each.metrics) for each in events_of(run_dir, Eval)] == [
        ("val", 7, {"acc": 0.9})
    ]


def test_a_start_without_a_step_begins_at_the_first_row(bridge, run_dir):
    bridge.start()
    assert not run_dir.exists()
    bridge.log({"loss": 1.0}, 12)
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [12]


def test_config_that_comes_late_is_added(bridge, run_dir):
    bridge.update_config({"early": 1})
    bridge.start(0, config={"at_start": 2})
    bridge.update_config({"late": 3})
    assert events_of(run_dir, RunStart)[0].ctx.run_config == {"early": 1, "at_start": 2}
    assert [each.config for each in events_of(run_dir, ConfigUpdate)] == [{"late": 3}]


def test_a_second_training_of_a_process_is_a_run_beside_the_complete_one(bridge, run_dir):
    for _ in range(2):
        bridge.start(0)
        bridge.log({"loss": 1.0}, 0)
        bridge.end()
    bridge.finish()
    assert status_of(run_dir) == status_of(run_dir.with_name("run-2")) == "completed"


def test_a_start_in_the_middle_of_a_training_cancels_it_and_goes_on_in_its_run(bridge, run_dir):
    bridge.start(0)
    bridge.log({"loss": 1.0}, 0, commit=True)
    bridge.start(1)
    bridge.end()
    bridge.finish()
    assert [each.run_result.status for each in events_of(run_dir, RunEnd)] == ["cancelled", "completed"]
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [0, 1]


def test_evals_after_the_training_are_in_its_run(bridge, run_dir):
    bridge.start(0)
    bridge.end()
    bridge.eval("test", {"acc": 1.0})
    bridge.finish()
    assert [each.eval_name for each in events_of(run_dir, Eval)] == ["test"]
    assert status_of(run_dir) == "completed"


def test_evals_without_a_training_leave_a_killed_run_as_it_is(bridge, run_dir):
    for start in (lambda: None, lambda: bridge.start(0)):
        bridge.log({"eval_acc": 1.0}, 0)
        assert not run_dir.exists() or len(events_of(run_dir, StepEnd)) == 1
        start()
        bridge.log({"loss": 1.0}, 0)
        bridge.finish()
    assert len(events_of(run_dir.with_name("run-eval"), Eval)) == 1
    assert len(events_of(run_dir.with_name("run-eval-2"), Eval)) == 1
    assert status_of(run_dir) == "cancelled"  # the training has not ended
    assert [each.state.step for each in events_of(run_dir, TrainStart)] == [0, 0]


def test_an_error_fails_the_run_and_an_interrupt_cancels_it(run_dir):
    for error, status in ((ValueError("nan"), "failed"), (KeyboardInterrupt(), "cancelled")):
        bridge = RunBridge(run_dir, **OPTIONS)
        bridge.start(0)
        bridge.end(error)
        assert status_of(run_dir) == status


def test_a_run_that_is_given_is_neither_started_nor_ended(run_dir):
    import evsys_bus

    with evsys_bus.run(run_dir, **OPTIONS) as run:
        bridge = RunBridge(run=run)
        bridge.start(0, config={"lr": 1})
        bridge.log({"loss": 1.0}, 0)
        bridge.end()
        bridge.finish()
        assert run.config["lr"] == 1
        run.log({"loss": 0.5}, 1)
    assert len(events_of(run_dir, RunStart)) == 1
    assert len(events_of(run_dir, StepEnd)) == 2


def test_a_failure_is_logged_once_counted_and_not_raised(bridge, caplog):
    hook = Hook(bridge)
    assert hook.on_log({"loss": 1.0}, 0) == "logged"
    assert [hook.on_log({"loss": 1.0}, "later") for _ in range(3)] == [None] * 3
    assert bridge.failures == 3
    assert [record.getMessage().split()[:2] for record in caplog.records if record.levelname == "WARNING"] == [
        ["bridge.failed", "hook=Hook.on_log"]
    ]


def test_a_run_that_cannot_be_opened_is_tried_once_a_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    bridge = RunBridge(tmp_path / "file" / "run", **OPTIONS)
    hook = Hook(bridge)
    assert [hook.on_log({"loss": 1.0}, step) for step in range(5)] == [None] * 5
    assert bridge.failures == 1
    assert not bridge.writes


def test_a_url_is_an_error_when_the_bridge_is_made():
    with pytest.raises(EvsysBusError, match="URL"):
        RunBridge("s3://bucket/run")


def test_only_rank_0_writes(run_dir, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    hook = Hook(RunBridge(run_dir, **OPTIONS))
    assert hook.on_log({"loss": 1.0}, 0) is None
    monkeypatch.delenv("RANK")
    hook = Hook(RunBridge(run_dir, **OPTIONS))
    hook.bridge.start(0, is_rank_zero=False)
    assert hook.on_log({"loss": 1.0}, 0) is None
    assert not run_dir.exists()


def test_a_forked_child_writes_nothing(bridge, run_dir):
    hook = Hook(bridge)
    hook.on_log({"loss": 1.0}, 0)
    child = os.fork()
    if not child:
        os._exit(hook.on_log({"loss": 2.0}, 1) is not None)
    assert os.waitpid(child, 0)[1] == 0
    assert hook.on_log({"loss": 0.5}, 1) == "logged"
    bridge.finish()
    assert [each.metrics["loss"] for each in events_of(run_dir, StepEnd)] == [1.0, 0.5]


def test_a_pickled_copy_has_no_run(bridge):
    bridge.start(0)
    copy = pickle.loads(pickle.dumps(bridge))
    assert copy.run is None
    assert copy.path == bridge.path


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", "cancelled"),
        ("raise ValueError('nan')", "failed"),
        ("raise SystemExit(1)", "cancelled"),
        ("bridge.end()", "completed"),
    ],
)
def test_a_program_that_ends_without_a_hook_ends_its_run(program, tmp_path, end, status):
    done = program(f"""
        from evsys_adapters.bridges import RunBridge
        bridge = RunBridge("run", environment=False, output=False)
        bridge.start(0)
        bridge.log({{"loss": 1.0}}, 0)
        {end}
    """)
    _, err = done.communicate(timeout=20)
    assert status_of(tmp_path / "run") == status, err
    assert "never_left" not in err


def test_a_process_of_multiprocessing_ends_its_run(program, tmp_path):
    done = program("""
        import multiprocessing
        from evsys_adapters.bridges import RunBridge

        def train():
            bridge = RunBridge("run", environment=False, output=False)
            bridge.start(0)
            bridge.end()

        for method in ("fork", "spawn") if __name__ == "__main__" else ():
            process = multiprocessing.get_context(method).Process(target=train)
            process.start()
            process.join()
    """)
    _, err = done.communicate(timeout=20)
    assert status_of(tmp_path / "run") == status_of(tmp_path / "run-2") == "completed", err


def test_a_killed_training_that_its_framework_resumes_is_one_run(program, tmp_path):
    source = """
        import os, signal, sys
        from evsys_adapters.bridges import RunBridge
        bridge = RunBridge("run", environment=False, output=False)
        first, last = map(int, sys.argv[1:])
        bridge.start()
        for step in range(first, last):
            bridge.log({"loss": float(step)}, step)
        if last < 9:
            os.kill(os.getpid(), signal.SIGKILL)
        bridge.end()
    """
    program(source, "0", "6").communicate(timeout=20)
    program(source, "4", "9").communicate(timeout=20)
    assert status_of(tmp_path / "run") == "completed"
    assert [each.state.step for each in events_of(tmp_path / "run", TrainStart)] == [0, 4]


def test_metrics_of_any_shape_do_not_cost_the_row(bridge, run_dir):
    bridge.start(0)
    bridge.log({"loss": 1.0, "by_task": {"a": 1, "b": {"c": 2}}, "names": ["x"], "object": {1}.__class__}, 0)
    bridge.finish()
    assert events_of(run_dir, StepEnd)[0].metrics == {
        "loss": 1.0,
        "by_task/a": 1,
        "by_task/b/c": 2,
        "names": "['x']",
        "object": "<class 'set'>",
    }


def test_the_package_of_the_bridges_imports_no_framework():
    done = run_python(
        "import sys, evsys_adapters.bridges; print([m for m in ('torch', 'keras', 'ray') if m in sys.modules])"
    )
    assert done.stdout == "[]\n"
