"""A run that was interrupted and resumed is the same run: real arithmetic, real files, real cancellation."""

import asyncio
import signal
from pathlib import Path

import anyio
import numpy as np
import pytest

from evsys_bus.callback import Callback
from evsys_bus.demo.digits import DigitBatches, DigitNetwork, load_split
from evsys_bus.training import TrainingLoop
from support.files import read_json_lines

STEPS = 24


class At(Callback):
    """Does something once, at the end of a step; notes how the run ended."""

    def __init__(self, step=None, act=None) -> None:
        self.step, self.act = step, act
        self.first_step = None
        self.ended = 0
        self.error = None

    def on_train_start(self, state):
        self.first_step = state.step

    def on_step_end(self, state, step_idx, batch, metrics):
        if step_idx == self.step:
            self.act(state)

    def on_train_end(self, state, artifacts):
        self.ended += 1
        self.error = state.error


def interrupt(state):
    """As what takes the machine away: the run is to go on some other time."""
    state.request_stop("the machine is needed")
    state.stopped_early = True


def digits_loop(run_dir, *callbacks, network=None, **more):
    split = load_split(seed=3)
    batches = DigitBatches(split.train, seed=3)
    network = network or DigitNetwork(run_dir / "checkpoints", seed=3)
    return TrainingLoop(
        network, batches, num_steps=STEPS, output_dir=run_dir, callbacks=callbacks, save_every=5, **more
    )


def metrics_of(run_dir):
    rows = read_json_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "step_seconds"} for row in rows]


def manifest_of(run_dir):
    rows = read_json_lines(run_dir / "checkpoints.jsonl")
    return [(row["name"], row["batch"], row["epoch"]) for row in rows]


class Stumbles(DigitNetwork):
    """Fails at its update number 13, those before a resume included."""

    updates = 0

    async def load_state(self, path):
        await super().load_state(path)
        with np.load(path) as saved:
            self.updates = int(saved["updates"])

    async def forward_backward(self, batch):
        if self.updates == 13:
            raise RuntimeError("the cluster is gone")
        return await super().forward_backward(batch)

    async def optim_step(self):
        self.updates += 1
        return await super().optim_step()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    asyncio.run(digits_loop(run_dir).run())
    return metrics_of(run_dir), manifest_of(run_dir)


async def test_an_interrupted_run_resumes_after_its_final_and_its_files_read_as_one_run(tmp_path, undisturbed):
    await digits_loop(tmp_path, At(11, interrupt)).run()
    assert manifest_of(tmp_path)[-1] == ("final", 11, 0)
    seen = At()
    await digits_loop(tmp_path, seen, resume=True).run()
    assert seen.first_step == 12
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == undisturbed


async def test_a_run_that_raised_resumes_from_its_last_checkpoint_and_runs_the_lost_steps_again(tmp_path, undisturbed):
    with pytest.raises(RuntimeError, match="cluster"):
        await digits_loop(tmp_path, network=Stumbles(tmp_path / "checkpoints", seed=3)).run()
    assert [row["step"] for row in metrics_of(tmp_path)] == list(range(13))
    assert manifest_of(tmp_path)[-1][0] == "step-000009"
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":13,"lo')  # as a kill may leave it
    with (tmp_path / "checkpoints.jsonl").open("ab") as file:
        file.write(b'{"name":"weights-only","batch":12,"sampler_path":"w"}\n{"name":"st')
    seen = At()
    await digits_loop(tmp_path, seen, resume=True).run()
    assert seen.first_step == 10
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == undisturbed


async def test_a_resume_killed_before_it_saved_anything_can_be_resumed_again(tmp_path, undisturbed):
    """The earlier ``final`` is all there is to go on from until the next checkpoint."""
    await digits_loop(tmp_path, At(11, interrupt)).run()
    with pytest.raises(RuntimeError, match="cluster"):
        await digits_loop(tmp_path, network=Stumbles(tmp_path / "checkpoints", seed=3), resume=True).run()
    seen = At()
    await digits_loop(tmp_path, seen, resume=True).run()
    assert seen.first_step == 12
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == undisturbed


async def test_the_state_that_a_resume_came_from_is_never_overwritten(tmp_path):
    """Else a kill between the new file and its row would leave a record that names the wrong state."""
    await digits_loop(tmp_path, At(11, interrupt)).run()
    came_from = tmp_path / "checkpoints" / "final.state.npz"
    before = came_from.read_bytes()
    artifacts = await digits_loop(tmp_path, resume=True).run()
    assert came_from.read_bytes() == before
    assert artifacts.checkpoints[-1].name == "final"
    assert artifacts.checkpoints[-1].state_path != str(came_from)


async def test_a_checkpoint_on_record_is_not_written_over_by_a_resume_that_stops_before_its_first_step(tmp_path):
    class Watches(DigitNetwork):
        async def save_state(self, name):
            saved.append(name)
            return await super().save_state(name)

    class StopsAtOnce(Callback):
        def on_train_start(self, state):
            interrupt(state)

        def on_checkpoint(self, state, row):
            told.append((row.name, row.batch))

    saved, told = [], []
    for last in (3, 6):
        stops = At(last, interrupt)
        await digits_loop(tmp_path, stops, resume=True, network=Watches(tmp_path / "checkpoints", seed=3)).run()
    before = (tmp_path / "checkpoints.jsonl").read_bytes()
    network = Watches(tmp_path / "checkpoints", seed=3)
    artifacts = await digits_loop(tmp_path, StopsAtOnce(), resume=True, network=network).run()
    assert len(set(saved)) == len(saved)
    assert (tmp_path / "checkpoints.jsonl").read_bytes() == before
    assert told == [("final", 6)]
    assert artifacts.checkpoints[-1].name == "final"


