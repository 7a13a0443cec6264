"""`EvsysBusLogger`: torchtune's ``MetricLoggerInterface`` on the bus.

In a recipe: ``metric_logger: {_component_: evsys_adapters.bridges.torchtune.EvsysBusLogger, path: runs/first}``
"""

import sys
from collections.abc import Mapping
from typing import Any

from evsys_adapters.bridges._base import isolated
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.common.hook_arguments import fields


class EvsysBusLogger:
    """Writes what a recipe logs to a run; a step is the recipe's ``global_step``.

    Args:
        path: The run's directory. Default: ``log_dir``, then ``EVSYS_BUS_RUN_DIR``, then ``runs/training``.
        log_dir: The name that other loggers of torchtune have for it.
        options: Passed to `evsys_bus.run`.
    """

    def __init__(self, path: Any = None, *, log_dir: Any = None, **options: Any) -> None:
        self.bridge = StepBridge(path or log_dir, **options)

    @isolated
    def log(self, name: str, data: Any, step: int) -> None:
        self.bridge.log({name: data}, step)

    @isolated
    def log_config(self, config: Any) -> None:
        omegaconf: Any = sys.modules.get("omegaconf")
        if omegaconf is not None and omegaconf.OmegaConf.is_config(config):
            config = omegaconf.OmegaConf.to_container(config, resolve=True)
        self.bridge.update_config(fields(config))

    @isolated
    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        self.bridge.log(payload, step)

    @isolated
    def close(self) -> None:
        self.bridge.complete()
