import asyncio
import contextlib
import inspect
import logging
from pathlib import Path

import pytest

from evsys_bus import (
    Callback,
    CallbackSpec,
    Eval,
    EvalResult,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunResult,
    StepEnd,
    TrainingBatch,
    dispatch,
)
from evsys_bus.callback import check_hooks
from evsys_bus.context import ArmResult, ExperimentResult
from evsys_bus.errors import (
    AsyncHookError,
    HookError,
    HookSignatureError,
    MisspeltHookError,
    NotACallbackError,
    NotAttachedError,
)

HOOKS = {
    "on_experiment_start": ["ctx"],
    "on_group_start": ["ctx", "group_name"],
    "on_run_start": ["ctx"],
    "on_train_start": ["state"],
    "on_step_end": ["state", "step_idx", "batch", "metrics"],
    "on_checkpoint": ["state", "row"],
    "on_eval": ["state", "step_idx", "eval_name", "metrics"],
    "on_benchmark_eval": ["ctx", "eval_result", "predictions", "step"],
    "on_train_end": ["state", "artifacts"],
    "on_run_end": ["ctx", "run_result", "arm"],
    "on_experiment_end": ["ctx", "result"],
}


class Raises(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise ValueError("broken on purpose")


class Notes(Callback):
    def __init__(self, into=None, mark=None):
        self.seen = [] if into is None else into
        self.mark = mark

    def on_step_end(self, state, step_idx, batch, metrics):
        self.seen.append(step_idx if self.mark is None else self.mark)


def call_every_hook(callback: Callback, tmp_path: Path) -> None:
    ctx, state = LogContext(output_dir=tmp_path), LoopState(step=0, num_steps=1, output_dir=tmp_path)
    callback.on_experiment_start(ctx)
    callback.on_group_start(ctx, "g")
    callback.on_run_start(ctx)
    callback.on_train_start(state)
    callback.on_step_end(state, 0, TrainingBatch(), {})
    callback.on_checkpoint(state, ManifestRow("final"))
    callback.on_eval(state, 0, "val", {})
    callback.on_benchmark_eval(ctx, EvalResult("val"), [], step=3)
    callback.on_train_end(state, LoopArtifacts())
    callback.on_run_end(ctx, RunResult(), ArmResult("a"))
    callback.on_experiment_end(ctx, ExperimentResult("e"))


def test_R1_every_hook_has_a_no_op_default(tmp_path):
    call_every_hook(Callback(), tmp_path)


@pytest.mark.parametrize("hook", HOOKS)
def test_R1_a_hook_takes_its_arguments_by_position_in_this_order_and_says_their_types(hook):
    parameters = list(inspect.signature(getattr(Callback(), hook)).parameters.values())
    assert [each.name for each in parameters] == HOOKS[hook]
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters)
    keywords = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keywords == (["step"] if hook == "on_benchmark_eval" else [])


@pytest.mark.parametrize("hook", HOOKS)
def test_R2_every_hook_is_sync(hook):
    assert not inspect.iscoroutinefunction(getattr(Callback, hook))


def test_R3_a_raising_callback_does_not_propagate_and_the_next_one_runs(caplog):
    notes = Notes()
    dispatch([Raises(), notes], "on_step_end", None, 7, None, {})
    assert notes.seen == [7]


def test_R3_the_failure_is_logged_at_warning_with_traceback_and_both_names(caplog):
    dispatch([Raises()], "on_step_end", None, 7, None, {})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "evsys_bus"
    assert (record.callback, record.hook) == ("Raises", "on_step_end")
    assert "Raises" in record.getMessage()
    assert "on_step_end" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "broken on purpose"
    assert record.exc_info[2] is not None


