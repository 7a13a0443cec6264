"""evsys-bus: an event bus for training loops, whose callbacks and loggers never stall, kill or lose a run.

Public names are imported on first access, so that ``evsys-bus --help`` starts quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

from evsys_bus.deprecated import former_names

if TYPE_CHECKING:
    from evsys_bus.adapter import Rewindable, RunAnnotated, RunResumer
    from evsys_bus.bus import EventBus, Health, Receipt
    from evsys_bus.callback import Callback, dispatch
    from evsys_bus.config import CallbackSpec, build_callbacks, follow, register_callback, register_sink
    from evsys_bus.context import (
        ArmResult,
        ContentItem,
        EvalResult,
        ExperimentResult,
        LogContext,
        LoopArtifacts,
        LoopState,
        ManifestRow,
        RunResult,
        TrainingBatch,
    )
    from evsys_bus.errors import (
        BatchTooLargeError,
        DeliveryError,
        EvsysBusError,
        ParkedError,
        RejectedError,
        RetryLaterError,
        RunNotFoundError,
    )
    from evsys_bus.events import (
        Alert,
        BenchmarkEval,
        Checkpoint,
        ConfigUpdate,
        Content,
        Envelope,
        Environment,
        EpochEnd,
        Eval,
        Event,
        ExperimentEnd,
        ExperimentStart,
        GroupStart,
        Metrics,
        Rollout,
        RunEnd,
        RunStart,
        StepEnd,
        Summary,
        TrainData,
        TrainEnd,
        TrainStart,
    )
    from evsys_bus.front import Run, current_run, run
    from evsys_bus.reading import RecordedRun, read, read_runs
    from evsys_bus.sink import BatchResult, RawRecord, Sink
    from evsys_bus.training import Experiment, TrainingLoop

__version__: Final = "0.1.0"

importlib.import_module("datetime")
"""Before msgspec, whose C code imports it unchecked: a Ctrl-C in there would be lost, and crash the process later."""

_NAMES_BY_MODULE: Final = {
    "adapter": ("Rewindable", "RunAnnotated", "RunResumer"),
    "bus": ("EventBus", "Health", "Receipt"),
    "callback": ("Callback", "dispatch"),
    "context": (
        "ArmResult",
        "ContentItem",
        "EvalResult",
        "ExperimentResult",
        "LogContext",
        "LoopArtifacts",
        "LoopState",
        "ManifestRow",
        "RunResult",
        "TrainingBatch",
    ),
    "errors": (
        "BatchTooLargeError",
        "DeliveryError",
        "EvsysBusError",
        "ParkedError",
        "RejectedError",
        "RetryLaterError",
        "RunNotFoundError",
    ),
    "events": (
        "Alert",
        "BenchmarkEval",
        "Checkpoint",
        "ConfigUpdate",
        "Content",
        "Envelope",
        "Environment",
        "EpochEnd",
        "Eval",
        "Event",
        "ExperimentEnd",
        "ExperimentStart",
        "GroupStart",
        "Metrics",
        "Rollout",
        "RunEnd",
        "RunStart",
        "StepEnd",
        "Summary",
        "TrainData",
        "TrainEnd",
        "TrainStart",
    ),
    "reading": ("RecordedRun", "read", "read_runs"),
    "sink": ("BatchResult", "RawRecord", "Sink"),
    "training": ("Experiment", "TrainingLoop"),
    "front": ("Run", "current_run", "run"),
    "config": ("CallbackSpec", "build_callbacks", "follow", "register_callback", "register_sink"),
}
_MODULE_BY_NAME: Final = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [  # spelt out: type checkers do not follow the table
    "Alert",
    "ArmResult",
    "BatchResult",
    "BatchTooLargeError",
    "BenchmarkEval",
    "Callback",
    "CallbackSpec",
    "Checkpoint",
    "ConfigUpdate",
    "Content",
    "ContentItem",
    "DeliveryError",
    "Envelope",
    "Environment",
    "EpochEnd",
    "Eval",
    "EvalResult",
    "Event",
    "EventBus",
    "EvsysBusError",
    "Experiment",
    "ExperimentEnd",
    "ExperimentResult",
    "ExperimentStart",
    "GroupStart",
    "Health",
    "LogContext",
    "LoopArtifacts",
    "LoopState",
    "ManifestRow",
    "Metrics",
    "ParkedError",
    "RawRecord",
    "Receipt",
    "RecordedRun",
    "RejectedError",
    "RetryLaterError",
    "Rewindable",
    "Rollout",
    "Run",
    "RunAnnotated",
    "RunEnd",
    "RunNotFoundError",
    "RunResult",
    "RunResumer",
    "RunStart",
    "Sink",
    "StepEnd",
    "Summary",
    "TrainData",
    "TrainEnd",
    "TrainStart",
    "TrainingBatch",
    "TrainingLoop",
    "build_callbacks",
    "current_run",
    "dispatch",
    "follow",
    "read",
    "read_runs",
    "register_callback",
    "register_sink",
    "run",
]


_get_former: Final = former_names(__name__, {"Learnt": "RunAnnotated"})


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    module_name = _MODULE_BY_NAME.get(name)
    if module_name is None:
        return _get_former(name)
    value = getattr(importlib.import_module(f"{__name__}.{module_name}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
