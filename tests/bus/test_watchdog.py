import ctypes
import gc
import sys
import threading
import time

from evsys_bus import Callback, EventBus


def blocked_in(records):
    return [record for record in records if record.getMessage().startswith("hook.blocked")]


class Patient(threading.Event):
    """A hook waits on it: until the watchdog has spoken, and not by the clock."""


def test_a_hook_that_blocks_is_named_with_its_stack_while_it_blocks(step_end, caplog):
    spoken = []

    class Blocks(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.wait_for_the_watchdog()

        def wait_for_the_watchdog(self):
            while not blocked_in(caplog.records):
                time.sleep(0.01)
            spoken.extend(blocked_in(caplog.records))

    with EventBus([Callback(), Blocks()], blocked_hook_seconds=0.1) as bus:
        bus.publish(step_end(0))
        [hook] = bus.health().hooks
    assert hook.blocked >= 1
    record = spoken[0]  # it was there before the hook ended
    assert (record.callback, record.hook) == ("Blocks", "on_step_end")
    assert record.seconds >= 0.1
    assert "wait_for_the_watchdog" in record.getMessage()
    assert "in on_step_end" in record.getMessage()
    assert "in publish" not in record.getMessage()  # the stack begins at the hook


def test_many_quick_calls_are_no_blocked_hook(step_end, caplog):
    class Quick(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            time.sleep(0.02)

    with EventBus([Quick(), Quick()], blocked_hook_seconds=0.15) as bus:
        for step in range(15):  # together longer than the patience, each one shorter
            bus.publish(step_end(step))
    assert blocked_in(caplog.records) == []


def test_a_hook_that_held_the_interpreter_is_named_when_it_lets_go(step_end, caplog):
    nap = ctypes.PyDLL(None).usleep  # a C call that keeps the interpreter to itself

    class Holds(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            nap(600_000)
            time.sleep(0.05)

    with EventBus([Holds()], blocked_hook_seconds=0.2) as bus:
        bus.publish(step_end(0))
    [record] = blocked_in(caplog.records)
    assert record.hook == "on_step_end"
    assert record.held_interpreter


def test_a_slow_hook_is_timed_every_time_once_it_was_seen(step_end):
    class Slow(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            time.sleep(0.1 if step_idx == 70 else 0.002)

    with EventBus([Slow()]) as bus:
        bus.publish(step_end(0))
        bus.health()  # folds the sample in, as the watchdog does
        for step in range(1, 11 + 64):
            bus.publish(step_end(step))
        [hook] = bus.health().hooks
        assert hook.max_seconds >= 0.1  # of 1 in 64, this one would not have been timed


def test_a_hook_that_was_slow_once_is_sampled_again(step_end):
    # One slow call is often the machine's fault; a publish to 32 hooks that are all timed takes four times as long.
    class SlowOnce(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 0:
                time.sleep(0.1)

    def count_timed(bus):
        """About how many calls were timed: next to the slow one, the others take no time."""
        [hook] = bus.health().hooks
        return hook.max_seconds / hook.mean_seconds

    with EventBus([SlowOnce()]) as bus:
        for step in range(1_000):
            bus.publish(step_end(step))
            bus.health()
        before = count_timed(bus)
        for step in range(1_000, 1_640):
            bus.publish(step_end(step))
        assert count_timed(bus) - before <= 20  # 1 in 64 is ten; all of them were 640


def test_no_collection_starts_while_stacks_of_other_threads_are_walked(step_end):
    # On 3.11 one can leave another thread's frame dangling: see diagnostics.collector_paused.
    blocked, go_on, enabled = threading.Event(), threading.Event(), []

    class Blocks(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 0:
                blocked.set()
                go_on.wait(10)

    def profile(frame, event, arg):
        if event == "c_call" and arg is sys._current_frames:
            enabled.append(gc.isenabled())

    with EventBus([Blocks()], publish_patience_seconds=0.05) as bus:
        thread = threading.Thread(target=bus.publish, args=(step_end(0),))
        thread.start()
        blocked.wait(10)
        sys.setprofile(profile)
        try:
            bus.publish(step_end(1))  # looks for the thread that holds the bus, while it waits for it
        finally:
            sys.setprofile(None)
        go_on.set()
        thread.join()
    assert set(enabled) == {sys.version_info >= (3, 12)}
    assert gc.isenabled()
