"""What ``show`` and ``tail`` say of runs, beyond what the golden files have."""

import contextlib
import json
import subprocess
import time

import pytest

from evsys_adapters.checkpoints.events import CheckpointUploaded
from evsys_bus import Envelope, Eval, EventBus, LogContext, LoopState, StepEnd, TrainingBatch
from evsys_bus.cli import run
from evsys_bus.codec import encode
from evsys_bus.journal import JournalWriter


@pytest.fixture
def evsys_bus(capsys, tmp_path):
    """The command line in this process and in tmp_path."""

    def command(*arguments):
        with contextlib.chdir(tmp_path):
            code = run([str(each) for each in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return command


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
    assert row == ["val/acc", "2", "0.0400", "0.0900", "0.0400", "4", "0.0900", "9"]
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
