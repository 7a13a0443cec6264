import datetime as dt
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_bus import (
    Alert,
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    ConfigUpdate,
    Content,
    ContentItem,
    Envelope,
    Environment,
    EpochEnd,
    Eval,
    EvalResult,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    GroupStart,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Metrics,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    Summary,
    TrainData,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    events,
)
from evsys_bus.codec import decode, encode, event_encoder, to_json
from evsys_bus.codec.redact import is_secret_key
from evsys_bus.codec.wire_types import run_and_root
from evsys_bus.errors import DetachedError
from evsys_bus.events import Event, declared_events, event_tag


class Rollout(msgspec.Struct, frozen=True):
    reward: float
    tags: tuple[str, ...] = ()


class CodecRolloutEnd(Event):
    """A user's event: handles in any place, and types of the user's own."""

    reward: float
    state: LoopState | None
    when: dt.datetime
    rollouts: list[Rollout]
    folder: Path
    by_epoch: dict[int, float]
    batch: TrainingBatch | None = None
    ctx: LogContext | None = None


NAMES = st.text(max_size=20)
NUMBERS = st.floats() | st.integers(-(2**53), 2**53)
METRICS = st.dictionaries(NAMES, NUMBERS, max_size=8)
FLOATS = st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=5)
KEYS = NAMES.filter(lambda name: not is_secret_key(name))  # what is under the others comes back redacted
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(NAMES, JSONS, max_size=4)
MAYBE = st.none() | NAMES
PATHS = st.sampled_from([Path("/runs/a"), Path("relative/b"), Path("/läufe")])
COUNTS = st.integers(0, 2**40)
STATUSES = st.sampled_from(["pending", "running", "completed", "failed", "cancelled"])

CONTEXTS = st.builds(
    LogContext,
    output_dir=PATHS,
    config=JSONS,
    store=st.just(object()),
    run_key=MAYBE,
    run_config=JSONS,
    group_name=MAYBE,
    ids=OBJECTS,
    extras=OBJECTS,
)
STATES = st.builds(
    LoopState,
    step=COUNTS,
    num_steps=COUNTS,
    output_dir=PATHS,
    backend=st.just(object()),
    stop_requested=st.booleans(),
    stop_reason=MAYBE,
    error=st.none() | st.builds(ValueError, NAMES),
    ctx=st.none() | CONTEXTS,
)
BATCHES = st.builds(
    TrainingBatch,
    data=st.just([object()]),
    loss_fn=MAYBE,
    loss_fn_config=st.none() | OBJECTS,
    metrics=METRICS,
)
ROWS = st.builds(ManifestRow, NAMES, COUNTS, COUNTS, MAYBE, MAYBE)
SECONDS = st.floats(0, 1e9)
ARTIFACTS = st.builds(LoopArtifacts, NAMES, MAYBE, st.lists(ROWS, max_size=2), COUNTS, SECONDS)
EVALS = st.builds(EvalResult, NAMES, MAYBE, FLOATS, OBJECTS, SECONDS, st.none() | COUNTS, st.lists(NAMES, max_size=2))
RUNS = st.builds(RunResult, MAYBE, STATUSES, FLOATS, st.none() | ARTIFACTS, MAYBE)
ARMS = st.builds(
    ArmResult,
    name=NAMES,
    run_config=JSONS,
    status=STATUSES,
    metrics=FLOATS,
    eval_metrics=FLOATS,
    evals=st.lists(EVALS, max_size=1),
    run_id=MAYBE,
    run_result=st.none() | RUNS,
)
EXPERIMENTS = st.builds(ExperimentResult, NAMES, STATUSES, st.lists(ARMS, max_size=1), MAYBE, st.none() | SECONDS)
ITEMS = st.builds(ContentItem, st.sampled_from(["text", "image", "artifact"]), NAMES, MAYBE, data=METRICS)

