"""`EarlyStoppingCallback`: what it takes for an improvement, and when it asks to stop."""

import itertools
import math
import random

import numpy as np
import pytest

from evsys_adapters.early_stopping import EarlyStoppingCallback
from evsys_bus.callback import check_hooks, dispatch
from evsys_bus.context import DetachedLoopState, LogContext, LoopArtifacts, LoopState, detached
from evsys_bus.errors import WrongParamError

nan = math.nan


@pytest.fixture(autouse=True)
def no_hook_raised(caplog):
    yield
    assert "hook.failed" not in caplog.text


def state_of(key="run", step=0):
    return LoopState(step=step, num_steps=100, output_dir=f"out/{key}", ctx=LogContext("out", run_key=key))


def evaluate(callback, state, values, eval_name="val", metric="loss", steps=None):
    """Publish evals one after another; the step at which the stop was requested, if it was."""
    for step, value in zip(steps or itertools.count(), values, strict=False):
        dispatch([callback], "on_eval", state, step, eval_name, {metric: value, "other": 1.0})
        if state.stop_requested:
            return step
    return None


@pytest.mark.parametrize(
    ("mode", "values", "stops_at"),
    [
        ("max", [1, 2, 3, 3, 3, 3], 5),
        ("max", [3, 2, 1, 4, 1, 1, 1], 6),
        ("min", [3, 2, 1, 1, 2, 1], 5),
        ("min", [5, 4, 3, 2, 1, 0], None),
        ("max", [nan, 1, nan, nan, nan], 4),
        ("max", [nan, 1, 2, 3, 4, 5, 6], None),
        ("min", [nan, nan, nan], 2),
        ("max", [1, math.inf, 2, 3, 4], None),
        ("min", [1, -math.inf, 0.5, 0.4, 0.3], None),
    ],
)
def test_R13_stops_after_patience_evals_without_improvement(mode, values, stops_at):
    callback = EarlyStoppingCallback("loss", mode=mode)
    check_hooks(callback)
    assert evaluate(callback, state_of(), values) == stops_at


def test_R13_the_reason_names_the_metric_the_patience_and_the_best_eval():
    state = state_of()
    evaluate(EarlyStoppingCallback("loss", mode="min"), state, [0.5, 0.25, 0.3, 0.3, 0.3], steps=[10, 20, 30, 40, 50])
    assert state.stop_reason == "no improvement of loss for 3 evals; best 0.25 at step 20"
    state = state_of()
    evaluate(EarlyStoppingCallback("loss"), state, [nan, nan, nan])
    assert state.stop_reason == "no finite value of loss in 3 evals"


def test_a_change_of_min_delta_is_no_improvement_and_a_larger_one_is():
    assert evaluate(EarlyStoppingCallback("loss", min_delta=0.5, patience=2), state_of(), [1.0, 1.5, 1.25]) == 2
    assert evaluate(EarlyStoppingCallback("loss", min_delta=0.5, patience=2), state_of(), [1.0, 1.75, 2.5]) is None


def test_evals_that_come_late_and_in_any_order_are_judged_in_the_order_of_their_steps():
    values = [0.1, 0.5, 0.4, 0.9, nan, 0.2]
    orders = list(itertools.permutations(range(6)))
    for order in random.Random(0).sample(orders, 60):
        callback, state = EarlyStoppingCallback("loss", patience=99), state_of()
        evaluate(callback, state, [values[n] for n in order], steps=[10 * n for n in order])
        history = callback.history(state)
        assert (history.best, history.best_step, history.evals_since_best) == (0.9, 30, 2)


def test_a_late_eval_of_an_older_step_does_not_use_up_patience_after_the_best():
    callback, state = EarlyStoppingCallback("loss"), state_of()
    assert evaluate(callback, state, [0.9, 0.1, 0.2, 0.3, 0.1], steps=[40, 10, 20, 30, 35]) is None


def test_R12_a_repeated_eval_of_the_same_step_replaces_the_earlier_one():
    callback, state = EarlyStoppingCallback("loss"), state_of()
    assert evaluate(callback, state, [1, 0.5, 0.5, 0.5, 0.5], steps=[0, 1, 1, 1, 1]) is None
    evaluate(callback, state, [0.25], steps=[0])
    assert callback.history(state).best == 0.5


def test_only_the_named_eval_counts_and_without_a_name_each_eval_is_judged_by_itself():
    named = EarlyStoppingCallback("loss", eval_name="val", patience=2)
    state = state_of()
    for value in (1, 2, 3, 4):
        evaluate(named, state, [9 - value], eval_name="train", steps=[value])
        assert evaluate(named, state, [value], eval_name="val", steps=[value]) is None
    any_eval, state = EarlyStoppingCallback("loss", patience=2), state_of()
    for value in (1, 2, 3, 4):
        evaluate(any_eval, state, [100 + value], eval_name="easy", steps=[value])
        assert evaluate(any_eval, state, [value], eval_name="hard", steps=[value]) is None
    assert any_eval.history(state, "hard").best == 4


