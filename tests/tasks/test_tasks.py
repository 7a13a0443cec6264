import asyncio
import contextlib
import dataclasses
import logging
import sys
import threading
import time

import anyio
import pytest
import stamina

from evsys_bus import Callback, EventBus, RunStart, StepEnd
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import BusError, BusNotOpenError, NotAttachedError, SpawnError
from evsys_bus.tasks import Job, TaskCounts, TaskManager


class Starts(Callback):
    """Calls ``start(self)`` in on_step_end."""

    def __init__(self, start):
        self.start = start

    def on_step_end(self, state, step_idx, batch, metrics):
        self.start(self)


class Tally:
    def __init__(self):
        self.began = 0
        self.done = 0
        self.most_at_once = 0

    async def work(self, seconds=0.05):
        self.began += 1
        self.most_at_once = max(self.most_at_once, self.began - self.done)
        await asyncio.sleep(seconds)
        self.done += 1


def publish_one(bus):
    bus.publish(StepEnd(None, 0, None, {}))


async def test_200_spawned_tasks_of_the_last_hook_complete():
    tally = Tally()
    async with EventBus([Starts(lambda self: [self.spawn(tally.work) for _ in range(200)])]) as bus:
        publish_one(bus)
    assert tally.done == 200
    assert bus.receipt.tasks == TaskCounts(spawned=200, completed=200)
    assert bus.receipt.tasks_by_owner["Starts"].completed == 200
    assert tally.most_at_once <= 32


def test_200_spawned_tasks_complete_in_a_program_without_a_loop():
    tally = Tally()
    with EventBus([Starts(lambda self: [self.spawn(tally.work) for _ in range(200)])]) as bus:
        publish_one(bus)
    assert tally.done == 200
    assert bus.receipt.tasks == TaskCounts(spawned=200, completed=200)


async def test_R2_200_bare_tasks_of_the_last_hook_complete():
    tally = Tally()
    async with EventBus([Starts(lambda self: [asyncio.create_task(tally.work()) for _ in range(200)])]) as bus:
        publish_one(bus)
    assert tally.done == 200
    assert bus.receipt.tasks == TaskCounts(adopted=200, completed=200)
    assert bus.receipt.tasks_by_owner["Starts"].adopted == 200


async def test_R2_what_an_adopted_task_raises_is_logged_and_harms_nothing(caplog):
    tally = Tally()

    async def fails():
        raise OSError("upload refused")

    def start(_):
        asyncio.create_task(fails(), name="upload")
        asyncio.create_task(tally.work())

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    assert tally.done == 1
    assert bus.receipt.tasks == TaskCounts(adopted=2, completed=1, failed=1)
    [record] = caplog.records
    assert (record.levelname, record.owner, record.task) == ("WARNING", "Starts", "upload")
    assert "upload refused" in str(record.exc_info[1])


async def test_R2_a_task_made_by_ensure_future_or_gather_is_adopted_too():
    tally = Tally()

    def start(_):
        asyncio.ensure_future(tally.work())
        asyncio.gather(tally.work(), tally.work())
        asyncio.get_running_loop().create_task(tally.work())

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    assert tally.done == 4
    assert bus.receipt.tasks.adopted == 4


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_R2_without_a_loop_the_warning_says_to_use_spawn(caplog):
    tally = Tally()
    with EventBus([Starts(lambda _: asyncio.create_task(tally.work()))]) as bus:
        publish_one(bus)
    assert "self.spawn" in caplog.records[0].fix
    assert "no running event loop" in str(caplog.records[0].exc_info[1])


async def test_R2_tasks_made_outside_hooks_are_neither_awaited_nor_cancelled():
    forever = asyncio.create_task(asyncio.sleep(3600))
    starts = Starts(lambda _: None)
    async with EventBus([starts]) as bus:
        inside = asyncio.create_task(asyncio.sleep(3600))
        publish_one(bus)
        grandchild = []

        async def makes_one():
            grandchild.append(asyncio.create_task(asyncio.sleep(3600)))

        starts.start = lambda _: asyncio.create_task(makes_one())
        publish_one(bus)
    for task in (forever, inside, *grandchild):
        assert not task.done()
        task.cancel()
    assert len(grandchild) == 1
    assert bus.receipt.tasks == TaskCounts(adopted=1, completed=1)
    await asyncio.wait([forever, inside, *grandchild])


