import asyncio
import logging

import pytest

from evsys_bus.callback import Callback
from evsys_bus.context import EvalResult, TrainingBatch
from evsys_bus.training import Benchmark, TrainingLoop
from support.files import read_json_lines
from support.training_parts import FixedEvaluator


class ToyBackend:
    """Counts its updates; what it saves are names."""

    def __init__(self, *, raises_at: int | None = None, error: BaseException | None = None) -> None:
        self.updates = 0
        self.raises_at = raises_at
        self.error = error or RuntimeError("out of memory")

    async def forward_backward(self, batch):
        if self.updates == self.raises_at:
            raise self.error
        return {"loss": 1 / (1 + self.updates)}

    async def optim_step(self):
        self.updates += 1

    async def save_state(self, name):
        return f"toy://{name}/state"

    async def save_weights_for_sampler(self, name):
        return f"toy://{name}/weights"

    async def load_state(self, path):
        raise AssertionError("nothing to load here")


class ToyBatches:
    def __init__(self, empty=()) -> None:
        self.empty = empty

    async def build_batch(self, step_idx):
        if step_idx in self.empty:
            return None if step_idx % 2 else TrainingBatch(data=[])
        return TrainingBatch(data=[step_idx], metrics={"tokens": 7})


class Recorder(Callback):
    """Notes every hook, and what the run's files said at that moment."""

    def __init__(self, on=None) -> None:
        self.seen = []
        self.states = []
        self.on = on or (lambda hook, state, step: None)

    def note(self, hook, state, *facts):
        self.seen.append((hook, *facts))
        self.states.append((hook, state.step, state.error))
        self.on(hook, state, state.step)

    def on_train_start(self, state):
        self.note("train_start", state, state.step)

    def on_step_end(self, state, step_idx, batch, metrics):
        self.note("step_end", state, step_idx)
        assert read_json_lines(state.output_dir / "metrics.jsonl")[-1] == {"step": step_idx, **metrics}

    def on_checkpoint(self, state, row):
        self.note("checkpoint", state, row.name, row.batch)
        assert read_json_lines(state.output_dir / "checkpoints.jsonl")[-1]["name"] == row.name

    def on_eval(self, state, step_idx, eval_name, metrics):
        self.note("eval", state, step_idx, eval_name, metrics)

    def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
        self.seen.append(("benchmark_eval", step, eval_result.step, eval_result.name, predictions))

    def on_train_end(self, state, artifacts):
        self.note("train_end", state)
        self.artifacts = artifacts


def stop_at(where, step):
    return lambda hook, state, now: state.request_stop("enough") if (hook, now) == (where, step) else None


def hooks(recorder):
    return [name for name, *_ in recorder.seen]


async def train(tmp_path, *, recorder=None, backend=None, num_steps=4, batches=None, **more):
    recorder = recorder or Recorder()
    loop = TrainingLoop(
        backend or ToyBackend(),
        batches or ToyBatches(),
        num_steps=num_steps,
        output_dir=tmp_path / "run",
        callbacks=[recorder],
        **more,
    )
    return loop, recorder, await loop.run()


async def test_hooks_fire_at_their_moments_and_in_their_order(tmp_path):
    evaluator = FixedEvaluator("val", 2, {"acc": 0.5})
    _, recorder, artifacts = await train(tmp_path, evaluators=[evaluator], save_every=3)
    assert recorder.seen == [
        ("train_start", 0),
        ("step_end", 0),
        ("step_end", 1),
        ("eval", 1, "val", {"acc": 0.5}),
        ("step_end", 2),
        ("checkpoint", "step-000002", 2),
        ("step_end", 3),
        ("eval", 3, "val", {"acc": 0.5}),
        ("checkpoint", "final", 3),
        ("train_end",),
    ]
    assert recorder.artifacts == artifacts or recorder.artifacts.checkpoints == artifacts.checkpoints
    assert [row.name for row in artifacts.checkpoints] == ["step-000002", "final"]
    assert artifacts.run_dir == str(tmp_path / "run")
    assert artifacts.total_requested_steps == 4


async def test_R10_rows_are_on_disk_before_the_hook_fires(tmp_path, caplog):
    """The recorder asserts it inside the hooks; a failure there would be isolated, and logged."""
    await train(tmp_path, save_every=2)
    assert not caplog.records
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["loss"] for row in metrics] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert all(row["tokens"] == 7 and row["step_seconds"] >= 0 for row in metrics)
    assert read_json_lines(tmp_path / "run" / "checkpoints.jsonl")[-1] == {
        "name": "final",
        "batch": 3,
        "epoch": 0,
        "state_path": "toy://final/state",
        "sampler_path": "toy://final/weights",
    }


@pytest.mark.parametrize("hook", ["step_end", "checkpoint", "eval"])
async def test_R5_a_stop_lets_the_step_finish_its_saves_and_evals_then_final_then_train_end(tmp_path, hook):
    recorder = Recorder(on=stop_at(hook, 1))
    evaluators = [FixedEvaluator("first", 2, {"a": 1}), FixedEvaluator("second", 2, {"b": 2})]
    loop, _, artifacts = await train(tmp_path, recorder=recorder, evaluators=evaluators, save_every=2)
    assert hooks(recorder)[1:] == ["step_end", "step_end", "checkpoint", "eval", "eval", "checkpoint", "train_end"]
    assert recorder.seen[-2] == ("checkpoint", "final", 1)
    assert loop.state.stop_reason == "enough"
    assert artifacts.total_requested_steps == 4


