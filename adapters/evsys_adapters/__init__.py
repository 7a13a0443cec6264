"""The callbacks that ship with evsys-bus; each lives in its own module, which is imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from evsys_adapters.checkpoint_prune import CheckpointPrune
    from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
    from evsys_adapters.csv_metrics import CsvMetricsCallback
    from evsys_adapters.debug_logger import DebugLoggerCallback
    from evsys_adapters.early_stopping import EarlyStoppingCallback
    from evsys_adapters.evsys_logger import EvsysLoggerCallback
    from evsys_adapters.local_logger import LocalLoggerCallback
    from evsys_adapters.mlflow_logger import MlflowLoggerCallback
    from evsys_adapters.nats_relay import NatsRelay
    from evsys_adapters.print_progress import PrintProgressCallback
    from evsys_adapters.system_metrics import SystemMetricsCallback
    from evsys_adapters.tensorboard_logger import TensorBoardLoggerCallback
    from evsys_adapters.wandb_logger import WandbLoggerCallback
    from evsys_adapters.webhook import WebhookCallback

importlib.import_module("datetime")
"""Before msgspec, as in `evsys_bus`: a Ctrl-C in there would be lost, and crash the process later."""

_MODULE_OF: Final = {
    "CheckpointPrune": "checkpoint_prune",
    "CheckpointUploadCallback": "checkpoint_upload",
    "CsvMetricsCallback": "csv_metrics",
    "DebugLoggerCallback": "debug_logger",
    "EarlyStoppingCallback": "early_stopping",
    "EvsysLoggerCallback": "evsys_logger",
    "LocalLoggerCallback": "local_logger",
    "MlflowLoggerCallback": "mlflow_logger",
    "NatsRelay": "nats_relay",
    "PrintProgressCallback": "print_progress",
    "SystemMetricsCallback": "system_metrics",
    "TensorBoardLoggerCallback": "tensorboard_logger",
    "WandbLoggerCallback": "wandb_logger",
    "WebhookCallback": "webhook",
}

__all__ = [
    "CheckpointPrune",
    "CheckpointUploadCallback",
    "CsvMetricsCallback",
    "DebugLoggerCallback",
    "EarlyStoppingCallback",
    "EvsysLoggerCallback",
    "LocalLoggerCallback",
    "MlflowLoggerCallback",
    "NatsRelay",
    "PrintProgressCallback",
    "SystemMetricsCallback",
    "TensorBoardLoggerCallback",
    "WandbLoggerCallback",
    "WebhookCallback",
]


def __getattr__(name: str) -> Any:
    """Import a callback's module on first access."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
