"""Content of a run arrives whole, once, in TensorBoard, W&B and local files, whatever is killed meanwhile."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from support import wandb_server as wandb
from support.couriers import courier_processes
from support.programs import EVSYS_BUS
from support.waiting import wait_until

STEPS = 30
PROGRAM = """
import os, signal, sys
from pathlib import Path
import evsys_bus
from evsys_bus import build_callbacks

folder, die_at, wait_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
specs = [
    {"kind": "tensorboard_logger", "placement": "follow"},
    {"kind": "wandb_logger", "placement": "follow", "params": {"project": "p", "mode": "offline"}},
    {"kind": "local_logger", "placement": "follow", "params": {"print_every": 0}},
]
calls = 0

def call(log, *args, **options):
    global calls
    log(*args, **options)
    calls += 1
    if calls == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == wait_at:
        print("waiting", flush=True)
        sys.stdin.readline()

with evsys_bus.run(folder / "run", callbacks=build_callbacks(specs), environment=False, output=False) as run:
    print("first", run.state.step, flush=True)
    for step in run.steps(30):
        call(run.log, {"loss": step / 10}, step=step)
        call(run.histogram, "weights", ([step, 1, 2], [0.0, 1.0, 2.0, 3.0 + step]))
        if step % 5 == 0:
            pixels = bytes([step, 0, 0]) * 64 * 64
            import numpy as np
            call(run.image, "samples", np.frombuffer(pixels, np.uint8).reshape(64, 64, 3), caption=f"step {step}")
        if step == 7:
            call(run.table, "rows", [[index, f"word {index}"] for index in range(1000)], columns=["n", "text"])
        if step == 12:
            (folder / "weights.bin").write_bytes(bytes(range(256)) * 20480)
            call(run.artifact, "weights", folder / "weights.bin", type="model")
        call(run.log, {"accuracy": step / 20}, step=step)
        if step % 4 == 3:
            (folder / f"state-{step}").touch()
            call(run.checkpoint, f"step-{step}", state_path=folder / f"state-{step}", step=step)
"""
WEIGHTS = hashlib.sha256(bytes(range(256)) * 20480).hexdigest()
ROWS = [[index, f"word {index}"] for index in range(1000)]
IMAGE_STEPS = [step for step in range(STEPS) if step % 5 == 0]


def start(folder, die_at=0, wait_at=0):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(die_at), str(wait_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def train_with_kills(folder, choices):
    """Train in three lives: two are ended by SIGKILL, and in the last one the couriers are killed."""
    journal = folder / "run" / "journal"
    for _ in range(2):
        with start(folder, die_at=choices.randrange(5, 45)) as program:
            program.communicate(timeout=60)
            assert program.returncode == -signal.SIGKILL
    with start(folder, wait_at=choices.randrange(2, 20)) as program:
        assert program.stdout.readline().startswith("first")
        assert program.stdout.readline() == "waiting\n"
        wait_until(lambda: courier_processes(journal))
        for pid in courier_processes(journal):
            os.kill(pid, signal.SIGKILL)
        program.communicate("\n", timeout=60)
        assert program.returncode == 0
    subprocess.run([EVSYS_BUS, "sync", str(folder / "run")], check=True, capture_output=True)


def check_tensorboard(folder):
    found = EventAccumulator(str(folder / "tensorboard" / "run"), size_guidance={"tensors": 0}).Reload()
    images = found.Tensors("image/samples")
    assert [each.step for each in images] == IMAGE_STEPS
    stored = {each.stem for each in (folder / "run" / "media").glob("*.png")}
    assert {hashlib.sha256(each.tensor_proto.string_val[2]).hexdigest() for each in images} == stored
    histograms = found.Tensors("histogram/weights")
    assert [each.step for each in histograms] == [*range(STEPS)]
    for each in histograms:
        expected = [[0.0, 1.0, each.step], [1.0, 2.0, 1.0], [2.0, 3.0 + each.step, 2.0]]
        assert tensor_util.make_ndarray(each.tensor_proto).tolist() == expected
    [table] = found.Tensors("table/rows")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert lines[2:1002] == [f"| {index} | {word} |" for index, word in ROWS]
    [artifact] = found.Tensors("artifact/weights")
    assert WEIGHTS in artifact.tensor_proto.string_val[0].decode()
    for name, scale in (("loss", 10), ("accuracy", 20)):
        points = found.Tensors(f"train/{name}")
        values = [round(float(tensor_util.make_ndarray(each.tensor_proto)) * scale) for each in points]
        assert [each.step for each in points] == values == [*range(STEPS)]


def check_wandb(folder):
    [file] = wandb.wandb_files_of(folder)
    found = wandb.metric_series(rows := wandb.rows_in(file), "media")
    images = [value for _, value in found["samples"]]
    assert [step for step, _ in found["samples"]] == IMAGE_STEPS
    assert [value["caption"] for value in images] == [f"step {step}" for step in IMAGE_STEPS]
    for value in images:
        data = (file.parent / "files" / value["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == value["sha256"]
    histograms = [(step, value["values"][0]) for step, value in found["weights"]]
    assert histograms == [(step, step) for step in range(STEPS)]
    [(step, table)] = found["rows"]
    assert step == 7
    assert json.loads((file.parent / "files" / table["path"]).read_bytes())["data"] == ROWS
    [(_, artifact)] = found["artifact/weights"]
    [stored] = (file.parent / "files" / json.loads(artifact)["path"]).iterdir()
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == WEIGHTS
    losses = [row["train/step"] for row in rows if "train/loss" in row]
    assert sorted(losses) == [*range(STEPS)]


def check_local_files(folder):
    lines = (folder / "run" / "logs" / "content.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = {name: [row["step"] for row in rows if row["kind"] == name] for name in ("image", "histogram", "table")}
    assert steps == {"image": IMAGE_STEPS, "histogram": [*range(STEPS)], "table": [7]}
    [artifact] = [row for row in rows if row["kind"] == "artifact"]
    for row in rows:
        if "path" in row:
            data = (folder / "run" / row["path"]).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["digest"], row["size"])
    assert (artifact["digest"], artifact["size"]) == (WEIGHTS, 5 << 20)
    metrics = (folder / "run" / "logs" / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [*range(STEPS)]


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(3))
def test_content_arrives_whole_and_once_after_kills_of_the_program_and_of_couriers(tmp_path, seed):
    train_with_kills(tmp_path, random.Random(seed))
    check_local_files(tmp_path)
    check_wandb(tmp_path)
    check_tensorboard(tmp_path)
