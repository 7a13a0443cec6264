"""The names of EvSys' module ``callbacks``, so that a program moves to this bus by one line of imports.

    from evsys_adapters.callbacks import Callback, CsvMetricsCallback, build_callbacks, dispatch

Callbacks that were written for EvSys' loop run on a bus as they are, and those here run in that loop.
"""

import logging
from typing import Final

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.debug_logger import DebugLoggerCallback
from evsys_adapters.early_stopping import EarlyStoppingCallback
from evsys_adapters.evsys_logger import EvsysLoggerCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_adapters.print_progress import PrintProgressCallback
from evsys_adapters.tensorboard_logger import TensorBoardLoggerCallback
from evsys_adapters.wandb_logger import WandbLoggerCallback
from evsys_bus.callback import Callback, dispatch
from evsys_bus.config import build_callbacks, register_callback
from evsys_bus.context import LogContext, LoopState

logger: Final = logging.getLogger(__name__)
"""Of the standard library, for callbacks that log by it."""

__all__ = [
    "Callback",
    "CsvMetricsCallback",
    "DebugLoggerCallback",
    "EarlyStoppingCallback",
    "EvsysLoggerCallback",
    "LocalLoggerCallback",
    "LogContext",
    "LoopState",
    "PrintProgressCallback",
    "TensorBoardLoggerCallback",
    "WandbLoggerCallback",
    "build_callbacks",
    "dispatch",
    "register_callback",
]
