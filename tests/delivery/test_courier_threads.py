"""Couriers on threads of the program: what an adapter leaves running on other threads keeps nobody from leaving."""

import asyncio
import sys
import textwrap
import threading
import time

import pytest

from evsys_bus.tasks import LoopThread

BLOCKS = """
    import asyncio, sys, time
    import anyio.to_thread
    from evsys_bus import Callback, Event, EventBus, Sink, follow

    class Tick(Event, frozen=True):
        number: int

    async def blocks(number):
        if sys.argv[1] == "asyncio":
            await asyncio.to_thread(time.sleep, 600)
        else:
            await anyio.to_thread.run_sync(time.sleep, 600, abandon_on_cancel=True)

    class Blocks(Sink):
        async def write(self, batch):
            await blocks(batch[0].seq)

    class Spawns(Callback):
        def on_tick(self, number):
            self.spawn(blocks, number)

    sinks = [Blocks(), follow(Spawns(), "spawns")]
    with EventBus([Spawns()], sinks=sinks, journal="journal", drain_timeout=0.5) as bus:
        bus.publish(Tick(1))
        time.sleep(0.5)  # they are inside
        began = time.monotonic()
    print(time.monotonic() - began, [(each.name, each.pending) for each in bus.receipt.deliveries], flush=True)
"""


@pytest.mark.parametrize("library", ["asyncio", pytest.param("anyio", marks=pytest.mark.long)])
def test_a_blocking_call_on_a_thread_of_its_own_keeps_no_program_from_ending(program, library):
    began = time.monotonic()
    process = program(BLOCKS, library)
    out, errors = process.communicate(timeout=15)
    seconds, _, told = out.partition(" ")
    assert (float(seconds) < 3.5, told.strip()) == (True, "[('Blocks', 1), ('spawns', 1)]"), errors
    assert (process.returncode, errors.count("Traceback")) == (0, 0), errors
    assert time.monotonic() - began < 10


async def _at_once(count: int) -> set[int]:
    together = threading.Barrier(count)

    def meet() -> int:
        together.wait(10)
        return threading.get_ident()

    return set(await asyncio.gather(*(asyncio.to_thread(meet) for _ in range(count))))


async def _in_turn(count: int) -> set[int]:
    return {await asyncio.to_thread(threading.get_ident) for _ in range(count)}


async def _raised() -> list[object]:
    async def refused(error: BaseException) -> object:
        def fails() -> None:
            raise error

        return (await asyncio.gather(asyncio.to_thread(fails), return_exceptions=True))[0]

    return [await refused(KeyError("k")), await refused(OSError(5, "x"))]


def test_calls_on_other_threads_of_a_loop_of_ours_go_as_on_any():
    before = set(threading.enumerate())  # another test may have left a call that hangs
    thread = LoopThread()
    loop = thread.loop()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    assert len(run(_at_once(4))) == 4
    there = threading.active_count()
    assert len(run(_in_turn(20))) <= 4  # threads that are there are used again
    assert threading.active_count() <= there
    assert [type(each) for each in run(_raised())] == [KeyError, OSError]
    many = run(_in_turn(1)) | run(asyncio.wait_for(_at_once(5), 10))
    assert threading.get_ident() not in many
    thread.stop()
    end = time.monotonic() + 10
    while any(each.name == "evsys-bus-call" for each in set(threading.enumerate()) - before):
        assert time.monotonic() < end
        time.sleep(0.01)


NO_THREADS_FOR_A_WHILE = """
    import threading
    from evsys_bus.tasks.daemon_executor import DaemonExecutor

    def refused(call):
        try:
            executor.submit(call)
        except RuntimeError:
            return 1
        return 0

    executor, usual, went_on = DaemonExecutor(), threading.stack_size(), threading.Event()
    threading.stack_size(1 << 47)  # for which there is no room: no thread starts
    print(sum(refused(lambda: print("a refused one ran")) for _ in range(40)))
    threading.stack_size(usual)
    print(executor.submit(lambda: "done").result(5))
    executor.submit(went_on.wait)
    threading.stack_size(1 << 47)
    queued = executor.submit(lambda: "in its turn")  # behind the thread that there is
    threading.stack_size(usual)
    print(executor.submit(lambda: "beside it").result(5))
    went_on.set()
    print(queued.result(5))
"""


