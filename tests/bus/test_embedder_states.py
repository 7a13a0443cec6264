"""What an embedder says of a run is what followers see, whatever its state and its context are made of."""

import dataclasses
import enum
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from evsys_bus import (
    BenchmarkEval,
    Callback,
    Checkpoint,
    Envelope,
    Eval,
    EvalResult,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    follow,
)
from evsys_bus.codec import RunContexts, decode, encode
from evsys_bus.context import DetachedLoopState
from evsys_bus.delivery.open_runs import StreamContexts, open_runs_at
from evsys_bus.errors import DetachedError, SettingError
from evsys_bus.journal import JournalWriter, OsDisk
from support.foreign_values import RaisingKeyErrors
from support.journals import read_envelopes, read_records

HALF = np.float32(0.5)


class Phase(enum.Enum):
    WARM = "warm"


@dataclasses.dataclass
class HostLoop:
    """A loop of somebody else's; it lacks some of what ours has."""

    step: int = 4
    num_steps: Any = 9
    output_dir: Any = "/exp/wide"
    ctx: Any = None
    epoch: int = 2
    rate: Any = HALF
    phase: Phase = Phase.WARM
    cache: Path = Path("/tmp/cache")
    history: list[float] = dataclasses.field(default_factory=lambda: [1.0, 0.5])
    best: dict[str, Any] = dataclasses.field(default_factory=lambda: {"acc": 0.75, "at": [3, 4]})
    model: object = dataclasses.field(default_factory=object)
    api_key: str = "sk-1"
    _private: int = 1


@dataclasses.dataclass
class StagedState(LoopState):
    epoch: int = 1
    policy: object = dataclasses.field(default_factory=object)


def read(event, run=None, contexts=None):
    return decode(encode(Envelope("s", 1, 2.0, event, run)), contexts).event


@pytest.mark.parametrize("kind", [HostLoop, lambda: SimpleNamespace(**vars(HostLoop()))])
def test_a_hosts_own_state_reaches_followers_with_its_scalars_and_small_plain_data(kind):
    state = read(StepEnd(kind(), 4, TrainingBatch(), {"loss": 0.5})).state
    assert type(state) is DetachedLoopState
    assert (state.step, state.num_steps, state.output_dir, state.run_key) == (4, 9, Path("/exp/wide"), "wide")
    assert (state.epoch, state.rate, state.phase, state.cache) == (2, 0.5, "warm", "/tmp/cache")
    assert (state.history, state.best) == ([1.0, 0.5], {"acc": 0.75, "at": [3, 4]})
    assert (state.stop_requested, state.stop_reason, state.error, state.ctx) == (False, None, None, None)
    for live in ("model", "api_key", "backend"):
        with pytest.raises(DetachedError, match=live):
            getattr(state, live)
    for absent in ("_private", "modle"):
        with pytest.raises(AttributeError, match=f"no attribute '{absent}'"):
            getattr(state, absent)


def test_the_own_fields_of_a_subclass_and_of_an_instance_reach_followers(tmp_path):
    class Loose(LoopState):
        """Without slots: it takes any attribute."""

    loose = Loose(3, 9, tmp_path, backend="mesh")
    loose.tokens, loose.note, loose.sampler = 4096, "x" * 10_000, iter(())
    for state in (StagedState(3, 9, tmp_path, epoch=7), loose):
        found = read(TrainStart(state)).state
        assert (found.step, found.num_steps, found.output_dir) == (3, 9, tmp_path)
        with pytest.raises(DetachedError):
            _ = found.backend
    assert read(TrainStart(StagedState(3, 9, tmp_path, epoch=7))).state.epoch == 7
    found = read(TrainStart(loose)).state
    assert found.tokens == 4096
    for live in ("note", "sampler"):
        with pytest.raises(DetachedError, match="too large|live"):
            getattr(found, live)


