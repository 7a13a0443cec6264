"""How a program may end, and how little memory it may have: real processes, looked at from outside."""

import sys
import time
from pathlib import Path

import pytest

from evsys_bus import Eval
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader, JournalWriter, OsDisk
from support.journals import read_sequences

NEVER_LEFT = """
    import asyncio, atexit, sys, time
    from pathlib import Path
    from evsys_bus import Callback, EventBus, LoopState, Sink, StepEnd, TrainingBatch

    how, folder = sys.argv[1], Path(sys.argv[2])

    class Rows(Sink):
        async def write(self, batch):
            with open(folder / "rows.txt", "a") as file:
                file.writelines(f"{each.seq}\\n" for each in batch)

    class Spawns(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if step_idx == 3:
                self.spawn(self.later)

        async def later(self):
            await asyncio.sleep(0.05)
            (folder / "spawned").touch()

    def publish(count):
        for step in range(count):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5}))

    state = LoopState(0, 10, folder / "run")
    bus = EventBus([Spawns()], journal=folder / "journal", sinks=[Rows()], drain_timeout=10.0)
    if how == "async with":
        loop = asyncio.new_event_loop()
        loop.run_until_complete(bus.__aenter__())
    else:
        bus.__enter__()
    if how == "atexit":
        atexit.register(publish, 3)
    publish(5)
    if how == "raises":
        raise SystemExit(7)
"""


def delivered(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "rows.txt").read_text().split()]


@pytest.mark.parametrize(("how", "code", "events"), [("with", 0, 5), ("raises", 7, 5), ("atexit", 0, 8)])
def test_a_bus_that_a_program_never_leaves_is_left_when_it_ends_and_said_so(program, tmp_path, how, code, events):
    process = program(NEVER_LEFT, how, str(tmp_path))
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (code, "")
    assert err.startswith("bus.never_left fix=enter it with `with`")
    assert "Traceback" not in err
    assert read_sequences(tmp_path / "journal") == delivered(tmp_path) == [*range(1, events + 1)]
    assert (tmp_path / "spawned").exists()


def test_one_whose_loop_turns_no_more_costs_the_end_no_deadline_and_loses_nothing(program, tmp_path):
    """Its tasks cannot run any more, and there is no sense in waiting for them."""
    process = program(NEVER_LEFT.replace("drain_timeout=10.0", "drain_timeout=60.0"), "async with", str(tmp_path))
    _, err = process.communicate(timeout=15)
    assert process.returncode == 0
    assert err.startswith("bus.never_left")
    assert read_sequences(tmp_path / "journal") == delivered(tmp_path) == [1, 2, 3, 4, 5]


LITTLE_MEMORY = """
    import resource, sys
    from evsys_bus import BenchmarkEval, EvalResult, EventBus, LogContext, LoopState, RunStart, StepEnd, TrainingBatch

    folder, left = sys.argv[1], int(sys.argv[2])
    state = LoopState(0, 10, folder + "/run")
    predictions = [{"task_id": str(at), "output": "x" * 200_000} for at in range(300)]
    metrics = {f"metric-{at}": float(at) for at in range(100_000)}
    ctx = LogContext(folder, run_key="run", config={"prompts": ["y" * 200_000] * 300})

    def step(at):
        bus.publish(StepEnd(state, at, TrainingBatch(), {"loss": 0.5}))

    with EventBus([], journal=folder + "/journal") as bus:
        step(0)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (left << 20), resource.RLIM_INFINITY))
        for at in range(1, 4):
            bus.publish(RunStart(ctx))
            bus.publish(BenchmarkEval(ctx, EvalResult("tasks"), predictions, step=at))
            bus.publish(StepEnd(state, at, TrainingBatch(), metrics))
            step(at)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        told = bus.health().journal
        assert told.recorded + told.unrecorded + told.lost == 13, told
    print(bus.receipt.recorded, bus.receipt.unrecorded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts its pages in /proc")
@pytest.mark.long
@pytest.mark.timeout(60)  # it takes 12 s on an idle machine
@pytest.mark.parametrize("megabytes", [0, 12, 40])
def test_where_memory_ends_publish_raises_nothing_and_what_is_not_on_record_is_counted(program, tmp_path, megabytes):
    process = program(LITTLE_MEMORY, str(tmp_path), str(megabytes))
    out, err = process.communicate(timeout=55)
    assert process.returncode == 0, err
    count, unrecorded = map(int, out.split())
    assert count + unrecorded == 14  # with the end of the run, which the end of the bus implies
    reader = JournalReader(tmp_path / "journal")
    [stream] = reader.streams()
    found = [decode(record.payload) for record in reader.read(stream)]
    assert len(found) == count
    # A plain step needs next to nothing.
    steps = [each.event.step_idx for each in found if getattr(each.event, "metrics", None) == {"loss": 0.5}]
    assert steps == [0, 1, 2, 3]
    assert any(each.replaced for each in found) or unrecorded, "there was memory for all of it: nothing was tried"


LITTLE_FOR_ONE = """
    import resource, sys
    from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch

    folder, what = sys.argv[1:]
    state = LoopState(0, 10, folder + "/run")
    long = {"text": {"sample": "x" * (4 << 20)}, "keys": {f"{at:04}" * 250: float(at) for at in range(1000)}}[what]

    with EventBus([], journal=folder + "/journal") as bus:
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20 if what == "text" else 0), resource.RLIM_INFINITY))
        for at in range(1, 4):
            bus.publish(StepEnd(state, at, TrainingBatch(), long))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        told = bus.health().journal
    print(told.recorded + told.lost)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts its pages in /proc")
