"""What inline callbacks know of a run comes back when the run does: real journals, real kills."""

import asyncio
import json
import logging
import signal

import msgspec
import pytest

from evsys_adapters import CsvMetricsCallback, LocalLoggerCallback, TensorBoardLoggerCallback
from evsys_adapters.early_stopping import MAX_MARKED_EVALS, EarlyStoppingCallback
from evsys_bus import (
    Callback,
    Checkpoint,
    Eval,
    EventBus,
    ManifestRow,
    StepEnd,
    TrainStart,
    follow,
)
from evsys_bus.bus.callback_marks import BusCallbackMarks, add_mark_callbacks, recorded_marks
from evsys_bus.context import EvalResult, LoopArtifacts, TrainingBatch
from evsys_bus.errors import EventError
from evsys_bus.events import BenchmarkEval, Event, TrainEnd
from evsys_bus.journal import JournalWriter
from evsys_bus.sink import Sink
from support.journals import read_records
from support.steps import state_of


class Counts(Callback):
    """Counts the steps of each run; its marks are of one run."""

    def __init__(self):
        self.steps = {}
        self.seen_at_start = None

    def on_train_start(self, state):
        self.seen_at_start = self.steps.get(state.run_key, 0)

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps[state.run_key] = self.steps.get(state.run_key, 0) + 1

    def mark_run(self, run):
        return self.steps.get(run.run_key, 0)

    def rewind_run(self, run, mark, newest):
        self.steps[run.run_key] = mark or 0


class Total(Callback):
    """Counts the steps of all runs; its mark is of all of them."""

    def __init__(self):
        self.steps = 0
        self.seen_at_start = None

    def on_train_start(self, state):
        self.seen_at_start = self.steps

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps += 1

    def mark(self):
        return {"steps": self.steps}

    def rewind(self, mark):
        self.steps = mark["steps"]


def open_bus(folder, *callbacks, rank=0, **more):
    journal = folder / "journal"
    return EventBus(add_mark_callbacks(callbacks, journal, rank), journal=journal, rank=rank, **more)


def train(bus, state, steps, *, save_at=(), eval_at=()):
    """Publish what a loop would."""
    bus.publish(TrainStart(state))
    for step in steps:
        state.step = step
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
        if step in save_at:
            bus.publish(Checkpoint(state, ManifestRow(f"step-{step}", batch=step)))
        if step in eval_at:
            bus.publish(Eval(state, step, "val", {"loss": 1.0}))


def tags(folder):
    return [msgspec.msgpack.decode(record.payload)["event"]["type"] for record in read_records(folder / "journal")]


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_marks_are_recorded_behind_train_starts_checkpoints_and_the_evals_that_changed_them(tmp_path):
    with open_bus(tmp_path, Counts()) as bus:
        state = state_of(tmp_path)
        train(bus, state, range(3), save_at=[1], eval_at=[1, 2])
        bus.publish(Eval(state, 2, "val", {"loss": 1.0}))
        bus.publish(BenchmarkEval(state.ctx, EvalResult("test"), [], step=2))
        bus.publish(TrainEnd(state, LoopArtifacts()))
    assert tags(tmp_path) == [
        *["train_start", "bus_callback_marks", "step_end", "step_end", "checkpoint", "bus_callback_marks", "eval"],
        *["step_end", "eval", "bus_callback_marks", "eval", "benchmark_eval", "train_end"],
    ]
    found = [(each.step, each.marks) for each in recorded_marks(str(tmp_path / "journal"), "run")]
    assert found == [(3, {"Counts": 3}), (2, {"Counts": 2}), (0, {"Counts": 0})]


