"""What ``show`` and ``tail`` say of runs, beyond what the golden files have."""

import contextlib
import json
import time

import pytest

from evsys_adapters.checkpoints.events import CheckpointUploaded
from evsys_bus import (
    ArmResult,
    Checkpoint,
    Envelope,
    Eval,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.journal import JournalWriter
from evsys_bus.testing import RecordingSink
from support.programs import command_in


@pytest.fixture
def evsys_bus(capsys, tmp_path):
    """The command line in this process and in tmp_path."""
    return command_in(tmp_path, capsys)


@pytest.fixture
def digits(tmp_path):
    """An experiment of two runs, one of which is called running; its journal is open while ``training`` lasts."""
    folder = tmp_path / "runs" / "digits"
    for key in ("wide-s0", "deep-s0"):
        (folder / key).mkdir(parents=True)
        (folder / key / "metrics.jsonl").write_text('{"step":0,"loss":2.0}\n{"step":9,"loss":1.0}\n')
    runs = {key: {"arm": key[:4], "seed": 0, "status": "running"} for key in ("wide-s0", "deep-s0")}
    runs["deep-s0"]["status"] = "completed"
    page = {"name": "digits", "status": "running", "started": "2026-11-28T10:00:00+00:00", "runs": runs}
    (folder / "experiment.json").write_text(json.dumps(page))
    return folder


@contextlib.contextmanager
def training(folder):
    with EventBus([], journal=folder / "journal") as bus:
        for key, offset in (("wide-s0", 0.0), ("deep-s0", 0.5)):
            state = LoopState(step=0, num_steps=10, output_dir=folder / key, ctx=LogContext(folder, run_key=key))
            for step in (4, 9):
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
                bus.publish(Eval(state, step, "val", {"acc": step / 100 + offset}))
        yield bus


def test_show_has_the_evals_that_were_made_while_a_run_trained(evsys_bus, digits):
    with training(digits):
        pass
    out = evsys_bus("show", "wide-s0").stdout
    [row] = [line.split() for line in out.splitlines() if line.startswith("val/acc")]
    assert row == ["val/acc", "2", "0.04000", "0.09000", "0.04000", "4", "0.09000", "9"]
    [found] = json.loads(evsys_bus("show", "deep-s0", "--json").stdout)["evals"]
    assert (found["name"], found["rows"], found["last"], found["greatest_step"]) == ("val/acc", 2, 0.59, 9)


def test_show_says_of_a_run_whose_process_is_gone_how_to_go_on(evsys_bus, digits):
    with training(digits):
        for name in ("wide-s0", "digits"):
            assert "status   running\n" in evsys_bus("show", name).stdout.replace("    running", "   running")
    gone = "running, but its process is gone; go on with: evsys-bus run FILE --resume --output-dir runs/digits"
    for name in ("wide-s0", "digits"):
        assert gone in " ".join(evsys_bus("show", name).stdout.split()), name
        assert json.loads(evsys_bus("show", name, "--json").stdout)["process_gone"] is True
    assert "gone" not in evsys_bus("show", "deep-s0").stdout
    lines = [line.split("   ") for line in evsys_bus("show", "digits").stdout.splitlines()]
    assert ["wide-s0", "process gone"] in [[each.strip() for each in line[:2]] for line in lines]


def test_tail_says_of_an_upload_its_step_and_its_run_once(evsys_bus, digits):
    uploaded = CheckpointUploaded("wide-s0", "step-000009", 9, "file:///bucket/wide-s0/step-000009", 1, 7, 0.5)
    with training(digits):
        pass
    writer = JournalWriter(digits / "journal", family="c").open()
    writer.append(encode(Envelope(writer.stream, writer.next_sequence, time.time(), uploaded, "wide-s0")))
    writer.close()
    out = evsys_bus("tail", digits).stdout
    [line] = [line for line in out.splitlines() if "checkpoint_uploaded" in line]
    assert line.split()[2:5] == ["wide-s0", "checkpoint_uploaded", "9"]
    assert "run wide-s0" not in line
    assert "batch" not in line
    assert "checkpoint step-000009" in line


# -- runs of loops of one's own, which leave nothing but a journal ----------------------------------------------------


def state_of(folder, run, *, ctx=True, steps=40):
    context = LogContext(folder.parent, run_key=run) if ctx else None
    return LoopState(step=0, num_steps=steps, output_dir=folder, ctx=context)


def steps_of(bus, state, count, first=0):
    for number in range(first, first + count):
        bus.publish(StepEnd(state, number, TrainingBatch(), {"loss": 8.0 - number, "lr": 0.125}))


@pytest.mark.parametrize("ctx", [True, False])
@pytest.mark.parametrize("asked", ["out", "out/journal", "out/ppo"])
def test_show_reads_the_journal_of_a_loop_of_one_s_own(evsys_bus, tmp_path, asked, ctx):
    folder = tmp_path / "out" / "ppo"
    folder.mkdir(parents=True)
    sink = RecordingSink()
    with EventBus(sinks=[sink], journal=tmp_path / "out" / "journal") as bus:
        state = state_of(folder, "ppo", ctx=ctx)
        steps_of(bus, state, 6)
        bus.publish(Eval(state, 3, "val", {"acc": 0.25}))
        bus.publish(Eval(state, 5, "val", {"acc": 0.75}))
        bus.publish(Checkpoint(state, ManifestRow("step-5", 5, state_path=str(folder / "5.pt"))))
        [running] = rows_of(evsys_bus("show", asked, "--json"), "run")
    done = evsys_bus("show", asked)
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert done.stdout.startswith("ppo\n")
    assert (told["status"], told["steps"]) == (["ended"], ["6", "of", "40"])
    assert told["loss"] == "6 8.000 3.000 3.000 5 8.000 0".split()
    assert told["val/acc"][:3] == ["2", "0.250", "0.750"]
    assert told["step-5"][:2] == ["5", "5.pt"]
    assert (told["data"], told["delivery"]) == ([str(folder)], ["RecordingSink", "ok"])
    assert told["journal"][0].endswith("out/journal")
    [row] = rows_of(evsys_bus("show", asked, "--json"), "run")
    assert (row["name"], row["status"], row["last_step"], row["rows"]) == ("ppo", "ended", 5, 6)
    assert running["status"] == "running"
    [adapter] = rows_of(evsys_bus("show", asked, "--json"), "adapter")
    assert (adapter["adapter"], adapter["delivered"]) == ("RecordingSink", 9)


def rows_of(done, kind):
    assert done.returncode == 0, done.stderr
    return [row for row in map(json.loads, done.stdout.splitlines()) if row["type"] == kind]


def test_show_tells_of_each_run_of_a_journal_how_it_ended(evsys_bus, program, tmp_path):
    directory = tmp_path / "out" / "journal"
    for key in ("good", "bad", "left", "stopped"):
        (tmp_path / "out" / key).mkdir(parents=True)
    with EventBus([], journal=directory) as bus:
        for key, error in (("good", None), ("bad", ArithmeticError("loss is NaN"))):
            state = state_of(tmp_path / "out" / key, f"{key}-run", steps=0)
            bus.publish(TrainStart(state))
            steps_of(bus, state, 3)
            state.error = error
            bus.publish(TrainEnd(state, LoopArtifacts()))
        ctx = LogContext(tmp_path / "out", run_key="stopped")
        bus.publish(RunStart(ctx))
        bus.publish(RunEnd(ctx, RunResult(status="cancelled"), ArmResult("stopped")))
        steps_of(bus, state_of(tmp_path / "out" / "left", "left"), 2)
    killed = """
        import os, sys
        from evsys_bus import *
        bus = EventBus([], journal=sys.argv[1], rank=3)
        bus.__enter__()
        bus.publish(Eval(None, 1, "val", {"acc": 0.5}))
        os._exit(9)
    """
    assert program(killed, str(directory)).wait() == 9
    rows = rows_of(evsys_bus("show", "out", "--json"), "run")
    assert [(row["name"], row["status"], row["rows"]) for row in rows] == [
        ("good-run", "ended", 3),
        ("bad-run", "failed", 3),
        ("stopped", "cancelled", 0),
        ("left", "ended", 2),
        ("out", "killed", 0),
    ]
    assert "loss is NaN" in rows[1]["error"]
    out = evsys_bus("show", "out").stdout
    assert [line.split()[:2] for line in out.splitlines()[3:8]] == [[row["name"], row["status"]] for row in rows]
    assert evsys_bus("show", "out/bad").stdout.startswith("bad-run\n"), "by its folder, which has another name"
    done = evsys_bus("journal", "export", "out/bad", "--format", "csv")
    assert len(done.stdout.splitlines()) == 1 + 3, done.stderr
    assert len(evsys_bus("journal", "export", "out/journal", "--format", "csv").stdout.splitlines()) == 1 + 8


def test_show_of_a_journal_below_runs_is_found_by_name_and_one_without_a_run_is_no_error(evsys_bus, tmp_path):
    folder = tmp_path / "runs" / "bandit"
    with EventBus([], journal=folder / "journal") as bus:
        steps_of(bus, state_of(folder, None, ctx=False), 2)
    assert evsys_bus("show", "bandit").stdout.startswith("bandit\n")
    with EventBus([], journal=tmp_path / "runs" / "empty" / "journal"):
        pass
    done = evsys_bus("show", "empty")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "runs/empty/journal   0 runs")
    (tmp_path / "runs" / "bandit" / "none").mkdir()
    assert evsys_bus("show", "runs/bandit/none").returncode == 2