EVENTS = {
    ExperimentStart: st.builds(ExperimentStart, CONTEXTS),
    GroupStart: st.builds(GroupStart, CONTEXTS, NAMES),
    RunStart: st.builds(RunStart, CONTEXTS),
    TrainStart: st.builds(TrainStart, STATES),
    StepEnd: st.builds(StepEnd, STATES, COUNTS, BATCHES, METRICS),
    Checkpoint: st.builds(Checkpoint, STATES, ROWS),
    Eval: st.builds(Eval, STATES, COUNTS, NAMES, METRICS),
    BenchmarkEval: st.builds(BenchmarkEval, CONTEXTS, EVALS, st.lists(OBJECTS, max_size=3), st.none() | COUNTS),
    TrainEnd: st.builds(TrainEnd, STATES, ARTIFACTS),
    RunEnd: st.builds(RunEnd, CONTEXTS, RUNS, ARMS),
    ExperimentEnd: st.builds(ExperimentEnd, CONTEXTS, EXPERIMENTS),
    Metrics: st.builds(Metrics, STATES, COUNTS, METRICS),
    EpochEnd: st.builds(EpochEnd, STATES, COUNTS, METRICS),
    events.Rollout: st.builds(events.Rollout, STATES, COUNTS, st.lists(METRICS, max_size=2)),
    TrainData: st.builds(TrainData, CONTEXTS, st.lists(METRICS, max_size=2)),
    Environment: st.builds(Environment, CONTEXTS, METRICS),
    ConfigUpdate: st.builds(ConfigUpdate, CONTEXTS, METRICS),
    Summary: st.builds(Summary, CONTEXTS, METRICS),
    Content: st.builds(Content, STATES, st.none() | COUNTS, ITEMS),
    Alert: st.builds(Alert, CONTEXTS, NAMES, NAMES, st.sampled_from(["info", "warning", "error"])),
    CodecRolloutEnd: st.builds(
        CodecRolloutEnd,
        reward=st.floats(allow_nan=False),
        state=st.none() | STATES,
        when=st.datetimes(timezones=st.none() | st.just(dt.UTC)).map(lambda when: when.replace(fold=0)),
        rollouts=st.lists(st.builds(Rollout, st.floats(allow_nan=False), st.tuples(NAMES)), max_size=3),
        folder=PATHS,
        by_epoch=st.dictionaries(st.integers(), st.floats(allow_nan=False), max_size=3),
        batch=st.none() | BATCHES,
        ctx=st.none() | CONTEXTS,
    ),
}
ENVELOPES = st.builds(
    Envelope,
    stream=NAMES,
    seq=st.integers(1, 2**63),
    time=st.floats(0, 4e9),
    event=st.one_of(*EVENTS.values()),
    run=MAYBE,
    rank=st.integers(0, 1000),
    replaced=st.dictionaries(NAMES, NAMES, max_size=2),
)

TRAVELS = {
    LoopState: ("step", "num_steps", "output_dir", "stop_requested", "stop_reason"),
    LogContext: ("output_dir", "config", "run_key", "run_config", "group_name", "ids", "extras"),
    TrainingBatch: ("loss_fn", "loss_fn_config", "metrics"),
}


def assert_same(sent: Any, read: Any) -> None:
    """Equal, handles compared by what of them travels, and NaN being equal to NaN."""
    for kind, names in TRAVELS.items():
        if isinstance(sent, kind):
            assert isinstance(read, kind)
            for name in names:
                assert_same(getattr(sent, name), getattr(read, name))
            return
    assert type(read) is type(sent)
    if isinstance(sent, dict):
        assert list(read) == list(sent)
        for key, value in sent.items():
            assert_same(value, read[key])
    else:
        assert repr(read) == repr(sent)


def test_every_declared_event_of_ours_is_tried_here():
    shipped = {each for each in declared_events().values() if each.__module__ == "evsys_bus.events"}
    assert shipped | {CodecRolloutEnd} == set(EVENTS)


