"""How a real program ends: 200 tasks of 50 ms, started in the last hook, and then the end comes."""

import signal
import sys
from contextlib import suppress
from itertools import product

import pytest

from evsys_bus import (
    ArmResult,
    EventBus,
    LogContext,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    TrainEnd,
    TrainStart,
)
from support.journals import read_envelopes

PROGRAM = """
    import asyncio, os, sys, time
    from evsys_bus import Callback, EventBus, StepEnd

    how, bare, ready = sys.argv[1], sys.argv[2] == "bare", sys.argv[3]

    class LastHook(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            for _ in range(200):
                asyncio.create_task(self.work()) if bare else self.spawn(self.work)
            open(ready, "w").close()

        async def work(self):
            await asyncio.sleep(0.05)
            os.write(1, b".")

    bus = EventBus([LastHook()])

    def publish():
        bus.publish(StepEnd(None, 0, None, {}))

    async def train():
        try:
            async with bus:
                publish()
                if how == "normal":
                    return
                if how == "raises":
                    raise ValueError("training failed")
                await asyncio.sleep(30)
        finally:
            os.write(2, str(bus.receipt.tasks).encode())

    if how == "sync":
        with bus:
            publish()
            time.sleep(30)
    elif sys.argv[4] == "uvloop":
        import uvloop
        uvloop.run(train())
    elif sys.argv[4] == "anyio":
        import anyio
        anyio.run(train)
    else:
        asyncio.run(train())
"""


def wait_for(path, process):
    import time

    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def each_pair(first, second):
    """The runners, with tasks of both kinds and one of two ends; each two of these three meet. The rest is long."""
    combinations = product(("asyncio", "uvloop", "anyio"), ("bare", "spawned"), (first, second))
    return [
        pytest.param(*each, marks=() if (i % 4 in {0, 3}) == (i < 8) else pytest.mark.long)
        for i, each in enumerate(combinations)
    ]


@pytest.mark.parametrize(("runner", "bare", "end"), each_pair(("normal", 0), ("raises", 1)))
def test_R2_all_200_complete_at_a_normal_end_and_when_the_body_raises(program, tmp_path, end, bare, runner):
    how, code = end
    process = program(PROGRAM, how, bare, str(tmp_path / "ready"), runner)
    out, err = process.communicate(timeout=18)
    assert out.count(".") == 200, err
    assert process.returncode == code