def test_show_takes_the_state_of_a_run_that_has_only_metrics_from_its_journal(evsys_bus, tmp_path):
    folder = tmp_path / "out" / "ppo"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step":0,"loss":2.0}\n')
    with EventBus([], journal=tmp_path / "out" / "journal") as bus:
        steps_of(bus, state_of(folder, "ppo"), 1)
        assert "running" in evsys_bus("show", folder).stdout
    assert "ended" in evsys_bus("show", folder).stdout


@pytest.mark.parametrize("has_ctx", [True, False])
def test_show_lists_runs_of_one_name_in_two_folders_as_two_and_one_that_was_moved_as_one(evsys_bus, tmp_path, has_ctx):
    folders = [tmp_path / each / "digits" for each in ("first", "second", "gone")]
    with EventBus([], journal=tmp_path / "journal") as bus:
        for folder, steps in zip(folders, ([0], [1, 2], [3, 4, 5]), strict=True):
            ctx = LogContext(folder.parent, run_key="digits") if has_ctx else None
            state = LoopState(0, 3, folder, ctx=ctx)
            folder.mkdir(parents=True)
            for step in steps:
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5}))

    def shown_rows():
        shown = evsys_bus("show", tmp_path / "journal", "--json").stdout
        return [json.loads(line)["rows"] for line in shown.splitlines()]

    assert shown_rows() == [1, 2, 3]
    for each in folders[:2]:
        each.rmdir()
    assert shown_rows() == [6]


