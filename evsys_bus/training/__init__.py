"""Reference orchestrators: readable code to copy from, built from nothing but the bus and its events.

protocols     what a host plugs in: backend, step builder, evaluator
rows          metrics.jsonl and its like
checkpoints   checkpoints.jsonl, and what to resume from
walls         what a failing part may take with it, and what not
folder_lock   one training at a time in a folder
loop          one training
plan          the runs of an experiment, and what a recipe makes of one
ledger        how far an experiment has got, on disk
arm_run       one run of an experiment
outcome       arms side by side, and the conclusion
experiment    all of it
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