def test_R13_runs_at_the_same_time_are_judged_apart():
    callback, good, bad = EarlyStoppingCallback("loss", patience=2), state_of("good"), state_of("bad")
    for step in range(6):
        evaluate(callback, good, [step], steps=[step])
        evaluate(callback, bad, [10], steps=[step])
    assert (good.stop_requested, bad.stop_requested) == (False, True)
    assert callback.history(good).best == 5
    assert callback.history(good.ctx).best_step == 5
    assert callback.history(bad).best == 10


def test_several_stops_combine_and_the_first_reason_stays():
    state = state_of()
    state.request_stop("the user said so")
    dispatch([EarlyStoppingCallback("loss")], "on_eval", state, 0, "val", {"loss": 1.0})
    assert (state.stop_requested, state.stop_reason) == (True, "the user said so")


def test_a_run_that_starts_again_forgets_the_evals_that_are_run_again():
    callback, state = EarlyStoppingCallback("loss"), state_of()
    evaluate(callback, state, [1, 2, 9, 3])
    dispatch([callback], "on_train_start", state_of(step=2))
    history = callback.history(state)
    assert (history.points, history.best, history.evals_since_best) == ([(0, 1.0), (1, 2.0)], 2, 0)


def test_a_missing_metric_is_said_once_with_the_metrics_that_were_there(caplog):
    callback, state = EarlyStoppingCallback("acc", eval_name="val"), state_of()
    for step in range(4):
        evaluate(callback, state, [1], eval_name="train", steps=[step])
        evaluate(callback, state, [1], steps=[step])
    (record,) = caplog.records
    assert record.message.startswith("early_stopping.metric_missing")
    assert (record.eval_name, record.metric, record.there) == ("val", "acc", "loss, other")
    assert not state.stop_requested


def test_where_every_eval_is_watched_one_that_lacks_the_metric_is_only_said_when_none_has_it(caplog):
    callback, state = EarlyStoppingCallback("acc"), state_of()
    for step in range(4):
        evaluate(callback, state, [1], eval_name="speed", steps=[step])
        evaluate(callback, state, [step], metric="acc", steps=[step])
    assert caplog.text == ""
    evaluate(EarlyStoppingCallback("accuracy"), state_of(), [1, 2, 3])
    assert len(caplog.records) == 1


def test_an_eval_name_that_never_comes_is_said_at_the_end_with_the_evals_that_came(caplog):
    callback, state = EarlyStoppingCallback("loss", eval_name="vla"), state_of()
    evaluate(callback, state, [1, 1, 1])
    dispatch([callback], "on_train_end", state, LoopArtifacts())
    (record,) = caplog.records
    assert record.message.startswith("early_stopping.never_judged")
    assert (record.eval_name, record.evals) == ("vla", "val")


class _Tensors:
    """Several values, as a tensor of them behaves."""

    def __float__(self):
        raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")


def test_numbers_of_numpy_count_and_what_is_no_number_is_a_missing_metric(caplog):
    callback, state = EarlyStoppingCallback("loss", eval_name="val", patience=1), state_of()
    values = ["1.0", None, [1], _Tensors(), np.float32(0.5), np.array(0.75)]
    assert evaluate(callback, state, values) is None
    assert callback.history(state).best == 0.75
    assert len(caplog.records) == 1


def test_R13_a_subclass_decides_what_is_better_and_when_it_is_enough():
    class Closest(EarlyStoppingCallback):
        def improved(self, value, best):
            return abs(value - 10) < abs(best - 10)

        def should_stop(self, history):
            return history.best == 10

    callback, state = Closest("loss"), state_of()
    assert evaluate(callback, state, [100, 12, 7, 10]) == 3
    assert state.stop_reason == "loss has reached its target: best 10 at step 3"


@pytest.mark.parametrize(
    "params",
    [{"mode": "maximum"}, {"patience": 0}, {"patience": 1.5}, {"min_delta": -1}, {"metric": ""}, {"eval_name": 3}],
)
def test_R9_a_parameter_out_of_range_is_an_error_at_construction(params):
    with pytest.raises(WrongParamError, match="EB103"):
        EarlyStoppingCallback(**{"metric": "loss"} | params)


def test_a_detached_state_says_that_only_inline_callbacks_stop_a_run(caplog):
    state = detached(DetachedLoopState, {"step": 0, "num_steps": 2, "output_dir": "out/run"})
    callback = EarlyStoppingCallback("loss", patience=1)
    for step in range(2):
        dispatch([callback], "on_eval", state, step, "val", {"loss": 1.0})
    assert callback.history(state).evals_since_best == 1
    assert 'place the callback "inline"' in caplog.records[-1].exc_text or "inline" in str(
        caplog.records[-1].exc_info[1]
    )
    caplog.clear()


class HostState:
    """A host's own state: no class of ours."""

    def __init__(self, step=0):
        self.step, self.num_steps, self.output_dir, self.ctx = step, 50, "out/own", None
        self.stop_requested, self.stop_reason = False, None

    def request_stop(self, reason=None):
        self.stop_requested, self.stop_reason = True, reason


