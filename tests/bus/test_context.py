import pytest

from evsys_bus import LogContext, LoopState, TrainingBatch
from evsys_bus.context import DetachedLoopState, detached
from evsys_bus.errors import DetachedError


def test_R9_handles_construct_with_just_what_the_contract_says(tmp_path):
    ctx = LogContext(output_dir=str(tmp_path))
    assert (ctx.output_dir, ctx.run_dir, ctx.run_key, ctx.ids, ctx.extras) == (tmp_path, tmp_path, None, {}, {})
    state = LoopState(step=3, num_steps=10, output_dir=str(tmp_path))
    assert (state.step, state.num_steps, state.stop_requested, state.error, state.ctx) == (3, 10, False, None, None)


def test_a_runs_context_has_its_own_copies_of_ids_and_extras(tmp_path):
    experiment = LogContext(output_dir=tmp_path, ids={"experiment_id": "e"}, extras={"url": "u"})
    one, two = experiment.for_run("a-s0", {"lr": 1}, "a"), experiment.for_run("a-s1")
    one.ids["run_id"] = "r"
    assert experiment.ids == two.ids == {"experiment_id": "e"}
    assert one.extras == {"url": "u"}
    assert (one.run_dir, one.run_config, one.group_name) == (tmp_path / "a-s0", {"lr": 1}, "a")


def test_R5_the_first_reason_to_stop_is_kept(state):
    state.request_stop()
    state.request_stop("no improvement")
    state.request_stop("another")
    assert state.stop_requested
    assert state.stop_reason == "no improvement"


def test_a_detached_state_has_its_scalars_and_says_so_when_a_live_part_is_asked_for():
    state = detached(DetachedLoopState, {"step": 7})
    assert isinstance(state, LoopState)
    assert state.step == 7
    with pytest.raises(DetachedError, match="backend is a live object") as caught:
        _ = state.backend
    assert "inline" in caught.value.fix
    assert getattr(state, "backend", "none") == "none"
    with pytest.raises(DetachedError, match="only inline callbacks may stop a run"):
        state.request_stop()
    with pytest.raises(AttributeError, match="no attribute 'bakend'"):
        _ = state.bakend


def test_handles_show_scalars_only_attached_or_not(tmp_path):
    ctx = LogContext(output_dir=tmp_path, config={"api_key": "secret"}, run_key="r")
    assert repr(ctx) == f"LogContext(output_dir={tmp_path!r}, run_key='r')"
    assert (
        repr(detached(DetachedLoopState, {"step": 7, "output_dir": "/runs/a"}))
        == "DetachedLoopState(step=7, output_dir=PosixPath('/runs/a'), stop_requested=False, stopped_early=False)"
    )
    assert repr(TrainingBatch(data=[1], loss_fn="ppo")) == "TrainingBatch(loss_fn='ppo')"


def test_the_run_of_a_state_is_its_contexts_or_what_its_directory_is_called(tmp_path):
    experiment = LogContext(tmp_path)
    state = LoopState(0, 10, tmp_path / "bare")
    assert state.run_key == "bare"
    state.ctx = experiment
    assert state.run_key == "bare"
    state.ctx = experiment.for_run("arm")
    assert state.run_key == "arm"