def test_R3_isolation_is_the_same_for_a_bus_and_for_dispatch(caplog):
    dispatch([Raises()], "on_step_end", None, 0, None, {})
    with EventBus([Raises()]) as bus:
        bus.publish(StepEnd(None, 0, None, {}))
    by_hand, by_bus = caplog.records
    for fact in ("levelno", "name", "callback", "hook"):
        assert getattr(by_hand, fact) == getattr(by_bus, fact)
    assert by_bus.exc_info is not None


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError, GeneratorExit, MemoryError, type("Own", (BaseException,), {})]
)
def test_R3_even_what_is_no_exception_stays_inside(error, caplog):
    class Odd(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise error

    notes = Notes()
    dispatch([Odd(), notes], "on_step_end", None, 1, None, {})
    assert notes.seen == [1]
    assert caplog.records[0].hook == "on_step_end"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_R3_an_interrupt_reaches_the_caller_after_the_remaining_callbacks_ran(error):
    class Leaves(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise error

    notes = Notes()
    with pytest.raises(error):
        dispatch([Leaves(), notes], "on_step_end", None, 1, None, {})
    assert notes.seen == [1]


def test_R4_callbacks_run_in_the_order_in_which_they_were_given():
    order = []
    dispatch([Notes(order, mark) for mark in "cab"], "on_step_end", None, 0, None, {})
    assert order == ["c", "a", "b"]


def test_R6_a_callback_without_the_hook_is_skipped():
    notes = Notes()
    dispatch([object(), notes], "on_step_end", None, 5, None, {})
    assert notes.seen == [5]


@pytest.mark.parametrize("callbacks", [None, [], ()])
def test_R6_no_callbacks_is_a_clean_no_op(callbacks):
    dispatch(callbacks, "on_step_end", None, 0, None, {})


def test_R6_a_hook_that_nobody_has_is_a_clean_no_op(caplog):
    dispatch([Notes(), Raises()], "on_no_such_hook", 1, two=2)
    assert not caplog.records


def test_R6_keywords_are_passed_through():
    class Keeps(Callback):
        def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=None):
            self.step = step

    keeps = Keeps()
    dispatch([keeps], "on_benchmark_eval", None, None, [], step=12)
    assert keeps.step == 12


def test_an_async_hook_is_refused_with_the_remedy():
    class Async(Callback):
        async def on_step_end(self, state, step_idx, batch, metrics): ...

    with pytest.raises(AsyncHookError) as caught:
        EventBus([Async()])
    assert str(caught.value) == (
        "error[EB201]: Async.on_step_end is async, but hooks are sync\n"
        "why: the loop never waits for a callback, so nothing would await it\n"
        "fix: write `def on_step_end(...)` and start the async part inside it: "
        "self.spawn(coroutine_function, *args)"
    )


def test_a_hook_under_contextmanager_which_runs_no_line_counts_as_failed():
    class Timed(Callback):
        @contextlib.contextmanager
        def on_step_end(self, state, step_idx, batch, metrics):
            yield

        @contextlib.asynccontextmanager
        async def on_eval(self, state, step_idx, eval_name, metrics):
            yield

    with EventBus([Timed()]) as bus:
        bus.publish(StepEnd(None, 0, TrainingBatch(), {}))
        bus.publish(Eval(None, 0, "val", {}))
    assert {each.hook: each.failures for each in bus.health().hooks} == {"on_step_end": 1, "on_eval": 1}


def test_a_hook_that_is_no_method_is_refused_and_none_disables_one():
    class Tuple(Callback):
        on_step_end = (print,)

    class Broken(Callback):
        @property
        def on_step_end(self):
            raise AttributeError("not set up")

    for callback, why in ((Tuple(), "it is a tuple"), (Broken(), "AttributeError: not set up")):
        with pytest.raises(HookSignatureError, match=why):
            EventBus([callback])

    class Quiet(Notes):
        on_step_end = None

    EventBus([Quiet()])


@pytest.mark.parametrize("given", [{"kind": "csv_metrics"}, CallbackSpec(kind="csv_metrics"), "csv_metrics", Notes])
def test_dispatch_refuses_what_is_no_callback(given):
    with pytest.raises(NotACallbackError):
        dispatch([given], "on_step_end", None, 0, TrainingBatch(), {})


def test_a_hook_that_cannot_take_the_arguments_is_refused_with_the_signature_to_write():
    class Short:
        def on_benchmark_eval(self, ctx, eval_result): ...

    with pytest.raises(HookSignatureError) as caught:
        EventBus([Short()])
    assert str(caught.value) == (
        "error[EB202]: Short.on_benchmark_eval(ctx, eval_result) cannot be called with the event's arguments\n"
        "why: too many positional arguments\n"
        "fix: write `def on_benchmark_eval(self, ctx, eval_result, predictions, *, step=...)`; "
        "the names of positional arguments are free, *args works too"
    )


def test_names_of_positional_arguments_are_free_and_star_args_will_do():
    class Free:
        def on_step_end(self, a, b, c, d): ...

        def on_eval(self, *args): ...

        def on_benchmark_eval(self, *args, **kwargs): ...

    check_hooks(Free())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_step_ends", "on_step_end"),
        ("on_stepend", "on_step_end"),
        ("onStepEnd", "on_step_end"),
        ("on_chekpoint", "on_checkpoint"),
        ("on_train_begin", "on_train_start"),
        ("on_training_start", "on_train_start"),
        ("on_evall", "on_eval"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_name_that_was_meant(wrong, right):
    slip = type("Slip", (Callback,), {wrong: lambda self, *args: None})
    with pytest.raises(MisspeltHookError, match=f'did you mean "{right}"'):
        EventBus([slip()])


@pytest.mark.parametrize("other", ["on_rollout_begin_v2", "on_optimizer_built", "online", "once", "on_step_start"])
def test_a_method_that_is_no_hook_and_nearly_none_is_left_alone(other, caplog):
    callback = type("Other", (Callback,), {other: lambda self: None})()
    check_hooks(callback)
    assert [record.levelname for record in caplog.records] == (["WARNING"] if other.startswith("on_") else [])


def test_hook_errors_are_of_one_family_and_of_the_standard_kin():
    assert issubclass(HookError, TypeError)


def test_spawn_without_a_bus_says_what_is_missing():
    async def work(): ...

    with pytest.raises(NotAttachedError, match="give the callback to an EventBus"):
        Callback().spawn(work)
