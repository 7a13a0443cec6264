"""The demo: a real experiment on real data that takes a few seconds and downloads nothing.

``digits.yaml`` is the experiment; this module provides its recipe and runs it from Python.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.config import ExperimentConfig, load_experiment, read_document
from evsys_bus.context import ExperimentResult
from evsys_bus.demo.digits_run import DigitsRun, recipe, require_demo_extra
from evsys_bus.training import Experiment

DEMO_FILE: Final = Path(__file__).with_name("digits.yaml")
"""The experiment file; copy it to make your own."""

__all__ = ["DEMO_FILE", "DigitsRun", "demo_config", "recipe", "run_demo"]


def demo_config(output_dir: Path | str | None = None, **params: Any) -> ExperimentConfig:
    """Load the experiment from its file; ``params`` (fields of `DigitsRun`) override those of all arms.

    Raises:
        TrainingError: numpy or scikit-learn is missing.
    """
    require_demo_extra()
    config = load_experiment(read_document(DEMO_FILE))
    if output_dir is not None:
        config = msgspec.structs.replace(config, output_dir=str(output_dir))
    return msgspec.structs.replace(config, run={**config.run, **params})


async def run_demo(
    output_dir: Path | str, callbacks: Iterable[object] | None = None, *, resume: bool = False, **params: Any
) -> ExperimentResult:
    """Train every arm with every seed.

    Args:
        output_dir: The directory for all output.
        callbacks: The callbacks to use instead of those of the file.
        resume: Continue the experiment in ``output_dir``.
        **params: Fields of `DigitsRun` that override those of all arms, such as ``steps=50``.

    Raises:
        TrainingError: numpy or scikit-learn is missing, or ``output_dir`` cannot be used.
    """
    return await Experiment(demo_config(output_dir, **params), callbacks=callbacks, resume=resume).run()
