"""R9: what can be imported, by which name, and what it takes."""

import inspect
import subprocess
import sys

import msgspec
import pytest

import evsys_adapters
import evsys_bus
from evsys_bus import build_callbacks
from evsys_bus.config import CallbackSpec, callback_kinds

KINDS = {
    "print_progress": ("PrintProgressCallback", {"every": 1, "keys": None}, {}),
    "csv_metrics": ("CsvMetricsCallback", {"delimiter": ","}, {"out_path": "metrics.csv"}),
    "early_stopping": (
        "EarlyStoppingCallback",
        {"eval_name": None, "patience": 3, "mode": "max", "min_delta": 0.0},
        {"metric": "accuracy"},
    ),
    "debug_logger": ("DebugLoggerCallback", {"max_len": 400, "max_pred_rows": 3}, {}),
    "evsys_logger": ("EvsysLoggerCallback", {"project_id": None, "flush_every": 1}, {}),
    "local_logger": ("LocalLoggerCallback", {"print_every": 1, "keys": None}, {}),
    "tensorboard_logger": ("TensorBoardLoggerCallback", {"log_dir": None, "flush_secs": 30}, {}),
    "wandb_logger": (
        "WandbLoggerCallback",
        {"project": None, "entity": None, "name": None, "mode": "online", "log_every": 1, "max_pred_rows": 100},
        {},
    ),
}


def test_R9_the_bus_has_these_names():
    names = """Callback CallbackSpec LogContext LoopState build_callbacks dispatch register_callback EventBus Envelope
    TrainingLoop Experiment ExperimentStart GroupStart RunStart TrainStart StepEnd Checkpoint Eval BenchmarkEval
    TrainEnd RunEnd ExperimentEnd TrainingBatch ManifestRow LoopArtifacts EvalResult RunResult ArmResult
    ExperimentResult"""
    for name in names.split():
        assert name in evsys_bus.__all__
        assert getattr(evsys_bus, name).__name__ == name


@pytest.mark.parametrize("kind", KINDS)
def test_R9_a_kind_has_its_class_its_params_and_their_defaults(kind):
    name, defaults, required = KINDS[kind]
    cls = getattr(evsys_adapters, name)
    assert cls.name == kind
    fields = {field.name: field for field in msgspec.structs.fields(cls.Config)}
    assert {key: fields[key].default for key in defaults} == defaults
    assert all(fields[key].required for key in required)
    parameters = inspect.signature(cls).parameters
    assert {key: parameters[key].default for key in defaults} == defaults
    [built] = build_callbacks([CallbackSpec(kind, required, placement="inline")])
    assert type(built) is cls
    assert built.spec_name == kind
    assert kind in callback_kinds()


def test_R9_every_built_in_of_the_reference_is_among_the_kinds():
    reference = """PrintProgressCallback CsvMetricsCallback EarlyStoppingCallback DebugLoggerCallback
    LocalLoggerCallback TensorBoardLoggerCallback WandbLoggerCallback EvsysLoggerCallback"""
    assert set(reference.split()) == {name for name, _, _ in KINDS.values()}
    assert set(reference.split()) <= set(evsys_adapters.__all__)


def test_R9_results_construct_with_a_name_alone():
    for cls in (evsys_bus.ManifestRow, evsys_bus.EvalResult, evsys_bus.ArmResult, evsys_bus.ExperimentResult):
        assert cls("x").name == "x"
    for cls in (evsys_bus.RunResult, evsys_bus.LoopArtifacts, evsys_bus.TrainingBatch):
        cls()


def test_R9_a_spec_has_these_fields_in_this_order():
    spec = CallbackSpec("print_progress")
    assert (spec.kind, spec.params, spec.name, spec.placement) == ("print_progress", {}, None, None)
    assert CallbackSpec.__struct_fields__[:4] == ("kind", "params", "name", "placement")


def test_R9_importing_the_adapters_imports_none_of_them_and_no_vendor():
    program = "import sys, evsys_adapters; print([m for m in sys.modules if m.startswith('evsys_') or 'numpy' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['evsys_adapters']"


@pytest.mark.parametrize("module", [evsys_bus, evsys_adapters])
def test_an_unknown_name_is_an_ordinary_attribute_error(module):
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018 # it raises
    assert set(module.__all__) <= set(dir(module)) or module is evsys_adapters