@given(ENVELOPES)
def test_an_envelope_comes_back_with_its_own_event_and_detached_handles(envelope):
    read = decode(encode(envelope))
    assert type(read.event) is type(envelope.event)
    for name in ("stream", "seq", "time", "run", "rank", "replaced"):
        assert getattr(read, name) == getattr(envelope, name)
    for name in envelope.event.__struct_fields__:
        assert_same(getattr(envelope.event, name), getattr(read.event, name))


@given(ENVELOPES)
def test_an_envelope_that_was_read_can_be_written_again(envelope):
    once = encode(decode(encode(envelope)))
    assert encode(decode(once)) == once


@given(ENVELOPES)
def test_the_json_of_an_envelope_has_its_shape_and_no_nan(envelope):
    row = json.loads(to_json(envelope), parse_constant=pytest.fail)
    assert list(row)[:6] == ["stream", "seq", "time", "run", "rank", "event"]
    assert row["event"]["type"] == event_tag(type(envelope.event))
    assert set(row["event"]) == {"type", *envelope.event.__struct_fields__}
    assert row.get("replaced", {}) == envelope.replaced


@pytest.fixture
def envelope(tmp_path):
    ctx = LogContext(tmp_path, run_key="a", store=object())
    state = LoopState(3, 10, tmp_path / "a", backend=object(), error=ValueError("bad"), ctx=ctx)
    batch = TrainingBatch([1], "cross_entropy", {"beta": 0.1}, {"tokens": 12})
    return Envelope("s", 1, 2.0, StepEnd(state, 3, batch, {"loss": 0.5, "note": "ok"}), "a")


def test_a_detached_handle_has_scalars_and_says_what_it_lacks(envelope, tmp_path):
    event = decode(encode(envelope)).event
    assert event.state.output_dir == tmp_path / "a"
    assert event.state.error == "ValueError: bad"
    assert getattr(event.state, "backend", None) is None
    for handle, live in [(event.state, "backend"), (event.state, "log_store"), (event.state, "checkpoint_mgr")]:
        with pytest.raises(DetachedError, match=live):
            getattr(handle, live)
    with pytest.raises(DetachedError):
        _ = event.batch.data
    with pytest.raises(DetachedError):
        event.state.request_stop()
    started = decode(encode(Envelope("s", 1, 2.0, RunStart(envelope.event.state.ctx), "a"))).event
    with pytest.raises(DetachedError):
        _ = started.ctx.store


def test_the_context_of_a_detached_state_is_the_one_given_for_its_run(envelope, tmp_path):
    ctx = LogContext(tmp_path, run_key="a")
    data = encode(envelope)
    assert decode(data, {"a": ctx}).event.state.ctx is ctx


def test_a_run_whose_start_was_not_seen_has_a_context_that_names_it(envelope, tmp_path):
    data = encode(envelope)
    for contexts in (None, {}, {"b": LogContext(tmp_path, run_key="b")}):
        state = decode(data, contexts).event.state
        assert (state.run_key, state.ctx.run_key) == ("a", "a")
        assert (state.ctx.output_dir, state.ctx.run_dir) == (tmp_path, state.output_dir)
        assert (state.ctx.ids, state.ctx.extras, state.ctx.config, state.ctx.group_name) == ({}, {}, None, None)
        state.ctx.ids["run_id"] = "mine"
    assert decode(data).event.state.ctx.ids == {}
    with pytest.raises(DetachedError, match="store"):
        _ = decode(encode(envelope)).event.state.ctx.store


@pytest.mark.parametrize(
    ("run", "folder", "root"),
    [("arm/seed-1", "/exp/arm/seed-1", "/exp"), ("a", "a", "."), ("a/b", "b", "."), ("a", "/", "/")],
)
def test_the_directory_of_such_a_context_is_where_the_run_lies_in(run, folder, root):
    """As 0.1.0 wrote it: nothing but the key of the run."""
    state = {"step": 0, "num_steps": 1, "output_dir": folder, "run": run}
    written = {"stream": "s", "seq": 1, "time": 2.0, "run": run, "event": {"type": "train_start", "state": state}}
    assert decode(msgspec.msgpack.encode(written)).event.state.ctx.output_dir == Path(root)