def test_nothing_is_added_where_no_callback_keeps_marks_or_nothing_is_recorded(tmp_path):
    class Plain(Callback):
        def mark(self):
            """Not a pair."""

    class OfFiles(Total):
        marks_inline = False

    class AnswersToAll(Callback):
        def __getattr__(self, name):
            return lambda *_: None

    callbacks = (Plain(), OfFiles(), AnswersToAll(), object())
    assert add_mark_callbacks(callbacks, tmp_path) == callbacks
    counts = Counts()
    assert add_mark_callbacks([counts], None) == (counts,)


def test_adapters_that_mark_files_are_for_couriers(tmp_path):
    adapters = (CsvMetricsCallback(tmp_path / "a.csv"), LocalLoggerCallback(), TensorBoardLoggerCallback())
    assert add_mark_callbacks(adapters, tmp_path) == adapters


def test_callbacks_may_be_added_and_removed_later(tmp_path):
    counts, total, plain = Counts(), Total(), Callback()
    first, *given, last = add_mark_callbacks([plain, counts], JournalWriter(tmp_path))
    assert given == [plain, counts]
    assert add_mark_callbacks([first, plain, counts, last, total], tmp_path) == (first, plain, counts, total, last)
    assert add_mark_callbacks([first, plain, total, last], tmp_path) == (first, plain, total, last)
    assert add_mark_callbacks([first, plain, last], tmp_path) == (plain,)


def test_the_name_of_the_event_is_not_to_be_taken():
    with pytest.raises(EventError, match="ships with evsys-bus"):
        type("BusCallbackMarks", (Event,), {"__module__": "mine"})


def test_followers_and_sinks_count_marks_like_any_event(tmp_path):
    class Sees(Sink):
        def __init__(self):
            self.events = []

        async def write(self, batch):
            self.events += [type(each.event) for each in batch]

    class Steps(Callback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, state, step_idx, batch, metrics):
            self.steps.append(step_idx)

    sees, steps = Sees(), Steps()
    journal = tmp_path / "journal"
    with EventBus([*add_mark_callbacks([Counts()], journal), follow(steps)], journal=journal, sinks=[sees]) as bus:
        train(bus, state_of(tmp_path), range(4), eval_at=[1, 3])
    assert steps.steps == [0, 1, 2, 3]
    assert sees.events.count(BusCallbackMarks) == 3
    assert {(each.recorded, each.delivered, each.dead, each.pending) for each in bus.receipt.deliveries} == {
        (10, 10, 0, 0)
    }


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Counts, Total])
@pytest.mark.parametrize(("first", "known"), [(10, 10), (13, 12), (5, 5), (4, 0), (99, 18)])
def test_a_resume_gives_the_newest_mark_at_or_before_its_step_back_before_any_hook(tmp_path, kind, first, known):
    with open_bus(tmp_path, kind()) as bus:
        train(bus, state_of(tmp_path), range(20), save_at=[4, 9, 14], eval_at=[5, 11, 17])
    callback = kind()
    with open_bus(tmp_path, callback) as bus:
        train(bus, state_of(tmp_path, step=first), [])
    assert callback.seen_at_start == known


def test_what_an_undone_attempt_recorded_counts_no_more(tmp_path):
    with open_bus(tmp_path, Counts()) as bus:
        train(bus, state_of(tmp_path), range(20), save_at=[4], eval_at=range(20))
    with open_bus(tmp_path, Counts()) as bus:  # from the checkpoint on, and five steps of the ten are counted twice
        state = state_of(tmp_path, step=5)
        train(bus, state, [5, 5, 6, 6, 7, 7, 8], save_at=[8])
    counts = Counts()
    with open_bus(tmp_path, counts) as bus:
        train(bus, state_of(tmp_path, step=9), [])
    assert counts.seen_at_start == 12


def test_a_run_in_the_same_process_begins_again_as_in_another(tmp_path):
    counts = Counts()
    with open_bus(tmp_path, counts) as bus:
        train(bus, state_of(tmp_path), range(6), save_at=[3])
        train(bus, state_of(tmp_path, step=4), [])
        assert counts.seen_at_start == 4
        train(bus, state_of(tmp_path), [])
        assert counts.seen_at_start == 0


