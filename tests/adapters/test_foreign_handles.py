"""Handles of other classes: the small adapters do their work by the attributes that are there."""

import csv
import decimal
import fractions
import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evsys_adapters.common.hook_arguments import is_run_of, num_steps_of, run_folder, run_id, run_name, step_of
from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.debug_logger import DebugLoggerCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_adapters.print_progress import PrintProgressCallback
from evsys_bus import EventBus, StepEnd, TrainingBatch, follow
from evsys_bus.callback import dispatch
from evsys_bus.context import LogContext, LoopArtifacts, LoopState
from support.foreign_values import RaisingKeyErrors


@dataclass
class HostState:
    """What a host's loop has."""

    step: object
    output_dir: object
    ctx: object = None
    num_steps: object = 3


@dataclass
class HostContext:
    output_dir: object
    run_key: object = "wide"


class Slotted:
    """No __dict__, and no more than two attributes."""

    __slots__ = ("output_dir", "step")

    def __init__(self, step, output_dir):
        self.step, self.output_dir = step, output_dir


class Guarded:
    """A context whose configuration is not to be had."""

    run_key = "wide"

    def __init__(self, output_dir):
        self.output_dir = output_dir

    @property
    def config(self):
        raise RuntimeError("the configuration is not composed yet")

    run_config = group_name = config


STATES = {
    "a dict with a dict as context": lambda folder: {
        "step": 0,
        "output_dir": folder / "x",
        "ctx": {"output_dir": str(folder), "run_key": "wide"},
    },
    "a look-up that raises KeyError": lambda folder: RaisingKeyErrors(step=0, output_dir=folder / "wide"),
    "a context whose properties raise": lambda folder: HostState(0, folder / "x", Guarded(folder)),
    "a context of the experiment, without a run key": lambda folder: HostState(
        0, folder / "wide", HostContext(folder, None)
    ),
    "a dataclass of the host with a context of the host": lambda folder: HostState(
        0, folder / "x", HostContext(folder)
    ),
    "a context as text that names no folder": lambda folder: HostState(0, str(folder / "wide"), HostContext(None)),
    "a context without a run key": lambda folder: HostState(
        0, str(folder / "wide"), SimpleNamespace(output_dir=str(folder / "wide"))
    ),
    "no context": lambda folder: HostState(0, str(folder / "wide")),
    "a namespace without num_steps and ctx": lambda folder: SimpleNamespace(step=0, output_dir=str(folder / "wide")),
    "slots": lambda folder: Slotted(0, folder / "wide"),
    "no step": lambda folder: SimpleNamespace(ctx=HostContext(str(folder)), output_dir=None),
    "a run key that is a number": lambda folder: HostState(0, folder, HostContext(folder, 17)),
    "our state with a context of the host": lambda folder: LoopState(
        0, 3, folder / "wide", ctx=HostContext(str(folder))
    ),
}


