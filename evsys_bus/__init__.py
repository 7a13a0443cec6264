"""evsys-bus: an event bus for training loops, whose callbacks and loggers never stall, kill or lose a run.

Public names are imported on first access, so that ``evsys-bus --help`` starts quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from evsys_bus.attached import Learnt
    from evsys_bus.bus import EventBus, Health, Receipt
    from evsys_bus.callback import Callback, dispatch
    from evsys_bus.context import (
        ArmResult,
        EvalResult,
        ExperimentResult,
        LogContext,
        LoopArtifacts,
        LoopState,
        ManifestRow,
        RunResult,
        TrainingBatch,
    )
    from evsys_bus.errors import EvsysBusError
    from evsys_bus.events import (
        BenchmarkEval,
        Checkpoint,
        Envelope,
        Eval,
        Event,
        ExperimentEnd,
        ExperimentStart,
        GroupStart,
        RunEnd,
        RunStart,
        StepEnd,
        TrainEnd,
        TrainStart,
    )
    from evsys_bus.sink import Sink
    from evsys_bus.training import Experiment, TrainingLoop
    from evsys_bus.wiring import CallbackSpec, build_callbacks, follow, register_callback, register_sink

__version__: Final = "0.1.0"

importlib.import_module("datetime")
"""Before msgspec, whose C code imports it unchecked: a Ctrl-C in there would be lost, and crash the process later."""

_HOMES: Final = {
    "attached": ("Learnt",),
    "bus": ("EventBus", "Health", "Receipt"),
    "callback": ("Callback", "dispatch"),
    "context": (
        "ArmResult",
        "EvalResult",
        "ExperimentResult",
        "LogContext",
        "LoopArtifacts",
        "LoopState",
        "ManifestRow",
        "RunResult",
        "TrainingBatch",
    ),
    "errors": ("EvsysBusError",),
    "events": (
        "BenchmarkEval",
        "Checkpoint",
        "Envelope",
        "Eval",
        "Event",
        "ExperimentEnd",
        "ExperimentStart",
        "GroupStart",
        "RunEnd",
        "RunStart",
        "StepEnd",
        "TrainEnd",
        "TrainStart",
    ),
    "sink": ("Sink",),
    "training": ("Experiment", "TrainingLoop"),
    "wiring": ("CallbackSpec", "build_callbacks", "follow", "register_callback", "register_sink"),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # spelt out: type checkers do not follow the table
    "ArmResult",
    "BenchmarkEval",
    "Callback",
    "CallbackSpec",
    "Checkpoint",
    "Envelope",
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
    "Learnt",
    "LogContext",
    "LoopArtifacts",
    "LoopState",
    "ManifestRow",
    "Receipt",
    "RunEnd",
    "RunResult",
    "RunStart",
    "Sink",
    "StepEnd",
    "TrainEnd",
    "TrainStart",
    "TrainingBatch",
    "TrainingLoop",
    "build_callbacks",
    "dispatch",
    "follow",
    "register_callback",
    "register_sink",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
