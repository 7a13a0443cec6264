"""The structure of an experiment file: the Structs that a YAML file or a dict is decoded to.

`document` reads files and locates errors; `evsys_bus.training` runs experiments.
"""

from typing import Annotated, Any, Literal

import msgspec

Params = dict[str, Any]
"""Parameters of a run; the recipe defines them."""


class SuccessMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metric whose mean over the seeds decides which arm is best."""

    name: str
    """``<benchmark>/<metric>`` of an evaluation after training, or the name of a training metric (its last value)."""
    mode: Literal["max", "min"] = "max"


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of a continual run; it starts from the full state that the previous stage ended with."""

    name: str
    params: Params = {}
    """These override the params of the arm."""


class ExperimentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment: arms, seeds, and how to run them.

    For one arm give only ``run``. For several give ``runs`` (by name) or ``matrix`` (every combination); their params
    override those of ``run``.
    """

    name: str
    recipe: str
    """``module:function``; it takes the parameters and the plan of a run, and returns the parts for the loop."""
    output_dir: str | None = None
    """Default: ``runs/<name>``."""
    run: Params = {}
    """Parameters that all arms share."""
    runs: dict[str, Params] = {}
    """Arm -> its parameters, which override those of ``run``."""
    matrix: dict[str, list[Any]] = {}
    """Parameter -> its values; every combination is an arm."""
    continual: list[Stage] = []
    """Stages of every arm, in order, each in a run of its own."""
    n_repeats: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Runs of each arm that differ only in their seed."""
    seeds: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """The seeds of the repeats. Default: 0, 1, 2, …"""
    max_concurrent_runs: Annotated[int, msgspec.Meta(ge=1)] = 1
    success_metric: SuccessMetric | None = None
    metadata: dict[str, Any] = {}
    """``hypothesis``, ``tags`` and anything else to store with the experiment."""
    callbacks: list[Any] = []
    """Callback specs, see `evsys_bus.config.build_callbacks`."""
    plugins: list[str] = []
    """Modules to import first, for the callbacks that they register."""