def train(callback, state):
    dispatch([callback], "on_train_start", state)
    for step in range(3):
        dispatch([callback], "on_step_end", state, step, None, {"loss": step / 2})
    dispatch([callback], "on_eval", state, 2, "held out", {"accuracy": 0.5})
    dispatch([callback], "on_train_end", state, LoopArtifacts())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_every_small_adapter_takes_a_state_of_any_class(tmp_path, capsys, make):
    state = make(tmp_path)
    run = tmp_path / ("17" if "17" in run_name(state) else "wide")
    train(CsvMetricsCallback("{run_dir}/{run}.csv"), state)
    assert (run / f"{run.name}.csv").read_text() == "step,loss\n0,0.0\n1,0.5\n2,1.0\n"
    train(LocalLoggerCallback(print_every=0), state)
    logs = run / "logs"
    assert [json.loads(line)["step"] for line in (logs / "training/metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
    ]
    assert json.loads((logs / "validation/metrics.jsonl").read_text())["accuracy"] == 0.5
    assert capsys.readouterr().out == ""
    for printing in (PrintProgressCallback(clock=lambda: 0.0), LocalLoggerCallback()):
        train(printing, state)
        ends = [line.split()[1].partition("/")[0] for line in capsys.readouterr().out.splitlines()]
        assert ends == ["1", "2", "3"]


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_debug_logger_shows_a_state_of_any_class(tmp_path, caplog, make):
    with caplog.at_level(logging.DEBUG, "evsys_bus"):
        state = make(tmp_path)
        train(DebugLoggerCallback(), state)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6
    assert all(record.levelname == "DEBUG" for record in caplog.records)


def test_debug_logger_shows_no_config_of_a_host(tmp_path, caplog):
    ctx = SimpleNamespace(
        output_dir=tmp_path, run_key="a", config={"api_key": "hush-1"}, run_config={"token": "hush-2"}
    )
    state = HostState(4, tmp_path / "a", ctx)
    with caplog.at_level(logging.DEBUG, "evsys_bus"):
        dispatch([DebugLoggerCallback()], "on_run_start", ctx)
        dispatch([DebugLoggerCallback()], "on_train_start", state)
        dispatch([DebugLoggerCallback()], "on_experiment_start", {"whatever": ctx})
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "hush" not in text
    assert "run_key='a'" in text or "run_key=\\'a\\'" in text
    assert "step=4" in text


@pytest.mark.usefixtures("quiet")
def test_a_whole_experiment_with_contexts_of_a_host(tmp_path):
    logger, table = LocalLoggerCallback(print_every=0), CsvMetricsCallback("{run_dir}/m.csv")
    ctx = HostContext(str(tmp_path))
    root = SimpleNamespace(output_dir=str(tmp_path), config=SimpleNamespace(metadata={"hypothesis": "It fits."}))
    state = HostState(0, str(tmp_path / "wide"), ctx)
    for callback in (logger, table):
        dispatch([callback], "on_experiment_start", root)
        dispatch([callback], "on_run_start", ctx)
        train(callback, state)
        result = SimpleNamespace(name="tasks", metrics={"score": 1.0})
        dispatch([callback], "on_benchmark_eval", ctx, result, [{"task_id": "a"}], step=np.int32(2))
        dispatch([callback], "on_run_end", ctx, SimpleNamespace(status="completed"), SimpleNamespace(name="wide"))
        dispatch([callback], "on_experiment_end", root, SimpleNamespace(name="exp", status="completed"))
    assert "It fits." in (tmp_path / "experiment.md").read_text()
    assert "this run: wide (completed)" in (tmp_path / "wide/logs/conclusion.md").read_text()
    assert json.loads((tmp_path / "wide/logs/test/metrics.jsonl").read_text())["step"] == 2
    assert len((tmp_path / "wide/m.csv").read_text().splitlines()) == 4


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("state", [None, SimpleNamespace(ctx=None), 7], ids=str)
def test_a_step_without_any_run_is_a_row_of_the_file_and_a_line(tmp_path, capsys, state):
    table, printing = CsvMetricsCallback(tmp_path / "m.csv"), PrintProgressCallback(clock=lambda: 0.0)
    dispatch([table, printing], "on_train_start", state)
    dispatch([table, printing], "on_step_end", state, 0, None, {"loss": 0.5})
    dispatch([table, printing], "on_train_end", state, None)
    assert (tmp_path / "m.csv").read_text() == "step,loss\n0,0.5\n"
    assert capsys.readouterr().out == "step 1  loss 0.5\n"


def test_a_folder_for_the_files_of_no_run_is_refused_in_words(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    dispatch([LocalLoggerCallback(print_every=0)], "on_step_end", None, 0, None, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == []
    assert "without output_dir names no folder" in caplog.text


@pytest.mark.usefixtures("quiet")
def test_a_followed_logger_writes_no_file_of_a_run_whose_state_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [CsvMetricsCallback("{run_dir}/m.csv"), LocalLoggerCallback(print_every=0)]
    followed = [follow(each, each.name) for each in callbacks]
    with EventBus(followed, journal=tmp_path / "journal", couriers="thread") as bus:
        bus.publish(StepEnd(SimpleNamespace(step=0), 0, TrainingBatch(), {"loss": 0.5}))
    assert [each.hook_failures for each in bus.receipt.deliveries] == [1, 1]
    assert [each.name for each in tmp_path.iterdir()] == ["journal"]


def test_a_relative_output_dir_is_where_it_was_when_the_run_was_first_seen(tmp_path, monkeypatch, capsys):
    first, later = tmp_path / "first", tmp_path / "later"
    first.mkdir()
    later.mkdir()
    monkeypatch.chdir(first)
    callbacks = [CsvMetricsCallback("{run_dir}/m.csv"), CsvMetricsCallback("all.csv"), LocalLoggerCallback()]
    state = HostState(0, "runs/wide", HostContext("runs"))
    dispatch(callbacks, "on_train_start", state)
    monkeypatch.chdir(later)
    for step in range(3):
        dispatch(callbacks, "on_step_end", state, step, None, {"loss": 1.0})
        dispatch(callbacks, "on_eval", state, step, "held out", {"loss": 1.0})
    dispatch(callbacks, "on_train_end", state, LoopArtifacts())
    assert list(later.iterdir()) == []
    found = {str(each.relative_to(first)) for each in first.rglob("*") if each.suffix in {".csv", ".jsonl"}}
    assert {"all.csv", "runs/wide/m.csv", "runs/wide/logs/training/metrics.jsonl"} <= found
    assert len((first / "runs/wide/logs/training/metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()


def test_the_home_directory_in_the_output_dir_of_a_host_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train(CsvMetricsCallback("{run_dir}/m.csv"), HostState(0, "~/runs/wide"))
    assert (tmp_path / "home/runs/wide/m.csv").exists()
    assert not (tmp_path / "~").exists()


def test_files_of_a_run_at_a_url_are_refused_in_words_and_no_folder_is_made(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    train(LocalLoggerCallback(print_every=0), HostState(0, "gs://bucket/wide"))
    assert list(tmp_path.iterdir()) == []
    assert "is a URL and no path on this machine" in caplog.text


class Scalar:
    """A number of a library that is not installed here: ``item`` gives what it holds."""

    def __init__(self, value):
        self.value = value

    def item(self):
        if isinstance(self.value, list):
            raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")
        return self.value


WHOLE = [7, 7.0, np.float32(7), np.int8(7), np.array(7), np.array(7.0), Scalar(7.0), Scalar(7)]
WHOLE += [decimal.Decimal(7), fractions.Fraction(14, 2)]


@pytest.mark.parametrize("given", WHOLE, ids=lambda given: f"{type(given).__name__} {given!s:.12}")
def test_a_whole_number_of_any_kind_is_a_step(tmp_path, capsys, given):
    state = HostState(np.float64(7), tmp_path)
    table, logger = CsvMetricsCallback(tmp_path / "m.csv"), LocalLoggerCallback(print_every=0)
    printing = PrintProgressCallback(clock=lambda: 0.0)
    for callback in (table, logger, printing):
        dispatch([callback], "on_train_start", state)
        dispatch([callback], "on_step_end", state, given, None, {"loss": 0.5})
        dispatch([callback], "on_eval", state, given, "held out", {"loss": 0.5})
    with (tmp_path / "m.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "7", "loss": "0.5"}]
    assert '"step":7,' in (tmp_path / "logs/training/metrics.jsonl").read_text()
    assert '"step":7,' in (tmp_path / "logs/validation/metrics.jsonl").read_text()
    assert capsys.readouterr().out.startswith("step 8")


@pytest.mark.parametrize(
    "given", [7.5, math.nan, math.inf, "7", b"7", None, Scalar([1, 2]), np.arange(2), 7j, object()]
)
def test_what_is_no_whole_number_is_refused_in_words(given):
    with pytest.raises(TypeError, match="step_idx must be a whole number, not "):
        step_of(given)


@pytest.mark.parametrize(
    "unknown",
    [None, 0, -1, sys.maxsize, float(sys.maxsize), math.inf, -math.inf, math.nan, "many", 2.5, np.array(-1)],
    ids=str,
)
def test_a_horizon_that_nobody_knows_is_none(unknown):
    assert num_steps_of(SimpleNamespace(num_steps=unknown)) is None
    assert num_steps_of(SimpleNamespace(num_steps=300.0)) == 300


def test_a_handle_belongs_to_the_same_run_by_its_state_and_by_its_context(tmp_path):
    for root in (tmp_path, str(tmp_path), f"{tmp_path}{os.sep}"):
        ctx = HostContext(root)
        assert run_id(ctx) == run_id(HostState(0, "elsewhere", ctx)) == str(tmp_path / "wide")
        assert is_run_of(run_id(ctx), SimpleNamespace(output_dir=root))
        assert not is_run_of(run_id(ctx), SimpleNamespace(output_dir=f"{tmp_path}-2"))
    assert run_folder(LogContext(tmp_path, run_key="wide")) == tmp_path / "wide"
    assert run_folder(HostContext(Path(tmp_path))) == tmp_path / "wide"
