"""Reference orchestrators: readable code to copy from, built from nothing but the bus and its events.

protocols     the interfaces that a host implements: backend, step builder, evaluator
rows          append-only JSON files, such as metrics.jsonl
checkpoints   checkpoints.jsonl, and the checkpoint to resume from
walls         which errors of a run or an evaluator propagate
folder_lock   a lock on a run's or an experiment's directory
loop          one training
plan          the runs of an experiment, and the parts of one run
ledger        the progress of an experiment on disk
arm_run       one run of an experiment
outcome       comparison of the arms, and the conclusion
experiment    the whole experiment
"""

from evsys_bus.training.checkpoints import FINAL, Checkpoints
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.loop import TrainingLoop
from evsys_bus.training.outcome import ArmSummary, Spread, conclude, summarise
from evsys_bus.training.plan import RunParts, RunPlan
from evsys_bus.training.protocols import Backend, Benchmark, Evaluator, Scorer, SnapshotBackend, StepBuilder
from evsys_bus.training.rows import RowFile

__all__ = [
    "FINAL",
    "ArmSummary",
    "Backend",
    "Benchmark",
    "Checkpoints",
    "Evaluator",
    "Experiment",
    "RowFile",
    "RunParts",
    "RunPlan",
    "Scorer",
    "SnapshotBackend",
    "Spread",
    "StepBuilder",
    "TrainingLoop",
    "conclude",
    "summarise",
]
