"""The ways to encode a step against each other: what they say is the same, whatever a step holds."""

import dataclasses
import weakref
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_bus import Envelope, LogContext, LoopState, StepEnd, TrainingBatch
from evsys_bus.codec import decode, encode, event_encoder
from evsys_bus.codec.step_template import MAX_TEMPLATES

STREAM = "r0-20261128T070000-0badcafe"


def run_of(event: Any) -> str | None:
    try:
        ctx = getattr(event.state, "ctx", None)
        return Path(event.state.output_dir).name if ctx is None else ctx.run_key
    except (AttributeError, TypeError):
        return None


@pytest.fixture
def encode_step():
    return event_encoder(StepEnd, STREAM, 3, run_of)


def said(data: bytes) -> str:
    """As text: NaN is NaN, 1 is not 1.0, and -0.0 not 0.0."""
    return repr(msgspec.msgpack.decode(data))


def thorough(event: StepEnd, seq: int, time: float) -> dict[str, Any]:
    """What `to_builtins` makes of all of it: that is the way of envelopes in which something was replaced already."""
    data = encode(Envelope(STREAM, seq, time, event, run_of(event), 3, {"before": "this"}))
    row = msgspec.msgpack.decode(data)
    del row["replaced"]["before"]
    return row if row["replaced"] else {name: part for name, part in row.items() if name != "replaced"}


def ordinary(event: StepEnd, seq: int, time: float) -> bytes:
    return encode(Envelope(STREAM, seq, time, event, run_of(event), 3))


def states():
    contexts = st.none() | st.builds(
        LogContext, st.just(Path("/runs")), run_key=st.none() | st.sampled_from(["low", "high", "lo\ud800w", "x" * 300])
    )
    return st.builds(
        LoopState,
        st.integers() | st.booleans() | st.none(),
        st.integers() | st.sampled_from([1000, 1000.0, True, "many", ..., b"k"]),
        st.sampled_from([Path("/runs/low"), Path("/runs/high"), Path("/")]),
        stop_requested=st.just(False) | st.sampled_from([True, 0, None]),
        stop_reason=st.none() | st.just("enough"),
        error=st.none() | st.just(ValueError("no")),
        ctx=contexts,
    )


def batches():
    return st.just(TrainingBatch()) | st.builds(
        TrainingBatch,
        loss_fn=st.none() | st.sampled_from(["ppo", 7]),
        loss_fn_config=st.none() | st.just({"clip": 0.2}),
        metrics=st.just({}) | st.just({"tokens": 4096.0}),
    )


VALUES = (
    st.floats()
    | st.integers()
    | st.booleans()
    | st.none()
    | st.text(max_size=5)
    | st.sampled_from([[1, {"a": 2}], {3}, np.float32(0.1), np.float64(0.5), np.int64(7), object])
)
METRICS = st.dictionaries(st.text(max_size=5), st.floats(), max_size=9) | st.dictionaries(
    st.text(max_size=5) | st.integers(), VALUES, max_size=5
)
FORMED = event_encoder(StepEnd, STREAM, 3, run_of)  # one for all: forms of earlier steps are about


@given(states(), st.integers() | st.none(), batches(), METRICS, st.integers(1, 2**63), st.floats(allow_nan=False))
def test_whatever_a_step_holds_its_form_says_what_the_ordinary_way_says(state, index, batch, metrics, seq, time):
    event = StepEnd(state, index, batch, metrics)
    expected, found = ordinary(event, seq, time), FORMED(event, seq, time)
    assert said(found).partition(" at 0x")[0] == said(expected).partition(" at 0x")[0]


def test_a_plain_step_goes_by_its_form(encode_step, state):
    """Seen by the width of its numbers; otherwise none of the above would try anything."""
    event = StepEnd(state, 5, TrainingBatch(), {"loss": 0.5})
    sizes = [len(encode_step(event, 1, 2.0)) for _ in range(3)]  # the form is made with the second step
    assert sizes[2] == sizes[1] > sizes[0] == len(ordinary(event, 1, 2.0))


def test_runs_that_publish_by_turns_are_not_mixed_up(encode_step):
    made = [
        LoopState(0, 1000, f"/runs/{at}", ctx=LogContext("/runs", run_key=f"run-{at}"))
        for at in range(MAX_TEMPLATES + 9)
    ]
    for step in range(3):
        for state in made:
            state.step = step
            event = StepEnd(state, step, TrainingBatch(), {"loss": 0.5})
            assert said(encode_step(event, step + 1, 2.0)) == said(ordinary(event, step + 1, 2.0))


def test_a_horizon_that_changes_in_place_and_one_that_is_nearly_the_same_show_as_they_are(encode_step, tmp_path):
    """As a tensor does, say; and a form of 1 is none for True."""

    def check(event: StepEnd) -> None:
        assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))

    class Tensor:
        def item(self):
            return self.value

    tensor = Tensor()
    state = LoopState(0, tensor, tmp_path)
    for tensor.value in (10, 20, 30):
        check(StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}))
    for horizon in (1, True, 1.0, 1):
        check(StepEnd(LoopState(0, horizon, tmp_path), 0, TrainingBatch(), {"loss": 0.5}))


def test_what_changes_in_a_state_shows_from_the_next_step_on(encode_step, state):
    def check(**metrics: float) -> None:
        event = StepEnd(state, state.step, TrainingBatch(), metrics)
        assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))

    check(loss=0.5)
    state.num_steps += 10_000
    check(loss=0.5)
    state.output_dir = state.output_dir / "elsewhere"
    check(loss=0.5)
    state.ctx = LogContext(state.output_dir, run_key="named")
    check(loss=0.5)
    state.ctx.run_key = None
    check(loss=0.5)
    state.request_stop()
    check(loss=0.5)
    state.request_stop("enough")
    check(loss=0.5)