def test_calls_go_on_where_for_a_while_no_thread_could_be_started(program):
    process = program(NO_THREADS_FOR_A_WHILE)
    out, errors = process.communicate(timeout=15)
    assert out == "40\ndone\nbeside it\nin its turn\n", errors


MOVES = """
    import os, time
    from pathlib import Path
    from evsys_bus import Callback, Event, Sink, register_callback, register_sink

    HERE = Path(__file__).parent
    MOVED = HERE / "moved"

    class Tick(Event, frozen=True):
        number: int

    @register_callback("moves")
    class Moves(Callback):
        placement = "follow"

        def on_tick(self, number):
            os.chdir(HERE / "elsewhere")
            MOVED.touch()

    @register_sink("writes")
    class Writes(Sink):
        async def write(self, batch):
            while not MOVED.exists():
                time.sleep(0.01)
            with open("counted", "a") as file:
                file.writelines(f"{each.seq}\\n" for each in batch)
"""

STAYS = """
    from moves import Tick
    from evsys_bus import EventBus, LoopState, StepEnd, TrainEnd, TrainStart, TrainingBatch, build_callbacks

    specs = [{"kind": "moves"}, {"kind": "writes"}]
    for kind in ("csv_metrics", "local_logger"):
        specs.append({"kind": kind, "placement": "follow"})
    specs[-2]["params"] = {"out_path": "metrics.csv"}
    with EventBus(build_callbacks(specs), journal="journal") as bus:
        bus.publish(Tick(1))
        while any(each.pending for each in bus.health().deliveries):
            pass
        state = LoopState(step=0, num_steps=1, output_dir="run")
        for event in (TrainStart(state), StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}), TrainEnd(state, None)):
            bus.publish(event)
    print(bus.receipt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all threads of a process share one current directory")
def test_one_that_changes_the_current_directory_changes_only_its_own(tmp_path, program):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moves.py").write_text(textwrap.dedent(MOVES))
    out, errors = program(STAYS).communicate(timeout=20)
    assert out.splitlines()[1] == "everything was delivered", errors
    assert (tmp_path / "counted").read_text() == "1\n2\n3\n4\n", errors
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0.5\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["logs"]


RACE = """
    import threading
    from evsys_bus.delivery.subscription import AdapterRef
    from evsys_bus.config.subscription_builder import build_adapter

    def build(kind):
        try:
            build_adapter(AdapterRef(kind, {}, (f"adapter_{kind}",)))
        except Exception as error:
            print(kind, error, flush=True)

    threads = [threading.Thread(target=build, args=(kind,)) for kind in ("rows", "pages")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
"""

ADAPTER = """
    from room.{part} import it
    from evsys_bus import Callback, register_callback

    @register_callback("{kind}")
    class It(Callback):
        def on_eval(self, state, step_idx, eval_name, metrics): ...
"""


def test_two_adapters_of_one_package_that_are_built_at_once_do_not_find_it_half_imported(program, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    # It is imported slowly, as from a disk on the network, and a part of it imports from it.
    (room / "__init__.py").write_text("import time\ntime.sleep(0.3)\nfrom room.table import it\n")
    (room / "table.py").write_text("from room import durable\nit = 1\n")
    (room / "durable.py").touch()
    (room / "other.py").write_text("from room import it\n")
    for kind, part in {"rows": "other", "pages": "table"}.items():
        source = textwrap.dedent(ADAPTER).replace("{kind}", kind).replace("{part}", part)
        (tmp_path / f"adapter_{kind}.py").write_text(source)
    out, err = program(RACE).communicate(timeout=15)
    assert (out, err) == ("", "")
