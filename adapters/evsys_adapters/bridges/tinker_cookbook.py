"""`EvsysBusLogger`: tinker-cookbook's ``ml_log.Logger`` on the bus.

ml_logger = ml_log.setup_logging(log_dir, config=config)
ml_logger.loggers.append(EvsysBusLogger("runs/first", config=config))
"""

import sys
from collections.abc import Mapping
from typing import Any

from evsys_adapters.bridges._base import isolated
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.common.hook_arguments import fields


class EvsysBusLogger:
    """Writes what a recipe logs to a run. Metrics of a step may come in several calls; ``test/`` makes an eval.

    Args:
        path: The run's directory. Default: ``EVSYS_BUS_RUN_DIR``, else ``runs/training``.
        options: Passed to `evsys_bus.run`.
    """

    def __init__(self, path: Any = None, **options: Any) -> None:
        if "config" in options:
            options["config"] = _settings(options["config"])
        self.bridge = StepBridge(path, **options)

    @isolated
    def log_hparams(self, config: Any) -> None:
        self.bridge.update_config(_settings(config))

    @isolated
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.bridge.log(metrics, step)

    @isolated
    def log_long_text(self, key: str, text: str) -> None:
        self.bridge.open().text(key, text)

    def sync(self) -> None:
        """Do nothing: every call is on record when it returns."""

    def get_logger_url(self) -> str | None:
        """Return the run's directory as an address."""
        return self.bridge.path.as_uri()

    @isolated
    def close(self) -> None:
        self.bridge.complete()


def _settings(config: Any) -> dict[str, Any]:
    """Return a config as a dict, by the cookbook's own conversion if the program has it: its classes are special."""
    ml_log: Any = sys.modules.get("tinker_cookbook.utils.ml_log")
    return fields(config if ml_log is None else ml_log.dump_config(config))
