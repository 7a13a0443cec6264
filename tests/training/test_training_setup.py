import pytest

from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback
from evsys_bus.context import LogContext, TrainingBatch
from evsys_bus.errors import HookError, TrainingError
from evsys_bus.training import TrainingLoop


class Nothing:
    """A backend and a step builder that cost nothing."""

    async def build_batch(self, step_idx):
        return TrainingBatch()

    async def forward_backward(self, batch):
        return {"loss": 0.0}

    async def optim_step(self):
        return None

    async def save_state(self, name):
        return f"nothing://{name}/state"

    async def save_weights_for_sampler(self, name):
        return f"nothing://{name}/weights"

    async def load_state(self, path):
        pass


class Starts(Callback):
    def __init__(self) -> None:
        self.runs = []

    def on_train_start(self, state):
        self.runs.append(state.ctx.run_key)


def loop_of(output_dir=None, num_steps=2, **more):
    return TrainingLoop(Nothing(), Nothing(), num_steps=num_steps, output_dir=output_dir, **more)


async def test_a_bus_that_was_given_is_used_and_left_open(tmp_path):
    starts = Starts()
    async with EventBus([starts]) as bus:
        for name in ("a", "b"):
            await loop_of(tmp_path / name, bus=bus).run()
    assert starts.runs == ["a", "b"]


async def test_a_loop_has_the_health_and_the_receipt_of_its_bus(tmp_path):
    loop = loop_of(tmp_path / "own")
    assert (loop.health().state, loop.receipt) == ("new", None)
    await loop.run()
    assert loop.health().state == "closed"
    assert not loop.receipt.unfinished
    async with EventBus() as bus:
        borrowed = loop_of(tmp_path / "borrowed", bus=bus)
        await borrowed.run()
        assert (borrowed.health().state, borrowed.receipt) == ("open", None)
    assert borrowed.receipt is bus.receipt


async def test_the_context_that_was_given_decides_the_directory_and_reaches_the_hooks(tmp_path):
    ctx = LogContext(output_dir=tmp_path, run_key="arm-0")
    loop = loop_of(ctx=ctx)
    await loop.run()
    assert loop.state.ctx is ctx
    assert (tmp_path / "arm-0" / "metrics.jsonl").exists()


@pytest.mark.parametrize("run_key", ["../outside", "a/../../outside", "..", "/tmp/outside"])
def test_a_run_key_that_leads_out_of_the_experiments_directory_is_refused(tmp_path, run_key):
    with pytest.raises(TrainingError, match="leads out of") as refused:
        loop_of(ctx=LogContext(tmp_path / "e", run_key=run_key))
    assert refused.value.fix.startswith("give the ctx a run_key")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_key", ["x" * 300, "a\0b", "\ud800"])
async def test_a_run_key_that_no_folder_can_have_is_a_clear_error(tmp_path, run_key):
    with pytest.raises(TrainingError, match="cannot be written"):
        await loop_of(ctx=LogContext(tmp_path, run_key=run_key)).run()


async def test_an_output_dir_that_was_said_may_lie_anywhere_and_a_run_key_may_be_a_path_inside(tmp_path):
    ctx = LogContext(tmp_path / "e", run_key="../outside")
    await loop_of(tmp_path / "here", ctx=ctx).run()
    await loop_of(ctx=LogContext(tmp_path / "e", run_key="nested/fine")).run()
    assert (tmp_path / "here" / "metrics.jsonl").exists()
    assert (tmp_path / "e" / "nested" / "fine" / "metrics.jsonl").exists()


async def test_no_callbacks_and_no_steps_is_a_run_too(tmp_path):
    artifacts = await loop_of(tmp_path / "run", num_steps=0, callbacks=None).run()
    assert [(row.name, row.batch) for row in artifacts.checkpoints] == [("final", -1)]


async def test_a_directory_that_holds_a_run_is_not_mixed_with_another(tmp_path):
    await loop_of(tmp_path).run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already"):
        await loop_of(tmp_path).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


async def test_a_directory_that_cannot_be_made_is_a_clear_error_before_the_first_hook(tmp_path):
    (tmp_path / "file").write_text("")
    starts = Starts()
    with pytest.raises(TrainingError, match="cannot be written"):
        await loop_of(tmp_path / "file" / "run", callbacks=[starts]).run()
    assert not starts.runs


async def test_a_loop_runs_once(tmp_path):
    loop = loop_of(tmp_path)
    await loop.run()
    with pytest.raises(TrainingError, match="ran already"):
        await loop.run()


def test_arguments_that_do_not_fit_together_are_refused_at_once(tmp_path):
    with pytest.raises(TrainingError, match="nowhere to write"):
        loop_of()
    with pytest.raises(TrainingError, match="not both"):
        loop_of(tmp_path, callbacks=[], bus=EventBus())


def test_a_hook_that_could_never_be_called_is_refused_before_training(tmp_path):
    class Async(Callback):
        async def on_step_end(self, state, step_idx, batch, metrics):
            pass

    with pytest.raises(HookError):
        loop_of(tmp_path, callbacks=[Async()])
