"""`DebugLoggerCallback`: one bounded line per hook, whatever the arguments are."""

import logging
import math

import pytest

from evsys_adapters.debug_logger import DebugLoggerCallback
from evsys_bus.callback import check_hooks, dispatch
from evsys_bus.context import (
    ArmResult,
    DetachedLoopState,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunResult,
    TrainingBatch,
    detached,
)
from evsys_bus.errors import WrongParamError


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, logger="evsys_bus")
    return caplog


def all_hooks(ctx, state):
    """Every hook with its arguments, in the order of a training."""
    arm = ArmResult("wide", run_config={"api_key": "sk-secret"}, metrics={"loss": 0.5})
    return [
        ("on_experiment_start", (ctx,), {}),
        ("on_group_start", (ctx, "seeds"), {}),
        ("on_run_start", (ctx,), {}),
        ("on_train_start", (state,), {}),
        ("on_step_end", (state, 3, TrainingBatch([1, 2]), {"loss": 0.5}), {}),
        ("on_checkpoint", (state, ManifestRow("step-3", 3)), {}),
        ("on_eval", (state, 3, "val", {"acc": 0.75}), {}),
        ("on_benchmark_eval", (ctx, EvalResult("digits"), [{"task_id": str(n)} for n in range(9)]), {"step": 3}),
        ("on_train_end", (state, LoopArtifacts("out/run")), {}),
        ("on_run_end", (ctx, RunResult(), arm), {}),
        ("on_experiment_end", (ctx, ExperimentResult("e", arms=[arm], conclusion="wider is better")), {}),
    ]


@pytest.fixture
def live():
    ctx = LogContext("out", config={"api_key": "sk-secret"}, run_key="run", run_config={"api_key": "sk-secret"})
    return ctx, LoopState(step=3, num_steps=9, output_dir="out/run", ctx=ctx, backend=object())


def test_R9_every_hook_is_logged_with_its_name_and_arguments_and_no_config(lines, live):
    callback = DebugLoggerCallback()
    check_hooks(callback)
    hooks = all_hooks(*live)
    for hook, args, kwargs in hooks:
        dispatch([callback], hook, *args, **kwargs)
    assert {record.levelname for record in lines.records} == {"DEBUG"}
    assert list(dict.fromkeys(record.hook for record in lines.records)) == [hook for hook, _, _ in hooks]
    for said in ("step_idx=3", "{'loss': 0.5}", "wider is better", "ManifestRow(name='step-3'", "group_name='seeds'"):
        assert said in lines.text
    assert "sk-secret" not in lines.text


def test_only_the_first_predictions_are_shown_and_how_many_there_are(lines, live):
    hook, args, kwargs = all_hooks(*live)[7]
    dispatch([DebugLoggerCallback(max_pred_rows=2)], hook, *args, **kwargs)
    assert [record.message.count("task_id") for record in lines.records] == [0, 1, 1]
    assert lines.records[0].predictions == "9"


class _Hostile:
    def __repr__(self):
        raise ValueError

    __str__ = __float__ = __repr__

    @property
    def __class__(self):
        raise ValueError


class _Loud:
    def __repr__(self):
        return "x\nWARNING forged line\x1b[31m" * 1000


def test_hostile_long_and_many_lined_arguments_make_one_bounded_line(lines, live):
    circular = {}
    circular["self"] = circular
    deep = []
    for _ in range(5_000):
        deep = [deep]
    many = {f"m{n}": math.nan for n in range(100_000)}
    for value in (_Hostile(), {"bad": _Hostile()}, _Loud(), circular, deep, many, "y" * 1_000_000, 10**5_000, None):
        dispatch([DebugLoggerCallback(max_len=100)], "on_step_end", value, value, value, value)
    assert len(lines.records) == 9
    for record in lines.records:
        assert record.levelname == "DEBUG"
        assert len(record.message) < 4 * 300
        assert record.message.isprintable()
        assert len(record.metrics.replace("\\n", "n").replace("\\x1b", "e")) <= 100


def test_a_detached_state_is_shown(lines):
    state = detached(DetachedLoopState, {"step": 1, "num_steps": 2, "output_dir": "out/run"})
    dispatch([DebugLoggerCallback()], "on_train_start", state)
    assert "DetachedLoopState(run='out/run', step=1" in lines.text


def test_above_debug_nothing_is_formatted_and_one_warning_says_how_to_see_it(caplog, live):
    caplog.set_level(logging.INFO, logger="evsys_bus")
    callback = DebugLoggerCallback()
    for hook, args, kwargs in all_hooks(*live):
        dispatch([callback], hook, *args, **kwargs)
    dispatch([callback], "on_train_start", _Hostile())
    (record,) = caplog.records
    assert (record.levelname, "setLevel('DEBUG')" in record.message) == ("WARNING", True)


@pytest.mark.parametrize("params", [{"max_len": 0}, {"max_pred_rows": -1}, {"max_len": "400"}])
def test_R9_a_parameter_out_of_range_is_an_error_at_construction(params):
    with pytest.raises(WrongParamError, match="EB103"):
        DebugLoggerCallback(**params)