def test_what_a_hosts_state_lacks_is_as_ours_is_by_default():
    class Bare:
        pass

    state = read(StepEnd(Bare(), 6, None, {"loss": 0.5})).state
    assert (state.step, state.num_steps, state.stop_requested, state.ctx, state.run_key) == (6, None, False, None, "")
    ctx = read(RunStart(SimpleNamespace(run_key="a", output_dir="/exp")), "a").ctx
    assert (ctx.run_dir, ctx.ids, ctx.extras, ctx.config, ctx.group_name) == (Path("/exp/a"), {}, {}, None, None)
    with pytest.raises(DetachedError):
        _ = ctx.store


def test_a_dict_in_the_place_of_a_handle_travels_with_the_keys_that_are_ours():
    event = read(StepEnd({"step": 2, "num_steps": 5}, 2, {"loss_fn": "grpo", "ids": [1], "metrics": {"n": 3}}, {}))
    assert (event.state.step, event.state.num_steps) == (2, 5)
    assert (event.batch.loss_fn, event.batch.metrics) == ("grpo", {"n": 3})


def test_an_attribute_that_raises_costs_only_itself():
    class Odd:
        step = 3
        output_dir = "/exp/a"

        @property
        def num_steps(self):
            raise OSError("not mounted")

    envelope = decode(encode(Envelope("s", 1, 2.0, StepEnd(Odd(), 3, None, {"loss": 0.5}))))
    assert (envelope.event.state.step, envelope.event.state.num_steps) == (3, None)
    assert envelope.replaced == {"state.num_steps": "OSError when it was read"}


@pytest.mark.parametrize("handle", [SimpleNamespace, LogContext])
def test_the_run_of_a_state_and_of_a_context_is_found_by_their_attributes(tmp_path, handle):
    ctx = handle(output_dir=tmp_path, run_key="wide")
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(StepEnd(HostLoop(ctx=ctx), 0, None, {"loss": 0.5}))
        bus.publish(StepEnd(SimpleNamespace(step=0, output_dir="/exp/narrow"), 0, None, {"loss": 0.5}))
        bus.publish(StepEnd(HostLoop(ctx=handle(output_dir=tmp_path, run_key=None)), 0, None, {"loss": 0.5}))
    assert [each.run for each in read_envelopes(tmp_path / "journal")] == ["wide", "wide", "narrow", "wide", "wide"]


def test_a_relative_folder_of_a_hosts_state_is_where_it_was_when_it_was_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = encode(Envelope("s", 1, 2.0, StepEnd(HostLoop(output_dir="sweep/a"), 0, None, {})))
    monkeypatch.chdir("/")
    assert decode(data).event.state.output_dir == tmp_path / "sweep/a"


def test_handles_hold_absolute_folders_and_refuse_what_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    state, ctx = LoopState(0, 1, "sweep/a"), LogContext("~/sweep", run_key="a")
    monkeypatch.chdir("/")
    assert (state.output_dir, ctx.run_dir) == (tmp_path / "sweep/a", tmp_path / "home/sweep/a")
    for make in (lambda: LoopState(0, 1, "gs://box/a"), lambda: LogContext("gs://box")):
        with pytest.raises(SettingError, match="output_dir is 'gs://box") as caught:
            make()
        assert "local directory" in caught.value.fix


class Sees(Callback):
    """Keeps what it is handed of each event."""

    def __init__(self):
        self.contexts = []

    def on_train_start(self, state):
        state.ctx.ids["seen_by"] = "train_start"

    def on_step_end(self, state, step_idx, batch, metrics):
        self.contexts.append((state.ctx, metrics.get("loss")))


def context(root, **more):
    return LogContext(root, config={"lr": 0.1, "token": "hf_1"}, ids={"experiment_id": "e"}, **more).for_run(
        "a-s0", {"seed": 0}, "a"
    )


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("foreign", [True, False])
def test_a_context_whose_run_was_not_started_reaches_followers_whole(tmp_path, starts, foreign):
    live = context(tmp_path, extras={"page": "p"})
    ctx: Any = SimpleNamespace(**{each.name: getattr(live, each.name) for each in dataclasses.fields(live)})
    sees = Sees()
    with EventBus([follow(sees, "sees")], journal=tmp_path / "journal", couriers="thread") as bus:
        state = LoopState(0, 3, tmp_path, ctx=ctx if foreign else live)  # not where the context says
        if starts:
            bus.publish(TrainStart(state))
        for step in range(3):
            bus.publish(StepEnd(state, step, None, {"loss": float(step)}))
        bus.publish(TrainEnd(state, LoopArtifacts()))
    assert [loss for _, loss in sees.contexts] == [0.0, 1.0, 2.0]
    for found, _ in sees.contexts:
        assert (found.output_dir, found.run_key, found.group_name) == (tmp_path, "a-s0", "a")
        assert (found.config, found.run_config) == ({"lr": 0.1, "token": "<redacted>"}, {"seed": 0})
        assert (found.ids["experiment_id"], found.extras) == ("e", {"page": "p"})
        assert ("seen_by" in found.ids) == starts  # what a hook writes reaches later ones


