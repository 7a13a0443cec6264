"""A disk that is full in the middle of the demo: the training does not notice, and the receipt tells the truth.

A real file system of a few megabytes, mounted for the test; where that is not allowed the tests are skipped.
"""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from evsys_bus import Callback, EventBus, Experiment
from evsys_bus.config import build_callbacks
from evsys_bus.demo import DigitsRun, demo_config
from evsys_bus.demo import recipe as digits_recipe
from evsys_bus.events import Eval, ExperimentEnd, RunEnd, StepEnd
from evsys_bus.journal import JournalWriter, verify
from evsys_bus.training import RunComponents, RunPlan
from support.files import read_json_lines, small_file_system
from support.journals import read_events

STEPS = 60
FULL, SPACE_AGAIN = 22, 38
"""Steps. Checkpoints are due at 19, 39 and 59: what trains needs the disk for those, or it fails, as it should."""
RUN = "baseline-s0"


def recipe(params: DigitsRun, run: RunPlan) -> RunComponents:
    """The demo's, validating more often than it saves."""
    return dataclasses.replace(digits_recipe(params, run), save_every=20)


class Fills(Callback):
    """Fills a disk at the end of one step, and makes room at the end of another."""

    def __init__(self, disk: Path, full: int, space_again: int | None = None) -> None:
        self.filler = disk / "filler"
        self.full, self.space_again = full, space_again
        self.bus = None
        self.most_unrecorded = 0

    def on_step_end(self, state, step_idx, batch, metrics):
        if step_idx == self.full:
            with self.filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        if step_idx == self.space_again:
            self.filler.unlink()
        self.most_unrecorded = max(self.most_unrecorded, self.bus.health().journal.unrecorded)


async def run_demo(output_dir: Path, journal: JournalWriter, fills: Fills | None = None, drain_timeout: float = 20.0):
    """One run of the demo, with the callbacks of its file; its result, the receipt, and how much was published."""
    config = demo_config(output_dir, steps=STEPS, eval_every=5)
    callbacks = [*build_callbacks(config.callbacks), *([fills] if fills else [])]
    async with EventBus(callbacks, journal=journal, drain_timeout=drain_timeout) as bus:
        if fills is not None:
            fills.bus = bus
        experiment = Experiment(config, recipe=recipe, bus=bus, only_arms=["baseline"], only_seeds=[0])
        result = await experiment.run()
        published = sum(bus.health().published.values())
    return result, bus.receipt, published


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nothing happens to: what was trained, its rows, how many events were published."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    _, _, published = asyncio.run(run_demo(output_dir, JournalWriter(output_dir / "journal")))
    return trained(output_dir), rows(output_dir / RUN / "metrics.jsonl"), published


def trained(output_dir: Path) -> dict[str, bytes]:
    """The final state, optimizer included, bit by bit."""
    with np.load(output_dir / RUN / "checkpoints" / "final.state.npz") as saved:
        return {name: saved[name].tobytes() for name in saved}


def rows(path: Path) -> list[dict[str, object]]:
    """What stands there, without what a clock measured."""
    return [row | {"step_seconds": 0} for row in read_json_lines(path)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB: the checkpoints and their archive are on it."""
    with small_file_system(tmp_path / "small", "8m") as path:
        yield path


async def test_a_disk_full_in_the_middle_of_the_demo_and_then_space_again_harms_nothing(small_disk, undisturbed):
    fills = Fills(small_disk, FULL, SPACE_AGAIN)
    output_dir = small_disk / "digits"
    result, receipt, published = await run_demo(output_dir, JournalWriter(output_dir / "journal"), fills)
    assert result.status == "completed"
    assert (trained(output_dir), rows(output_dir / RUN / "metrics.jsonl"), published) == undisturbed
    assert fills.most_unrecorded > SPACE_AGAIN - FULL - 2  # it was full indeed
    assert (receipt.recorded, receipt.unrecorded) == (published, 0)
    assert [(each.name, each.pending, each.dead) for each in receipt.deliveries] == [
        (name, 0, 0) for name in ("checkpoint_upload", "csv_metrics", "local_logger")
    ]
    assert verify(output_dir / "journal").is_intact
    events = read_events(output_dir / "journal")
    assert len(events) == published
    assert [event.step_idx for event in events if isinstance(event, StepEnd)] == list(range(STEPS))
    assert [event.step_idx for event in events if isinstance(event, Eval)] == list(range(4, STEPS, 5))
    assert [type(event) for event in events[-2:]] == [RunEnd, ExperimentEnd]


async def test_a_disk_that_stays_full_costs_no_step_and_the_receipt_and_the_gaps_say_what_is_lost(
    small_disk, tmp_path, undisturbed
):
    fills = Fills(small_disk, FULL)
    journal = JournalWriter(small_disk / "journal", reserve_bytes=8192)
    result, receipt, published = await run_demo(tmp_path / "digits", journal, fills, drain_timeout=2.0)
    assert result.status == "completed"
    assert (trained(tmp_path / "digits"), rows(tmp_path / "digits" / RUN / "metrics.jsonl"), published) == undisturbed
    assert receipt.unrecorded > 0
    assert receipt.recorded + receipt.unrecorded == published
    events = read_events(small_disk / "journal")
    assert len(events) == receipt.recorded
    steps = [event.step_idx for event in events if isinstance(event, StepEnd)]
    assert steps[:FULL] == list(range(FULL))
    assert steps == sorted(set(steps))
    [stream] = verify(small_disk / "journal").streams
    assert sum(last - first + 1 for first, last in stream.missing_ranges) == receipt.unrecorded
    assert not stream.corrupt_ranges
    assert isinstance(events[-1], ExperimentEnd)  # the last words went into the reserve
