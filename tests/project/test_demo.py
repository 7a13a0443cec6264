"""The demo as an experiment: what it learns, that seeds decide every number, that a kill in the middle costs none."""

import asyncio
import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evsys_bus.callback import Callback
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.context import LoopState
from evsys_bus.demo import DEMO_FILE, demo_config, run_demo
from evsys_bus.demo.digits import BETA1, DigitBatches, DigitBenchmark, DigitNetwork, load_split
from evsys_bus.events import BenchmarkEval
from evsys_bus.training import Experiment
from support import ROOT
from support.files import read_json_lines

PATHS = ("state_path", "sampler_path")
RUNS = [f"{arm}-s{seed}" for arm in ("baseline", "wide", "lr-high") for seed in (0, 1)]


class Benchmarks(Callback):
    def __init__(self) -> None:
        self.scored = []

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.scored.append(BenchmarkEval(ctx, eval_result, predictions, step))


def on_disk(folder):
    return {path.name for path in folder.iterdir()}


def metrics_of(run_dir, name="metrics.jsonl"):
    return [
        {key: value for key, value in row.items() if key != "step_seconds"} for row in read_json_lines(run_dir / name)
    ]


def logs_of(run_dir, name):
    timed = {"step_seconds", "eval_seconds"}
    found = [
        {key: value for key, value in row.items() if key not in timed}
        for row in read_json_lines(run_dir / "logs" / name)
    ]
    return sorted(found, key=json.dumps) if name.startswith(("validation", "test")) else found


def csv_of(path):
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "step_seconds"} for row in csv.DictReader(file)]


async def small(folder, *callbacks, arm="baseline", seed=0, **params):
    """One run of the demo."""
    settings = demo_config(folder, **params)
    return await Experiment(settings, callbacks=callbacks, only_arms=[arm], only_seeds=[seed]).run()


@pytest.mark.long_on_uvloop
async def test_the_demo_trains_three_arms_with_two_seeds_and_reads_more_than_95_percent_of_digits_it_never_saw(
    tmp_path,
):
    result = await run_demo(tmp_path, [])
    assert (result.status, len(result.arms)) == ("completed", 6)
    assert {arm.name for arm in result.arms} == {"baseline", "wide", "lr-high"}
    assert all(arm.eval_metrics["digits-test/accuracy"] > 0.95 for arm in result.arms)
    assert result.best_score == max(
        np.mean([arm.eval_metrics["digits-test/accuracy"] for arm in result.arms if arm.name == name])
        for name in ("baseline", "wide", "lr-high")
    )
    assert result.hypothesis.startswith("A hidden layer twice as wide")
    assert result.conclusion.startswith(f"{result.best_arm} is best: digits-test/accuracy 0.9")
    for run in RUNS:
        checkpoints = read_json_lines(tmp_path / run / "checkpoints.jsonl")
        assert checkpoints[-1]["name"] == "final"
        assert {Path(row[path]).name for row in checkpoints for path in PATHS} == on_disk(
            tmp_path / run / "checkpoints"
        )


async def test_the_seed_decides_every_number_also_beside_another_run(tmp_path):
    await small(tmp_path / "a", steps=30)
    await small(tmp_path / "b", seed=1, steps=30)
    await run_demo(tmp_path / "c", [], steps=30)
    assert metrics_of(tmp_path / "a" / "baseline-s0") == metrics_of(tmp_path / "c" / "baseline-s0")
    assert metrics_of(tmp_path / "b" / "baseline-s1") == metrics_of(tmp_path / "c" / "baseline-s1")
    assert metrics_of(tmp_path / "c" / "baseline-s0") != metrics_of(tmp_path / "c" / "baseline-s1")


async def test_R12_the_validation_benchmark_runs_in_the_loop_and_the_test_benchmark_after_it(tmp_path):
    seen = Benchmarks()
    await small(tmp_path, seen, steps=60, eval_every=10)
    *in_loop, after = seen.scored
    assert [(each.step, each.eval_result.step) for each in in_loop] == [(step, step) for step in range(9, 60, 10)]
    assert {each.eval_result.name for each in in_loop} == {"digits-val"}
    assert (after.step, after.eval_result.step, after.eval_result.tags) == (None, None, ["test"])
    assert after.ctx.run_key == "baseline-s0"
    assert len(after.predictions) == 300
    row = after.predictions[0]
    assert set(row) == {"task_id", "instruction", "expected", "output", "reward"}
    assert after.eval_result.metrics["accuracy"] == np.mean([row["reward"] for row in after.predictions])
    assert len({row["task_id"] for row in after.predictions}) == 300