def test_a_hosts_context_that_says_only_a_little_is_read_with_that(tmp_path):
    sees = Sees()
    with EventBus([follow(sees, "sees")], journal=tmp_path / "journal", couriers="thread") as bus:
        for ctx in (SimpleNamespace(run_key="a", config={"lr": 0.1}), SimpleNamespace(config={"lr": 0.2})):
            state = SimpleNamespace(step=0, output_dir=tmp_path / "sweep" / "a", ctx=ctx)
            for step in range(2):
                bus.publish(StepEnd(state, step, None, {"loss": ctx.config["lr"]}))
    assert [ctx.config["lr"] for ctx, _ in sees.contexts[:2]] == [0.1, 0.1]
    for ctx, _ in sees.contexts:
        assert (ctx.ids, ctx.group_name) == ({}, None)
    assert {ctx.output_dir for ctx, _ in sees.contexts[:2]} == {tmp_path / "sweep"}


def test_two_experiments_with_one_run_key_on_one_bus_stay_apart(tmp_path):
    states = [LoopState(0, 3, tmp_path / name / "a-s0", ctx=context(tmp_path / name)) for name in ("x", "y")]
    sees = Sees()
    with EventBus([follow(sees, "sees")], journal=tmp_path / "journal", couriers="thread") as bus:
        for state in states:
            bus.publish(TrainStart(state))
        for step in range(3):
            for number, state in enumerate(states):
                bus.publish(StepEnd(state, step, None, {"loss": float(number)}))
        bus.publish(TrainEnd(states[0], LoopArtifacts()))
        bus.publish(StepEnd(states[1], 3, None, {"loss": 1.0}))
    assert [(ctx.output_dir.name, loss) for ctx, loss in sees.contexts] == [("x", 0.0), ("y", 1.0)] * 3 + [("y", 1.0)]
    assert len({id(ctx) for ctx, _ in sees.contexts}) == 2


@pytest.mark.parametrize("starts", [True, False])
def test_a_courier_that_begins_in_a_later_segment_finds_the_contexts(tmp_path, starts):
    states = [LoopState(0, 60, tmp_path, ctx=context(tmp_path / name)) for name in ("x", "y")]
    writer = JournalWriter(tmp_path / "journal", segment_bytes=4_000)
    with EventBus([], journal=writer) as bus:
        for state in states if starts else ():
            bus.publish(TrainStart(state))
        for step in range(60):
            for state in states:
                bus.publish(StepEnd(state, step, None, {"loss": 0.5}))
        last = bus.health().journal.recorded
    contexts = StreamContexts({})
    folder = f"{tmp_path}/journal/{writer.stream}"
    assert len([*Path(folder).glob("*.seg")]) > 3
    starts_found = open_runs_at(OsDisk(), folder, last - 1, contexts)
    assert len(starts_found) == (2 if starts else 0)
    for name in ("x", "y"):
        assert contexts.by_run.lookup("a-s0", str(tmp_path / name)).run_config == {"seed": 0}


