"""Every small file of a recorded run, torn, missing, of another kind or version, linked elsewhere.

The next start and the commands end without a traceback, nothing stays undelivered, and no row is lost or doubled.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from evsys_bus import (
    CallbackSpec,
    EventBus,
    LogContext,
    LoopState,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from evsys_bus.context import LoopArtifacts

STEPS = 6


def run(root: Path, steps: range) -> None:
    """A part of a training, recorded and delivered to files by a courier process."""
    context = LogContext(root, run_key="one")
    callbacks = build_callbacks(
        [
            CallbackSpec("csv_metrics", {"out_path": str(root / "m.csv")}, placement="follow"),
            CallbackSpec("local_logger", {"print_every": 0}),
            CallbackSpec("tensorboard_logger", {"log_dir": str(root / "tensorboard")}, placement="follow"),
        ]
    )
    state = LoopState(step=steps.start, num_steps=2 * STEPS, output_dir=root / "one", ctx=context)
    with EventBus(callbacks, journal=root / "journal", drain_timeout=20) as bus:
        bus.publish(TrainStart(state))
        for number in steps:
            bus.publish(StepEnd(state, number, TrainingBatch(), {"loss": float(number)}))
        bus.publish(TrainEnd(state, LoopArtifacts()))


def rows(root: Path) -> dict[str, list[int]]:
    logged = (root / "one/logs/training/metrics.jsonl").read_text().splitlines()
    tables = sorted(root.glob("m*.csv"))
    table = [int(line.partition(",")[0]) for each in tables for line in each.read_text().splitlines()[1:]]
    return {"csv": sorted(table), "jsonl": [json.loads(line)["step"] for line in logged]}


FILES = {
    "lock": "journal/couriers/csv_metrics.lock",
    "spec": "journal/couriers/csv_metrics.spec.json",
    "state": "journal/couriers/csv_metrics.state.json",
    "log": "journal/couriers/process.log",
    "cursor": "journal/cursors/csv_metrics.json",
    "journal": "journal/journal.json",
    "stream's lock": "journal/r0-*/lock",
    "note of the table": ".m.csv.run",
    "note of the event file": "tensorboard/one/.run",
}


def later_version(path: Path, data: bytes) -> None:
    try:
        known = json.loads(data.strip())
        path.write_text(json.dumps(known | {"evsys_bus_format": 99, "more": {"nested": [1, 2, {}]}}))
    except (ValueError, TypeError):
        path.write_bytes(data + b"\nof a later version\n")


def linked_elsewhere(path: Path, data: bytes) -> None:
    there = path.parents[1] / "elsewhere"
    there.write_bytes(data)
    path.symlink_to(there)


DAMAGES = {
    "missing": lambda path, data: None,
    "empty": lambda path, data: path.write_bytes(b""),
    "one byte": lambda path, data: path.write_bytes(data[:1]),
    "half": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "but the last byte": lambda path, data: path.write_bytes(data[:-1]),
    "zeros": lambda path, data: path.write_bytes(bytes(len(data) or 9)),
    "no text": lambda path, data: path.write_bytes(b'{"name":"\xff\xfe","streams":{"\xff":[1]}}'),
    "brackets": lambda path, data: path.write_bytes(b'{"name":' + b"[" * 99_999),
    "a later version": later_version,
    "a directory": lambda path, data: (path.mkdir(), (path / "inside").touch()),
    "a FIFO": lambda path, data: os.mkfifo(path),
    "a link to nothing": lambda path, data: path.symlink_to("nowhere/at/all"),
    "a link to itself": lambda path, data: path.symlink_to(path.name),
    "linked elsewhere": linked_elsewhere,
}
SHORT = {"half", "a FIFO"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The root of a run that has ended, and a copy of it."""
    folder = tmp_path_factory.mktemp("recorded")
    root = folder / "root"
    root.mkdir()
    run(root, range(STEPS))
    return root, shutil.copytree(root, folder / "kept")


def with_damage(kept: tuple[Path, Path], pattern: str, damage) -> Path:
    """The recorded run, where it was: paths in its files stay true."""
    root, copy = kept
    shutil.rmtree(root)
    shutil.copytree(copy, root)
    found = [*root.glob(pattern)]
    assert found
    for path in found:
        data = path.read_bytes()
        path.unlink()
        damage(path, data)
    return root


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param(file, damage, marks=[] if damage in SHORT else pytest.mark.long)
        for file in FILES
        for damage in DAMAGES
    ],
)
def test_a_damaged_file_stops_no_command_and_no_start_and_costs_no_row(file, damage, kept, evsys_bus):
    root = with_damage(kept, FILES[file], DAMAGES[damage])
    for command in ("status", "sync", "tail", "show", "checkpoints"):
        code, out, err = evsys_bus(command, root)
        assert "Traceback" not in out + err, (command, out, err)
        assert code in {0, 1, 2, 3, 4}, (command, code, out, err)
    run(root, range(STEPS, 2 * STEPS))
    assert rows(root) == {"csv": [*range(2 * STEPS)], "jsonl": [*range(2 * STEPS)]}
    code, out, err = evsys_bus("status", root, "--json")
    pending = {row["pending"] for row in map(json.loads, out.splitlines()) if "pending" in row}
    assert (code, pending) == (0, {0}), (out, err)
    log = root / "journal/couriers/process.log"
    assert not log.is_file() or "Traceback" not in log.read_text(errors="replace")