def test_a_state_of_a_host_of_its_own_is_judged_and_stopped(caplog):
    callback, state = EarlyStoppingCallback("loss", patience=2), HostState()
    dispatch([callback], "on_train_start", state)
    assert evaluate(callback, state, [3, 2, 1, 0]) == 2
    dispatch([callback], "on_train_end", state, None)
    dispatch([callback], "on_train_start", HostState(step=2))
    assert callback.history(state).points == [(0, 3.0), (1, 2.0)]
    assert caplog.text == ""


def test_a_state_that_can_only_be_told_by_its_attribute_is_stopped_too():
    class Bare:
        step, output_dir, stop_requested = 0, "out/bare", False

    state = Bare()
    assert evaluate(EarlyStoppingCallback("loss", patience=1), state, [3, 2, 1]) == 1


def test_steps_that_are_whole_floats_or_numbers_of_numpy_are_steps():
    callback, state = EarlyStoppingCallback("loss", patience=2), state_of()
    steps = [5.0, np.int64(6), np.float32(7), np.array(8), np.uint8(9)]
    evaluate(callback, state, [1, 2, 3, 2, 2], steps=steps)
    history = callback.history(state)
    assert [step for step, _ in history.points] == [5, 6, 7, 8, 9]
    assert {type(step) for step, _ in history.points} == {int}
    assert state.stop_requested
    dispatch([callback], "on_train_start", state_of(step=np.float64(8.0)))
    assert [step for step, _ in history.points] == [5, 6, 7]


def test_a_step_that_is_no_whole_number_is_an_error_in_words(caplog):
    callback = EarlyStoppingCallback("loss")
    for step in (math.nan, 2.5, "2", None):
        dispatch([callback], "on_eval", state_of(), step, "val", {"loss": 1.0})
        assert "must be a whole number" in str(caplog.records[-1].exc_info[1])
    caplog.clear()


def test_a_run_whose_evals_were_enough_is_stopped_at_its_start():
    callback = EarlyStoppingCallback("loss", patience=2)
    evaluate(callback, state_of(), [3, 2, 1], steps=[0, 1, 2])
    for first, stops in ((2, False), (0, False)):
        state = state_of(step=first)
        dispatch([callback], "on_train_start", state)
        assert state.stop_requested is stops
    evaluate(callback, state_of(), [3, 2, 1], steps=[0, 1, 2])
    state = state_of(step=3)
    dispatch([callback], "on_train_start", state)
    assert state.stop_reason == "no improvement of loss for 2 evals; best 3 at step 0"


def test_a_mark_of_one_run_gives_back_that_run_alone():
    callback = EarlyStoppingCallback("loss", patience=9)
    evaluate(callback, state_of("a"), [1, 2], steps=[0, 1])
    evaluate(callback, state_of("b"), [4, 5], steps=[0, 1])
    mark = callback.mark_run(state_of("a"))
    evaluate(callback, state_of("a"), [9], steps=[2])
    evaluate(callback, state_of("b"), [9], steps=[2])
    callback.rewind_run(state_of("a", step=2), mark, mark)
    assert callback.history(state_of("a")).points == [(0, 1.0), (1, 2.0)]
    assert callback.history(state_of("b")).best_step == 2
    callback.rewind_run(state_of("b", step=2), None, None)
    assert callback.history(state_of("b")).points == []


def test_the_mark_of_a_run_with_nan_and_odd_names_goes_through_any_form_of_plain_data():
    import msgspec

    callback, state = EarlyStoppingCallback("loss", patience=9), state_of()
    for name in ("wértung", "a/b", ""):
        evaluate(callback, state, [nan, 1, math.inf], eval_name=name)
    mark = msgspec.msgpack.decode(msgspec.msgpack.encode(callback.mark_run(state)))
    again = EarlyStoppingCallback("loss", patience=9)
    again.rewind_run(state_of(step=3), mark, mark)
    for name in ("wértung", "a/b", ""):
        history, before = again.history(state, name), callback.history(state, name)
        assert str(history.points) == str(before.points)
        assert (history.best, history.best_step, history.evals_since_best) == (1.0, 1, 1)


def test_of_two_marks_the_newest_counts_unless_it_holds_evals_that_run_again_and_not_one_by_one():
    callback, state = EarlyStoppingCallback("loss", patience=10_000), state_of()
    marks = {}
    for step in range(901):
        marks[step] = callback.mark_run(state) if step in {10, 500, 900} else None
        callback.on_eval(state, step, "val", {"loss": float(-step)})
    for first, mark, newest in ((600, 500, 900), (900, 500, 900), (10, 10, 900), (10, 10, 10), (520, 500, 900)):
        again, state = EarlyStoppingCallback("loss", patience=10_000), state_of(step=first)
        again.rewind_run(state, marks[mark], marks[newest])
        history = again.history(state)
        known = first if newest == mark or (newest == 900 and first > 644) else mark
        assert history.older.evals + len(history.points) == min(known, first), (first, mark, newest)
        assert (history.best_step, history.evals_since_best) == (0, min(known, first) - 1)