def test_only_the_first_event_of_a_run_on_record_carries_its_context(tmp_path):
    state = LoopState(0, 9, tmp_path / "a-s0", ctx=context(tmp_path))
    events = [
        StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}),
        Eval(state, 0, "val", {"acc": 0.5}),
        StepEnd(state, 1, None, {"loss": 0.5}),
        Checkpoint(state, ManifestRow("one")),
        StepEnd(state, 2, None, {"loss": 0.5}),
        TrainEnd(state, LoopArtifacts()),
    ]

    def carry(*published):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        with EventBus([], journal=folder) as bus:
            for event in published:
                bus.publish(event)
        return [b"\xa7context" in bytes(record.payload) for record in read_records(folder)]

    for first in range(len(events)):
        assert carry(*events[first:]) == [True] + [False] * (len(events) - first - 1)
    assert carry(RunStart(state.ctx), TrainStart(state), *events) == [False] * 9  # with the implied end of the run
    assert carry(TrainStart(state), *events) == [True] + [False] * 6
    bare = LoopState(0, 9, tmp_path / "a-s0")
    assert carry(TrainStart(bare), StepEnd(bare, 0, None, {})) == [False] * 2


def test_what_0_1_0_wrote_reads_the_same(tmp_path):
    """Byte for byte what that version wrote for such events."""
    state = {"step": 3, "num_steps": 10, "output_dir": "/exp/a", "stop_requested": True, "run": "a"}
    head = {"stream": "s", "seq": 7, "time": 2.0, "run": "a", "rank": 1}
    event = {"type": "step_end", "state": state, "step_idx": 3, "batch": {}, "metrics": {"loss": 0.5}}
    envelope = decode(msgspec.msgpack.encode({**head, "event": event, "replaced": {"metrics.x": "odd"}}))
    found = envelope.event.state
    assert (envelope.run, envelope.rank, envelope.replaced) == ("a", 1, {"metrics.x": "odd"})
    assert (found.step, found.stop_requested, found.ctx.output_dir, found.ctx.run_key) == (3, True, Path("/exp"), "a")
    known = RunContexts()
    known.add("a", "/exp", ctx := LogContext(tmp_path, run_key="a"))
    assert decode(msgspec.msgpack.encode({**head, "event": event}), known).event.state.ctx is ctx


def test_what_was_read_is_written_again_as_it_was():
    """A folder that 0.1.0 wrote is relative to where that program ran, and not to where it is read."""
    state = {"step": 3, "num_steps": 9, "output_dir": "sweep/a", "stop_requested": False, "error": None, "run": "a"}
    batch = {"loss_fn": None, "metrics": {}}
    event = {"type": "step_end", "state": state, "step_idx": 3, "batch": batch, "metrics": {"loss": 0.5}}
    ctx = {"output_dir": "sweep", "run_key": "a", "config": {"lr": 0.1}}
    for each in (event, {"type": "run_start", "ctx": ctx}):
        written = {"stream": "s", "seq": 7, "time": 2.0, "run": "a", "rank": 0, "event": each}
        assert msgspec.msgpack.decode(encode(decode(msgspec.msgpack.encode(written)))) == written


def test_a_benchmark_that_follows_a_run_without_start_shares_its_context(tmp_path):
    class Reads(Sees):
        def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
            self.contexts.append((ctx, None))

    reads, live = Reads(), context(tmp_path)
    with EventBus([follow(reads, "reads")], journal=tmp_path / "journal", couriers="thread") as bus:
        bus.publish(TrainStart(LoopState(0, 1, tmp_path / "a-s0", ctx=live)))
        bus.publish(BenchmarkEval(live, EvalResult("val"), []))
    [(ctx, _)] = reads.contexts
    assert ctx.ids == {"experiment_id": "e", "seen_by": "train_start"}


def test_reading_the_environment_is_no_part_of_recording(tmp_path):
    """A working directory that is gone costs no row of a state with a relative folder."""
    gone = tmp_path / "gone"
    gone.mkdir()
    here = Path.cwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        data = encode(Envelope("s", 1, 2.0, StepEnd(HostLoop(output_dir="a"), 0, None, {"loss": 0.5})))
    finally:
        os.chdir(here)
    assert decode(data).event.metrics == {"loss": 0.5}


def test_contexts_that_nobody_ends_do_not_stay_for_ever(tmp_path):
    known = RunContexts()
    for number in range(10_100):
        known.add(f"a-{number}", "/exp", LogContext(tmp_path))
    known.add("a-5000", "/other", LogContext(tmp_path))
    assert len(known) == 10_000
    assert (known.lookup("a-99", "/exp"), known.ambiguous_keys) == (None, {"a-5000"})
    known.remove("a-5000", "/other")
    assert (known["a-5000"] is known.lookup("a-5000", "/exp"), known.ambiguous_keys) == (True, set())


