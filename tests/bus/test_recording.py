"""What a bus with a journal promises: when `publish` has returned, the event outlives the process."""

import math
import shutil
import signal
import sys
import threading

import pytest

from evsys_bus import (
    BenchmarkEval,
    Callback,
    Checkpoint,
    Eval,
    EvalResult,
    Event,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Metrics,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.bus.recorder import rank_from_environment
from evsys_bus.codec import decode
from evsys_bus.context import ArmResult
from evsys_bus.errors import JournalOpenError, UnrecordedError
from evsys_bus.events import declared_events
from evsys_bus.journal import JournalReader, JournalWriter, verify
from evsys_bus.testing import SimulatedDisk
from support.journals import read_envelopes
from support.waiting import wait_until


def steps(directory):
    return [envelope.event.step_idx for envelope in read_envelopes(directory)]


def test_every_event_is_on_record_in_order_with_its_run_and_what_hooks_added(tmp_path, step_end):
    class Derives(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            metrics["perplexity"] = 2.0 ** metrics["loss"]

        def on_run_start(self, ctx):
            ctx.ids["run_id"] = "r1"

    ctx = LogContext(output_dir=tmp_path).for_run("a-s0")
    with EventBus([Derives()], journal=tmp_path / "journal", rank=3) as bus:
        bus.publish(RunStart(ctx))
        bus.publish(step_end(0, loss=1.0))
        bus.publish(BenchmarkEval(ctx, EvalResult("val", metrics={"acc": 0.5}), [{"task_id": "1"}], 0))
        assert bus.health().journal.recorded == 3
    assert bus.receipt.recorded == 4, "the end of the run is implied"
    assert bus.receipt.unrecorded == 0
    start, step, benchmark, _ = read_envelopes(tmp_path / "journal")
    assert [each.seq for each in (start, step, benchmark)] == [1, 2, 3]
    assert {each.rank for each in (start, step, benchmark)} == {3}
    assert (start.run, step.run, benchmark.run) == ("a-s0", tmp_path.name, "a-s0")
    assert start.event.ctx.ids == {"run_id": "r1"}  # a start is recorded after its hooks
    assert step.event.metrics == {"loss": 1.0, "perplexity": 2.0}
    assert (benchmark.event.eval_result.metrics, benchmark.event.step) == ({"acc": 0.5}, 0)
    assert start.time <= step.time <= benchmark.time


def test_all_eleven_events_and_one_of_ones_own_are_recorded(tmp_path):
    class RewardSeen(Event, frozen=True):
        reward: float

    ctx, state = LogContext(output_dir=tmp_path), LoopState(step=0, num_steps=1, output_dir=tmp_path)
    values = {"ctx": ctx, "state": state, "row": ManifestRow("final"), "metrics": {}, "artifacts": LoopArtifacts()}
    values["step_idx"] = 0
    shipped = [event for event in declared_events().values() if event.__module__ == "evsys_bus.events"]
    with EventBus([], journal=tmp_path / "journal") as bus:
        for event in shipped:
            bus.publish(event(*(values.get(name) for name in event.__struct_fields__)))
        bus.publish(RewardSeen(0.5))
    found = [type(envelope.event) for envelope in read_envelopes(tmp_path / "journal")]
    assert found == [*shipped, RewardSeen]


def test_an_event_of_ones_own_that_names_a_run_is_that_runs(tmp_path):
    class PageFound(Event, frozen=True):
        run: str | None

    with EventBus([], journal=tmp_path / "journal") as bus:
        for run in ("wide", None):
            bus.publish(PageFound(run))
    assert [envelope.run for envelope in read_envelopes(tmp_path / "journal")] == ["wide", None]


class NoKey:
    """Stands where a context belongs."""


class Raises(LoopState):
    __slots__ = ()

    @property
    def ctx(self):
        raise RuntimeError("not now")

    @ctx.setter
    def ctx(self, value):
        pass


@pytest.mark.parametrize(
    "odd", [{"ctx": NoKey()}, {"ctx": {}}, {"output_dir": None}, {"output_dir": 3}, {"output_dir": "runs/x"}, "raises"]
)
def test_whatever_stands_in_a_state_the_event_is_recorded_and_its_hooks_run(tmp_path, odd):
    seen = []

    class Sees(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            seen.append(step_idx)

        def on_train_end(self, state, artifacts):
            seen.append("end")

    state = Raises(0, 9, tmp_path) if odd == "raises" else LoopState(0, 9, tmp_path)
    for name, value in {} if odd == "raises" else odd.items():
        setattr(state, name, value)
    with EventBus([Sees()], journal=tmp_path / "journal") as bus:
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}))
        bus.publish(StepEnd(state, 1, TrainingBatch(), {"loss": 0.5}))
        bus.publish(TrainEnd(state, LoopArtifacts()))
    assert seen == [0, 1, "end"]
    assert len(read_envelopes(tmp_path / "journal")) == 3


