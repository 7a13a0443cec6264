import gc
import inspect
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from typing import ClassVar

import pytest

from evsys_bus import (
    BenchmarkEval,
    Callback,
    Eval,
    EvalResult,
    Event,
    EventBus,
    LogContext,
    RunStart,
    StepEnd,
    dispatch,
)
from evsys_bus.bus.publisher import NESTED_LIMIT
from evsys_bus.errors import BusNotOpenError, EventError, ForkedBusError, NotACallbackError, SettingError
from evsys_bus.tasks import HOOK_FILENAME_PREFIX
from support.journals import read_envelopes


class Notes(Callback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps.append(step_idx)


class Raises(Callback):
    def __init__(self, error=ValueError):
        self.error = error

    def on_step_end(self, state, step_idx, batch, metrics):
        raise self.error(f"step {step_idx}")


class Blocks(Callback):
    """Blocks in each step with the metric "blocks", until the test goes on."""

    def __init__(self):
        self.blocked, self.go_on = threading.Event(), threading.Event()

    def on_step_end(self, state, step_idx, batch, metrics):
        if "blocks" in metrics:
            self.blocked.set()
            self.go_on.wait(10)


def hook_of(bus: EventBus, callback: str, hook: str = "on_step_end"):
    return next(each for each in bus.health().hooks if (each.callback, each.hook) == (callback, hook))


def test_R1_each_event_calls_its_own_hook_with_its_fields(step_end, tmp_path):
    class Keeps(Callback):
        def on_run_start(self, ctx):
            self.ctx = ctx

        def on_step_end(self, state, step_idx, batch, metrics):
            self.step = (state, step_idx, batch, metrics)

        def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
            self.benchmark = (ctx, eval_result, predictions, step)

    keeps, ctx, event = Keeps(), LogContext(output_dir=tmp_path), step_end(3, loss=0.5)
    result, rows = EvalResult("val"), [{"task_id": "1"}]
    with EventBus([keeps]) as bus:
        bus.publish(RunStart(ctx))
        bus.publish(event)
        bus.publish(BenchmarkEval(ctx, result, rows, 3))
    assert keeps.ctx is ctx
    assert keeps.step == (event.state, 3, event.batch, event.metrics)
    assert keeps.benchmark == (ctx, result, rows, 3)


@pytest.mark.parametrize("position", range(4))
def test_R3_a_hook_that_raises_at_any_position_harms_no_other(position, step_end, caplog):
    callbacks = [Notes() for _ in range(3)]
    callbacks.insert(position, Raises())
    with EventBus(callbacks) as bus:
        for step in range(200):
            bus.publish(step_end(step))
        assert hook_of(bus, "Raises").failures == 200
    for callback in callbacks:
        if isinstance(callback, Notes):
            assert callback.steps == list(range(200))


def test_R3_repeated_failures_are_logged_at_once_then_at_most_once_a_second_and_counted_exactly(step_end, caplog):
    with EventBus([Raises()]) as bus:
        for step in range(500):
            bus.publish(step_end(step))
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert records[0].count == 1
    assert records[-1].count == 500  # said when the bus closes, whatever was held back before
    assert len(records) < 50


def test_R3_the_traceback_shows_the_line_that_called_and_the_line_that_raised(step_end, caplog):
    with EventBus([Raises()]) as bus:
        bus.publish(step_end(0))
    text = "".join(traceback.format_exception(*caplog.records[0].exc_info))
    assert "try: h0(a0, a1, a2, a3)" in text
    assert "raise self.error" in text


def test_R4_callbacks_run_in_order_and_each_event_ends_before_the_next_begins(step_end):
    order = []

    def named(mark):
        class Named(Callback):
            def on_step_end(self, state, step_idx, batch, metrics):
                order.append((step_idx, mark))

        return Named()

    with EventBus([named("c"), named("a"), named("b")]) as bus:
        for step in range(3):
            bus.publish(step_end(step))
    assert order == [(step, mark) for step in range(3) for mark in "cab"]


def test_R13_a_metric_derived_in_a_hook_is_seen_by_later_callbacks_only(step_end):
    seen = {}

    class Derives(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            metrics["perplexity"] = 2.0 ** metrics["loss"]

    def reader(name):
        class Reads(Callback):
            def on_step_end(self, state, step_idx, batch, metrics):
                seen[name] = dict(metrics)

        return Reads()

    with EventBus([reader("before"), Derives(), reader("after")]) as bus:
        bus.publish(step_end(0, loss=1.0))
    assert seen == {"before": {"loss": 1.0}, "after": {"loss": 1.0, "perplexity": 2.0}}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_hook_reaches_the_caller_after_the_remaining_hooks_ran(error, step_end, caplog):
    notes = Notes()
    with EventBus([Raises(error), notes]) as bus:
        with pytest.raises(error):
            bus.publish(step_end(4))
        assert notes.steps == [4]
        bus.publish(Eval(None, 0, "val", {}))  # and the bus goes on
    assert "token_restored" not in caplog.text  # the token was given back, not found to be lost


def test_counts_are_exact_and_times_are_sampled(step_end):
    with EventBus([Notes()]) as bus:
        for step in range(1000):
            bus.publish(step_end(step))
        health = bus.health()
    assert health.published == {"step_end": 1000}
    assert hook_of(bus, "Notes").calls == 1000
    assert 0 < hook_of(bus, "Notes").mean_seconds <= hook_of(bus, "Notes").max_seconds


def test_a_callback_that_does_not_override_the_hook_is_not_called_for_it(step_end):
    with EventBus([Callback(), Notes()]) as bus:
        bus.publish(step_end(0))
        assert [each.callback for each in bus.health().hooks] == ["Notes"]


def test_an_event_of_ones_own_calls_a_hook_of_its_own_name(step_end):
    class RewardSeen(Event, frozen=True):
        reward: float
        note: str = ""

    class Keeps:
        def on_reward_seen(self, reward, note):
            self.kept = (reward, note)

    keeps = Keeps()
    with EventBus([keeps, Callback()]) as bus:
        bus.publish(RewardSeen(0.5, "good"))
        assert bus.health().published == {"reward_seen": 1}
    assert keeps.kept == (0.5, "good")


@pytest.mark.parametrize("name", ["StepEnd", "Learnt"])
def test_an_event_may_not_take_the_name_of_one_that_ships(name):
    with pytest.raises(EventError, match="give it another name"):
        type(name, (Event,), {"__module__": "elsewhere"})


def test_an_event_published_in_a_hook_runs_after_the_current_one_and_before_publish_returns(state, step_end):
    order = []

    class Nests(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(Eval(state, step_idx, "val", {}))
            order.append("nests, step")

        def on_eval(self, state, step_idx, eval_name, metrics):
            order.append("nests, eval")

    class Follows(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            order.append("follows, step")

        def on_eval(self, state, step_idx, eval_name, metrics):
            order.append("follows, eval")

    with EventBus([Nests(), Follows()]) as bus:
        bus.publish(step_end(0))
        assert order == ["nests, step", "follows, step", "nests, eval", "follows, eval"]


def test_a_hook_that_publishes_its_own_event_without_end_is_stopped_and_told_why(step_end, caplog):
    class Endless(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(step_end(step_idx))

    notes = Notes()
    with EventBus([Endless(), notes]) as bus:
        bus.publish(step_end(1))
        bus.publish(step_end(2))
        assert hook_of(bus, "Endless").failures > 0
    assert len(notes.steps) == 2 * (NESTED_LIMIT + 1)
    assert "never ends" in str(caplog.records[0].exc_info[1])


def test_callbacks_added_and_removed_inside_a_hook_count_from_the_next_publish(step_end):
    late = Notes()

    class Changes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 0:
                bus.add(late)
                bus.remove(self)

    with EventBus([Changes()]) as bus:
        kept_publish = bus.publish
        bus.publish(step_end(0))
        assert late.steps == []
        bus.publish(step_end(1))
        kept_publish(step_end(2))  # a bound publish that somebody kept goes by the new callbacks too
        assert hook_of(bus, "Changes").calls == 1
        assert bus.health().published == {"step_end": 3}
    assert late.steps == [1, 2]


def test_publish_is_a_documented_method_with_a_signature():
    signature = inspect.signature(EventBus.publish)
    assert list(signature.parameters) == ["self", "event"]
    assert "PublishLoopError" in inspect.getdoc(EventBus.publish)


class Doubles(EventBus):
    def publish(self, event):
        super().publish(event)
        if isinstance(event, StepEnd) and event.step_idx < 100:
            super().publish(StepEnd(event.state, event.step_idx + 100, event.batch, event.metrics))


class Listed:
    """A mixin that overrides what it does not inherit."""

    def publish(self, event):
        self.listed = [*getattr(self, "listed", ()), event.hook]
        super().publish(event)


class ListedBus(Listed, EventBus):
    pass


def test_a_subclass_may_override_publish(step_end):
    notes, late = Notes(), Notes()
    with Doubles([notes]) as bus:
        kept = bus.publish
        bus.publish(step_end(0))
        bus.add(late)
        kept(step_end(1))
        bus.remove(notes)
        kept(step_end(2))
        assert bus.health().published == {"step_end": 6}
    assert notes.steps == [0, 100, 1, 101]
    assert late.steps == [1, 101, 2, 102]
    with pytest.raises(BusNotOpenError, match="after the bus was closed"):
        kept(step_end())


def test_a_mixin_may_override_publish_and_hooks_that_publish_go_through_it(step_end):
    class Evaluates(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.publish(Eval(state, step_idx, "val", {}))

    with ListedBus([Evaluates()]) as bus:
        bus.publish(step_end(0))
    assert bus.listed == ["on_step_end", "on_eval"]


def test_a_subclass_that_does_not_override_publish_has_the_compiled_one(step_end):
    class Named(EventBus):
        """Adds nothing to publish."""

    notes = Notes()
    with Named([notes]) as bus:
        assert bus.publish.__code__.co_filename.startswith(HOOK_FILENAME_PREFIX)
        bus.publish(step_end(3))
        EventBus.publish(bus, step_end(4))
    assert notes.steps == [3, 4]


def test_publishing_before_and_after_the_block_is_an_error_that_says_so(step_end):
    bus = EventBus([Notes()])
    with pytest.raises(BusNotOpenError, match="before the bus was entered"):
        bus.publish(step_end())
    with bus:
        kept = bus.publish
    for publish in (bus.publish, kept):
        with pytest.raises(BusNotOpenError, match="after the bus was closed"):
            publish(step_end())
    with pytest.raises(BusNotOpenError, match="entered once"), bus:
        pass


@pytest.mark.parametrize("thing", ["step", {"loss": 1}, None, StepEnd])
def test_publishing_what_is_no_event_is_an_error_and_leaves_the_bus_whole(thing, step_end):
    notes = Notes()
    with EventBus([notes]) as bus:
        with pytest.raises(EventError, match="is no event"):
            bus.publish(thing)
        bus.publish(step_end(1))
    assert notes.steps == [1]


def test_hooks_never_run_side_by_side_and_no_event_is_lost_among_sixteen_threads(step_end):
    inside, overlaps, seen = [], [], []

    class Watches(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            inside.append(step_idx)
            if len(inside) > 1:
                overlaps.append(step_idx)
            seen.append(step_idx)
            inside.pop()

    def publish(first):
        for step in range(first, first + 1000):
            bus.publish(step_end(step))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with EventBus([Watches()]) as bus:
            threads = [threading.Thread(target=publish, args=(1000 * index,)) for index in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert bus.health().published == {"step_end": 16_000}
    finally:
        sys.setswitchinterval(switch)
    assert overlaps == []
    assert sorted(seen) == list(range(16_000))


def test_an_event_of_a_thread_that_waited_in_vain_is_run_by_the_thread_that_held_the_bus(step_end):
    blocks, notes = Blocks(), Notes()
    with EventBus([blocks, notes], publish_patience_seconds=0.05) as bus:
        thread = threading.Thread(target=bus.publish, args=(step_end(0, blocks=1.0),))
        thread.start()
        assert blocks.blocked.wait(10)
        bus.publish(step_end(1))  # returns after its patience, though the bus is held
        assert notes.steps == []
        assert bus.health().deferred == 1
        blocks.go_on.set()
        thread.join()
        assert notes.steps == [0, 1]


def test_a_token_lost_to_an_interrupt_is_restored(step_end, caplog):
    def interrupt(frame, event, arg):
        """Raise between taking the token and the ``try`` that returns it, as a signal handler may."""
        if event == "c_return" and arg.__name__ == "pop" and frame.f_code.co_filename.startswith(HOOK_FILENAME_PREFIX):
            sys.setprofile(None)
            raise KeyboardInterrupt

    notes = Notes()
    with EventBus([notes]) as bus:
        sys.setprofile(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                bus.publish(step_end(0))
        finally:
            sys.setprofile(None)
        bus.publish(step_end(1))
        bus.publish(step_end(2))
    assert notes.steps == [1, 2]
    assert [record.getMessage() for record in caplog.records] == ["publish.token_restored"]


def test_a_signal_handler_may_publish_in_the_middle_of_a_publish(step_end):
    import signal

    notes = Notes()

    class Signalled(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx < 100:
                os.kill(os.getpid(), signal.SIGUSR1)

    earlier = signal.signal(signal.SIGUSR1, lambda *_: bus.publish(step_end(100)))
    try:
        with EventBus([Signalled(), notes]) as bus:
            for step in range(50):
                bus.publish(step_end(step))
    finally:
        signal.signal(signal.SIGUSR1, earlier)
    assert notes.steps == [step for pair in zip(range(50), [100] * 50, strict=True) for step in pair]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_gets_a_clear_error_and_leaves_the_parents_bus_alone(program):
    process = program("""
        import os, warnings
        from evsys_bus import *
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside a thread
        with EventBus([]) as bus:
            child = os.fork()
            if child == 0:
                try:
                    bus.publish(StepEnd(None, 0, None, {}))
                except Exception as error:
                    print(type(error).__name__, "EventBus of its own" in str(error), flush=True)
                raise SystemExit(0)  # leaves the block, as a forked worker does
            os.waitpid(child, 0)
            bus.publish(StepEnd(None, 0, None, {}))
            print(bus.health().published, flush=True)
    """)
    out, err = process.communicate(timeout=15)
    assert out == "ForkedBusError True\n{'step_end': 1}\n", err
    assert issubclass(ForkedBusError, RuntimeError)


def test_two_buses_in_one_hook_do_not_disturb_each_other(step_end):
    inner_notes, outer_notes = Notes(), Notes()

    class Passes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            inner.publish(step_end(step_idx))
            assert inner_notes.steps[-1] == step_idx  # it ran at once: the inner bus is not in a hook of its own

    with EventBus([inner_notes]) as inner, EventBus([Passes(), outer_notes]) as outer:
        for step in range(3):
            outer.publish(step_end(step))
        assert hook_of(outer, "Passes").failures == 0
    assert inner_notes.steps == outer_notes.steps == [0, 1, 2]


def test_callbacks_changed_in_hooks_beside_other_threads_never_let_two_hooks_run_at_once(step_end, caplog):
    inside, overlaps = [], []

    class Other(Callback):
        def on_eval(self, state, step_idx, eval_name, metrics): ...

    class Changes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            inside.append(step_idx)
            if len(inside) > 1:
                overlaps.append(step_idx)
            inside.pop()
            if "main" in metrics:
                other = Other()
                bus.add(other)
                bus.remove(other)

    def beside():
        while not stop.is_set():
            bus.publish(step_end(0))

    stop, blocks = threading.Event(), Blocks()
    with EventBus([Changes(), blocks]) as bus:
        threads = [threading.Thread(target=beside) for _ in range(2)]
        for thread in threads:
            thread.start()
        for step in range(200):
            bus.publish(step_end(step, main=1.0))
        stop.set()
        for thread in threads:
            thread.join()
        # Still one thread at a time: an event of another thread waits for the hook that blocks.
        deferred = bus.health().deferred
        thread = threading.Thread(target=bus.publish, args=(step_end(0, blocks=1.0),))
        thread.start()
        assert blocks.blocked.wait(10)
        bus.publish(step_end(1))
        assert bus.health().deferred == deferred + 1
        blocks.go_on.set()
        thread.join()
    assert overlaps == []
    assert "publish.token_restored" not in caplog.text


def test_an_event_that_waits_when_the_bus_closes_is_counted_and_troubles_nobody(step_end, caplog):
    blocks, raised = Blocks(), []

    def publish():
        try:
            bus.publish(step_end(0, blocks=1.0))
        except BaseException as error:
            raised.append(error)

    with EventBus([blocks], publish_patience_seconds=0.05, drain_timeout=0.1) as bus:
        thread = threading.Thread(target=publish)
        thread.start()
        assert blocks.blocked.wait(10)
        bus.publish(step_end(1))
    assert (bus.receipt.dropped, bus.receipt.without_hooks) == (1, 0)
    blocks.go_on.set()
    thread.join()
    assert raised == []
    assert (bus.health().deferred, bus.health().dropped) == (1, 1)
    assert "the bus was closed while it waited" in caplog.text


class BrokenTextError(RuntimeError):
    def __str__(self):
        raise ValueError("no text")


class Stranger:
    """Looks nothing up without raising."""

    def on_step_end(self, *args):
        raise BrokenTextError

    def __getattr__(self, name):
        raise KeyError(name)


def test_what_looking_at_a_callback_or_at_its_error_raises_stays_inside(step_end, caplog):
    notes = Notes()
    with EventBus([Stranger(), notes]) as bus:
        bus.publish(step_end(1))
        bus.publish(Eval(None, 0, "val", {}))
    dispatch([Stranger(), notes], "on_step_end", None, 2, None, {})
    dispatch([Stranger(), notes], "on_eval", None, 2, "val", {})
    assert notes.steps == [1, 2]


def test_a_logging_handler_that_raises_reaches_neither_the_loop_nor_the_other_hooks(step_end, capsys):
    class Down(logging.Handler):
        def emit(self, record):
            raise ConnectionError("log server down")

    handler, notes = Down(), Notes()
    logging.getLogger("evsys_bus").addHandler(handler)
    try:
        with EventBus([Raises(), notes]) as bus:
            bus.publish(step_end(1))
    finally:
        logging.getLogger("evsys_bus").removeHandler(handler)
    assert notes.steps == [1]
    assert "log server down" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["hook", "keywords", "lambda"])
def test_a_field_that_no_hook_could_be_given_is_refused_when_the_event_is_declared(field):
    with pytest.raises(EventError, match="give the field another name"):
        type("Odd", (Event,), {"__annotations__": {field: int}, "__module__": "elsewhere"})


def test_keyword_fields_may_stand_anywhere():
    class Mixed(Event, frozen=True):
        keywords: ClassVar = frozenset({"first"})
        first: int
        second: int

    class Keeps:
        def on_mixed(self, second, *, first):
            self.kept = (first, second)

    keeps = Keeps()
    with EventBus([keeps]) as bus:
        bus.publish(Mixed(1, 2))
    assert keeps.kept == (1, 2)


@pytest.mark.parametrize("thing", [{"kind": "print_progress"}, "print_progress", None, lambda: None, Notes])
def test_what_is_no_callback_is_refused(thing):
    with pytest.raises(NotACallbackError):
        EventBus([thing])


def test_removed_callbacks_are_let_go_and_their_counts_stay(step_end):
    with EventBus([]) as bus:
        gone = []
        for _ in range(3):
            callback = Notes()
            gone.append(weakref.ref(callback))
            bus.add(callback)
            bus.publish(step_end(0))
            bus.remove(callback)
            del callback
        gc.collect()
        assert [ref() for ref in gone] == [None] * 3
        assert hook_of(bus, "Notes").calls == 3


@pytest.mark.parametrize("setting", ["drain_timeout", "blocked_hook_seconds", "publish_patience_seconds"])
def test_a_duration_out_of_range_is_refused_and_infinity_is_not(setting, step_end):
    for value in (-1, float("nan")):
        with pytest.raises(SettingError, match=setting):
            EventBus([], **{setting: value})
    with EventBus([], **{setting: float("inf")}) as bus:
        bus.publish(step_end(0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_fork_beside_a_thread_that_asks_for_health_does_not_hang_the_child(program):
    process = program("""
        import os, signal, threading, time, warnings
        from evsys_bus import Callback, EventBus, StepEnd
        warnings.simplefilter("ignore")
        class Hook(Callback):
            def on_step_end(self, *args): ...
        with EventBus([Hook()]) as bus:
            stop = threading.Event()
            def poll():
                while not stop.is_set():
                    bus.health()
            thread = threading.Thread(target=poll)
            thread.start()
            for step in range(150):
                bus.publish(StepEnd(None, step, None, {}))
                child = os.fork()
                if child == 0:
                    os._exit(0)
                for _ in range(500):
                    if os.waitpid(child, os.WNOHANG)[0]:
                        break
                    time.sleep(0.01)
                else:
                    print("hung")
                    os.kill(child, signal.SIGKILL)
                    break
            stop.set()
            thread.join()
        print("done")
    """)
    out, err = process.communicate(timeout=18)
    assert out == "done\n", err


@pytest.mark.parametrize("number", [1 << 63, -(1 << 80), 1e40, 1 << 200])
def test_a_step_that_no_file_can_hold_is_refused_where_it_is_published(number, tmp_path, step_end):
    notes = Notes()
    with EventBus([notes], journal=tmp_path / "journal") as bus:
        for event in (step_end(number), Eval(None, number, "val", {}), BenchmarkEval(None, None, [], step=number)):
            with pytest.raises(EventError, match=r"has \d+ bits, and files and charts hold 63"):
                bus.publish(event)
        for step in ((1 << 63) - 1, 1 << 62, -1, 0):
            bus.publish(step_end(step))
    assert notes.steps == [(1 << 63) - 1, 1 << 62, -1, 0]
    assert bus.receipt.recorded == 4


def test_the_time_of_an_event_that_waits_for_another_hook_is_when_it_was_published(tmp_path, step_end):
    goes_on, blocks, asks = threading.Event(), threading.Event(), []

    class Blocks(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(Eval(state, 1, "nested", {}))
            asks.append(time.time())
            blocks.set()
            assert goes_on.wait(10)

        def on_eval(self, state, step_idx, eval_name, metrics):
            seen[eval_name] = self.event.time

    seen = {}
    with EventBus([Blocks()], journal=tmp_path / "journal", publish_patience_seconds=0.0) as bus:
        thread = threading.Thread(target=bus.publish, args=(step_end(0),))
        thread.start()
        assert blocks.wait(10)
        bus.publish(Eval(None, 2, "handed over", {}))
        asks.append(time.time())
        while time.time() - asks[-1] < 0.01:
            threading.Event().wait(0.005)
        goes_on.set()
        thread.join()
        assert bus.health().deferred == 1
    assert seen["nested"] <= asks[0] <= seen["handed over"] <= asks[1]
    recorded = read_envelopes(tmp_path / "journal")
    assert {each.event.eval_name: each.time for each in recorded[1:]} == seen