def test_the_three_parts_share_no_image_and_miss_none():
    split = load_split(0)
    assert sorted(np.concatenate([part.ids for part in split])) == list(range(1797))


async def test_every_epoch_shows_each_image_at_most_once_in_a_fresh_order():
    train = load_split(0).train
    batches = DigitBatches(train, seed=0)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        epochs.append(np.concatenate([(await batches.build_batch(step)).data.ids for step in steps]))
    assert len(set(epochs[0])) == len(epochs[0])
    assert not np.array_equal(*epochs)


async def test_the_gradients_are_those_of_the_loss(tmp_path):
    """Against central differences; the hand-written backward pass has no other witness."""
    network, trained = DigitNetwork(tmp_path, seed=0), DigitNetwork(tmp_path, seed=0)
    batch = await DigitBatches(load_split(0).train, seed=0).build_batch(0)
    await trained.forward_backward(batch)
    await trained.optim_step()
    await trained.save_state("one update")  # Adam's mean is by then the gradient times 1 - BETA1
    with np.load(tmp_path / "one update.state.npz") as saved:
        gradients = {name: saved[f"mean.{name}"] / (1 - BETA1) for name in network.weights}
    for name, weight in network.weights.items():
        place = np.unravel_index(np.abs(gradients[name]).argmax(), weight.shape)
        losses = []
        for nudge in (1e-5, -2e-5):
            weight[place] += nudge
            losses.append((await network.forward_backward(batch))["loss"])
        weight[place] += 1e-5
        assert gradients[name][place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


async def test_a_loaded_state_goes_on_exactly_as_the_saved_one(tmp_path):
    batches = DigitBatches(load_split(0).train, seed=0)
    network, twin = DigitNetwork(tmp_path, seed=0), DigitNetwork(tmp_path, seed=9)
    for step in range(5):
        await network.forward_backward(await batches.build_batch(step))
        await network.optim_step()
    await twin.load_state(await network.save_state("here"))
    for each in (network, twin):
        await each.forward_backward(await batches.build_batch(5))
        await each.optim_step()
    for name, weight in network.weights.items():
        assert np.array_equal(weight, twin.weights[name])


async def test_weights_for_sampling_predict_what_the_network_predicts(tmp_path):
    split = load_split(0)
    network = DigitNetwork(tmp_path, seed=0)
    with np.load(await network.save_weights_for_sampler("w")) as saved:
        assert set(saved) == set(network.weights)
    state = LoopState(step=0, num_steps=1, output_dir=tmp_path, backend=network)
    benchmark = await DigitBenchmark("digits-val", split.val, tag="val").evaluate(state)
    assert [row["output"] for row in benchmark.predictions] == [
        str(n) for n in network.predict_probabilities(split.val.pixels).argmax(axis=1)
    ]


DEMO = """
import asyncio, os, sys
from evsys_bus.demo import run_demo
for folder in sys.argv[1:]:
    os.chdir(folder)
    asyncio.run(run_demo("e", resume=os.path.exists("e"), steps=400))
"""


def demo(*folders):
    """The demo in a process of its own, with the callbacks of its file, in one folder after another."""
    command = [sys.executable, "-c", DEMO, *map(str, folders)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.timeout(90)  # three demos
def test_the_demo_killed_by_sigterm_in_the_middle_and_resumed_is_an_undisturbed_run_in_every_file(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    with demo(here) as first:
        for line in first.stdout:
            if line.startswith("wide-s0  step 200/"):
                break
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=10)
    assert first.returncode == -signal.SIGTERM, errors
    stopped = json.loads((here / "e" / "experiment.json").read_text())
    assert stopped["status"] == "cancelled"
    assert [entry["status"] for entry in stopped["runs"].values()] == ["completed"] * 2 + ["cancelled"] * 4
    for run in ("wide-s0", "wide-s1"):
        done = len(metrics_of(here / "e" / run))
        assert 200 <= done < 400, "it was not in the middle"
        last = read_json_lines(here / "e" / run / "checkpoints.jsonl")[-1]
        assert (last["name"], last["batch"]) == ("final", done - 1)
    assert not (here / "e" / "lr-high-s0").exists()

    with demo(here, there) as process:
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    for run in RUNS:
        one, other = here / "e" / run, there / "e" / run
        assert metrics_of(one) == metrics_of(other)
        assert [row["step"] for row in metrics_of(one)] == list(range(400))
        names = [[row["name"] for row in read_json_lines(each / "checkpoints.jsonl")] for each in (one, other)]
        assert names[0] == names[1]
        for name in ("training", "validation", "test"):
            assert logs_of(one, f"{name}/metrics.jsonl") == logs_of(other, f"{name}/metrics.jsonl")
        for name in ("validation", "test"):
            assert logs_of(one, f"{name}/rollouts.jsonl") == logs_of(other, f"{name}/rollouts.jsonl")
        tables = [csv_of(folder / "e" / run / "metrics.csv") for folder in (here, there)]
        assert tables[0] == tables[1]
        assert len(tables[0]) == 400
        scores = [json.loads((each / "result.json").read_text())["eval_metrics"] for each in (one, other)]
        assert scores[0] == scores[1]
    pages = [(folder / "e" / "experiment.md").read_text() for folder in (here, there)]
    assert pages[0] == pages[1]
    ends = [json.loads((folder / "e" / "experiment.json").read_text()) for folder in (here, there)]
    assert [end["conclusion"] for end in ends] == [ends[0]["conclusion"]] * 2
    assert [end["status"] for end in ends] == ["completed"] * 2


KILLED = """
import asyncio, os, signal, sys
from evsys_bus import Callback
from evsys_bus.demo import run_demo

class Kill(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        if (state.ctx.run_key, step_idx) == ("wide-s0", 17):
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run_demo(sys.argv[1], [Kill()], steps=30, eval_every=5))
"""


@pytest.mark.long
def test_the_demo_killed_without_warning_goes_on_from_the_last_checkpoints_and_counts_no_step_twice(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "e")], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = json.loads((tmp_path / "e" / "experiment.json").read_text())
    assert left["status"] == "running"
    assert [entry["status"] for entry in left["runs"].values()] == ["completed"] * 2 + ["running"] * 2 + ["pending"] * 2
    asyncio.run(run_demo(tmp_path / "e", [], resume=True, steps=30, eval_every=5))
    asyncio.run(run_demo(tmp_path / "undisturbed", [], steps=30, eval_every=5))
    for run in RUNS:
        assert metrics_of(tmp_path / "e" / run) == metrics_of(tmp_path / "undisturbed" / run)
        manifests = [read_json_lines(tmp_path / folder / run / "checkpoints.jsonl") for folder in ("e", "undisturbed")]
        assert [row["name"] for row in manifests[0]] == [row["name"] for row in manifests[1]]


def test_the_example_is_the_file_that_the_demo_runs():
    example = ROOT / "examples" / "digits.yaml"
    assert example.resolve() == DEMO_FILE.resolve()


@pytest.mark.parametrize("index", range(5))
def test_the_callbacks_of_the_demo_can_be_built(index):
    spec = demo_config().callbacks[index]
    assert {built.name for built in build_callbacks([spec])} == {CallbackSpec(**spec).kind}


async def test_a_snapshot_for_the_sampler_is_not_trained_any_further(tmp_path):
    split = load_split(0)
    network, batches = DigitNetwork(tmp_path, 0), DigitBatches(split.train, 0)
    snapshot = await network.snapshot_for_sampler()
    before = snapshot.predict_probabilities(split.val.pixels)
    await network.forward_backward(await batches.build_batch(0))
    await network.optim_step()
    assert (snapshot.predict_probabilities(split.val.pixels) == before).all()
    assert (network.predict_probabilities(split.val.pixels) != before).any()