async def test_a_task_made_by_a_task_group_stays_with_its_group():
    tally = Tally()
    async with EventBus([]) as bus, asyncio.TaskGroup() as theirs, anyio.create_task_group() as anyios:

        def start(_):
            theirs.create_task(tally.work())
            anyios.start_soon(tally.work)

        bus.add(Starts(start))
        publish_one(bus)
        assert bus.health().tasks == TaskCounts()
    assert tally.done == 2


async def test_adoption_works_beside_another_task_factory_and_gives_it_back():
    made = []

    def theirs(loop, coro, **options):
        made.append(options)
        return asyncio.Task(coro, loop=loop, **options)

    loop, tally = asyncio.get_running_loop(), Tally()
    loop.set_task_factory(theirs)
    async with EventBus([Starts(lambda _: asyncio.create_task(tally.work(), name="mine"))]) as bus:
        publish_one(bus)
        loop.create_task(tally.work(), context=None)
    assert bus.receipt.tasks == TaskCounts(adopted=1, completed=1)
    assert loop.get_task_factory() is theirs
    assert len(made) >= 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.asyncio(loop_factories=["asyncio"])  # uvloop and eager tasks do not go together on 3.13.0
async def test_adoption_works_beside_eager_tasks():
    loop, tally, order = asyncio.get_running_loop(), Tally(), []

    async def at_once():
        order.append("began")

    def start(_):
        asyncio.create_task(at_once())
        order.append("made")
        asyncio.create_task(tally.work())

    loop.set_task_factory(asyncio.eager_task_factory)
    try:
        async with EventBus([Starts(start)]) as bus:
            publish_one(bus)
            bus.spawn(tally.work)
    finally:
        loop.set_task_factory(None)
    assert order == ["began", "made"]
    assert tally.done == 2
    assert bus.receipt.tasks == TaskCounts(spawned=1, adopted=2, completed=3)


async def test_the_factory_drops_eager_start_none_that_newer_pythons_pass():
    def strict(loop, coro, *, context=None):
        return asyncio.Task(coro, loop=loop, context=context)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(strict)
    try:
        async with EventBus([]):
            await loop.get_task_factory()(loop, asyncio.sleep(0), eager_start=None)
    finally:
        loop.set_task_factory(None)


async def test_two_buses_on_one_loop_each_adopt_their_own_and_the_last_gives_the_factory_back():
    loop, tally = asyncio.get_running_loop(), Tally()
    before = loop.get_task_factory()
    outer = EventBus([Starts(lambda _: asyncio.create_task(tally.work()))])
    inner = EventBus([Starts(lambda _: asyncio.create_task(tally.work()))])
    async with outer:
        async with inner:
            publish_one(inner)
            publish_one(outer)
            publish_one(outer)
        assert inner.receipt.tasks.adopted == 1
        assert loop.get_task_factory() is not before
        publish_one(outer)
    assert outer.receipt.tasks.adopted == 3
    assert loop.get_task_factory() is before
    assert tally.done == 4


async def test_a_factory_that_the_host_sets_later_ends_adoption_with_one_warning(caplog):
    loop = asyncio.get_running_loop()
    async with EventBus([], blocked_hook_seconds=0.02) as bus:
        assert bus.health().adoption == "on"
        loop.set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop, **options))
        while bus.health().adoption == "on":
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["adoption.ended"]


def test_adoption_reaches_a_loop_on_another_thread_once_a_run_starts_there(tmp_path):
    from evsys_bus import LogContext

    tally = Tally()

    async def train(bus):
        bus.publish(RunStart(LogContext(output_dir=tmp_path)))
        publish_one(bus)
        await bus.drain()

    with EventBus([Starts(lambda _: asyncio.create_task(tally.work()))]) as bus:
        thread = threading.Thread(target=asyncio.run, args=(train(bus),))
        thread.start()
        thread.join()
    assert tally.done == 1
    assert bus.receipt.tasks == TaskCounts(adopted=1, completed=1)


@pytest.mark.parametrize("bare", [False, True])
async def test_200_tasks_complete_when_the_body_raises_and_when_a_sibling_fails(bare):
    tally = Tally()

    async def fails():
        raise OSError("upload refused")

    def start(self):
        for fn in [fails, *[tally.work] * 200]:
            if bare:
                asyncio.create_task(fn())
            else:
                self.spawn(fn)

    with pytest.raises(ValueError, match="training failed"):
        async with EventBus([Starts(start)]) as bus:
            publish_one(bus)
            raise ValueError("training failed")
    assert tally.done == 200
    assert (bus.receipt.tasks.completed, bus.receipt.tasks.failed) == (200, 1)


