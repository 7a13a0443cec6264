"""Reference orchestrators: readable code to copy from, built from nothing but the bus and its events.

protocols         the interfaces that a host implements: backend, step builder, evaluator
checkpoints       the checkpoints of a training, and the manifest that lists them
loop              one training
plan              the runs of an experiment, and the parts of one run
experiment_store  the progress of an experiment on disk
run_executor      one run of an experiment
summary           comparison of the arms, and the conclusion
experiment        the whole experiment
"""

from evsys_bus.deprecated import former_names
from evsys_bus.run_files import RowFile
from evsys_bus.training.checkpoints import FINAL, Checkpoints
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.loop import TrainingLoop
from evsys_bus.training.plan import RunComponents, RunPlan
from evsys_bus.training.protocols import Backend, Benchmark, Evaluator, Scorer, SnapshotBackend, StepBuilder
from evsys_bus.training.summary import ArmSummary, Spread, conclude, summarise

__all__ = [
    "FINAL",
    "ArmSummary",
    "Backend",
    "Benchmark",
    "Checkpoints",
    "Evaluator",
    "Experiment",
    "RowFile",
    "RunComponents",
    "RunPlan",
    "Scorer",
    "SnapshotBackend",
    "Spread",
    "StepBuilder",
    "TrainingLoop",
    "conclude",
    "summarise",
]

__getattr__ = former_names(__name__, {"RunParts": "RunComponents"})
