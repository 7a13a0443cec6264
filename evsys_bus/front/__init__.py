"""The front door: a run as one object that logs metrics, evals, checkpoints and content to a bus."""

from evsys_bus.bus.lifecycle import exit_code
from evsys_bus.front.current import current_run
from evsys_bus.front.open import run
from evsys_bus.front.run import Run

__all__ = ["Run", "current_run", "exit_code", "run"]
