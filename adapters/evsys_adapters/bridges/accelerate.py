"""`EvsysBusTracker`: Hugging Face's Accelerator on the bus.

register()
accelerator = Accelerator(log_with="evsys_bus", project_dir="runs")
accelerator.init_trackers("first", config, init_kwargs={"evsys_bus": {"callbacks": [...]}})
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, register_tracker_class

from evsys_adapters.bridges._base import RunBridge, isolated


class EvsysBusTracker(GeneralTracker):
    """Writes what an Accelerator logs to a run, in ``<logging_dir>/<run_name>``.

    ``accelerator.get_tracker("evsys_bus", unwrap=True)`` returns the run, for tables, images and artifacts.
    """

    name = "evsys_bus"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Any = None, **options: Any) -> None:
        super().__init__()
        self.bridge = RunBridge(Path(logging_dir or "", run_name), **options)

    @property
    def tracker(self) -> Any:
        return self.bridge.run

    @isolated
    def start(self) -> None:
        self.bridge.start(is_rank_zero=PartialState().is_main_process)

    @isolated
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.bridge.update_config(values)

    @isolated
    def log(self, values: dict[str, Any], step: int | None = None, *, commit: bool = False, **kwargs: Any) -> None:
        self.bridge.log(values, step, commit=commit)

    @isolated
    def checkpoint(self, path: Any, step: int) -> None:
        """Record a checkpoint that ``accelerator.save_state`` wrote after this step."""
        self.bridge.checkpoint(path, step)

    @isolated
    def finish(self) -> None:
        self.bridge.end()
        self.bridge.finish()


def register() -> None:
    """Make ``log_with="evsys_bus"`` known to Accelerate; call it before the Accelerator is made."""
    register_tracker_class(EvsysBusTracker)
