"""`EvsysBusCallback`: Hugging Face's Trainer on the bus, and what is built on it: trl, sentence-transformers, axolotl.

trainer = Trainer(..., callbacks=[EvsysBusCallback("runs/first", callbacks=[WandbLoggerCallback("project")])])
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from evsys_adapters.bridges._base import RunBridge, isolated


class EvsysBusCallback(TrainerCallback):
    """Writes a Trainer's logs, evals and checkpoints to a run, in ``args.output_dir`` if no path is given.

    Steps are the Trainer's ``global_step``. The summary of a training (``train_runtime``) becomes the run's summary.
    """

    def __init__(self, path: Any = None, **options: Any) -> None:
        self.bridge = RunBridge(path, **options)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bridge.default_path = args.output_dir

    @isolated
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.bridge.default_path = Path(args.output_dir, state.trial_name or "")
        config = args.to_sanitized_dict()
        if getattr(model, "config", None) is not None:
            config["model"] = model.config.to_dict()
        self.bridge.start(
            state.global_step + 1 if state.global_step else 0,
            config=config,
            num_steps=state.max_steps,
            is_rank_zero=state.is_world_process_zero,
        )

    @isolated
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs and self.bridge.run is not None:
            self.bridge.run.summary.update(logs)
        else:
            self.bridge.log(logs, state.global_step, commit=True)

    @isolated
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bridge.stop_requested:
            control.should_training_stop = True

    @isolated
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bridge.checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

    @isolated
    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.bridge.log(metrics, state.global_step)

    @isolated
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bridge.end()


def register() -> None:
    """Make ``report_to="evsys_bus"`` known to the Trainer, for programs that cannot be given callbacks."""
    integration_utils.INTEGRATION_TO_CALLBACK["evsys_bus"] = EvsysBusCallback
