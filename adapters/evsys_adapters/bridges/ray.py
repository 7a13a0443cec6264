"""`EvsysBusLogger` and `EvsysBusUserCallback`: Ray Tune and Ray Train on the bus.

    Tuner(trainable, run_config=tune.RunConfig(name="sweep", callbacks=[EvsysBusLogger("runs/sweep")]))
    DataParallelTrainer(train, run_config=train.RunConfig(name="sft", callbacks=[EvsysBusUserCallback("runs/sft")]))

Each trial of Tune is a run in the directory, named after the trial. Train calls its callback in the controller, which
is a process of its own: give an absolute path, on a file system that it shares with you.
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

import asyncio
import os
from pathlib import Path
from typing import Any, Final

from ray.train import UserCallback
from ray.tune.logger import LoggerCallback

from evsys_adapters.bridges._base import RUN_DIR_VARIABLE, isolated
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.common.hook_arguments import safe_name
from evsys_bus.errors import TrainingError

_FACTS_OF_THE_TRIAL: Final = frozenset(
    {"config", "checkpoint_dir_name", "date", "done", "experiment_id", "experiment_tag", "hostname", "node_ip", "pid"}
) | {"should_checkpoint", "timestamp", "trial_id"}
"""What Tune adds to every result that is no metric."""
_STEP_KEYS: Final = ("training_iteration", "global_step", "step")


class EvsysBusLogger(LoggerCallback):
    """Writes each trial's results, checkpoints, config and end to a run; a step is a ``training_iteration``.

    Args:
        path: The directory of the runs. Default: ``EVSYS_BUS_RUN_DIR``, else ``runs/<experiment>``.
        options: Passed to `evsys_bus.run` for each trial, with new ``callbacks`` of the same arguments.
    """

    def __init__(self, path: Any = None, **options: Any) -> None:
        self.bridge = StepBridge(path, **options)
        """Counts the failures of all trials."""
        self._path = path or os.environ.get(RUN_DIR_VARIABLE)
        self._trials: dict[str, StepBridge] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open runs: they go on from what is on record."""
        return vars(self) | {"_trials": {}}

    @isolated
    def log_trial_start(self, trial: Any) -> None:
        self._bridge_of(trial).open()

    @isolated
    def log_trial_result(self, iteration: int, trial: Any, result: Any) -> None:
        metrics = {key: value for key, value in result.items() if key not in _FACTS_OF_THE_TRIAL}
        self._bridge_of(trial).log(metrics, result["training_iteration"], commit=True)

    @isolated
    def log_trial_save(self, trial: Any) -> None:
        if trial.checkpoint is not None:
            step = (trial.last_result or {}).get("training_iteration", 0)
            self._bridge_of(trial).checkpoint(trial.checkpoint.path, step)

    @isolated
    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        bridge = self._bridge_of(trial)
        del self._trials[trial.trial_id]
        if failed:
            error = trial.get_pickled_error()
            bridge.finish(error or TrainingError(f"the trial {trial} failed", fix=f"see {trial.error_file}"))
        else:
            bridge.complete()

    def _bridge_of(self, trial: Any) -> StepBridge:
        bridge = self._trials.get(trial.trial_id)
        if bridge is None:
            folder = Path(self._path or Path("runs", safe_name(trial.experiment_dir_name)))
            bridge = self._trials[trial.trial_id] = self.bridge.copy_for(folder / safe_name(str(trial)))
            bridge.update_config({key: value for key, value in trial.config.items() if key != "callbacks"})
        return bridge


class EvsysBusUserCallback(UserCallback):
    """Writes what the worker of rank 0 reports to a run.

    The step of a row is ``training_iteration``, ``global_step`` or ``step`` of its metrics, else the number of reports:
    report the step, so that a training which resumes from a checkpoint replaces the rows behind it.

    Args:
        path: The run's directory. Default: ``EVSYS_BUS_RUN_DIR``, else the training's directory.
        step_key: The metric that is the step.
        options: Passed to `evsys_bus.run`.
    """

    def __init__(self, path: Any = None, *, step_key: str | None = None, **options: Any) -> None:
        self.bridge = StepBridge(path, **options)
        self._step_keys = _STEP_KEYS if step_key is None else (step_key,)
        self._reports = 0
        self._error: Exception | None = None

    @isolated
    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        if self.bridge.run is None:
            run_config = run_context.run_config
            self.bridge.default_path = Path(run_config.storage_path, run_config.name, "run")
            self.bridge.open(config=run_context.train_loop_config)
            self._reports = self.bridge.recorded_steps
            self._end_with_controller()
        self._error = None
        reported = dict(metrics[0])
        step_key = next((key for key in self._step_keys if key in reported), None)
        step = self._reports if step_key is None else int(reported.pop(step_key))
        self._reports = step + 1
        self.bridge.log(reported, step, commit=True)
        if checkpoint is not None:
            self.bridge.checkpoint(checkpoint.path, step)

    @isolated
    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
        """Record an alert: Ray decides whether the training is tried again."""
        for rank, error in [*worker_exceptions.items()][:1]:
            self._error = error
            self.bridge.open().alert(f"the worker of rank {rank} failed", str(error), "error")

    def _end_with_controller(self) -> None:
        # Ray has no hook for the end, and its processes end without exit handlers. Hooks run in the controller's task.
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop: the run ends with the program
            return
        if task is not None:
            task.add_done_callback(self._end)

    @isolated
    def _end(self, task: Any) -> None:
        if self._error is not None:
            self.bridge.finish(self._error)
        else:
            self.bridge.complete()