def test_a_rewind_leaves_what_is_known_of_other_runs_alone(tmp_path):
    counts = Counts()
    with open_bus(tmp_path, counts) as bus:
        train(bus, state_of(tmp_path, "a"), range(8), save_at=[3])
        train(bus, state_of(tmp_path, "b"), range(9), save_at=[3])
        train(bus, state_of(tmp_path, "a", step=4), [])
    assert counts.steps == {"a": 4, "b": 9}


def test_a_mark_of_all_runs_is_not_given_back_while_another_trains_and_the_log_says_so(tmp_path, caplog):
    total = Total()
    with open_bus(tmp_path, total) as bus:
        train(bus, state_of(tmp_path, "a"), range(8), save_at=[3])
        train(bus, state_of(tmp_path, "b"), range(9))
        train(bus, state_of(tmp_path, "a", step=4), [])
        assert total.steps == 17
        [said] = [record for record in caplog.records if record.message.startswith("callback.not_rewound")]
        assert (said.callback, said.run) == ("Total", "a")
        assert "mark_run" in said.fix


def test_a_mark_of_all_runs_is_given_back_once_the_others_have_ended(tmp_path):
    total = Total()
    with open_bus(tmp_path, total) as bus:
        train(bus, state_of(tmp_path, "a"), range(8), save_at=[3])
        train(bus, state_of(tmp_path, "b"), range(9))
        bus.publish(TrainEnd(state_of(tmp_path, "b"), LoopArtifacts()))
        train(bus, state_of(tmp_path, "a", step=4), [])
        assert total.steps == 4


def test_two_of_one_class_have_each_its_own_mark(tmp_path):
    with open_bus(tmp_path, Counts(), Counts(), Total()) as bus:
        first, second = bus.callbacks[1:3]
        train(bus, state_of(tmp_path), range(3))
        second.steps["run"] = 50
        bus.publish(Eval(state_of(tmp_path, step=2), 2, "val", {}))
    first, second = Counts(), Counts()
    with open_bus(tmp_path, first, second) as bus:
        train(bus, state_of(tmp_path, step=3), [])
    assert (first.seen_at_start, second.seen_at_start) == (3, 50)


def test_a_rank_gets_its_own_marks_and_a_new_one_those_of_another(tmp_path):
    for rank, steps in ((0, 3), (1, 5)):
        with open_bus(tmp_path, Counts(), rank=rank) as bus:
            train(bus, state_of(tmp_path), range(steps), save_at=[steps - 1])
    for rank, known in ((0, 3), (1, 5), (2, 5)):
        counts = Counts()
        with open_bus(tmp_path, counts, rank=rank) as bus:
            train(bus, state_of(tmp_path, step=5), [])
        assert counts.seen_at_start == known


def test_of_two_runs_of_one_key_each_gets_its_own_and_a_run_that_was_moved_that_of_its_key(tmp_path):
    for folder, steps in (("x", [0, 1, 2]), ("y", [0, 0, 1, 1, 2, 2])):
        with open_bus(tmp_path, Counts()) as bus:
            train(bus, state_of(tmp_path / folder), steps, save_at=[2])
    for folder, known in (("elsewhere", 6), ("x", 3), ("y", 6)):
        counts = Counts()
        with open_bus(tmp_path, counts) as bus:
            train(bus, state_of(tmp_path / folder, step=3), [])
        assert counts.seen_at_start == known, folder


class AnotherState:
    """A state of a host's own: no class of ours, a whole float for the step, a text for the folder."""

    def __init__(self, folder, step):
        self.step, self.num_steps, self.output_dir, self.run_key = step, None, str(folder), "run"