async def test_200_tasks_complete_when_the_body_is_cancelled_and_again_while_draining():
    tally, draining = Tally(), asyncio.Event()

    async def train():
        async with EventBus([Starts(lambda self: [self.spawn(tally.work) for _ in range(200)])]) as bus:
            publish_one(bus)
            draining.set()
            await asyncio.sleep(3600)

    task = asyncio.create_task(train())
    await draining.wait()
    task.cancel()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tally.done == 200


async def test_an_anyio_cancel_scope_does_not_cut_the_drain_short_nor_spin():
    tally = Tally()
    with anyio.CancelScope() as scope:
        try:
            async with EventBus([Starts(lambda self: [self.spawn(tally.work) for _ in range(40)])]) as bus:
                publish_one(bus)
                scope.cancel()
                await asyncio.sleep(3600)
        finally:
            cancellations = asyncio.current_task().cancelling()  # anyio repeats its own each time the loop turns
    assert scope.cancelled_caught
    assert tally.done == 40
    assert cancellations < 5


async def test_what_outlives_the_deadline_is_cancelled_and_counted():
    tally = Tally()

    async def forever():
        await asyncio.sleep(3600)

    def start(self):
        self.spawn(forever)
        self.spawn(tally.work)
        asyncio.create_task(forever())

    async with EventBus([Starts(start)], drain_timeout=0.2) as bus:
        publish_one(bus)
    assert bus.receipt.tasks == TaskCounts(spawned=2, adopted=1, completed=1, cancelled=2)
    assert bus.receipt.unfinished == ()


async def test_what_swallows_cancellation_is_left_and_named_within_a_second_more(caplog):
    ends = asyncio.Event()

    async def stubborn():
        while not ends.is_set():
            try:
                await ends.wait()
            except asyncio.CancelledError:
                pass

    began = asyncio.get_running_loop().time()
    async with EventBus([Starts(lambda self: self.spawn(stubborn))], drain_timeout=0.1) as bus:
        publish_one(bus)
    assert asyncio.get_running_loop().time() - began < 0.1 + 1 + 1
    assert bus.receipt.unfinished == ("Starts:stubborn",)
    assert "Starts:stubborn" in caplog.text
    ends.set()
    await asyncio.sleep(0)


def test_a_task_that_blocks_the_loops_thread_does_not_hold_the_exit_up(caplog):
    release = threading.Event()

    async def blocks():
        release.wait(15)

    with EventBus([Starts(lambda self: self.spawn(blocks))], drain_timeout=0.1) as bus:
        publish_one(bus)
    assert not release.is_set()
    release.set()
    assert bus.receipt.unfinished == ("Starts:blocks",)


async def test_a_task_that_was_cancelled_before_its_first_step_is_counted():
    tally = Tally()
    manager = TaskManager(asyncio.get_running_loop, FaultLog(), max_running=1)
    for _ in range(3):
        manager.spawn(Job(tally.work, (), owner="program", name=None, timeout=None, retry=None, lane=None))
    manager.cancel_all()
    receipt = await manager.drain(5, close=True)
    assert tally.began == 0
    assert receipt.tasks == TaskCounts(spawned=3, cancelled=3)


async def test_more_than_may_wait_are_refused_counted_and_logged(caplog):
    tally, accepted = Tally(), []

    def start(self):
        accepted.extend(self.spawn(tally.work) for _ in range(20))

    async with EventBus([Starts(start)], max_running_tasks=4, max_waiting_tasks=10) as bus:
        publish_one(bus)
        assert (bus.health().tasks_running, bus.health().tasks_waiting) == (4, 10)
    assert accepted == [True] * 14 + [False] * 6
    assert tally.done == 14
    assert bus.receipt.tasks == TaskCounts(spawned=14, completed=14, refused=6)
    assert caplog.records[0].why == "10 tasks wait already"


async def test_tasks_of_one_lane_run_one_after_another_in_order_and_lanes_beside_each_other():
    order, tally = [], Tally()

    async def work(lane, number):
        order.append((lane, number))
        await tally.work(0.01)
        order.append((lane, number))

    def start(self):
        for number in range(5):
            for lane in ("a", "b"):
                self.spawn(work, lane, number, lane=lane)

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    for lane in ("a", "b"):
        assert [each for each in order if each[0] == lane] == [(lane, n) for n in range(5) for _ in range(2)]
    assert tally.most_at_once == 2


async def test_a_lane_goes_on_after_a_task_of_it_failed(caplog):
    tally = Tally()

    async def fails():
        raise OSError

    def start(self):
        self.spawn(fails, lane="a")
        self.spawn(tally.work, lane="a")

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    assert tally.done == 1


