"""The form of a step against the ordinary way: what it says is the same, whatever a step holds."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_bus import Envelope, LogContext, LoopState, StepEnd, TrainingBatch
from evsys_bus.codec import encode, encoder
from evsys_bus.codec.step_form import MOST_FORMS

STREAM = "r0-20261128T070000-0badcafe"


def run_of(event: Any) -> str | None:
    state = event.state
    if not isinstance(state, LoopState):
        return None
    return Path(state.output_dir).name if state.ctx is None else state.ctx.run_key


@pytest.fixture
def encode_step():
    return encoder(StepEnd, STREAM, 3, run_of)


def said(data: bytes) -> str:
    """As text: NaN is NaN, 1 is not 1.0, and -0.0 not 0.0."""
    return repr(msgspec.msgpack.decode(data))


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
FORMED = encoder(StepEnd, STREAM, 3, run_of)  # one for all: forms of earlier steps are about


@given(states(), st.integers() | st.none(), batches(), METRICS, st.integers(1, 2**63), st.floats(allow_nan=False))
def test_whatever_a_step_holds_its_form_says_what_the_ordinary_way_says(state, index, batch, metrics, seq, time):
    event = StepEnd(state, index, batch, metrics)
    expected, found = ordinary(event, seq, time), FORMED(event, seq, time)
    assert said(found).partition(" at 0x")[0] == said(expected).partition(" at 0x")[0]


def test_a_plain_step_goes_by_its_form(encode_step, state):
    """Seen by the width of its numbers; otherwise none of the above would try anything."""
    event = StepEnd(state, 5, TrainingBatch(), {"loss": 0.5})
    assert len(encode_step(event, 1, 2.0)) > len(ordinary(event, 1, 2.0))


def test_runs_that_publish_by_turns_are_not_mixed_up(encode_step):
    made = [
        LoopState(0, 1000, f"/runs/{at}", ctx=LogContext("/runs", run_key=f"run-{at}")) for at in range(MOST_FORMS + 9)
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