def test_states_of_other_classes_and_steps_that_are_whole_floats_will_do(tmp_path):
    with open_bus(tmp_path, Counts()) as bus:
        train(bus, AnotherState(tmp_path / "run", 0.0), [0.0, 1.0, 2.0], save_at=[1.0])
    counts = Counts()
    with open_bus(tmp_path, counts) as bus:
        train(bus, AnotherState(tmp_path / "run", 2.0), [])
    assert counts.seen_at_start == 2


# -- what may go wrong ------------------------------------------------------------------------------------------------


def test_one_that_cannot_mark_or_rewind_is_named_and_the_others_are_rewound(tmp_path, caplog):
    class Broken(Counts):
        def mark_run(self, run):
            raise RuntimeError("no mark")

    class BrokenLater(Counts):
        def rewind_run(self, run, mark, newest):
            raise RuntimeError("no rewind")

    with open_bus(tmp_path, Broken(), BrokenLater(), Counts()) as bus:
        train(bus, state_of(tmp_path), range(4), save_at=[3])
    counts = Counts()
    with open_bus(tmp_path, Broken(), BrokenLater(), counts) as bus:
        train(bus, state_of(tmp_path, step=4), [])
    assert counts.seen_at_start == 4
    failed = {(record.callback, record.hook) for record in caplog.records if record.message.startswith("hook.failed")}
    assert failed == {("Broken", "mark"), ("BrokenLater", "rewind")}


def test_a_mark_that_cannot_be_recorded_whole_is_not_given_back(tmp_path, caplog):
    class Odd(Counts):
        def mark_run(self, run):
            return {"count": self.steps.get("run", 0), "object": object() if self.steps.get("run") == 4 else None}

        def rewind_run(self, run, mark, newest):
            self.steps["run"] = mark["count"]

    with open_bus(tmp_path, Odd()) as bus:
        train(bus, state_of(tmp_path), range(5), save_at=[1, 3])
    assert "a mark is plain data" in caplog.text
    odd = Odd()
    with open_bus(tmp_path, odd) as bus:
        train(bus, state_of(tmp_path, step=4), [])
    assert odd.seen_at_start == 2