async def test_R5_a_stop_before_the_first_step_trains_nothing_and_still_ends_in_order(tmp_path):
    recorder = Recorder(on=stop_at("train_start", 0))
    await train(tmp_path, recorder=recorder)
    assert hooks(recorder) == ["train_start", "checkpoint", "train_end"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
async def test_R11_a_loop_that_raises_still_fires_train_end_with_the_error_and_saves_no_final(tmp_path, error):
    recorder = Recorder()
    with pytest.raises(type(error)) as raised:
        await train(tmp_path, recorder=recorder, backend=ToyBackend(raises_at=2, error=error))
    assert raised.value is error
    assert hooks(recorder) == ["train_start", "step_end", "step_end", "train_end"]
    assert recorder.states[-1] == ("train_end", 2, error)
    assert len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 2


async def test_R11_a_hook_that_leaves_the_program_reaches_the_caller_after_train_end(tmp_path):
    class Leaves(Recorder):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise SystemExit(9)

    recorder = Leaves()
    with pytest.raises(SystemExit):
        await train(tmp_path, recorder=recorder)
    assert hooks(recorder) == ["train_start", "train_end"]


async def test_R12_a_benchmark_fires_eval_then_benchmark_eval_with_the_0_based_step(tmp_path):
    rows = [{"task_id": "a", "reward": 1.0}]
    benchmark = Benchmark(EvalResult(name="digits", metrics={"acc": 1.0}, tags=["val"]), rows)
    _, recorder, _ = await train(tmp_path, num_steps=2, evaluators=[FixedEvaluator("digits", 2, benchmark)])
    at = hooks(recorder).index("eval")
    assert recorder.seen[at : at + 2] == [
        ("eval", 1, "digits", {"acc": 1.0}),
        ("benchmark_eval", 1, 1, "digits", rows),
    ]


class PanicException(BaseException):
    """As pyo3 raises it, for tokenizers and polars."""


@pytest.mark.parametrize(
    "fault", [ValueError("bad"), asyncio.CancelledError(), PanicException("unwrap"), "not a score", None]
)
async def test_R3_a_failing_evaluator_is_logged_by_name_and_the_others_and_the_loop_go_on(tmp_path, caplog, fault):
    evaluators = [FixedEvaluator("broken", 1, fault), FixedEvaluator("sound", 4, {"acc": 1.0})]
    loop, recorder, _ = await train(tmp_path, evaluators=evaluators)
    assert ("eval", 3, "sound", {"acc": 1.0}) in recorder.seen
    assert recorder.seen[-1] == ("train_end",)
    assert loop.failed_evals == {"broken": 4}
    said = [record for record in caplog.records if record.message.startswith("evaluator.failed")]
    assert said[0].levelno == logging.WARNING
    assert said[0].evaluator == "broken"
    assert said[0].exc_info is not None


@pytest.mark.parametrize("leave", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_an_evaluator_that_wants_to_leave_the_program_is_let_go_after_train_end(tmp_path, leave):
    recorder = Recorder()
    with pytest.raises(leave):
        await train(tmp_path, recorder=recorder, evaluators=[FixedEvaluator("leaves", 1, leave())])
    assert hooks(recorder) == ["train_start", "step_end", "train_end"]


async def test_R3_a_raising_hook_changes_nothing_for_the_loop(tmp_path, caplog):
    class Raises(Recorder):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise ValueError("a hook")

    _, recorder, artifacts = await train(tmp_path, recorder=Raises())
    assert hooks(recorder) == ["train_start", "checkpoint", "train_end"]
    assert [row.name for row in artifacts.checkpoints] == ["final"]
    assert "hook.failed" in caplog.text


async def test_empty_batches_are_skipped_and_said_once_with_their_count_and_what_is_due_still_happens(tmp_path, caplog):
    loop, recorder, _ = await train(tmp_path, batches=ToyBatches(empty=(1, 2)), save_every=2)
    assert [fact for fact in recorder.seen if fact[0] == "step_end"] == [("step_end", 0), ("step_end", 3)]
    assert ("checkpoint", "step-000001", 1) in recorder.seen
    assert loop.skipped_steps == 2
    [said] = [each for each in caplog.records if each.message.startswith("step.skipped")]
    assert said.levelname == "WARNING"
    assert "count=2" in said.message
    assert [row["step"] for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 3]


async def test_a_batch_whose_data_the_backend_holds_is_not_empty(tmp_path):
    class NoData(ToyBatches):
        async def build_batch(self, step_idx):
            return TrainingBatch()

    loop, _, _ = await train(tmp_path, batches=NoData())
    assert loop.skipped_steps == 0


async def test_keys_that_a_hook_derives_reach_later_callbacks_but_not_the_row_on_disk(tmp_path):
    class Derives(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            metrics["perplexity"] = 2.0

    class Reads(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            assert metrics["perplexity"] == 2.0
            self.read = True

    reads = Reads()
    loop = TrainingLoop(
        ToyBackend(), ToyBatches(), num_steps=1, output_dir=tmp_path / "run", callbacks=[Derives(), reads]
    )
    await loop.run()
    assert reads.read
    assert "perplexity" not in read_json_lines(tmp_path / "run" / "metrics.jsonl")[0]


async def test_a_metric_called_step_does_not_displace_the_step(tmp_path):
    class CountsFromOne(ToyBackend):
        async def optim_step(self):
            await super().optim_step()
            return {"step": self.updates}

    await train(tmp_path, backend=CountsFromOne())
    assert [row["step"] for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