@pytest.mark.parametrize("what", [pytest.param("text", marks=pytest.mark.long), "keys"])
def test_a_step_for_which_there_is_no_memory_ends_nothing(program, tmp_path, what):
    """In what a form encodes there may be long texts and long keys as well."""
    out, err = (process := program(LITTLE_FOR_ONE, str(tmp_path), what)).communicate(timeout=15)
    assert (process.returncode, out) == (0, "4\n"), err


NO_MEMORY_FOR_A_SEGMENT = """
    import resource, sys
    from evsys_bus import Eval, EventBus, ExperimentStart, LogContext, LoopState
    from evsys_bus.journal import JournalWriter

    folder = sys.argv[1]
    state = LoopState(0, 100, folder + "/run")
    ctx = LogContext(folder, config=["c%03d" % at * 60_000 for at in range(50)])
    with EventBus(journal=JournalWriter(folder + "/journal", segment_bytes=12 << 20)) as bus:
        bus.publish(ExperimentStart(ctx))
        for at in range(200):
            if at == 20:  # memory ends: too little is left for a segment, which begins with 12 MB of config
                used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
                filled = []
                try:
                    while True:
                        filled.append(bytearray(1 << 20))
                except MemoryError:
                    del filled[-3:]
            if at == 180:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            bus.publish(Eval(state, at, "val", {f"k{number}": float(at) for number in range(1000)}))
    print(bus.receipt.recorded, bus.receipt.unrecorded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts its pages in /proc")
def test_an_event_that_waits_for_memory_for_a_segment_is_recorded_once(program, tmp_path):
    out, err = (process := program(NO_MEMORY_FOR_A_SEGMENT, str(tmp_path))).communicate(timeout=18)
    assert process.returncode == 0, err
    reader = JournalReader(tmp_path / "journal")
    [stream] = reader.streams()
    found = [decode(record.payload).event for record in reader.read(stream)]
    steps = [event.step_idx for event in found if isinstance(event, Eval)]
    assert steps == sorted(set(steps)), "some are there twice"
    count, unrecorded = map(int, out.split())
    assert (count, count + unrecorded) == (len(found), 201)


def test_a_round_of_upkeep_that_fails_is_not_the_last_one(tmp_path):
    class Stumbles(OsDisk):
        synced = 0
        stumbles = False

        def sync(self, file: int) -> None:
            if self.stumbles:
                self.stumbles = False
                raise MemoryError
            super().sync(file)
            self.synced += 1

    disk = Stumbles()
    writer = JournalWriter(tmp_path / "journal", disk=disk, flush_seconds=0.01).open()
    disk.stumbles, disk.synced = True, 0
    deadline = time.monotonic() + 10
    while not disk.synced and time.monotonic() < deadline:
        writer.append(b"payload")
        time.sleep(0.005)
    assert (disk.synced > 0, writer.failures) == (True, 1)
    assert writer.close()