async def test_a_retry_policy_of_a_library_is_followed_and_its_retries_counted():
    attempts = []

    async def flaky(part):
        attempts.append(part)
        if len(attempts) < 3:
            raise OSError("try again")

    policy = stamina.AsyncRetryingCaller(attempts=5, wait_initial=0.001, wait_max=0.002).on(OSError)
    async with EventBus([Starts(lambda self: self.spawn(flaky, 7, retry=policy))]) as bus:
        publish_one(bus)
    assert attempts == [7, 7, 7]
    assert bus.receipt.tasks == TaskCounts(spawned=1, completed=1, retries=2)


async def test_a_timeout_counts_as_a_failure_and_is_logged(caplog):
    async with EventBus([Starts(lambda self: self.spawn(asyncio.sleep, 3600, timeout=0.01, name="nap"))]) as bus:
        publish_one(bus)
    assert bus.receipt.tasks == TaskCounts(spawned=1, failed=1)
    assert caplog.records[0].task == "nap"
    assert isinstance(caplog.records[0].exc_info[1], TimeoutError)


async def test_a_task_that_calls_sys_exit_fails_alone(caplog):
    async def leaves():
        raise SystemExit(3)

    tally = Tally()

    def start(self):
        self.spawn(leaves)
        self.spawn(tally.work)

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    assert tally.done == 1
    assert bus.receipt.tasks.failed == 1


@pytest.mark.parametrize("thing", [print, 3, Tally], ids=["builtin", "number", "class"])
async def test_what_is_no_coroutine_function_is_refused_at_once(thing):
    async with EventBus([]) as bus:
        with pytest.raises(SpawnError, match="coroutine function"):
            bus.spawn(thing)


async def test_a_coroutine_in_place_of_a_function_is_refused_with_the_call_to_write():
    async with EventBus([]) as bus:
        with pytest.raises(SpawnError, match=r"self.spawn\(upload, path\)"):
            bus.spawn(Tally().work())


async def test_an_ordinary_function_is_found_out_when_it_is_called(caplog):
    async with EventBus([]) as bus:
        bus.spawn(lambda: None)
    assert bus.receipt.tasks.failed == 1
    assert "define it with `async def`" in str(caplog.records[0].exc_info[1])