@pytest.mark.parametrize(("runner", "bare", "number"), each_pair(signal.SIGTERM, signal.SIGINT))
def test_R2_all_200_complete_on_sigterm_and_on_one_sigint(program, tmp_path, number, bare, runner):
    process = program(PROGRAM, "signal", bare, str(tmp_path / "ready"), runner)
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=18)
    assert out.count(".") == 200, err
    # The sender of a signal sees what it would have seen without us; Python turns SIGINT into KeyboardInterrupt.
    assert process.returncode in ((-number,) if number == signal.SIGTERM else (1, 130, -number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_200_complete_on_a_signal_in_a_program_without_a_loop(program, tmp_path, number):
    process = program(PROGRAM, "sync", "spawned", str(tmp_path / "ready"))
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=18)
    assert out.count(".") == 200, err
    assert process.returncode in ((-number,) if number == signal.SIGTERM else (1, 130, -number))


@pytest.mark.parametrize("how", ["signal", "sync"])
def test_a_second_ctrl_c_ends_at_once(program, tmp_path, how):
    process = program(
        PROGRAM.replace("asyncio.sleep(0.05)", "asyncio.sleep(3600)").replace(
            "EventBus([LastHook()])", "EventBus([LastHook()], drain_timeout=3600)"
        ),
        how,
        "spawned",
        str(tmp_path / "ready"),
        "asyncio",
    )
    wait_for(tmp_path / "ready", process)
    import time

    while process.poll() is None:  # the first one begins the drain, any later one ends it
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, _ = process.communicate(timeout=18)
    assert out == ""
    assert process.returncode != 0


def test_the_handler_of_a_host_that_has_one_runs_and_is_given_back(program, tmp_path):
    process = program(
        """
        import os, signal, sys, time
        from evsys_bus import EventBus
        seen = []
        def theirs(number, frame):
            seen.append(number)
        signal.signal(signal.SIGTERM, theirs)
        with EventBus([]) as bus:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is theirs
        print(len(seen))
        """
    )
    out, err = process.communicate(timeout=18)
    assert (out, process.returncode) == ("1\n", 0), err


@pytest.mark.parametrize("entered", ["async with", "with"])
def test_a_forked_child_ends_by_sigterm_and_the_parents_tasks_complete(program, tmp_path, entered):
    process = program(
        """
        import asyncio, os, signal, sys, time, warnings
        from evsys_bus import EventBus
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside a thread

        def fork():
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writing, b"up")
                time.sleep(10)
                os._exit(0)
            os.read(reading, 2)
            os.kill(child, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        async def main():
            async with EventBus([]) as bus:
                bus.spawn(asyncio.sleep, 0.05)
                print(fork() == -signal.SIGTERM)
            print(bus.receipt.tasks.completed)

        if sys.argv[1] == "async with":
            asyncio.run(main())
        else:
            with EventBus([]) as bus:
                bus.spawn(asyncio.sleep, 0.05)
                print(fork() == -signal.SIGTERM)
            print(bus.receipt.tasks.completed)
        """,
        entered,
    )
    out, err = process.communicate(timeout=18)
    assert out == "True\n1\n", err


def test_handle_signals_false_leaves_them_alone(program, tmp_path):
    process = program(
        """
        import signal
        from evsys_bus import EventBus
        with EventBus([], handle_signals=False):
            print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        """
    )
    out, err = process.communicate(timeout=18)
    assert out == "True\n", err


def test_a_bus_in_a_thread_and_a_bus_in_a_running_notebook_loop_work_too(program):
    """`with` inside a running loop: its bare tasks cannot turn while the exit waits, so they are named, not lost."""
    process = program(
        """
        import asyncio, threading
        from evsys_bus import Callback, EventBus, StepEnd

        class Hook(Callback):
            def on_step_end(self, state, step_idx, batch, metrics):
                self.spawn(asyncio.sleep, 0.01)
                if step_idx == 1:
                    asyncio.create_task(asyncio.sleep(0.01), name="bare")

        def plain():
            with EventBus([Hook()]) as bus:
                bus.publish(StepEnd(None, 0, None, {}))
            print(bus.receipt.tasks.completed, bus.receipt.unfinished)

        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()

        async def notebook():
            with EventBus([Hook()]) as bus:
                bus.publish(StepEnd(None, 1, None, {}))
            print(bus.receipt.tasks.completed, bus.receipt.unfinished)

        asyncio.run(notebook())
        """
    )
    out, err = process.communicate(timeout=18)
    assert out == "1 ()\n1 ('Hook:bare',)\n", err


TWO = """
    import asyncio, os, signal, sys
    from evsys_bus import EventBus

    async def run(name, seconds):
        async with EventBus([]) as bus:
            bus.spawn(asyncio.sleep, 0.05)
            try:
                await asyncio.sleep(seconds)
            finally:
                print(name, "leaves", flush=True)
        print(name, bus.receipt.tasks.completed, flush=True)

    async def main():
        first = asyncio.create_task(run("first", 0.1))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(run("second", 3600 if sys.argv[1] in ("both", "not yet") else 0.4))
        if sys.argv[1] == "both":
            await asyncio.sleep(0.01)
        elif sys.argv[1] != "not yet":
            await first
        if sys.argv[1] == "none":
            await second
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait([first, second])
        await asyncio.sleep(1)
        print("survived", flush=True)

    asyncio.run(main())
"""


@pytest.mark.parametrize("still_open", ["both", "not yet", "one", "none"])
def test_sigterm_ends_a_program_with_two_buses_that_do_not_lie_one_in_the_other(program, still_open):
    process = program(TWO, still_open)
    out, err = process.communicate(timeout=18)
    assert process.returncode == -signal.SIGTERM, err
    assert "survived" not in out
    assert "first leaves" in out
    assert "second leaves" in out


def test_a_first_sigterm_while_a_plain_with_drains_waits_for_the_drain(program):
    process = program("""
        import asyncio, os, signal, threading
        from evsys_bus import EventBus
        async def upload():
            await asyncio.sleep(0.5)
            print("uploaded", flush=True)
        with EventBus([]) as bus:
            bus.spawn(upload)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    """)
    out, err = process.communicate(timeout=18)
    assert (out, process.returncode) == ("uploaded\n", -signal.SIGTERM), err


NO_MORE_THREADS = """
    import asyncio, sys, threading
    from evsys_bus import EventBus, LoopState, Sink, StepEnd, TrainingBatch

    class Slow(Sink):
        async def write(self, batch):
            await asyncio.sleep(0.2)
            print(len(batch), flush=True)

    bus = EventBus(sinks=[Slow()], journal="journal")

    def work():
        for step in range(5):
            bus.publish(StepEnd(LoopState(step, 5, "run"), step, TrainingBatch(), {}))
        threading.stack_size(1 << 47)  # no thread starts from here on, as in a Python 3.12 that ends

    async def main():
        await bus.__aenter__()
        work()

    if sys.argv[1] == "async with":
        asyncio.run(main())
    else:
        bus.__enter__()
        work()
"""


@pytest.mark.parametrize("entered", ["async with", "with"])
def test_what_is_recorded_is_delivered_at_the_end_also_where_no_thread_can_be_started(program, entered):
    process = program(NO_MORE_THREADS, entered)
    out, err = process.communicate(timeout=18)
    assert (sum(map(int, out.split())), "Traceback" in err) == (5, False), err


ENTERED_BY_WHAT_IS_OVER = """
    import asyncio, os, signal, sys, threading, time
    from evsys_bus import EventBus

    async def upload():
        await asyncio.sleep(0.3)
        print("uploaded", flush=True)

    async def elsewhere():
        await asyncio.create_task(bus.__aenter__())  # as `wait_for` does in Python 3.11
        bus.spawn(upload)
        try:
            if sys.argv[1] != "while it leaves":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
                await bus.__aexit__(None, None, None)
            await asyncio.sleep(10)
        finally:
            print("leaves", flush=True)
            await bus.__aexit__(None, None, None)

    bus = EventBus([])
    if sys.argv[1] == "closed loop":
        asyncio.run(bus.__aenter__())
        for _ in range(100):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            except Exception:
                print("a step failed, the next one", flush=True)
    elif sys.argv[1] == "uvloop":
        import uvloop
        uvloop.run(elsewhere())
    else:
        asyncio.run(elsewhere())
    print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("closed loop", ""),
        ("asyncio", "leaves\nuploaded\n"),
        ("uvloop", "leaves\nuploaded\n"),
        ("while it leaves", "uploaded\n"),
    ],
)
def test_sigterm_ends_a_program_whose_bus_was_entered_by_a_task_that_is_over(program, where, told):
    process = program(ENTERED_BY_WHAT_IS_OVER, where)
    out, err = process.communicate(timeout=18)
    assert (out, process.returncode) == (told, -signal.SIGTERM), err


def test_a_signal_that_meets_a_loop_that_was_just_closed_leaves_the_program_mortal(program):
    process = program("""
        import os, signal
        from evsys_bus.bus.lifecycle import SigtermHandler

        def closed():
            raise RuntimeError("Event loop is closed")

        SigtermHandler(closed).install()
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                print("not heard")
            except RuntimeError:
                print("heard")
    """)
    out, err = process.communicate(timeout=18)
    assert out == "heard\nheard\n", err


LEFT_BY_A_DAEMON = """
    import asyncio, sys, threading, time
    from evsys_bus import Callback, EventBus, LoopState, Sink, StepEnd, TrainingBatch

    class Spawns(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(self.work)

        async def work(self):
            await asyncio.sleep(0.4)
            print("task", flush=True)

    class Slow(Sink):
        async def write(self, batch):
            if sys.argv[2] == "delivers":
                leaving.set()
            await asyncio.sleep(0.8)
            print("delivered", flush=True)

    bus, leaving = EventBus([Spawns()], sinks=[Slow()], journal="journal"), threading.Event()

    def publish():
        bus.publish(StepEnd(LoopState(0, 1, "run"), 0, TrainingBatch(), {}))
        if sys.argv[2] == "drains":
            leaving.set()

    def work():
        with bus:
            publish()

    async def main():
        async with bus:
            publish()

    threading.Thread(target=work if sys.argv[1] == "with" else lambda: asyncio.run(main()), daemon=True).start()
    leaving.wait()
    time.sleep(0.1 if sys.argv[2] == "drains" else 0.5)
"""


@pytest.mark.parametrize("meanwhile", ["drains", "delivers"])
@pytest.mark.parametrize("entered", ["async with", "with"])
def test_what_another_thread_is_leaving_when_the_program_ends_is_waited_for(program, entered, meanwhile):
    process = program(LEFT_BY_A_DAEMON, entered, meanwhile)
    out, err = process.communicate(timeout=18)
    assert (out.splitlines(), err) == (["task", "delivered"], "")


def test_a_thread_that_comes_to_the_end_of_its_block_while_the_program_ends_has_its_receipt(program):
    process = program("""
        import asyncio, atexit, threading, time
        from evsys_bus import EventBus, LoopState, Sink, StepEnd, TrainingBatch

        class Slow(Sink):
            async def write(self, batch):
                await asyncio.sleep(0.8)

        bus, entered = EventBus(sinks=[Slow()], journal="journal"), threading.Event()

        def work():
            with bus:
                bus.publish(StepEnd(LoopState(0, 1, "run"), 0, TrainingBatch(), {}))
                entered.set()
                time.sleep(0.3)
            print([each.delivered for each in bus.receipt.deliveries], flush=True)

        thread = threading.Thread(target=work, daemon=True)
        atexit.register(thread.join, 5)  # it runs after the bus's
        thread.start()
        entered.wait()
    """)
    out, err = process.communicate(timeout=18)
    assert (out, err.count("bus.never_left"), "Traceback" in err) == ("[1]\n", 1, False), err


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="it starts no thread any more while it ends")
def test_a_bus_that_is_opened_while_the_program_ends_does_its_tasks(program):
    process = program("""
        import asyncio, atexit
        from evsys_bus import EventBus

        def last():
            with EventBus([]) as bus:
                bus.spawn(asyncio.sleep, 0.01)
            print(bus.receipt.tasks.completed, flush=True)

        atexit.register(last)
    """)
    out, err = process.communicate(timeout=18)
    assert out == "1\n", err


def test_a_bus_is_left_although_no_more_files_can_be_opened_to_import_anything_with(program, tmp_path):
    process = program(
        """
        import asyncio, resource, sys
        from evsys_bus import EventBus

        async def main():
            async with EventBus(journal=sys.argv[1]) as bus:
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
            print(bus.receipt.unrecorded)

        asyncio.run(main())
        """,
        str(tmp_path / "journal"),
    )
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (0, "0\n"), err


def test_a_run_that_was_started_by_its_event_is_ended_with_the_bus(tmp_path):
    def ends(path):
        found = [each.event for each in read_envelopes(path) if isinstance(each.event, TrainEnd | RunEnd)]
        assert all(each.run_result.implied for each in found if isinstance(each, RunEnd))
        return [(type(each), each.run_result.status if isinstance(each, RunEnd) else None) for each in found]

    def leave(folder, error=None):
        ctx = LogContext(tmp_path, run_key="a")
        state = LoopState(0, 9, ctx.run_dir, ctx=ctx)
        with suppress(BaseException), EventBus(journal=tmp_path / folder) as bus:
            bus.publish(RunStart(ctx))
            bus.publish(TrainStart(state))
            if error is not None:
                raise error
        return ends(tmp_path / folder)

    assert leave("clean") == [(TrainEnd, None), (RunEnd, "completed")]
    assert leave("raises", ValueError("nan")) == [(TrainEnd, None), (RunEnd, "failed")]
    assert leave("interrupted", KeyboardInterrupt()) == [(TrainEnd, None), (RunEnd, "cancelled")]
    assert leave("exits", SystemExit(2)) == [(TrainEnd, None), (RunEnd, "failed")]


def test_a_run_whose_end_was_published_is_not_ended_again(tmp_path):
    one, two = (LogContext(tmp_path, run_key=key) for key in "ab")
    with EventBus(journal=tmp_path / "journal") as bus:
        for ctx in (one, two):
            bus.publish(RunStart(ctx))
        bus.publish(RunEnd(one, RunResult(status="failed"), ArmResult("a", status="failed")))
    ends = [each for each in read_envelopes(tmp_path / "journal") if type(each.event) is RunEnd]
    assert [(each.run, each.event.run_result.status, each.event.run_result.implied) for each in ends] == [
        ("a", "failed", False),
        ("b", "completed", True),
    ]