@pytest.mark.parametrize("key", [7, Path("wide/7"), 0.5])
def test_a_run_key_that_is_no_text_names_one_run_for_inline_and_followed_callbacks(tmp_path, key):
    class Keys(Callback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, state, step_idx, batch, metrics):
            self.seen.append((str(state.ctx.run_key), Path(state.ctx.output_dir), state.ctx.run_config["lr"]))

    inline, followed = Keys(), Keys()
    with EventBus([inline, follow(followed, "f")], journal=tmp_path / "journal", couriers="thread") as bus:
        for step in range(3):  # a context of its own each time, as a property gives it
            ctx = SimpleNamespace(output_dir=tmp_path, run_key=key, run_config={"lr": 0.5})
            bus.publish(StepEnd(SimpleNamespace(step=step, output_dir=tmp_path / "x", ctx=ctx), step, None, {}))
    assert followed.seen == inline.seen == [(str(key), tmp_path, 0.5)] * 3
    assert {each.run for each in read_envelopes(tmp_path / "journal")} == {str(key)}


def test_a_program_that_changes_its_folder_while_a_bus_records_does_not_move_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    ctx = SimpleNamespace(output_dir="sweep", run_key="a")
    states = [HostLoop(output_dir="alone"), HostLoop(output_dir="sweep/a", ctx=ctx)]
    with EventBus([], journal=tmp_path / "journal") as bus:
        for step in range(5):  # some of them by a form
            for state in states:
                bus.publish(StepEnd(state, step, None, {"loss": 0.5}))
                bus.publish(Eval(state, step, "val", {"acc": 0.5}))
            monkeypatch.chdir(tmp_path / "scratch")
    found = [each.event.state for each in read_envelopes(tmp_path / "journal")]
    assert {each.output_dir for each in found} == {tmp_path / "alone", tmp_path / "sweep/a"}
    assert {each.ctx.output_dir for each in found if each.ctx} == {tmp_path / "sweep"}
    with EventBus([], journal=tmp_path / "later") as bus:  # another day's is another folder
        bus.publish(StepEnd(states[0], 0, None, {}))
    assert read_envelopes(tmp_path / "later")[0].event.state.output_dir == tmp_path / "scratch/alone"


@pytest.mark.parametrize("make", [RaisingKeyErrors, dict])
def test_a_state_whose_look_up_raises_makes_no_publish_raise(tmp_path, make):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for state in (make(step=0, output_dir=tmp_path / "a"), make(ctx=make(run_key="b", output_dir=tmp_path))):
            for event in (
                TrainStart(state),
                StepEnd(state, 0, None, {"loss": 0.5}),
                Eval(state, 0, "val", {"acc": 0.5}),
                Checkpoint(state, ManifestRow("c")),
                TrainEnd(state, LoopArtifacts()),
            ):
                bus.publish(event)
        bus.publish(RunStart(make(output_dir=tmp_path)))
    assert [each.run for each in read_envelopes(tmp_path / "journal")] == ["a"] * 5 + ["b"] * 5 + [None]


class Volume:
    """A path of a host's own: `os.PathLike`, and nothing else."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fspath(self.path)


def test_a_folder_may_be_whatever_open_takes(tmp_path):
    for folder in (Volume(tmp_path / "a"), Volume(os.fsencode(tmp_path / "a")), Volume(str(tmp_path / "a"))):
        ctx = SimpleNamespace(output_dir=Volume(tmp_path), run_key="a")
        alone, inside = SimpleNamespace(step=0, output_dir=folder), SimpleNamespace(step=0, output_dir=folder, ctx=ctx)
        assert read(StepEnd(alone, 0, None, {})).state.output_dir == tmp_path / "a"
        found = read(StepEnd(inside, 0, None, {})).state
        assert (found.output_dir, found.ctx.output_dir, found.ctx.run_key) == (tmp_path / "a", tmp_path, "a")