def test_the_directory_of_such_a_context_is_its_own_where_the_run_lies_elsewhere(tmp_path):
    for folder in (tmp_path, tmp_path / "elsewhere" / "a"):
        live = LoopState(0, 1, folder, ctx=LogContext(tmp_path, run_key="a"))
        state = decode(encode(Envelope("s", 1, 2.0, TrainStart(live), "a"))).event.state
        assert (state.ctx.output_dir, state.ctx.run_key, state.output_dir) == (tmp_path, "a", folder)


def test_a_bare_state_is_as_bare_when_it_is_detached_and_names_its_run(tmp_path):
    for run in ("bare", None):
        envelope = Envelope("s", 1, 2.0, TrainStart(LoopState(0, 1, tmp_path / "bare")), run)
        state = decode(encode(envelope)).event.state
        assert (state.ctx, state.run_key) == (None, "bare")


def test_a_state_without_context_takes_the_run_of_its_envelope(tmp_path):
    ctx = LogContext(tmp_path, run_key="a")
    data = encode(Envelope("s", 1, 2.0, TrainStart(LoopState(0, 1, tmp_path)), "a"))
    assert decode(data, {"a": ctx}).event.state.ctx is ctx


def test_numpy_metrics_are_written_as_plain_ones_are(envelope):
    plain = envelope.event
    for kind in (np.float64, np.float32):
        foreign = StepEnd(plain.state, plain.step_idx, plain.batch, {"loss": kind(0.5), "note": "ok"})
        assert encode(msgspec.structs.replace(envelope, event=foreign)) == encode(envelope)


def test_the_metrics_of_the_event_itself_are_never_changed(envelope):
    metrics = {"loss": np.float32(0.5), "deep": [np.float64(1.0)]}
    event = StepEnd(envelope.event.state, 3, envelope.event.batch, metrics)
    encode(msgspec.structs.replace(envelope, event=event))
    assert type(metrics["loss"]) is np.float32
    assert type(metrics["deep"][0]) is np.float64


def test_nan_in_metrics_stays_a_float_in_msgpack_and_is_flagged_in_json(envelope):
    event = StepEnd(envelope.event.state, 3, envelope.event.batch, {"loss": float("nan"), "lr": float("-inf")})
    envelope = msgspec.structs.replace(envelope, event=event)
    assert repr(decode(encode(envelope)).event.metrics) == "{'loss': nan, 'lr': -inf}"
    row = json.loads(to_json(envelope))
    assert row["event"]["metrics"] == {"loss": None, "lr": None}
    assert row["nonfinite"] == {"metrics.loss": "nan", "metrics.lr": "-inf"}


def test_an_envelope_with_nothing_replaced_does_not_mention_it(envelope):
    assert "replaced" not in json.loads(to_json(envelope))


def test_a_memoryview_is_read_as_bytes_are(envelope):
    assert decode(memoryview(encode(envelope))).event.metrics == envelope.event.metrics


@pytest.mark.parametrize("keys", ["aaaabbbb", "abababab", (1, 1, 1, 2, 2, 2), (None, None, None, "a", "a", "a")])
def test_a_state_without_a_directory_names_its_run_in_every_step(keys):
    encode_step = event_encoder(StepEnd, "s", 0, lambda event: run_and_root(cast("Any", event).state)[0])
    steps = [StepEnd(cast("Any", SimpleNamespace(step=i, run_key=key)), i, None, {}) for i, key in enumerate(keys)]
    runs = [decode(encode_step(step, seq, 1.0)).run for seq, step in enumerate(steps)]
    assert runs == [None if key is None else str(key) for key in keys]
