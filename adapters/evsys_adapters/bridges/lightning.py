"""`EvsysBusLogger` and `EvsysBusCallback`: Lightning's Trainer on the bus; the logger serves Fabric too.

    logger = EvsysBusLogger("runs/first", callbacks=[WandbLoggerCallback("project")])
    trainer = Trainer(logger=logger, callbacks=[EvsysBusCallback()])

The callback adds what loggers are not called for: the first step of a resumed training, the number of steps, a stop
that is requested, the exception that ends a training.
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from evsys_adapters.bridges._base import RUN_DIR_VARIABLE, RunBridge, isolated


class EvsysBusLogger(Logger):
    """Writes what Lightning logs to a run, and lists the checkpoints; steps are Lightning's own, from 0."""

    def __init__(self, path: Any = None, **options: Any) -> None:
        super().__init__()
        self.bridge = RunBridge(path, **options)
        self._saved_steps: int | None = None

    @property
    def name(self) -> str:
        return self.bridge.path.name

    @property
    def version(self) -> str:
        """Empty: checkpoints are in the run's directory, where a resumed training finds them."""
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.bridge.path.parent)

    @property
    def experiment(self) -> Any:
        """The run, for tables, images and artifacts; None before the first row."""
        return self.bridge.run

    @isolated
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.bridge.update_config(vars(params) if isinstance(params, Namespace) else params)

    @isolated
    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.bridge.log(metrics, step)

    @isolated
    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path, steps = checkpoint_callback._last_checkpoint_saved, checkpoint_callback._last_global_step_saved  # noqa: SLF001 # no public names
        if steps != self._saved_steps:  # else it is another file of the same state, such as `last.ckpt`
            self._saved_steps = steps
            name = Path(path).stem
            self.bridge.checkpoint(path, max(steps - 1, 0), name=f"{name}-{steps}" if name == "last" else None)

    @isolated
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status != "finished":  # a checkpoint before Slurm requeues the job
            self.bridge.end(sys.exception() if status == "failed" else None)


class EvsysBusCallback(Callback):
    """Starts and ends the run with the training, and stops the training when a callback of the run requests it.

    It uses the trainer's `EvsysBusLogger`; if the trainer has none, it adds one with these arguments.
    """

    def __init__(self, path: Any = None, **options: Any) -> None:
        self.bridge = RunBridge(path, **options)
        self._is_active = False  # not in a trial run (`fast_dev_run`), and once where the environment adds another one

    @isolated
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        first = next(each for each in trainer.callbacks if isinstance(each, EvsysBusCallback))
        self._is_active = first is self and not trainer.fast_dev_run
        logger = next((each for each in trainer.loggers if isinstance(each, EvsysBusLogger)), None)
        if logger is not None:
            self.bridge = logger.bridge
        elif self._is_active:
            logger = EvsysBusLogger()
            logger.bridge = self.bridge
            trainer.loggers = [*trainer.loggers, logger]

    @isolated
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._is_active:
            return
        num_steps = trainer.estimated_stepping_batches
        self.bridge.start(
            trainer.global_step,
            num_steps=int(num_steps) if num_steps < math.inf else None,
            is_rank_zero=trainer.is_global_zero,
        )

    @isolated
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.bridge.stop_requested:
            trainer.should_stop = True

    @isolated
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.bridge.end(exception)


def callbacks_factory() -> list[Callback]:
    """Return the callback for the trainers of a program that was started with ``EVSYS_BUS_RUN_DIR`` set."""
    return [EvsysBusCallback()] if os.environ.get(RUN_DIR_VARIABLE) else []
