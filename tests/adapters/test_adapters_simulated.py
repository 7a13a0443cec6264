"""The file adapters on a simulated disk: a kill or a power cut at every call loses and doubles nothing."""

import csv
import io
import json
import random
from pathlib import Path

import pytest

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_bus.context import LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.files import use_disk
from evsys_bus.testing import MachineStopped, SimulatedDisk

STEPS = 7
STATE = LoopState(step=0, num_steps=STEPS, output_dir="/out/run")


class Follower:
    """Events in order, a mark after every second one, as a courier has it; what is on record outlives the process."""

    def __init__(self, make):
        self.make = make
        self.mark: object = None
        self.at = 0

    def life(self):
        adapter = self.make()
        if self.mark is not None:
            adapter.rewind(self.mark)
        for event in range(self.at, STEPS + 2):
            if event == 0:
                adapter.on_train_start(STATE)
            elif event <= STEPS:
                metrics = {"loss": float(event)} | ({"late": 1.0} if event > 4 else {})
                adapter.on_step_end(STATE, event - 1, TrainingBatch(), metrics)
                if hasattr(adapter, "on_eval"):
                    adapter.on_eval(STATE, 0, "kept" if event % 3 else f"e{event}", {"score": event * "x"})
            else:
                adapter.on_train_end(STATE, LoopArtifacts())
            if event % 2:
                mark = adapter.mark()
                self.mark, self.at = mark, event + 1
        mark = adapter.mark()
        self.mark, self.at = mark, STEPS + 2
        adapter.close()


def csv_rows(disk):
    return [
        (int(row["step"]), float(row["loss"]))
        for row in csv.DictReader(io.StringIO(disk.contents("/out/run/m.csv").decode()))
    ]


def json_rows(disk):
    def rows(name):
        return [json.loads(line) for line in disk.contents(f"/out/run/logs/{name}").decode().splitlines()]

    evals = sorted((row["benchmark"], row["score"]) for row in rows("validation/metrics.jsonl"))
    assert evals == [("e3", "xxx"), ("e6", "x" * 6), ("kept", "x" * 7)]
    return [(row["step"], row["loss"]) for row in rows("training/metrics.jsonl")]


ADAPTERS = {
    "csv": (lambda: CsvMetricsCallback("/out/run/m.csv"), csv_rows),
    "local": (lambda: LocalLoggerCallback(print_every=0), json_rows),
}
EXPECTED = [(n, n + 1.0) for n in range(STEPS)]


def leftovers(disk):
    return [path for path in disk.paths() if path.endswith((".new", ".damaged"))]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_adapters_run_on_a_simulated_disk_and_touch_no_other(adapter):
    make, rows = ADAPTERS[adapter]
    disk = SimulatedDisk()
    with use_disk(disk):
        Follower(make).life()
    assert (rows(disk), leftovers(disk), Path("/out").exists()) == (EXPECTED, [], False)


@pytest.mark.parametrize("ending", ["kill", "power", "torn"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_process_that_ends_at_any_call_loses_and_doubles_nothing(adapter, ending):
    make, rows = ADAPTERS[adapter]
    number = 0
    while True:
        number += 1
        disk, follower, chance = SimulatedDisk(), Follower(make), random.Random(number)
        disk.stop(number, share=chance.random())
        lives = 0
        with use_disk(disk):
            while True:
                lives += 1
                try:
                    follower.life()
                    break
                except MachineStopped:
                    disk.restart("kill" if ending == "kill" else "power", chance=chance if ending == "torn" else None)
                    if lives == 1:
                        disk.stop(disk.calls + chance.randint(1, 60), share=chance.random())
        assert (number, rows(disk), leftovers(disk)) == (number, EXPECTED, [])
        if lives == 1:
            break
    assert number > 60


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_call_that_fails_once_loses_and_doubles_nothing(adapter):
    make, rows = ADAPTERS[adapter]
    disk = SimulatedDisk()
    with use_disk(disk):
        Follower(make).life()
    for number in range(1, disk.calls):
        disk, follower = SimulatedDisk(), Follower(make)
        disk.fail(number)
        with use_disk(disk):
            for _ in range(3):
                try:
                    follower.life()
                    break
                except OSError:
                    disk.restart("kill")
        assert (number, rows(disk)) == (number, EXPECTED)
