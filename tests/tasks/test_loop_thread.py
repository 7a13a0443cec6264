"""`LoopThread`: whatever moment an interrupt or a late task comes at, its thread ends or never starts."""

import asyncio
import threading

import pytest
from faults.test_at_any_line import AtLine, interrupted, settled, threads

from evsys_bus import Callback, EventBus, StepEnd
from evsys_bus.delivery.courier_pool import CourierPool
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.tasks import LoopStopped, LoopThread
from evsys_bus.testing import RecordingSink
from support.waiting import wait_until


def test_an_interrupt_at_any_instruction_of_stop_leaves_the_rest_to_the_next_stop():
    before, number = threads(), 0
    while True:
        number += 1
        thread = LoopThread()
        thread.loop()
        at = AtLine(number, interrupted, ("tasks/loops.py", "tasks/calls.py"), "opcode")
        try:
            with at:
                thread.stop()
        except KeyboardInterrupt:
            thread.stop()
        assert settled(before) == set(), at.line
        if not at.came:
            break
    assert number > 50


def test_a_loop_thread_that_was_stopped_starts_no_other_thread():
    before, used, unused = threads(), LoopThread(), LoopThread()
    used.loop()
    for thread in (used, unused):
        thread.stop()
        with pytest.raises(LoopStopped):
            thread.loop()
    assert settled(before) == set()


def test_the_thread_ends_with_the_work_that_was_submitted_to_it_though_nobody_stops_it():
    before, thread = threads(), LoopThread()
    assert thread.submit(asyncio.sleep(0, "done")).result(10) == "done"
    assert settled(before) == set()


def test_a_courier_that_ends_at_any_line_of_the_wait_for_it_leaves_no_thread(tmp_path):
    before, number = threads(), 0
    while True:
        number += 1
        pool = CourierPool(str(tmp_path), [Subscription("a", instance=RecordingSink())], build={}.__getitem__)
        pool.start()

        def end_courier(pool=pool):
            pool.finish()
            wait_until(lambda: not pool.running)

        at = AtLine(number, end_courier, ("delivery/courier_pool.py",))
        with at:
            pool.join(0.0)
        if not at.came:
            end_courier()
        assert settled(before) == set(), at.line if at.came else "after the wait"
        if not at.came:
            break
    assert number > 5


def test_a_drain_after_the_exit_names_the_abandoned_tasks_and_starts_no_thread():
    release, before = threading.Event(), threads()

    class Blocks(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(self.block)

        async def block(self):
            release.wait(15)

    with EventBus([Blocks()], drain_timeout=0.1) as bus:
        bus.publish(StepEnd(None, 0, None, {}))
    receipt = bus.drain(0.1).result(10)
    release.set()
    assert receipt.unfinished == ("Blocks:block",)
    assert settled(before) == set()


def test_a_second_request_to_end_leaves_the_thread_the_time_to_close_its_generators():
    closing, ended, errors = threading.Event(), [], []

    async def numbers():
        try:
            yield 1
        finally:
            closing.set()
            await asyncio.sleep(0.05)
            ended.append(True)

    opened = numbers()

    async def work():
        await anext(opened)

    hook, threading.excepthook = threading.excepthook, lambda args: errors.append(args.exc_value)
    try:
        thread = LoopThread()
        thread.submit(work())
        assert closing.wait(5)
        thread.request_stop()
        thread.stop(5.0)
    finally:
        threading.excepthook = hook
    assert (ended, errors) == ([True], [])
