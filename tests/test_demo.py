import asyncio
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from evsys_bus.callback import Callback
from evsys_bus.context import LoopState
from evsys_bus.demo import run_demo
from evsys_bus.demo.digits import DigitBatches, DigitBenchmark, DigitNetwork, load_split
from evsys_bus.events import BenchmarkEval


class Benchmarks(Callback):
    def __init__(self) -> None:
        self.scored = []

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.scored.append(BenchmarkEval(ctx, eval_result, predictions, step))


def metrics_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "step_seconds"} for row in rows]


def cli(*arguments):
    return [sys.executable, "-c", "from evsys_bus.cli import main; main()", "demo", *map(str, arguments)]


async def test_the_demo_reads_more_than_95_percent_of_digits_it_never_saw(tmp_path):
    result = await run_demo(tmp_path / "run")
    assert result.test.metrics["accuracy"] > 0.95
    assert result.steps_done == 1000
    assert result.seconds < 15


async def test_the_seed_decides_every_number(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        await run_demo(tmp_path / name, num_steps=30, seed=seed)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert metrics_of(tmp_path / "a") != metrics_of(tmp_path / "c")


async def test_R12_the_validation_benchmark_runs_in_the_loop_and_the_test_benchmark_after_it(tmp_path):
    seen = Benchmarks()
    await run_demo(tmp_path / "run", [seen], num_steps=60)
    *in_loop, after = seen.scored
    assert [(each.step, each.eval_result.step) for each in in_loop] == [(step, step) for step in range(9, 60, 10)]
    assert {each.eval_result.name for each in in_loop} == {"digits-val"}
    assert (after.step, after.eval_result.step, after.eval_result.tags) == (None, None, ["test"])
    assert after.ctx.run_key == "run"
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
    network = DigitNetwork(tmp_path, seed=0)
    batch = await DigitBatches(load_split(0).train, seed=0).build_batch(0)
    await network.forward_backward(batch)
    gradients = dict(network._gradients)
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
    assert [row["output"] for row in benchmark.predictions] == [str(n) for n in network.predict(split.val.pixels)]


def test_the_demo_killed_by_sigterm_in_the_middle_and_resumed_is_an_undisturbed_run(tmp_path):
    run_dir = tmp_path / "run"
    with subprocess.Popen(cli("--steps", 1500, "--output-dir", run_dir), stdout=subprocess.PIPE, text=True) as demo:
        for line in demo.stdout:
            if line.startswith("step 125/"):
                break
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=10)
    assert demo.returncode == -signal.SIGTERM
    stopped = metrics_of(run_dir)
    assert 125 <= len(stopped) < 1500, "it was not in the middle"
    last = json.loads((run_dir / "checkpoints.jsonl").read_text().splitlines()[-1])
    assert (last["name"], last["batch"]) == ("final", len(stopped) - 1)

    resumed = subprocess.run(
        cli("--steps", 1500, "--output-dir", run_dir, "--resume"), capture_output=True, text=True, check=True
    )
    asyncio.run(run_demo(tmp_path / "undisturbed", num_steps=1500))
    assert metrics_of(run_dir) == metrics_of(tmp_path / "undisturbed")
    manifests = [tmp_path / name / "checkpoints.jsonl" for name in ("run", "undisturbed")]
    names = [[json.loads(line)["name"] for line in path.read_text().splitlines()] for path in manifests]
    assert names[0] == names[1]
    assert f"step {len(stopped) + 1}/1500" in resumed.stdout


def test_the_demo_says_where_everything_is_and_needs_no_terminal(tmp_path):
    done = subprocess.run(
        cli("--steps", 40, "--output-dir", tmp_path / "run"), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("step 1/40  epoch 0  loss ")
    assert "test accuracy  0." in done.stdout
    assert str(tmp_path / "run" / "metrics.jsonl") in done.stdout
    assert str(tmp_path / "run" / "checkpoints.jsonl") in done.stdout
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout


def test_a_reader_that_leaves_does_not_end_the_training_or_its_good_exit_code(tmp_path):
    with subprocess.Popen(
        cli("--steps", 400, "--output-dir", tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        demo.stdout.readline()
        demo.stdout.close()
        errors = demo.stderr.read()
    assert demo.returncode == 0, errors
    assert len(metrics_of(tmp_path / "run")) == 400
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