@pytest.mark.parametrize("hook", ["on_checkpoint", "on_train_end", "on_run_end"])
def test_a_checkpoint_and_an_end_are_on_record_before_their_hooks(tmp_path, state, hook):
    seen = []
    look = lambda self, *args: seen.extend(type(each.event) for each in read_envelopes(tmp_path / "journal"))  # noqa: E731
    callback = type("Looks", (Callback,), {hook: look})()
    events = {
        "on_checkpoint": Checkpoint(state, ManifestRow("final")),
        "on_train_end": TrainEnd(state, LoopArtifacts()),
        "on_run_end": RunEnd(LogContext(output_dir=tmp_path), RunResult(), ArmResult("a")),
    }
    with EventBus([callback], journal=tmp_path / "journal") as bus:
        bus.publish(events[hook])
    assert seen == [type(events[hook])]


def test_an_interrupt_in_a_hook_reaches_the_caller_once_the_event_is_recorded(tmp_path, step_end):
    class Leaves(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise KeyboardInterrupt

    with EventBus([Leaves()], journal=tmp_path / "journal") as bus:
        with pytest.raises(KeyboardInterrupt):
            bus.publish(step_end(7))
        assert steps(tmp_path / "journal") == [7]


def test_what_a_hook_publishes_is_recorded_when_the_outermost_publish_returns(tmp_path, state, step_end):
    class Nests(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            bus.publish(Eval(state, step_idx, "val", {}))

    with EventBus([Nests()], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(1))
        assert [type(each.event).__name__ for each in read_envelopes(tmp_path / "journal")] == ["StepEnd", "Eval"]


def test_sixteen_threads_leave_no_gap_and_lose_nothing(tmp_path, step_end):
    def publish(first):
        for step in range(first, first + 500):
            bus.publish(step_end(step))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with EventBus([], journal=tmp_path / "journal") as bus:
            threads = [threading.Thread(target=publish, args=(500 * index,)) for index in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(switch)
    found = read_envelopes(tmp_path / "journal")
    assert [each.seq for each in found] == list(range(1, 8001))
    assert sorted(each.event.step_idx for each in found) == list(range(8000))


def test_a_later_bus_in_the_same_directory_goes_on_in_the_same_stream(tmp_path, step_end):
    for step in range(3):
        with EventBus([], journal=tmp_path / "journal") as bus:
            bus.publish(step_end(step))
    found = read_envelopes(tmp_path / "journal")
    assert [(each.seq, each.event.step_idx) for each in found] == [(1, 0), (2, 1), (3, 2)]
    assert len({each.stream for each in found}) == 1


def test_two_buses_at_once_in_one_directory_have_a_stream_each(tmp_path, step_end):
    with EventBus([], journal=tmp_path / "journal") as one, EventBus([], journal=tmp_path / "journal") as two:
        one.publish(step_end(1))
        two.publish(step_end(2))
    found = read_envelopes(tmp_path / "journal")
    assert len({each.stream for each in found}) == 2
    assert [each.seq for each in found] == [1, 1]


def test_a_journal_that_cannot_be_opened_is_an_error_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    bus = EventBus([], journal=tmp_path / "file" / "journal")
    with pytest.raises(JournalOpenError, match="cannot be written"), bus:
        pass
    assert bus.health().state == "new"


def test_a_directory_that_is_removed_costs_no_event_while_the_process_lives(tmp_path, step_end, caplog):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(0))
        shutil.rmtree(tmp_path / "journal")
        (tmp_path / "journal").write_text("in the way")
        wait_until(lambda: "journal.removed" in caplog.text)
        for step in range(1, 5):
            bus.publish(step_end(step))
        (tmp_path / "journal").unlink()
        health = bus.health().journal
        assert health.recorded + health.unrecorded + health.lost == 5
    assert bus.receipt.recorded + bus.receipt.unrecorded == 5


def test_on_unrecorded_raise_raises_from_publish_after_the_hooks_ran(tmp_path, step_end, program):
    process = program(
        """
        import resource, sys
        from evsys_bus import *
        from evsys_bus.journal import JournalWriter
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        class Counts(Callback):
            steps = 0
            def on_step_end(self, state, step_idx, batch, metrics):
                self.steps += 1
        counts = Counts()
        writer = JournalWriter(sys.argv[1], on_unrecorded="raise", reserve_bytes=0)
        with EventBus([counts], journal=writer) as bus:
            state = LoopState(0, 1, ".")
            bus.publish(StepEnd(state, 0, TrainingBatch(), {}))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                bus.publish(StepEnd(state, 1, TrainingBatch(), {}))
            except Exception as error:
                print(type(error).__name__, counts.steps)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            bus.publish(StepEnd(state, 2, TrainingBatch(), {}))
        """,
        str(tmp_path / "journal"),
    )
    out, err = process.communicate(timeout=18)
    assert out == "UnrecordedError 2\n", err
    assert steps(tmp_path / "journal") == [0, 2]
    assert issubclass(UnrecordedError, OSError)


KILLED = """
    import os, sys
    from evsys_bus import *
    state = LoopState(step=0, num_steps=1, output_dir="runs/a")
    with EventBus([], journal=sys.argv[1]) as bus:
        step = 0
        while True:
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0 / (step + 1)}))
            os.write(1, step.to_bytes(4, "little"))  # the receipt: it is only given once publish has returned
            step += 1
"""


@pytest.mark.long
def test_no_event_with_a_receipt_is_lost_to_a_kill(program, tmp_path):
    receipts = 0
    for kill in range(5):
        directory = tmp_path / f"journal-{kill}"
        process = program(KILLED, str(directory))
        head = process.stdout.buffer.read(4 * (100 + 997 * kill))
        process.send_signal(signal.SIGKILL)
        received = head + process.stdout.buffer.read()
        process.wait(10)
        last = len(received) // 4 - 1
        found = steps(directory)
        assert found[: last + 1] == list(range(last + 1))
        assert len(found) <= last + 2  # one more may have been recorded than was told
        assert not any(stream.corrupt_ranges or stream.missing_ranges for stream in verify(directory).streams)
        receipts += last + 1
    assert receipts > 5 * 100


def test_a_run_that_is_killed_and_started_again_reads_as_one_stream(program, tmp_path):
    for _ in range(3):
        process = program(KILLED, str(tmp_path / "journal"))
        process.stdout.buffer.read(4 * 50)
        process.send_signal(signal.SIGKILL)
        process.stdout.buffer.read()
        process.wait(10)
    found = read_envelopes(tmp_path / "journal")
    assert [each.seq for each in found] == list(range(1, len(found) + 1))
    assert len({each.stream for each in found}) == 1


def test_a_forked_child_does_not_touch_the_parents_journal(program, tmp_path):
    process = program(
        """
        import os, sys, warnings
        from evsys_bus import *
        warnings.simplefilter("ignore")
        state = LoopState(0, 1, "runs/a")
        with EventBus([], journal=sys.argv[1]) as bus:
            bus.publish(StepEnd(state, 0, TrainingBatch(), {}))
            child = os.fork()
            if child == 0:
                try:
                    bus.publish(StepEnd(state, 100, TrainingBatch(), {}))
                except Exception as error:
                    os._exit(7 if type(error).__name__ == "ForkedBusError" else 8)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            bus.publish(StepEnd(state, 1, TrainingBatch(), {}))
        """,
        str(tmp_path / "journal"),
    )
    out, err = process.communicate(timeout=18)
    assert out == "7\n", err
    assert steps(tmp_path / "journal") == [0, 1]


def test_values_under_keys_that_look_like_credentials_are_not_recorded(tmp_path):
    config = {
        "wandb": {"api_key": "hush-1", "project": "p"},
        "max_tokens": 5,
        "my-word": "hush-2",
        "list": [{"password": "hush-3"}],
    }
    ctx = LogContext(output_dir=tmp_path, config=config, run_config={"hf_token": "hush-4", "lr": 0.1})
    with EventBus([], journal=tmp_path / "journal", redact=["My-Word"]) as bus:
        bus.publish(RunStart(ctx))
    assert config["wandb"]["api_key"] == "hush-1"  # ours is a copy
    [record] = read_envelopes(tmp_path / "journal")
    assert record.event.ctx.config == {
        "wandb": {"api_key": "<redacted>", "project": "p"},
        "max_tokens": 5,
        "my-word": "<redacted>",
        "list": [{"password": "<redacted>"}],
    }
    assert record.event.ctx.run_config == {"hf_token": "<redacted>", "lr": 0.1}
    assert record.replaced["ctx.config.wandb.api_key"] == "it looks like a credential"
    assert b"hush" not in b"".join(path.read_bytes() for path in (tmp_path / "journal").rglob("*.seg"))


def test_the_files_of_a_journal_are_for_their_owner_alone(tmp_path, step_end):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(0))
    for path in [tmp_path / "journal", *(tmp_path / "journal").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_new_segment_begins_with_the_starts_of_the_runs_still_open(tmp_path, step_end, state):
    ctx = LogContext(output_dir=tmp_path)
    state.ctx = ctx.for_run("a-s0")
    ended = LoopState(step=0, num_steps=1, output_dir=tmp_path, ctx=ctx.for_run("b-s0"))
    writer = JournalWriter(tmp_path / "journal", segment_bytes=4096)
    with EventBus([], journal=writer) as bus:
        bus.publish(RunStart(ended.ctx))
        bus.publish(TrainStart(ended))
        bus.publish(TrainEnd(ended, LoopArtifacts()))
        bus.publish(RunEnd(ended.ctx, RunResult(), ArmResult("b")))
        bus.publish(RunStart(state.ctx))
        bus.publish(TrainStart(state))
        for step in range(50):
            bus.publish(step_end(step))
    last = max((tmp_path / "journal").rglob("*.seg"))
    assert b"run_start" in last.read_bytes()
    assert b"b-s0" not in last.read_bytes()
    assert [each.seq for each in read_envelopes(tmp_path / "journal")] == list(range(1, 59))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"RANK": "2"}, 2), ({"SLURM_PROCID": "5"}, 5), ({"RANK": "x", "PMI_RANK": "1"}, 1)],
)
def test_the_rank_is_what_the_launcher_says(environment, rank):
    assert rank_from_environment(environment) == rank