def test_show_takes_a_run_whose_state_names_the_experiments_folder_for_one(evsys_bus, tmp_path):
    ctx = LogContext(tmp_path / "sweep", run_key="low", run_config={"lr": 1})
    ctx.run_dir.mkdir(parents=True)
    state = LoopState(0, 1, ctx.output_dir, ctx=ctx)
    with EventBus([], journal=tmp_path / "journal") as bus:
        for event in (RunStart(ctx), StepEnd(state, 0, TrainingBatch(), {"loss": 0.5})):
            bus.publish(event)
    shown = json.loads(evsys_bus("show", tmp_path / "journal", "--json").stdout)
    assert (shown["rows"], shown["config"]) == (1, {"lr": 1})


def test_show_counts_a_step_once_that_a_resumed_training_made_anew(evsys_bus, tmp_path):
    for first, last, loss in ((0, 12, 9.0), (8, 10, 5.0), (5, 15, 1.0)):  # two resumes, each from an earlier step
        with EventBus(journal=tmp_path / "journal") as bus:
            state = LoopState(first, 15, tmp_path / "low", ctx=LogContext(tmp_path, run_key="low"))
            bus.publish(TrainStart(state))
            for step in range(first, last):
                bus.publish(StepEnd(state, step, None, {"loss": loss}))
    done = evsys_bus("show", tmp_path / "journal", "--json")
    shown = json.loads(done.stdout.splitlines()[0])
    assert (shown["rows"], shown["last_step"]) == (15, 14), done.stdout
    assert next(each for each in shown["metrics"] if each["name"] == "loss")["rows"] == 15
