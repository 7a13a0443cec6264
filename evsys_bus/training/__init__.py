"""Reference orchestrators: readable code to copy from, built from nothing but the bus and its events."""

from evsys_bus.training.checkpoints import FINAL, Checkpoints
from evsys_bus.training.loop import TrainingLoop
from evsys_bus.training.protocols import Backend, Benchmark, Evaluator, StepBuilder
from evsys_bus.training.rows import RowFile

__all__ = ["FINAL", "Backend", "Benchmark", "Checkpoints", "Evaluator", "RowFile", "StepBuilder", "TrainingLoop"]