async def test_spawn_works_from_any_thread_and_runs_on_the_callers_loop():
    loops = []

    async def where():
        loops.append(asyncio.get_running_loop())

    async with EventBus([]) as bus:
        threads = [threading.Thread(target=bus.spawn, args=(where,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    assert loops == [asyncio.get_running_loop()] * 8


async def test_a_drain_in_the_middle_waits_and_cancels_nothing():
    tally = Tally()
    async with EventBus([]) as bus:
        bus.spawn(tally.work)
        bus.spawn(asyncio.sleep, 0.6, name="long")
        receipt = await bus.drain(timeout=0.3)
        assert tally.done == 1
        assert receipt.unfinished == ("program:long",)
        with pytest.raises(BusError, match="await bus.drain"):
            bus.drain().result()
    assert bus.receipt.tasks == TaskCounts(spawned=2, completed=2)


def test_a_drain_in_a_program_without_a_loop_is_waited_for_by_result():
    tally = Tally()
    with EventBus([]) as bus:
        bus.spawn(tally.work)
        assert bus.drain().result().tasks.completed == 1
        assert tally.done == 1


async def test_a_task_may_publish_and_spawn_while_the_bus_drains():
    seen, tally = [], Tally()

    class Sees(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            seen.append(step_idx)
            self.spawn(tally.work)

    async def late_eval():
        await asyncio.sleep(0.05)
        publish_one(bus)

    async with EventBus([Sees()]) as bus:
        bus.spawn(late_eval)
    assert seen == [0]
    assert tally.done == 1


async def test_spawn_after_the_block_is_an_error_that_says_so():
    async with EventBus([]) as bus:
        pass
    with pytest.raises(BusNotOpenError, match="closed"):
        bus.spawn(Tally().work)


async def test_a_callback_on_two_buses_spawns_on_the_one_that_calls_it():
    tally = Tally()
    shared = Starts(lambda self: self.spawn(tally.work))
    async with EventBus([shared]) as one, EventBus([shared]) as two:
        publish_one(one)
        publish_one(one)
        publish_one(two)
    assert (one.receipt.tasks.spawned, two.receipt.tasks.spawned) == (2, 1)


async def test_a_fault_that_repeats_under_many_task_names_is_one_fault(caplog):
    async def fails():
        raise OSError("upload refused")

    def start(self):
        for number in range(100):
            asyncio.create_task(fails())
            self.spawn(fails, name=f"upload-{number}")

    async with EventBus([Starts(start)]) as bus:
        publish_one(bus)
    assert bus.receipt.tasks.failed == 200
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) <= 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_a_task_raises_to_end_a_program_does_not_end_the_loop_of_the_others(error, caplog):
    tally = Tally()

    async def leaves():
        raise error

    async def leaves_later():
        asyncio.create_task(leaves())
        await asyncio.sleep(0.1)

    with EventBus([]) as bus:
        for _ in range(3):
            bus.spawn(tally.work)
        bus.spawn(leaves_later)
        bus.spawn(leaves)
        bus.drain().result()
        assert bus.spawn(tally.work)
    assert tally.done == 4


async def test_every_unended_task_is_named_those_that_wait_too():
    async with EventBus([], max_running_tasks=1) as bus:
        for number in range(3):
            bus.spawn(asyncio.sleep, 0.2, name=f"t{number}")
        bus.spawn(asyncio.sleep, 0, name="first", lane="a")
        bus.spawn(asyncio.sleep, 0, name="second", lane="a")
        receipt = await bus.drain(timeout=0.01)
    assert receipt.unfinished == tuple(f"program:{name}" for name in ("first", "second", "t0", "t1", "t2"))


async def test_a_bus_published_to_from_another_ones_hook_takes_its_own_tasks():
    tally = Tally()

    class Passes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            publish_one(inner)

    shared = Starts(lambda self: (asyncio.create_task(tally.work()), self.spawn(tally.work)))
    async with EventBus([Passes(), shared]) as outer:
        async with EventBus([shared]) as inner:
            publish_one(outer)
        assert inner.receipt.tasks == TaskCounts(spawned=1, adopted=1, completed=2)
    assert outer.receipt.tasks == TaskCounts(spawned=1, adopted=1, completed=2)


async def test_a_callback_that_removes_itself_may_spawn_until_its_hook_has_ended():
    tally = Tally()

    def start(self):
        bus.remove(self)
        self.spawn(tally.work)

    callback = Starts(start)
    async with EventBus([callback]) as bus:
        publish_one(bus)
        with pytest.raises(NotAttachedError):
            callback.spawn(tally.work)
    assert tally.done == 1


def test_a_task_on_a_loop_that_was_closed_is_not_waited_for(tmp_path):
    async def train():
        publish_one(bus)

    began = time.monotonic()
    with EventBus([Starts(lambda _: asyncio.create_task(asyncio.sleep(3600)))], drain_timeout=15) as bus:
        asyncio.run(train())
        assert bus.receipt is None
    assert time.monotonic() - began < 10
    assert bus.receipt.tasks.adopted == 1


async def test_a_logging_handler_that_raises_cannot_hang_the_exit(capsys):
    class Down(logging.Handler):
        def emit(self, record):
            raise ConnectionError("log server down")

    async def stubborn():
        while not ends.is_set():
            try:
                await ends.wait()
            except asyncio.CancelledError:
                pass

    handler, ends = Down(), asyncio.Event()
    logging.getLogger("evsys_bus").addHandler(handler)
    try:
        async with asyncio.timeout(10):
            async with EventBus([], drain_timeout=0.05) as bus:
                bus.spawn(stubborn)
                await asyncio.sleep(0)
    finally:
        logging.getLogger("evsys_bus").removeHandler(handler)
    assert bus.receipt.unfinished == ("program:stubborn",)
    ends.set()
    await asyncio.sleep(0)


def test_a_frozen_dataclass_makes_a_callback_that_can_spawn():
    tally = Tally()

    @dataclasses.dataclass(frozen=True)
    class Frozen(Callback):
        every: int = 1

        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(tally.work)

    with EventBus([Frozen()]) as bus:
        publish_one(bus)
    assert tally.done == 1


@pytest.mark.parametrize("fails", [False, True])
def test_background_tasks_end_before_the_thread_of_the_loop_does(step_end, fails):
    class Watches(Callback):
        ended = 0

        def __init__(self):
            self.watching = threading.Semaphore(0)

        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(self.watch, background=True)

        async def watch(self):
            self.watching.release()
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0)
                self.ended += 1

    watches = Watches()
    with contextlib.suppress(KeyError), EventBus([watches]) as bus:
        for step in range(3):
            bus.publish(step_end(step))
            assert watches.watching.acquire(timeout=5)
        if fails:
            raise KeyError
    assert watches.ended == 3