def test_without_a_journal_nothing_is_written(tmp_path, step_end):
    with EventBus([]) as bus:
        bus.publish(step_end(0))
        assert bus.health().journal is None
    assert (bus.receipt.recorded, bus.receipt.journal) == (0, None)
    assert list(tmp_path.iterdir()) == []


def tags_and_steps(directory):
    return [(type(each.event).__name__, each.event.step_idx) for each in read_envelopes(directory)]


def test_a_row_and_the_next_part_are_recorded_in_this_order_by_one_write_and_both_are_counted(state):
    disk, hooked = SimulatedDisk(), []

    class Hooked(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            hooked.append(step_idx)

    journal = JournalWriter("/journal", disk=disk, flush_seconds=math.inf)
    with EventBus([Hooked()], journal=journal) as bus:
        bus.publish_row(StepEnd(state, 0, TrainingBatch(), {"a": 0.0}), Metrics(state, 1, {"a": 1.0}))
        before = disk.calls
        for step in range(1, 10):
            row = StepEnd(state, step, TrainingBatch(), {"a": float(step)})
            bus.publish_row(row, Metrics(state, step + 1, {"a": step + 1.0}))
        assert disk.calls - before == 9
        assert bus.health().published == {"step_end": 10, "run.metrics": 10}
        assert bus.health().journal.recorded == 20
    assert hooked == [*range(10)]
    events = [decode(each.payload).event for each in JournalReader("/journal", disk).read(journal.stream)]
    assert [type(each) for each in events] == [StepEnd, Metrics] * 10
    assert [each.step_idx for each in events] == [0, *(step for step in range(1, 10) for _ in range(2)), 10]
    assert all(each.metrics == {"a": float(each.step_idx)} for each in events)


def test_a_part_that_is_published_with_a_row_calls_its_hooks_after_those_of_the_row(tmp_path, state):
    class Hooked(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            calls.append(("row", step_idx))

        def on_metrics(self, state, step_idx, metrics):
            calls.append(("part", step_idx))

    calls, second = [], Hooked()
    with EventBus([], journal=tmp_path) as bus:
        for step in range(3):
            if step == 1:
                bus.add(second)
            if step == 2:
                bus.remove(second)
            bus.publish_row(StepEnd(state, step), Metrics(state, step + 1, {}))
    assert calls == [("row", 1), ("part", 2)]
    assert tags_and_steps(tmp_path) == [
        (name, n + i) for n in range(3) for i, name in enumerate(("StepEnd", "Metrics"))
    ]


def test_a_row_and_the_next_part_are_published_without_a_journal_and_by_the_publish_of_a_subclass(tmp_path, state):
    class Counts(EventBus):
        def publish(self, event):
            published.append(type(event))
            super().publish(event)

    published = []
    with EventBus([]) as bus:
        bus.publish_row(StepEnd(state, 0), Metrics(state, 1, {}))
        assert bus.health().published == {"step_end": 1, "run.metrics": 1}
    with Counts([], journal=tmp_path) as bus:
        bus.publish_row(StepEnd(state, 0), Metrics(state, 1, {}))
    assert published == [StepEnd, Metrics]
    assert tags_and_steps(tmp_path) == [("StepEnd", 0), ("Metrics", 1)]


def test_a_row_and_the_next_part_that_a_hook_publishes_are_recorded_after_the_event_of_the_hook(tmp_path, state):
    class Publishes(Callback):
        def on_eval(self, state, step_idx, name, metrics):
            bus.publish_row(StepEnd(state, 0), Metrics(state, 1, {}))

    with EventBus([Publishes()], journal=tmp_path) as bus:
        bus.publish(Eval(state, 5, "val", {}))
    assert tags_and_steps(tmp_path) == [("Eval", 5), ("StepEnd", 0), ("Metrics", 1)]


def test_an_interrupt_in_a_hook_of_a_row_reaches_the_caller_once_row_and_next_part_are_recorded(tmp_path, state):
    class Interrupted(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise KeyboardInterrupt

    with EventBus([Interrupted()], journal=tmp_path) as bus:
        with pytest.raises(KeyboardInterrupt):
            bus.publish_row(StepEnd(state, 0), Metrics(state, 1, {}))
        assert tags_and_steps(tmp_path) == [("StepEnd", 0), ("Metrics", 1)]


def test_eight_threads_that_publish_rows_with_next_parts_lose_and_repeat_nothing(tmp_path, state):
    def publish(first):
        for step in range(first, first + 300):
            bus.publish_row(StepEnd(state, step), Metrics(state, step, {"a": float(step)}))

    with EventBus([], journal=tmp_path) as bus:
        threads = [threading.Thread(target=publish, args=(first,)) for first in range(0, 2_400, 300)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert bus.health().published == {"step_end": 2_400, "run.metrics": 2_400}
    found = tags_and_steps(tmp_path)
    assert sorted(found) == sorted((name, step) for name in ("StepEnd", "Metrics") for step in range(2_400))
    assert all(found.index(("StepEnd", step)) < found.index(("Metrics", step)) for step in range(0, 2_400, 50))


@pytest.mark.parametrize("changes", [{}, {"b": 2.0}, {"a": 7.0}, {"a": "text"}, {"a": None}, {"a": [1.0, 2.0]}])
def test_a_row_of_one_part_is_recorded_as_its_hooks_have_left_it(tmp_path, state, changes):
    class Changes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            metrics.update(changes)

    with EventBus([Changes()], journal=tmp_path) as bus:
        for step in range(6):
            part = {"a": float(step)}
            bus.publish(Metrics(state, step, part))
            bus.publish(StepEnd(state, step, TrainingBatch(), {**part}))
    rows = [each.event.metrics for each in read_envelopes(tmp_path) if isinstance(each.event, StepEnd)]
    assert rows == [{"a": float(step)} | changes for step in range(6)]