class Kind(Enum):
    A = "a"


@dataclasses.dataclass
class Host:
    step: Any
    num_steps: Any
    output_dir: Any
    epoch: Any = 0
    model: Any = None


@dataclasses.dataclass
class Own(LoopState):
    epoch: Any = 0
    model: Any = None


OWN = st.sampled_from([0, 1, 1.0, True, None, "warm", Kind.A, Path("/x"), np.float32(0.5), [1, [2]], {"a": 1}, object])
FOLDERS = st.sampled_from([Path("/runs/low"), "/runs/high", "/", "relative", None, 3])
STEPS = st.integers() | st.sampled_from([None, 1.5, True, np.int64(4), np.array(3)])


def any_states():
    of_host = st.builds(Host, STEPS, st.sampled_from([9, 1000, None, float("inf")]), FOLDERS, OWN, OWN)
    own = st.builds(Own, st.integers(), st.just(9), st.just(Path("/runs/low")), epoch=OWN, model=OWN)
    plain = of_host.map(lambda state: SimpleNamespace(**vars(state)))
    return st.none() | states() | of_host | own | plain | of_host.map(vars) | st.builds(SimpleNamespace)


def any_batches():
    parts = {"loss_fn": st.none() | st.sampled_from(["ppo", 7]), "metrics": st.none() | METRICS}
    return (
        batches()
        | st.sampled_from([None, 5, "text", [1, 2], np.zeros(3)])
        | (st.builds(SimpleNamespace, **parts) | st.fixed_dictionaries({}, optional=parts))
    )


def row_of(data: bytes) -> str:
    """Without addresses, and with `replaced` in any order."""
    row = msgspec.msgpack.decode(data)
    return repr({**row, "replaced": dict(sorted(row.get("replaced", {}).items()))}).partition(" at 0x")[0]


@given(any_states(), any_batches(), METRICS | st.sampled_from([None, 3, [1.0]]), st.integers(0, 9))
def test_whatever_a_step_is_shaped_like_all_ways_say_the_same(state, batch, metrics, index):
    event = StepEnd(state, index, batch, metrics)
    expected = row_of(msgspec.msgpack.encode(thorough(event, 7, 2.0)))
    assert row_of(encode(Envelope(STREAM, 7, 2.0, event, run_of(event), 3))) == expected
    for _ in range(3):  # the form is made with the second step
        assert row_of(FORMED(event, 7, 2.0)) == expected


def test_own_fields_that_change_with_every_step_show_as_they_are(encode_step, tmp_path):
    state: Any = Host(0, 9, tmp_path, epoch=0, model=object())
    for step in range(9):
        state.step, state.epoch = step, step / 2
        event = StepEnd(state, step, None, {"loss": 0.5})
        assert said(encode_step(event, step + 1, 2.0)) == said(ordinary(event, step + 1, 2.0))
    for state.model in (3, None, [1, 2], [object()], {"a": 1}, "x" * 10_000, "x", object(), [0] * 100, [0]):
        event = StepEnd(state, 9, None, {"loss": 0.5})
        assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))
    state.deferred = 4
    event = StepEnd(state, 9, None, {"loss": 0.5})
    assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))
    del state.deferred
    assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))


def test_a_list_that_was_too_long_shows_once_it_is_short(encode_step, tmp_path):
    state = SimpleNamespace(step=0, output_dir=str(tmp_path), queue=[0] * 100)
    for length in (100, 100, 100, 3, 3, 100):
        state.queue[:] = [0] * length
        event = StepEnd(state, 0, None, {"loss": 0.5})
        assert said(encode_step(event, 9, 2.0)) == said(ordinary(event, 9, 2.0))


def test_a_state_that_was_read_is_written_again_with_its_own_fields(encode_step, tmp_path):
    state = decode(ordinary(StepEnd(Host(3, 9, tmp_path, epoch=4), 3, None, {}), 1, 2.0)).event.state
    for _ in range(3):
        event = decode(encode_step(StepEnd(state, 3, None, {}), 1, 2.0)).event
        assert (event.state.epoch, event.state.step) == (4, 3)


def test_no_live_object_is_kept_by_a_form(encode_step, tmp_path):
    class Model:
        pass

    state = Host(0, 9, tmp_path, model=Model())
    gone = weakref.ref(state.model)
    for step in range(3):
        encode_step(StepEnd(state, step, None, {"loss": 0.5}), step + 1, 2.0)
    del state
    assert gone() is None


@pytest.mark.parametrize("where", ["metrics", "batch", "own"])
def test_credentials_in_a_configuration_are_redacted_wherever_it_stands(encode_step, tmp_path, where):
    config = {"config": {"lr": 0.1, "api_key": "sk-123"}}
    state = Host(0, 9, tmp_path, epoch=config if where == "own" else 0)
    batch = SimpleNamespace(metrics=config if where == "batch" else {})
    for _ in range(3):
        event = StepEnd(state, 0, batch, {"loss": 0.5, "nested": config} if where == "metrics" else {"loss": 0.5})
        assert b"sk-123" not in encode_step(event, 1, 2.0)


def test_a_dataclass_under_the_name_of_a_configuration_is_searched_too(encode_step, state):
    @dataclasses.dataclass
    class Config:
        api_key: str = "sk-123"

    for metrics in ({"config": Config()}, {"run": [{"config": Config()}]}):
        assert b"sk-123" not in encode_step(StepEnd(state, 0, None, metrics), 1, 2.0)
