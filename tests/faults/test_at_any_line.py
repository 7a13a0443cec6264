"""What a signal handler does between any two lines of a bus: publish, ask, spawn, or raise KeyboardInterrupt."""

import asyncio
import collections
import contextlib
import gc
import itertools
import linecache
import os
import signal
import sys
import threading
import time
from pathlib import Path

import interrupts
import pytest

from evsys_bus import Callback, Eval, EventBus, StepEnd
from evsys_bus.bus.lifecycle import BusLifecycle
from evsys_bus.codec import decode
from evsys_bus.disk import OsDisk
from evsys_bus.errors import BusNotOpenError, JournalOpenError
from evsys_bus.journal import JournalReader, JournalWriter, layout
from evsys_bus.tasks import Deadline, LoopThread

try:
    import uvloop
except ImportError:
    LOOPS = [asyncio.new_event_loop]
else:
    LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


class AtLine:
    """Calls the handler once, when the n-th line (or instruction) in these files is about to run on this thread."""

    def __init__(self, number, handler, files, unit="line"):
        self.number, self.handler, self.files, self.unit = number, handler, files, unit
        self.came = False

    def __enter__(self):
        self.seen = 0
        gc.disable()  # a writer of an earlier turn would be finalized within this one, where no error can come out
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        gc.enable()

    def trace(self, frame, event, _):
        name = frame.f_code.co_filename
        if not any(each in name for each in self.files):
            return None
        frame.f_trace_opcodes = self.unit == "opcode"
        # Instructions of no line are those that leave an `except` block: no signal handler runs there either.
        if event == self.unit and not self.came and frame.f_lineno and not self.leaves_a_block(frame):
            self.seen += 1
            if self.seen == self.number:
                self.came = True
                self.line = f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
                self.handler()
        return self.trace

    def leaves_a_block(self, frame):
        """Whether a ``with`` statement may be about to release its lock: no signal handler runs between these two."""
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def interrupted():
    raise KeyboardInterrupt


def at_every_line(act, handler, files, most=2_000, seconds=20):
    """Act again and again, on a thread, with the handler at one line after the other; each time it must come back."""
    for number in range(1, most):
        at = AtLine(number, handler, files)
        raised = []

        def run(at=at, raised=raised):
            try:
                with at:
                    act()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        assert not thread.is_alive(), f"it hangs where the handler comes at line event {number}"
        assert raised == [], f"line event {number}"
        if not at.came:
            return number
    raise AssertionError("too many lines")


