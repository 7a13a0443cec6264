"""The demo: a real experiment on real data, in a few seconds, with nothing to download.

``digits.yaml`` is the experiment; this module is its recipe, and runs it from Python.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.context import ExperimentResult
from evsys_bus.demo.digits_run import DigitsRun, recipe, require_extra
from evsys_bus.training import Experiment
from evsys_bus.wiring import ExperimentConfig, load_experiment, read_document

DEMO_FILE: Final = Path(__file__).with_name("digits.yaml")
"""The experiment; copy it to make one of your own."""

__all__ = ["DEMO_FILE", "DigitsRun", "demo_config", "recipe", "run_demo"]


def demo_config(output_dir: Path | str | None = None, **params: Any) -> ExperimentConfig:
    """The experiment as its file says, with some parameters over those of all arms. Any: as `DigitsRun` has them.

    Raises:
        TrainingError: numpy or scikit-learn is missing.
    """
    require_extra()
    config = load_experiment(read_document(DEMO_FILE))
    if output_dir is not None:
        config = msgspec.structs.replace(config, output_dir=str(output_dir))
    return msgspec.structs.replace(config, run={**config.run, **params})


async def run_demo(
    output_dir: Path | str, callbacks: Iterable[object] | None = None, *, resume: bool = False, **params: Any
) -> ExperimentResult:
    """Train every arm with every seed. Any: as `DigitsRun` has them.

    Args:
        output_dir: Where everything goes.
        callbacks: Default: those of the file.
        resume: Continue what ``output_dir`` holds.
        **params: Over those of all arms: ``steps=50``.

    Raises:
        TrainingError: numpy or scikit-learn is missing, or ``output_dir`` cannot be used.
    """
    return await Experiment(demo_config(output_dir, **params), callbacks=callbacks, resume=resume).run()