def test_a_damaged_segment_costs_its_marks_and_no_more(tmp_path):
    for first in (0, 4):
        with open_bus(tmp_path, Counts()) as bus:
            train(bus, state_of(tmp_path, step=first), range(first, first + 4), save_at=[first + 3])
    newest = max(tmp_path.glob("journal/r0-*/*.seg"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(b"\0" * 5_000)
    counts = Counts()
    with open_bus(tmp_path, counts) as bus:
        train(bus, state_of(tmp_path, step=8), [])
    assert counts.seen_at_start == 4


def test_marks_of_a_newer_version_are_passed_over(tmp_path):
    class BusCallbackMark(Event, frozen=True, tag="bus_callback_marks"):
        run: str
        step: str
        marks: str

    with open_bus(tmp_path, Counts()) as bus:
        train(bus, state_of(tmp_path), range(3), save_at=[2])
        bus.publish(BusCallbackMark("run", "three", "all"))
    assert [each.step for each in recorded_marks(str(tmp_path / "journal"), "run")] == [3, 0]


def test_the_search_for_marks_ends_in_time_and_says_so(tmp_path, caplog):
    with open_bus(tmp_path, Counts()) as bus:
        train(bus, state_of(tmp_path), range(3), save_at=[2])
    for _ in range(3):
        with open_bus(tmp_path) as bus:
            train(bus, state_of(tmp_path, "other"), range(3))
    assert list(recorded_marks(str(tmp_path / "journal"), "run", seconds=0.0)) == []
    assert "callback_marks.search_ended" in caplog.text


# -- early stopping ---------------------------------------------------------------------------------------------------


def judged(folder, state, values, **params):
    """A process of its own, as far as the callback knows: evals at these steps; where it had the run stop."""
    stopping = EarlyStoppingCallback("loss", mode="min", **params)
    with open_bus(folder, stopping) as bus:
        bus.publish(TrainStart(state))
        for step, value in values:
            if state.stop_requested:
                break
            state.step = max(state.step, step)
            bus.publish(Eval(state, step, "val", {"loss": value}))
    return stopping.history(state)


def test_patience_goes_on_where_a_run_does(tmp_path):
    judged(tmp_path, state_of(tmp_path), [(0, 3.0), (1, 2.0), (2, 2.5)])
    state = state_of(tmp_path, step=3)
    history = judged(tmp_path, state, [(3, 2.5), (4, 2.5), (5, 2.5)])
    assert (state.stop_requested, state.step, history.best_step, history.evals_since_best) == (True, 4, 1, 3)


def test_evals_that_run_again_count_once(tmp_path):
    judged(tmp_path, state_of(tmp_path), [(0, 1.0), (1, 2.0), (2, 2.0)])
    state = state_of(tmp_path, step=1)
    history = judged(tmp_path, state, [(1, 2.0), (2, 2.0)])
    assert (state.stop_requested, history.points) == (False, [(0, 1.0), (1, 2.0), (2, 2.0)])


def test_an_eval_that_came_late_is_known_to_a_resume_from_before_it_came(tmp_path):
    journal = tmp_path / "journal"
    stopping = EarlyStoppingCallback("loss", mode="min", patience=3)
    state = state_of(tmp_path)
    with EventBus(add_mark_callbacks([stopping], journal), journal=journal) as bus:
        train(bus, state, range(20), save_at=[9])
        for step in (4, 8, 12):  # they land when twenty steps are done
            bus.publish(Eval(state, step, "val", {"loss": 1.0}))
    state = state_of(tmp_path, step=10)
    assert judged(tmp_path, state, [(12, 1.0)], patience=3).points == [(4, 1.0), (8, 1.0), (12, 1.0)]


def test_a_run_whose_patience_was_at_its_end_stops_before_its_first_step(tmp_path):
    judged(tmp_path, state_of(tmp_path), [(0, 1.0), (1, 2.0), (2, 2.0)], patience=2)
    state = state_of(tmp_path, step=3)
    judged(tmp_path, state, [], patience=2)
    assert state.stop_reason == "no improvement of loss for 2 evals; best 1 at step 0"


def test_marks_of_another_metric_are_not_taken(tmp_path):
    judged(tmp_path, state_of(tmp_path), [(0, 1.0), (1, 2.0), (2, 2.0)], patience=9)
    stopping = EarlyStoppingCallback("accuracy", patience=1)
    state = state_of(tmp_path, step=3)
    with open_bus(tmp_path, stopping) as bus:
        bus.publish(TrainStart(state))
        bus.publish(Eval(state, 3, "val", {"accuracy": 0.5}))
    assert not state.stop_requested
    assert stopping.history(state).points == [(3, 0.5)]


def test_a_mark_does_not_grow_with_the_run_and_long_patience_survives(tmp_path):
    stopping, state = EarlyStoppingCallback("loss", mode="min", patience=1_000), state_of(tmp_path)
    for step in range(700):
        stopping.on_eval(state, step, "val", {"loss": 0.5 if step == 3 else 1.0})
    mark = json.loads(json.dumps(stopping.mark_run(state)))
    assert len(json.dumps(mark)) < 30 * MAX_MARKED_EVALS
    again, state = EarlyStoppingCallback("loss", mode="min", patience=1_000), state_of(tmp_path, step=700)
    again.rewind_run(state, mark, mark)
    again.on_train_start(state)
    for step in range(700, 1003):
        again.on_eval(state, step, "val", {"loss": 1.0})
        assert not state.stop_requested
    assert again.history(state).best_step == 3
    again.on_eval(state, 1003, "val", {"loss": 1.0})
    assert state.stop_reason == "no improvement of loss for 1000 evals; best 0.5 at step 3"


def test_what_is_known_of_all_runs_can_be_marked_too(tmp_path):
    stopping, state = EarlyStoppingCallback("loss"), state_of(tmp_path)
    stopping.on_eval(state, 7, "val", {"loss": 1.0})
    again = EarlyStoppingCallback("loss")
    again.rewind(json.loads(json.dumps(stopping.mark())))
    assert again.history(state).points == [(7, 1.0)]


RUN = """
    import asyncio, os, signal, sys
    from evsys_adapters import EarlyStoppingCallback
    from evsys_bus import EventBus, TrainingBatch, TrainingLoop
    from evsys_bus.bus.callback_marks import add_mark_callbacks

    folder, most_evals, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]

    class Model:
        async def forward_backward(self, batch):
            return {"loss": 1.0}

        async def optim_step(self): ...

        async def save_state(self, name):
            return f"memory://{name}"

        save_weights_for_sampler = save_state

        async def load_state(self, path): ...

    class Batches:
        async def build_batch(self, step_idx):
            if val.made == most_evals:  # right behind an eval: the machine goes away
                val.made += 1
                os.kill(os.getpid(), getattr(signal, how))
            return TrainingBatch(data=1)

    class Val:
        name, every, made = "val", 2, 0

        async def evaluate(self, state):
            self.made += 1
            with open(f"{folder}.evals", "a") as file:
                print(state.step, file=file)
            return {"score": 10 - min(state.step, 5)}

    val = Val()

    async def main():
        stopping = EarlyStoppingCallback("score", mode="min", patience=4)
        async with EventBus(add_mark_callbacks([stopping], f"{folder}/journal"), journal=f"{folder}/journal") as bus:
            loop = TrainingLoop(
                Model(), Batches(), num_steps=60, output_dir=folder, evaluators=[val], save_every=int(sys.argv[4]),
                bus=bus, resume=True,
            )
            await loop.run()
        print(loop.state.stop_reason)

    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("how", "most_evals", "save_every", "made"),
    [
        ("SIGKILL", 2, 1, 7),
        pytest.param("SIGKILL", 2, 3, 9, marks=pytest.mark.long),
        pytest.param("SIGTERM", 2, 1, 7, marks=pytest.mark.long),
        ("SIGTERM", 3, 50, 7),
    ],
)
def test_a_run_that_is_interrupted_every_few_evals_stops_after_as_many_as_an_undisturbed_one(
    tmp_path, program, how, most_evals, save_every, made
):
    """Improves until step 5, so it stops four evals later. Two of nine evals are made again where they were undone."""
    result = "no improvement of score for 4 evals; best 5 at step 5\n"

    def attempt(most_evals):
        process = program(RUN, str(tmp_path / "run"), str(most_evals), how, str(save_every))
        said, errors = process.communicate(timeout=60)
        return process.returncode, said, errors

    codes = []
    while not codes or codes[-1] != 0:
        code, said, errors = attempt(most_evals)
        codes.append(code)
        assert code in {0, -getattr(signal, how)}, errors
        assert len(codes) < 9, "it goes on for ever"
    assert said == result
    assert len(codes) > 1
    evals = (tmp_path / "run.evals").read_text().split()
    assert {int(step) for step in evals} == set(range(1, 14, 2))
    assert len(evals) == made
    # And once it has stopped, no attempt trains on.
    code, said, errors = attempt(99)
    assert (code, said) == (0, result), errors
    assert (tmp_path / "run.evals").read_text().split() == evals
    assert "training.stopped_earlier" in errors


@pytest.fixture(autouse=True)
def logged_from_info(caplog):
    caplog.set_level(logging.INFO, "evsys_bus")


def test_marks_are_kept_on_a_loop_too(tmp_path):
    async def main():
        counts = Counts()
        async with open_bus(tmp_path, counts) as bus:
            train(bus, state_of(tmp_path), range(3), save_at=[2])

    asyncio.run(main())
    assert [each.step for each in recorded_marks(str(tmp_path / "journal"), "run")] == [3, 0]