async def test_R13_of_two_checkpoints_after_the_same_step_the_later_one_is_resumed_from(tmp_path, undisturbed):
    """The earlier one may have been pruned."""

    class Prune(Callback):
        def on_checkpoint(self, state, row):
            for older in state.checkpoint_mgr.rows[:-1]:
                Path(older.state_path).unlink(missing_ok=True)

    await digits_loop(tmp_path, Prune(), At(9, interrupt)).run()
    assert [batch for _, batch, _ in manifest_of(tmp_path)[-2:]] == [9, 9]
    seen = At()
    await digits_loop(tmp_path, Prune(), seen, resume=True).run()
    assert seen.first_step == 10
    assert metrics_of(tmp_path) == undisturbed[0]


async def test_resume_of_a_directory_without_a_run_starts_at_the_start(tmp_path, undisturbed):
    seen = At()
    await digits_loop(tmp_path / "new", seen, resume=True).run()
    assert seen.first_step == 0
    assert metrics_of(tmp_path / "new") == undisturbed[0]


async def test_resume_of_a_run_that_is_done_changes_nothing(tmp_path, undisturbed):
    await digits_loop(tmp_path).run()
    await digits_loop(tmp_path, resume=True).run()
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == undisturbed


async def test_a_state_that_cannot_be_loaded_is_raised_and_nothing_is_cut(tmp_path):
    await digits_loop(tmp_path, At(11, interrupt)).run()
    before = metrics_of(tmp_path), manifest_of(tmp_path)
    (tmp_path / "checkpoints" / "final.state.npz").unlink()
    seen = At()
    with pytest.raises(FileNotFoundError):
        await digits_loop(tmp_path, seen, resume=True).run()
    assert isinstance(seen.error, FileNotFoundError)
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == before


async def test_R11_a_cancelled_run_finishes_its_step_saves_final_fires_train_end_and_is_cancelled(
    tmp_path, undisturbed
):
    task = asyncio.current_task()
    seen = At(7, lambda state: task.cancel())
    with pytest.raises(asyncio.CancelledError):
        await digits_loop(tmp_path, seen).run()
    task.uncancel()
    last = metrics_of(tmp_path)[-1]["step"]
    assert last in (7, 8)
    assert manifest_of(tmp_path)[-1] == ("final", last, 0)
    assert (seen.ended, seen.error) == (1, None)
    await digits_loop(tmp_path, resume=True).run()
    assert (metrics_of(tmp_path), manifest_of(tmp_path)) == undisturbed


async def test_a_deadline_of_asyncio_ends_the_run_in_order_and_as_a_timeout(tmp_path):
    seen = At(4, lambda state: deadline.reschedule(0))
    deadline = asyncio.timeout(60)

    async def run_in_time():
        async with deadline:
            await digits_loop(tmp_path, seen).run()

    with pytest.raises(TimeoutError):
        await run_in_time()
    assert manifest_of(tmp_path)[-1][0] == "final"
    assert seen.ended == 1


async def test_a_cancel_scope_of_anyio_that_cancels_again_and_again_counts_as_one_cancellation(tmp_path):
    class TakesItsTime(DigitNetwork):
        async def save_state(self, name):
            for _ in range(20):
                await asyncio.sleep(0)
            return await super().save_state(name)

    with anyio.CancelScope() as scope:
        seen = At(4, lambda state: scope.cancel())
        await digits_loop(tmp_path, seen, network=TakesItsTime(tmp_path / "checkpoints", seed=3)).run()
    assert scope.cancelled_caught
    assert manifest_of(tmp_path)[-1][0] == "final"
    assert (seen.ended, seen.error) == (1, None)


class Hangs(DigitNetwork):
    """Its steps never end; it can say when one has begun."""

    async def forward_backward(self, batch):
        self.hanging.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


async def test_a_second_cancellation_gives_up_at_once(tmp_path):
    network = Hangs(tmp_path / "checkpoints", seed=3)
    network.hanging = asyncio.Event()
    seen = At()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(digits_loop(tmp_path, seen, network=network).run())
        await network.hanging.wait()
        run.cancel()
        await asyncio.wait([run], timeout=0.05)
        assert not run.done(), "the first cancellation waits for the step"
        run.cancel()
        await asyncio.wait([run], timeout=5)
        assert run.cancelled()
    assert (seen.ended, type(seen.error)) == (1, asyncio.CancelledError)
    assert not (tmp_path / "checkpoints.jsonl").exists()


def test_a_run_on_uvloop_is_the_same_run(tmp_path, undisturbed):
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(digits_loop(tmp_path).run())
    assert metrics_of(tmp_path) == undisturbed[0]


def test_ctrl_c_ends_the_step_and_the_run_and_then_the_program(tmp_path):
    seen = At(5, lambda state: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(digits_loop(tmp_path, seen).run())
    assert manifest_of(tmp_path)[-1][0] == "final"
    assert seen.ended == 1
