"""`EvsysBusCallback` and `EvsysBusWriter`: Stable-Baselines3 on the bus; a step is a step of an environment.

    model.learn(100_000, callback=EvsysBusCallback("runs/first"))

The callback adds a writer to the model's logger. A logger of your own takes one too:
``logger.output_formats.append(EvsysBusWriter("runs/first"))``.
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam, Image, KVWriter, Video

from evsys_adapters.bridges._base import RunBridge, isolated


class EvsysBusWriter(KVWriter):
    """Writes what a logger dumps to a run; videos, which are arrays without a format, are left out."""

    def __init__(self, path: Any = None, *, bridge: RunBridge | None = None, **options: Any) -> None:
        self.bridge = bridge or RunBridge(path, **options)

    @isolated
    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        values = {key: value for key, value in key_values.items() if "evsys_bus" not in (key_excluded.get(key) or ())}
        objects = {
            key: values.pop(key) for key in [*values] if isinstance(values[key], Figure | HParam | Image | Video)
        }
        self.bridge.log(values, step, commit=True)
        for key, value in objects.items():
            if isinstance(value, HParam):
                self.bridge.update_config(value.hparam_dict)
            elif isinstance(value, Figure | Image) and self.bridge.run is not None:
                content = value.figure if isinstance(value, Figure) else value.image
                getattr(self.bridge.run, type(value).__name__.lower())(key, content, step=step)

    @isolated
    def close(self) -> None:
        self.bridge.finish()


class EvsysBusCallback(BaseCallback):
    """Starts and ends the run with ``learn``, and stops it when the run's callbacks request it."""

    def __init__(self, path: Any = None, *, verbose: int = 0, **options: Any) -> None:
        super().__init__(verbose)
        self.bridge = RunBridge(path, **options)

    @isolated
    def _on_training_start(self) -> None:
        done = self.model.num_timesteps
        config = {key: value for key, value in vars(self.model).items() if isinstance(value, int | float | str)}
        self.bridge.start(
            done + 1 if done else 0,
            config=config,
            num_steps=self.locals.get("total_timesteps"),
            unit="env_steps",
        )
        formats = self.logger.output_formats
        if not any(isinstance(each, EvsysBusWriter) and each.bridge is self.bridge for each in formats):
            formats.append(EvsysBusWriter(bridge=self.bridge))

    def _on_step(self) -> bool:
        return not self.bridge.stop_requested

    @isolated
    def _on_training_end(self) -> None:
        self.bridge.end()