class Fails(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise ValueError(f"step {step_idx}")


@pytest.mark.parametrize("files", [("diagnostics.py",), ("bus/dispatch.py",), ("bus/delivery_manager.py",)])
def test_a_handler_that_publishes_asks_and_spawns_comes_back_at_any_line(files, tmp_path, step_end):
    async def nothing():
        pass

    with EventBus([Fails()], journal=tmp_path / "journal") as bus:

        def handler():
            bus.publish(step_end(1))
            bus.health()
            bus.spawn(nothing)

        def act():
            bus.publish(step_end(0))
            bus.health()

        assert at_every_line(act, handler, files) > 3


def test_a_handler_that_flushes_the_journal_comes_back_at_any_line_of_writing_it(tmp_path, step_end):
    """Each record begins a segment, so none takes the plain path."""
    step, writer = 0, JournalWriter(tmp_path / "journal", segment_bytes=1, flush="never")
    with EventBus([], journal=writer) as bus:

        def act():
            nonlocal step
            step += 1
            bus.publish(step_end(step))
            writer.flush()

        files = ("journal/slow_writer.py", "journal/writer.py", "journal/maintenance.py")
        assert at_every_line(act, writer.flush, files) > 20
    found = recorded(tmp_path / "journal")
    assert set(found) == {("outer", each) for each in range(1, step + 1)}
    assert set(found.values()) == {1}
    assert bus.receipt.recorded == step


@pytest.mark.timeout(60)  # each line waits for a hook; the longer the patience, the more lines
def test_a_handler_that_publishes_comes_back_while_its_thread_waits_for_another_threads_hook(step_end):
    inside, go_on = threading.Event(), threading.Event()

    class Holds(Callback):
        def on_eval(self, state, step_idx, eval_name, metrics):
            inside.set()
            go_on.wait(30)

    with EventBus([Holds()], publish_patience_seconds=0.001) as bus:
        other = threading.Thread(target=lambda: bus.publish(Eval(None, 0, "e", {})))
        other.start()
        assert inside.wait(10)
        number = at_every_line(
            lambda: bus.publish(step_end(0)), lambda: bus.publish(step_end(1)), ("bus/token_recovery.py",)
        )
        assert number > 3
        go_on.set()
        other.join()


def test_an_interrupt_at_any_line_of_a_publish_is_raised_once_and_loses_nothing_that_returned(tmp_path, step_end):
    """The hook's own publish has returned, so its event is on record whatever becomes of the outer one."""
    done = []

    class Nests(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(Eval(state, step_idx, "nested", {}))
            done.append(("nested", step_idx))

    step, lines = 0, {}
    with EventBus([Nests()], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(step))
        while True:
            step += 1
            at = AtLine(step, interrupted, ("bus/publisher.py", "<evsys-bus publish"))
            raised = 0
            try:
                with at:
                    bus.publish(step_end(step))
                done.append(("outer", step))
            except KeyboardInterrupt:
                raised += 1
            assert raised == at.came
            lines[step] = at.line if at.came else ""
            step += 1
            bus.publish(step_end(step))  # raises nothing
            done.append(("outer", step))
            if not at.came:
                break
    found = recorded(tmp_path / "journal")
    assert [(each, lines.get(each[1])) for each in done if found[each] != 1] == []
    assert max(found.values()) == 1
    assert step > 20


def recorded(journal):
    reader = JournalReader(journal)
    found = collections.Counter()
    for stream in reader.streams():
        for record in reader.read(stream):
            event = decode(record.payload).event
            found["outer" if isinstance(event, StepEnd) else "nested", event.step_idx] += 1
    return found


class Twice:
    """A value whose first looks are interrupted."""

    def __init__(self, looks):
        self.left = looks

    def item(self):
        if self.left:
            self.left -= 1
            raise KeyboardInterrupt
        return 1.0


class Looks(Callback):
    def on_eval(self, state, step_idx, eval_name, metrics):
        metrics["v"].item()


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_interrupts_in_hooks_and_in_the_encoder_are_raised_by_the_publish_that_they_hit(looks, tmp_path, step_end):
    class Nests(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(Eval(state, step_idx, "nested", {"v": Twice(looks)}))

    with EventBus([Nests(), Looks(), Looks()], journal=tmp_path / "journal") as bus:
        with pytest.raises(KeyboardInterrupt):
            bus.publish(step_end(0))
        bus.publish(Eval(None, 7, "later", {"v": Twice(0)}))  # raises nothing
    found = recorded(tmp_path / "journal")
    assert found["nested", 0] == 1  # its publish had returned
    assert found["nested", 7] == 1
    assert bus.receipt.recorded == sum(found.values())


LOGGED_FILES = (
    *("front/run.py", "front/rows.py", "bus/event_bus.py", "bus/publisher.py", "bus/recorder.py"),
    *("journal/writer.py", "codec/step_template.py"),
)


@pytest.mark.timeout(120)  # half a minute for each, where the machine is busy
@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    ("commits", "logs_again", "in_loop"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, False), (False, True, True)],
)
def test_an_interrupt_at_any_line_of_run_log_leaves_each_value_in_one_row(
    commits, logs_again, in_loop, is_recorded, tmp_path
):
    """The program catches Ctrl-C, logs the part again or not, and goes on; two parts a step."""
    rows, acknowledged, lines = [], {}, {}

    class Rows(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            rows.append((step_idx, dict(metrics)))

    def log(step, name, commit, at=None):
        part = {name: float(step)}
        try:
            with at or contextlib.nullcontext():
                run.log(part, commit=commit) if in_loop else run.log(part, step=step, commit=commit)
        except KeyboardInterrupt:
            lines[step] = at.line
            if logs_again:
                log(step, name, commit)
        else:
            acknowledged[step, name] = part[name]

    journal = tmp_path / "journal" if is_recorded else None
    with EventBus([Rows()], journal=journal) as bus, bus.run(tmp_path / "a", environment=False, output=False) as run:
        run.log({"a": 0.0}, step=0)
        acknowledged[0, "a"] = 0.0
        number, came = 0, True
        loop = run.steps() if in_loop else itertools.count(1)
        while came:
            number, came = number + 1, False
            for turn in range(2):  # the part that makes the row before complete, and the last one of a step
                step, at = next(loop), AtLine(number, interrupted, LOGGED_FILES)
                log(step, "a", False, at if turn == 0 else None)
                log(step, "b", commits, at if turn == 1 else None)
                came = came or at.came
    assert number > 20
    for found in (rows, recorded_rows(journal)) if is_recorded else (rows,):
        wrong = {step for (step, name), value in acknowledged.items() if dict(found)[step].get(name) != value}
        wrong |= {step for step, count in collections.Counter(step for step, _ in found).items() if count > 1}
        assert {step: (lines.get(step - 1), lines.get(step)) for step in wrong} == {}


@pytest.mark.timeout(120)  # some seconds, where the machine is idle
def test_an_interrupt_at_any_line_of_the_first_run_log_leaves_each_value_in_one_row(tmp_path):
    class Rows(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            rows.append((step_idx, dict(metrics)))

    number, came = 0, True
    while came:
        number, rows, folder = number + 1, [], tmp_path / str(number)
        with (
            EventBus([Rows()]) as bus,
            bus.run(folder / "a", environment=False, output=False) as run,
        ):
            at = AtLine(number, interrupted, ("front/run.py", "front/rows.py"))
            with contextlib.suppress(KeyboardInterrupt), at:
                run.log({"a": 0.0}, step=0)
            run.log({"a": 0.0}, step=0)
            run.log({"b": 1.0}, step=1)
        came = at.came
        assert rows == [(0, {"a": 0.0}), (1, {"b": 1.0})], getattr(at, "line", None)
    assert number > 20


def recorded_rows(journal):
    reader = JournalReader(journal)
    events = [decode(record.payload).event for stream in reader.streams() for record in reader.read(stream)]
    return [(each.step_idx, each.metrics) for each in events if isinstance(each, StepEnd)]


# -- entering -----------------------------------------------------------------------------------------------


def threads():
    return {each for each in threading.enumerate() if each.is_alive()}


def settled(before):
    until = time.monotonic() + 10
    while threads() - before and time.monotonic() < until:
        time.sleep(0.005)
    return threads() - before


def test_an_interrupt_at_any_line_of_the_entry_leaves_nothing_behind(tmp_path, step_end):
    before, handler = threads(), signal.getsignal(signal.SIGTERM)
    number = entered = 0
    while True:
        number += 1
        bus = EventBus([Looks()], journal=tmp_path / "journal")
        at = AtLine(number, interrupted, ("bus/event_bus.py", "bus/lifecycle.py", "bus/watchdog.py"))
        try:
            with at:
                bus.__enter__()
        except KeyboardInterrupt:
            assert settled(before) == set()
            assert signal.getsignal(signal.SIGTERM) is handler
            assert_unlocked(tmp_path / "journal")
            with pytest.raises(BusNotOpenError):
                bus.publish(step_end(0))
        else:
            entered += 1
            bus.__exit__(None, None, None)
        with EventBus([], journal=tmp_path / "journal") as another:
            another.publish(step_end(number))
        assert another.receipt.recorded == 1
        if not at.came:
            break
    assert number > 20
    assert entered >= 1


def assert_unlocked(journal):
    if journal.exists():
        for stream in JournalReader(journal).streams():
            assert not OsDisk().is_locked(f"{journal}/{stream}/{layout.LOCK}")


def test_an_interrupt_at_any_instruction_while_a_loop_is_begun_leaves_no_thread_behind():
    before, number = threads(), 0
    while True:
        number += 1
        thread = LoopThread()
        at = AtLine(number, interrupted, ("tasks/loops.py", "tasks/calls.py", "/threading.py"), "opcode")
        try:
            with at:
                thread.loop()
        except KeyboardInterrupt:
            pass
        thread.stop()
        assert settled(before) == set(), at.line
        if not at.came:
            break
    assert number > 100


def test_an_interrupt_at_any_instruction_of_cutting_a_deadline_holds_nobody_up():
    number = 0
    while True:
        number += 1
        deadline = Deadline(60.0)
        at = AtLine(number, interrupted, ("tasks/calls.py", "/threading.py"), "opcode")
        try:
            with at:
                deadline.cut_short()
        except KeyboardInterrupt:
            pass
        other = threading.Thread(target=deadline.pause, args=(0.01,), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), at.line
        deadline.cut_short()
        assert deadline.remaining() == 0.0
        if not at.came:
            break
    assert number > 10


def test_an_interrupt_at_any_instruction_of_letting_go_of_sigterm_leaves_that_to_the_next_try():
    number, handler = 0, signal.getsignal(signal.SIGTERM)
    while True:
        number += 1
        entrance = BusLifecycle(handles_signals=True)
        entrance.install_exit_handlers(lambda: None)
        assert signal.getsignal(signal.SIGTERM) is not handler
        at = AtLine(number, interrupted, ("bus/lifecycle.py", "tasks/calls.py"), "opcode")
        try:
            with at:
                entrance.complete_exit()
        except KeyboardInterrupt:
            entrance.complete_exit()  # as the end of the program does
        assert signal.getsignal(signal.SIGTERM) is handler, at.line
        if not at.came:
            break
    assert number > 50


def test_a_bus_that_could_not_be_entered_says_why_and_another_works_once_that_is_mended(tmp_path, step_end):
    before = threads()
    (tmp_path / "in the way").write_text("")
    bus = EventBus([], journal=tmp_path / "in the way" / "journal")
    with pytest.raises(JournalOpenError), bus:
        pass
    assert settled(before) == set()
    with pytest.raises(BusNotOpenError, match="in the way"):
        bus.publish(step_end(0))
    (tmp_path / "in the way").unlink()
    with EventBus([], journal=tmp_path / "in the way" / "journal") as another:
        another.publish(step_end(0))
    assert another.receipt.recorded == 1


# -- leaving -----------------------------------------------------------------------------------------------


def test_an_interrupt_at_any_line_of_the_exit_closes_the_journal_all_the_same(tmp_path, step_end):
    before, number = threads(), 0
    while True:
        number += 1
        journal = tmp_path / str(number)
        bus = EventBus([], journal=journal)
        bus.__enter__()
        bus.publish(step_end(0))
        at = AtLine(number, interrupted, ("bus/event_bus.py", "tasks/calls.py", "bus/lifecycle.py"))
        raised = False
        try:
            with at:
                bus.__exit__(None, None, None)
        except KeyboardInterrupt:
            raised = True
        assert raised == at.came
        if bus.receipt is None:  # it came before the exit could begin; the end of the program would do this
            bus.__exit__(None, None, None)
        assert settled(before) == set()
        assert bus.receipt.recorded == 1
        assert bus.health().state == "closed"
        assert_unlocked(journal)
        if not at.came:
            break
    assert number > 15


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX")
@pytest.mark.timeout(60)  # a few seconds, where the machine is idle
@pytest.mark.long
def test_a_hundred_interrupts_at_random_moments_harm_nothing():
    wrong = {
        form: total["wrong"] for form, total in interrupts.interrupt_all_forms(100, seed=os.getpid() % 1000).items()
    }
    assert not any(wrong.values()), wrong


@pytest.mark.timeout(60)  # some seconds, where the machine is idle
@pytest.mark.parametrize(
    "loop_factory", [LOOPS[0], *(pytest.param(each, marks=pytest.mark.long) for each in LOOPS[1:])]
)
def test_an_interrupt_at_any_line_of_an_exit_on_a_loop_closes_the_journal_all_the_same(
    loop_factory, tmp_path, step_end
):
    before, handler = threads(), signal.getsignal(signal.SIGTERM)

    async def program(bus, at):
        await bus.__aenter__()
        bus.publish(step_end(0))
        try:
            with at:
                await bus.__aexit__(None, None, None)
        except KeyboardInterrupt:
            return True
        return False

    number = 0
    while True:
        number += 1
        bus = EventBus([], journal=tmp_path / str(number))
        at = AtLine(number, interrupted, ("bus/event_bus.py", "tasks/", "bus/lifecycle.py"))
        raised = True
        with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=loop_factory) as runner:
            raised = runner.run(program(bus, at))
        assert raised == at.came
        if bus.health().state != "closed" or signal.getsignal(signal.SIGTERM) is not handler:
            bus.__exit__(None, None, None)  # as the end of the program does
        assert settled(before) == set(), at.line
        assert signal.getsignal(signal.SIGTERM) is handler, at.line
        assert (bus.receipt.recorded, bus.health().state) == (1, "closed"), at.line
        assert_unlocked(tmp_path / str(number))
        if not at.came:
            break
    assert number > 50


async def test_two_cancellations_while_a_bus_is_left_come_out_once_all_is_closed(tmp_path, step_end):
    bus = EventBus([], journal=tmp_path / "journal")
    spawned, leaves = asyncio.Event(), asyncio.Event()

    async def program():
        async with bus:
            bus.publish(step_end(0))
            bus.spawn(leaves.wait)
            spawned.set()

    task = asyncio.ensure_future(program())
    await spawned.wait()
    for _ in range(2):  # the bus waits for the task meanwhile
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    leaves.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bus.receipt.recorded == 1
    assert bus.health().state == "closed"
    assert_unlocked(tmp_path / "journal")
