"""A followed callback: its hooks get every event in order, with detached objects, and hurt nobody but themselves."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from evsys_bus import (
    BenchmarkEval,
    Callback,
    Envelope,
    EvalResult,
    ExperimentStart,
    LogContext,
    LoopState,
    RunEnd,
    RunStart,
    StepEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.context import ArmResult, RunResult
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import DetachedError, NotAttachedError
from evsys_bus.events import UnknownEvent
from evsys_bus.journal import JournalWriter
from support.couriers import read_dead_letters, read_status

CTX = LogContext(output_dir=Path("/out"), run_key="run-a")
STATE = LoopState(step=0, num_steps=9, output_dir=Path("/out/run-a"), ctx=CTX, backend=object())


def envelope(event, sequence=1):
    return Envelope("r0-1", sequence, 1.0, event, "run-a", 0)


def step(number):
    return envelope(StepEnd(STATE, number, TrainingBatch(), {"loss": 0.5}), number + 1)


@pytest.fixture
def write(journal):
    writer = JournalWriter(journal).open()

    def append(*events):
        for event in events:
            run = None if isinstance(event, ExperimentStart) else "run-a"
            payload = encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, run))
            writer.append(payload, essential=isinstance(event, ExperimentStart | RunStart | TrainStart))

    yield append
    writer.close()


def steps(count):
    return [StepEnd(STATE, number, TrainingBatch(), {"loss": 0.5}) for number in range(count)]


async def deliver(journal, callback, on_failure="count", **options):
    courier = Courier(journal, "it", callback, DeliveryPolicy(on_failure=on_failure), **options)
    courier.finish()
    await asyncio.wait_for(courier.run(), 10)
    return courier


class Keeps(Callback):
    def __init__(self):
        self.calls = []

    def on_run_start(self, ctx):
        self.calls.append(("run_start", ctx))

    def on_train_start(self, state):
        self.calls.append(("train_start", state))

    def on_step_end(self, state, step_idx, batch, metrics):
        self.calls.append((step_idx, state))

    @property
    def steps(self):
        return [each for each, _ in self.calls if type(each) is int]


async def test_hooks_are_called_in_order_with_detached_objects(journal, write):
    write(RunStart(CTX), TrainStart(STATE), *steps(700))
    kept = Keeps()
    await deliver(journal, kept)
    assert [each for each, _ in kept.calls] == ["run_start", "train_start", *range(700)]
    ctx, state = kept.calls[0][1], kept.calls[-1][1]
    assert state.ctx is ctx
    assert (state.num_steps, ctx.run_key) == (9, "run-a")
    with pytest.raises(DetachedError):
        _ = state.backend
    with pytest.raises(DetachedError):
        state.request_stop("no")


async def test_fields_that_are_keywords_are_given_by_name(journal, write):
    class Scores(Callback):
        def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
            self.got = (ctx.run_key, eval_result.name, predictions, step)

    write(BenchmarkEval(CTX, EvalResult("math"), [], 3))
    scores = Scores()
    await deliver(journal, scores)
    assert scores.got == ("run-a", "math", [], 3)


async def test_what_a_hook_writes_into_ids_reaches_the_later_hooks_of_its_run(journal, write):
    class Logger(Callback):
        def on_experiment_start(self, ctx):
            ctx.ids["experiment_id"] = "e1"

        def on_run_start(self, ctx):
            ctx.ids["run_id"] = "r1"
            ctx.extras["url"] = "http://r1"

        def on_run_end(self, ctx, run_result, arm):
            self.ids, self.extras = ctx.ids, ctx.extras

        def on_step_end(self, state, step_idx, batch, metrics):
            self.at_step = dict(state.ctx.ids)

    experiment = LogContext(output_dir=Path("/out"))
    write(ExperimentStart(experiment), RunStart(CTX), *steps(1), RunEnd(CTX, RunResult(), ArmResult("a")))
    logger = Logger()
    await deliver(journal, logger)
    assert logger.at_step == logger.ids == {"experiment_id": "e1", "run_id": "r1"}
    assert logger.extras == {"url": "http://r1"}


async def test_a_callback_that_is_built_anew_is_rewound_and_introduced(journal, write):
    class Writes(Keeps):
        rewound = None

        def mark(self):
            return {"rows": len(self.steps)}

        def rewind(self, mark):
            self.rewound = mark

    write(RunStart(CTX), TrainStart(STATE), *steps(3))
    await deliver(journal, Writes())
    write(*steps(5)[3:])
    anew = Writes()
    await deliver(journal, anew)
    assert anew.rewound == {"rows": 3}
    assert [each for each, _ in anew.calls] == ["run_start", "train_start", 3, 4]
    assert anew.calls[1][1].step == 3
    assert read_status(journal).delivered == 7


class Raises(Keeps):
    """Raises at step 1, so many times."""

    def __init__(self, error, times=1 << 30):
        super().__init__()
        self.error, self.times = error, times

    def on_step_end(self, state, step_idx, batch, metrics):
        if step_idx == 1 and self.times:
            self.times -= 1
            raise self.error
        super().on_step_end(state, step_idx, batch, metrics)


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError(), MemoryError(), Odd()],
    ids=lambda each: type(each).__name__,
)
async def test_whatever_a_hook_raises_the_next_event_comes_and_it_is_counted_and_logged(journal, write, caplog, error):
    write(*steps(3))
    raises = Raises(error)
    await deliver(journal, raises)
    assert raises.steps == [0, 2]
    one = read_status(journal)
    assert (one.delivered, one.dead, one.pending) == (3, 0, 0)
    assert one.hook_failures == 1
    said = [each for each in caplog.records if each.levelname == "WARNING"]
    assert len(said) == 1
    assert "on_step_end" in said[0].getMessage()
    assert said[0].exc_info[1] is error


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt("bad row")])
async def test_a_failure_that_means_dead_makes_a_dead_letter(journal, write, error):
    write(*steps(3))
    raises = Raises(error)
    await deliver(journal, raises, "dead")
    assert raises.steps == [0, 2]
    assert (read_status(journal).delivered, read_status(journal).dead) == (2, 1)
    (letter,) = read_dead_letters(journal)
    assert letter["why"] == f"{type(error).__name__}: bad row"
    assert letter["event"]["event"]["step_idx"] == 1


async def hooks_of(callback, on_failure="retry", reports=None, **options):
    receiver = CallbackReceiver(callback, on_failure, faults=FaultLog(), **options)
    await receiver.open([].append if reports is None else reports.append)
    return receiver


async def test_a_failure_that_means_retry_is_tried_again_and_told():
    reports = []
    raises = Raises(ValueError("busy"), times=2)
    receiver = await hooks_of(raises, reports=reports, retry_pauses=(0.001, 0.002))
    taken = await receiver.deliver([step(0), step(1), step(2)], [1, 1, 1])
    assert (taken.handled, taken.rejected) == (3, {})
    assert raises.steps == [0, 1, 2]
    assert [each and (each.state, each.error, each.attempts) for each in reports] == [
        ("retrying", "ValueError: busy", 1),
        ("retrying", "ValueError: busy", 2),
        None,
    ]


async def test_after_its_tries_it_is_a_dead_letter():
    raises = Raises(ValueError("busy"))
    receiver = await hooks_of(raises, retry_pauses=(0.001, 0.002))
    taken = await receiver.deliver([step(0), step(1), step(2)], [1, 1, 1])
    assert (taken.handled, dict(taken.rejected)) == (3, {1: "ValueError: busy"})
    assert raises.steps == [0, 2]
    assert receiver.failures == 3


async def test_a_hook_that_blocks_holds_up_its_own_courier_only(journal, write):
    write(*steps(2))
    release = threading.Event()

    class Blocks(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            release.wait(10)

    def run(callback, name):
        courier = Courier(journal, name, callback, DeliveryPolicy())
        courier.finish()
        asyncio.run(courier.run())

    blocked = threading.Thread(target=run, args=(Blocks(), "blocks"))
    blocked.start()
    kept = Keeps()
    await asyncio.to_thread(run, kept, "goes")
    assert kept.steps == [0, 1]
    assert blocked.is_alive()
    release.set()
    await asyncio.to_thread(blocked.join, 10)


async def test_spawn_works_in_followed_hooks_and_the_close_waits_for_the_tasks(journal, write):
    done = []

    class Uploads(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            assert self.spawn(self.upload, step_idx, lane="one")

        async def upload(self, number):
            await asyncio.sleep(0.002)
            done.append(number)

    write(*steps(20))
    uploads = Uploads()
    await deliver(journal, uploads)
    assert done == list(range(20))
    with pytest.raises(NotAttachedError):
        uploads.spawn(uploads.upload, 1)


async def test_a_task_that_never_ends_does_not_hold_the_close(caplog):
    class Hangs(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(self.hang)

        async def hang(self):
            await asyncio.Event().wait()

    receiver = await hooks_of(Hangs(), drain_seconds=0.02, task_wait_seconds=0.05)
    await receiver.deliver([step(0)], [1])
    await asyncio.wait_for(receiver.close(), 3)


async def test_a_failing_task_is_logged_and_nothing_else(journal, write, caplog):
    class Uploads(Keeps):
        def on_step_end(self, state, step_idx, batch, metrics):
            super().on_step_end(state, step_idx, batch, metrics)
            self.spawn(self.upload)

        async def upload(self):
            raise ValueError("no route")

    write(*steps(3))
    uploads = Uploads()
    await deliver(journal, uploads)
    assert uploads.steps == [0, 1, 2]
    assert "task.failed" in caplog.text


async def test_many_more_tasks_than_may_wait_are_all_taken_on():
    done, accepted = [], []

    class Uploads(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            accepted.append(self.spawn(self.upload, step_idx))

        async def upload(self, number):
            await asyncio.sleep(0.001)
            done.append(number)

    receiver = await hooks_of(Uploads())
    for first in range(0, 20_000, 500):
        await receiver.deliver([step(each) for each in range(first, first + 500)], [1] * 500)
    await receiver.close()
    assert all(accepted)
    assert len(done) == 20_000


async def test_in_slices_it_works_no_longer_than_that_at_a_stretch():
    class Works(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            until = time.perf_counter() + 0.0005
            while time.perf_counter() < until:
                pass

    receiver = await hooks_of(Works(), slice_seconds=0.001)
    turns = 0
    running = True

    async def others():
        nonlocal turns
        while running:
            turns += 1
            await asyncio.sleep(0)

    async def take():
        nonlocal running
        await receiver.deliver([step(each) for each in range(100)], [1] * 100)
        running = False

    await asyncio.gather(others(), take())
    assert turns > 25


async def test_an_event_whose_class_is_not_known_here_reaches_the_hook_of_its_name():
    seen = []

    class Rollouts(Callback):
        def on_rollout_scored(self, reward, lengths):
            seen.append((reward, lengths))

    receiver = await hooks_of(Rollouts(), "count")
    event = UnknownEvent("rollout_scored", {"reward": 0.5, "lengths": [3, 4]})
    assert (await receiver.deliver([envelope(event)], [1])).rejected == {}
    assert seen == [(0.5, [3, 4])]


async def test_one_that_does_not_fit_the_hook_is_a_dead_letter_with_the_reason(journal, write):
    class Rollouts(Callback):
        def on_rollout_scored(self, reward): ...

    receiver = await hooks_of(Rollouts(), "count")
    batch = [step(0), envelope(UnknownEvent("rollout_scored", {"reward": 0.5, "lengths": []})), step(1)]
    taken = await receiver.deliver(batch, [1] * 3)
    assert taken.handled == 3
    assert [*taken.rejected] == [1]
    assert "rollout_scored" in taken.rejected[1]
    assert "too many positional arguments" in taken.rejected[1]
    assert receiver.failures == 0


async def test_one_that_the_callback_has_no_hook_for_is_delivered_as_any_event():
    receiver = await hooks_of(Keeps(), "count")
    assert (await receiver.deliver([envelope(UnknownEvent("rollout_scored", {}))], [1])).rejected == {}
